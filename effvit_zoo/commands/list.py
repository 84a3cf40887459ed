"""`effzoo list`: the models of the zoo with accuracy, cost and weights, filtered and sorted; with --time their speed on this host."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from ..errors import UserError, number, unknown_choice
from ..report.rows import add_format_arguments, figures, print_rows, print_table, shown
from . import _index

HELP = "which model? top-1, cost and weights of the models of the zoo"

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "model": ("model", str),
    "top1": ("top-1, %", lambda value: "-" if value is None else f"{value:.2f}"),
    "params": ("params, M", lambda value: figures(value / 1e6)),
    "macs": ("MACs, G", lambda value: figures(value / 1e9)),
    "input_size": ("input", lambda size: shown(size[1:])),
    "milliseconds": ("ms", figures),
    "weights": ("weights", lambda tags: ", ".join(tags) or "none"),
}
"""Key of a row -> title and text of a cell."""
SORTS = {
    "model": "model",
    "top1": "top1",
    "params": "params",
    "macs": "macs",
    "input": "input_size",
    "ms": "milliseconds",
}
"""Value of --sort -> key of a row."""
LARGEST = 10_000
"""Million parameters, or billion MACs: more is meant as a plain number by mistake."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The sizes pico and nano64 are this package's own; no paper has them."
    parser.add_argument(
        "filter", nargs="*", metavar="FILTER", help="part of a name, or a pattern with * and ?; all must match"
    )
    parser.add_argument("--family", help="one family only, e.g. swiftformer")
    parser.add_argument("--pretrained", action="store_true", help="only models with published weights")
    size = number(0, LARGEST, "million parameters")
    parser.add_argument("--max-params", type=size, metavar="M", help="at most M million parameters")
    cost = number(0, LARGEST, "billion multiply-accumulates")
    parser.add_argument("--max-macs", type=cost, metavar="G", help="at most G billion multiply-accumulates")
    parser.add_argument(
        "--min-top1",
        type=number(1, 100, "percent"),
        metavar="PERCENT",
        help="at least this ImageNet-1k top-1, published for the weights that --pretrained takes",
    )
    parser.add_argument(
        "--time", action="store_true", help="also measure the milliseconds of one image here, by torch on the CPU"
    )
    parser.add_argument(
        "--sort", choices=tuple(SORTS), metavar="COLUMN", help=f"{', '.join(SORTS)}: the best first (default: by name)"
    )
    add_format_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if args.sort == "ms" and not args.time:
        raise UserError("--sort ms: the milliseconds are measured with --time only")
    known = _index.models()
    names = _named(known, args.filter, args.family)
    rows = [row for row in map(_row, names) if _fits(row, args)]
    if not rows:
        raise UserError(f"none of the {len(known)} models matches")
    if args.time:
        from ..benchmark.models import time_names

        for row, milliseconds in zip(rows, time_names([row["model"] for row in rows]), strict=True):
            row["milliseconds"] = milliseconds
    if args.sort:
        rows.sort(key=lambda row: _rank(row[SORTS[args.sort]], args.sort))
    if args.json or args.csv:
        print_rows(rows, args.json, args.output)
        return
    columns = {key: column for key, column in COLUMNS.items() if key in rows[0]}
    cells = [[text(row[key]) for key, (_, text) in columns.items()] for row in rows]
    right = [index for index, key in enumerate(columns) if key in ("top1", "params", "macs", "milliseconds")]
    print_table([title for title, _ in columns.values()], cells, right=right, output=args.output)


def _named(known: Mapping[str, Mapping[str, Any]], filters: Sequence[str], family: str | None) -> list[str]:
    """Names of a family that all filters match. Raises `UserError` for an unknown family, or a filter that no name matches."""
    families = sorted({facts["family"] for facts in known.values()})
    if family and family not in families:
        raise unknown_choice("family", family, families)
    found = [name for name in known if family in (None, known[name]["family"])]
    for text in filters:
        pattern = text if set(text) & set("*?[") else f"*{text}*"
        if not any(fnmatch(name, pattern) for name in known):
            raise unknown_choice("model", text, known)
        found = [name for name in found if fnmatch(name, pattern)]
    return found


def _row(name: str) -> dict[str, Any]:
    facts = _index.models()[name]
    weights = facts.get("weights", [])
    return {
        "model": name,
        "family": facts["family"],
        "top1": weights[0]["top1"] if weights else None,
        "params": facts["params"],
        "macs": facts["macs"],
        "input_size": facts["input_size"],
        "weights": [entry["tag"] or "default" for entry in weights],
        "license": facts.get("license"),
    }


def _fits(row: Mapping[str, Any], args: argparse.Namespace) -> bool:
    limits = ((args.max_params, row["params"] / 1e6), (args.max_macs, row["macs"] / 1e9))
    cheap = all(limit is None or value <= limit for limit, value in limits)
    good = args.min_top1 is None or (row["top1"] or 0) >= args.min_top1
    return cheap and good and (bool(row["weights"]) or not args.pretrained)


def _rank(value: Any, column: str) -> Any:
    """Sort key: the highest top-1 first, the lowest of anything else; what is not known comes last."""
    return (value is None, -(value or 0)) if column == "top1" else value
