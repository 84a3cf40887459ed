"""`effzoo weights`: lists the published weights, or checks them on the Hub."""

from __future__ import annotations

import argparse
from typing import Any

from ..report.rows import add_format_arguments, print_rows, print_table

HELP = "list the published weights, or check them on the Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `effzoo weights`."""
    parser.add_argument(
        "action",
        choices=("list", "check"),
        metavar="list|check",
        help="list published weights, or check that they are available",
    )
    parser.add_argument(
        "pattern", nargs="?", metavar="PATTERN", help="part of a MODEL.TAG name, or a pattern with * and ?"
    )
    add_format_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Lists or checks. Raises `UserError`, after the table, if a check finds problems."""
    from ..hub import index

    check = args.action == "check"
    rows = list(index.check(args.pattern)) if check else index.published(args.pattern)
    if args.json or args.csv:
        print_rows(rows, args.json, args.output)
    elif check:
        head = ["weights", "from", "MB", "SHA-256", "licence", "cached", "result"]
        print_table(head, [_checked_cells(row) for row in rows], right=(2,), output=args.output)
    else:
        head = ["weights", "top-1, %", "measured by", "licence", "MB", "from"]
        print_table(head, [_listed_cells(row) for row in rows], right=(1, 4), output=args.output)
    if check:
        index.require_sound(rows)


def _listed_cells(row: dict[str, Any]) -> list[str]:
    top1 = f"{row['top1']:.2f}" if row["top1"] else "-"
    origin = [row["top1_source"] or "-", row["license"] or "-"]
    return [row["weights"], top1, *origin, f"{row['bytes'] / 1e6:.1f}", row["from"]]


def _checked_cells(row: dict[str, Any]) -> list[str]:
    size = f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else "-"
    facts = [(row["sha256"] or "-")[:12], row["license"] or "-", row["cached"] or "-"]
    return [row["weights"], row["from"], size, *facts, "; ".join(row["problems"]) or "ok"]
