"""`effzoo validate`, and `validate.py`: measures models, exported files too, on a data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..report.rows import check_output, print_table, shown, write_rows
from ._arguments import MODEL_HELP

HELP = "measure a model's accuracy and speed on a data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        nargs="+",
        help=f"{MODEL_HELP}, or a file .onnx, .xml or .pte; several are measured in turn",
    )
    parser.add_argument(
        "--like", metavar="MODEL", help="model that supplies preprocessing and labels of an exported file"
    )
    parser.add_argument("--pretrained", action="store_true", help="with a model name: its published weights")
    parser.add_argument(
        "--data", default="builtin:fashion-mnist-mini", help="as data.root in a config (default: %(default)s)"
    )
    parser.add_argument(
        "--split",
        default="auto",
        help="split of the data (default: what the model was validated on, if it was trained on this data; else val or test)",
    )
    parser.add_argument(
        "--img-size", type=int, nargs="+", metavar="N", help="one or more sizes in pixels (default: the model's)"
    )
    parser.add_argument(
        "--crop-pct", type=float, metavar="SHARE", help="share of the resized image to crop (default: the model's)"
    )
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="loader processes (default: one per core, at most 8)")
    parser.add_argument("--results-file", type=Path, metavar="FILE", help="write results to FILE.json or FILE.csv")


def run(args: argparse.Namespace) -> None:
    from ._until_merge import validate_models

    _check(args)
    failed: list[str] = []

    def skip(name: str, error: UserError) -> None:
        failed.append(name)
        print(f"skipped {name}: {error}", file=sys.stderr)

    rows = validate_models(
        args.model,
        args.data,
        like=args.like,
        pretrained=args.pretrained,
        split=args.split,
        img_sizes=args.img_size or (),
        crop_pct=args.crop_pct,
        batch_size=args.batch_size,
        workers=args.workers,
        on_skip=skip if len(args.model) > 1 else None,
    )
    if not rows:
        raise UserError(f"none of the {len(args.model)} models could be measured")
    if len(rows) == 1:
        _print_one(rows[0])
    else:
        _print_summary(rows)
    if args.results_file:
        write_rows(_plain(rows) if args.results_file.suffix == ".csv" else rows, args.results_file)
    if failed:
        raise UserError(f"{len(failed)} of {len(args.model)} models could not be measured: {', '.join(failed)}")


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for an argument out of range."""
    check_output(args.results_file, "--results-file")
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    if min(args.img_size or [1]) < 1:
        raise UserError(f"--img-size must be at least 1, got {' '.join(map(str, args.img_size))}")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise UserError(f"--crop-pct must lie in (0, 1], got {args.crop_pct}")


def _print_one(row: Mapping[str, Any]) -> None:
    """A model's sections, and its metrics below them."""
    print(f"{row['model']} on {row['data']} ({row['split']}), {shown(row['input_size'][1:])} pixels\n")
    for table in row["tables"]:
        if table["title"]:
            print(table["title"])
        numbers = [index for index, cell in enumerate(table["rows"][0]) if isinstance(cell, int | float)]
        print_table(table["head"], [[*map(shown, cells)] for cells in table["rows"]], right=numbers)
        print()
    metrics = ", ".join(f"{metric.title} {metric.show(row[name])}" for name, metric in _metrics([row]).items())
    skipped = f", {row['bad_files']} unreadable files skipped" if row["bad_files"] else ""
    print(f"{metrics} on {row['images']} images, {row['images_per_second']:.0f} images/s{skipped}")


def _print_summary(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each model and size."""
    metrics = _metrics(rows)
    head = ["model", "data", "split", "images", "input", *(_head(metric) for metric in metrics.values()), "images/s"]
    cells = [
        [
            *(row["model"], row["data"], row["split"], shown(row["images"]), shown(row["input_size"][1:])),
            *(f"{row[name]:.{metric.digits}f}" if name in row else "-" for name, metric in metrics.items()),
            f"{row['images_per_second']:.0f}",
        ]
        for row in rows
    ]
    print_table(head, cells, right=(3, *range(5, len(head))))


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics that rows have, of whatever task."""
    from ._until_merge import known_metrics

    return {name: metric for name, metric in known_metrics().items() if any(name in row for row in rows)}


def _head(metric: Any) -> str:
    return f"{metric.title}, {metric.unit}" if metric.unit else metric.title


def _plain(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a spreadsheet: sizes as 3x224x224."""
    return [{**row, "input_size": "x".join(map(str, row["input_size"]))} for row in rows]
