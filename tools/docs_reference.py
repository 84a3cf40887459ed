#!/usr/bin/env python
"""Reference pages from the code: a hook of mkdocs (see mkdocs.yml) that fills in `<!-- generated: NAME -->`.

python tools/docs_reference.py NAME     # prints one part
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from effvit_zoo.commands import COMMANDS, _index
from effvit_zoo.config import Setting, sections, settings
from effvit_zoo.errors import OneLineParser
from effvit_zoo.pipelines.tosa import ToSAConfig
from effvit_zoo.training.config import RunConfig

WIDTH = 100
EXPORTS = Path(__file__).resolve().parent.parent / "results" / "export.json"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def commands() -> str:
    """Every command with its help; `train` without the settings, which have a page of their own."""
    parts = []
    for name, command in COMMANDS.items():
        parser = OneLineParser(prog=f"effzoo {name}")
        command.add_arguments(parser)
        if name == "train":
            parser.epilog = None
        parts.append(f"## effzoo {name}\n\n{_help(parser)}")
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parts += [f"### {sub.prog.removeprefix('effzoo ')}\n\n{_help(sub)}" for sub in action.choices.values()]
    return "\n\n".join(parts)


def _help(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = functools.partial(parser.formatter_class, width=WIDTH)  # type: ignore[assignment]
    return f"```text\n{parser.format_help().strip()}\n```"


def exports() -> str:
    """What results/export.json says of models in export targets: the largest error and on how many images, or why there is none."""
    rows = json.loads(EXPORTS.read_text(encoding="utf-8"))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    parts = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        found = {(row["model"], row["target"]): row for row in rows if row["precision"] == precision}
        models = dict.fromkeys(model for model, _ in found)
        cells = [[model, *(_export_cell(found.get((model, target))) for target in targets)] for model in models]
        parts.append(f"In {precision}:\n\n{table(['model', *targets], cells)}")
    return "\n\n".join(parts)


def _export_cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    if "failed" in row:
        return f"refused: {row['failed'].partition(': ')[2][:80]}"
    if "largest_error" not in row:
        return f"converted, rank {row['rank']}"
    return f"{row['largest_error']:.0e} ({row['images']})"


def run_settings() -> str:
    """The settings of a run, a table per section and kind of task."""
    rows, parts = settings(RunConfig), []
    for name, doc in sections(RunConfig).items():
        parts.append(f"## {name}\n\n{doc}")
        own = [row for row in rows if row.key.startswith(f"{name}.")]
        for kind in dict.fromkeys(row.kind for row in own):
            heading = f"### {name} with kind: {kind}\n\n" if kind else ""
            parts.append(heading + _settings_table(row for row in own if row.kind == kind))
    return "\n\n".join(parts)


def tosa_settings() -> str:
    """The settings of the pipeline `tosa`, apart from the sections that it shares with a run."""
    shared = ("model.", "data.", "optim.", "train.")
    rows = [
        row for row in settings(ToSAConfig) if not any(part in f".{row.key}." for part in (f".{s}" for s in shared))
    ]
    return _settings_table(rows)


def _settings_table(rows: Iterable[Setting]) -> str:
    cells = ((f"`{row.key}`", row.type, f"`{row.default_text}`", row.doc) for row in rows)
    return table(("setting", "type", "default", "meaning"), cells)


def models() -> str:
    """All models, a table per family."""
    families: dict[str, list[list[str]]] = {}
    for name, facts in _index.models().items():
        families.setdefault(facts["family"], []).append(_model_row(name, facts))
    head = ("model", "parameters, M", "MACs, G", "input", "weights: top-1, %", "paper")
    return "\n\n".join(f"## {family}\n\n{table(head, rows)}" for family, rows in families.items())


def _model_row(name: str, facts: Mapping[str, Any]) -> list[str]:
    weights = (
        f"`{entry['tag'] or 'default'}`" + (f": {entry['top1']:.2f}" if entry["top1"] else "")
        for entry in facts.get("weights", ())
    )
    papers = (f"[{address.rpartition('/')[2]}]({address})" for address in facts.get("paper", ()))
    return [
        f"`{name}`",
        f"{facts['params'] / 1e6:.2f}",
        f"{facts['macs'] / 1e9:.3g}",
        " x ".join(map(str, facts["input_size"][1:])),
        "<br>".join(weights) or "-",
        ", ".join(papers),
    ]


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "settings": run_settings,
    "tosa": tosa_settings,
    "models": models,
    "exports": exports,
}


def fill_in(markdown: str) -> str:
    """Markdown with `<!-- generated: NAME -->` replaced. Raises KeyError for an unknown name."""
    return re.sub(r"<!-- generated: (\w+) -->", lambda found: PARTS[found.group(1)](), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs's event for the text of a page."""
    return fill_in(markdown)


if __name__ == "__main__":
    print(PARTS[sys.argv[1]]())
