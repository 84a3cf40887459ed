"""`effzoo config`: every setting of a run with its type, default and documentation."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import unknown_choice
from . import _index

HELP = "list the settings of a run, with types and defaults"
WIDTH = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", help="section or setting to explain, e.g. optim or optim.lr")
    parser.add_argument("--json-schema", action="store_true", help="print the JSON schema, for completion in editors")


def run(args: argparse.Namespace) -> None:
    known = _index.settings()
    if args.json_schema:
        print(schema_text(), end="")
    elif args.section is None:
        print("\n".join(_overview(known["sections"])))
    else:
        found = [row for row in known["settings"] if f"{row['key']}.".startswith(f"{args.section}.")]
        if not found:
            keys = [row["key"] for row in known["settings"]]
            raise unknown_choice("section", args.section, [*known["sections"], *keys])
        print("\n".join([*_title(known["sections"], args.section), *_lines(found)]))


def schema_text() -> str:
    """Content of configs/run.schema.json."""
    from ..config import json_schema
    from ..training.config import RunConfig

    return json.dumps(json_schema(RunConfig), indent=2) + "\n"


def run_settings() -> dict[str, Any]:
    """Content of assets/settings.json: sections with their documentation, and settings."""
    from ..config import sections, settings
    from ..training.config import RunConfig

    rows = [
        {"key": row.key, "kind": row.kind, "type": row.type, "default": row.default_text, "doc": row.doc}
        for row in settings(RunConfig)
    ]
    return {"sections": sections(RunConfig), "settings": rows}


def settings_help() -> str:
    """All sections with their settings, for the help of the training command; at most 80 columns."""
    known = _index.settings()
    parts = [
        [
            *_title(known["sections"], name),
            *_lines([row for row in known["settings"] if row["key"].startswith(f"{name}.")]),
        ]
        for name in known["sections"]
    ]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _overview(sections: Mapping[str, str]) -> Iterator[str]:
    width = max(map(len, sections)) + 2
    for name, doc in sections.items():
        yield textwrap.fill(doc, WIDTH, initial_indent=name.ljust(width), subsequent_indent=" " * width)
    yield ""
    yield "`effzoo config SECTION` explains the settings of a section."
    yield "In a run's YAML they are `section: {key: value}`, on the command line"
    yield "`--set section.key=value`."


def _title(sections: Mapping[str, str], name: str) -> Iterator[str]:
    if doc := sections.get(name):
        yield textwrap.fill(f"{name}: {doc}", WIDTH)


def _lines(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """A setting's key, type and default on one line, its documentation below; a heading where the kind of task changes."""
    kind = ""
    for row in rows:
        if row["kind"] != kind:
            kind = row["kind"]
            yield f"\n{row['key'].partition('.')[0]} with kind: {kind}"
        default = row["default"] if row["default"] == "required" else f"default {row['default']}"
        facts = f"{row['key']}  ({row['type']}; {default})"
        yield textwrap.fill(facts, WIDTH, initial_indent="  ", subsequent_indent="    ")
        yield textwrap.fill(row["doc"], WIDTH, initial_indent="      ", subsequent_indent="      ")
