"""`effzoo weights`."""

from __future__ import annotations

import argparse

from ..report.rows import add_format_arguments, print_rows, print_table

HELP = "list the published weights, or check them on the Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=("list", "check"), metavar="list|check", help="what there is, or whether it is there"
    )
    parser.add_argument(
        "pattern", nargs="?", metavar="PATTERN", help="part of a MODEL.TAG name, or a pattern with * and ?"
    )
    add_format_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from ..hub import index as published

    rows = list(published.check(args.pattern)) if args.what == "check" else published.published(args.pattern)
    if args.json or args.csv:
        print_rows(rows, args.json, args.output)
    elif args.what == "list":
        table = [
            [
                row["weights"],
                f"{row['top1']:.2f}" if row["top1"] else "-",
                row["top1_source"] or "-",
                row["license"] or "-",
                f"{row['bytes'] / 1e6:.1f}",
                row["from"],
            ]
            for row in rows
        ]
        header = ["weights", "top-1, %", "measured by", "licence", "MB", "from"]
        print_table(header, table, right=(1, 4), output=args.output)
    else:
        table = [
            [
                row["weights"],
                row["from"],
                f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else "-",
                (row["sha256"] or "-")[:12],
                row["license"] or "-",
                row["cached"] or "-",
                "; ".join(row["problems"]) or "ok",
            ]
            for row in rows
        ]
        header = ["weights", "from", "MB", "SHA-256", "licence", "cached", "result"]
        print_table(header, table, right=(2,), output=args.output)
    if args.what == "check":
        published.require_sound(rows)
