"""`effzoo config`: every setting of a run with its type, default and documentation."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Sequence

from ..config import Setting, json_schema, sections, settings
from ..errors import unknown_choice
from ..training.config import RunConfig

HELP = "list the settings of a run, with types and defaults"
WIDTH = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", help="section or setting to explain, e.g. optim or optim.lr")
    parser.add_argument("--json-schema", action="store_true", help="print the JSON schema, for completion in editors")


def run(args: argparse.Namespace) -> None:
    if args.json_schema:
        print(schema_text(), end="")
    elif args.section is None:
        print("\n".join(_overview()))
    else:
        found = [row for row in settings(RunConfig) if f"{row.key}.".startswith(f"{args.section}.")]
        if not found:
            raise unknown_choice(
                "section", args.section, [*sections(RunConfig), *(row.key for row in settings(RunConfig))]
            )
        print("\n".join([*_title(args.section), *_lines(found)]))


def schema_text() -> str:
    """Content of configs/run.schema.json."""
    return json.dumps(json_schema(RunConfig), indent=2) + "\n"


def settings_help() -> str:
    """All sections with their settings, for the help of the training command; at most 80 columns."""
    rows = settings(RunConfig)
    parts = [
        "\n".join([*_title(name), *_lines([row for row in rows if row.key.startswith(f"{name}.")])])
        for name in sections(RunConfig)
    ]
    return "\n\n".join(parts)


def _overview() -> Iterator[str]:
    known = sections(RunConfig)
    width = max(map(len, known)) + 2
    for name, doc in known.items():
        yield textwrap.fill(doc, WIDTH, initial_indent=name.ljust(width), subsequent_indent=" " * width)
    yield ""
    yield "`effzoo config SECTION` explains the settings of a section."
    yield "In a run's YAML they are `section: {key: value}`, on the command line"
    yield "`--set section.key=value`."


def _title(name: str) -> Iterator[str]:
    if doc := sections(RunConfig).get(name):
        yield textwrap.fill(f"{name}: {doc}", WIDTH)


def _lines(rows: Sequence[Setting]) -> Iterator[str]:
    """A setting's key, type and default on one line, its documentation below; a heading where the kind of task changes."""
    kind = ""
    for row in rows:
        if row.kind != kind:
            kind = row.kind
            yield f"\n{row.key.partition('.')[0]} with kind: {kind}"
        facts = (
            f"{row.type}; {row.default_text}"
            if row.default_text == "required"
            else f"{row.type}; default {row.default_text}"
        )
        yield textwrap.fill(f"{row.key}  ({facts})", WIDTH, initial_indent="  ", subsequent_indent="    ")
        yield textwrap.fill(row.doc, WIDTH, initial_indent="      ", subsequent_indent="      ")
