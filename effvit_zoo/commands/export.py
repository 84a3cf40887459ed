"""`effzoo export`: a model as files for other runtimes, each proven on photos."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, positive, whole
from ..export import TARGETS
from ..report.rows import print_table
from ._arguments import MODEL_HELP

HELP = "write a model as files for other runtimes, compared with it on photos, or as a page for browsers"
PAGE = "web"
"""What `--to` calls a page, which is a folder of its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    names = ", ".join((*TARGETS, PAGE))
    parser.add_argument("--to", nargs="+", required=True, metavar="TARGET", help=f"one or more of {names}")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="(default: export in the folder MODEL; for what is no folder ./NAME-export)",
    )
    parser.add_argument("--pretrained", action="store_true", help="with a model name: its published weights")
    parser.add_argument(
        "--data",
        metavar="ROOT",
        help="photos to compare on, as data.root in a config, or any folder of images (default: embedded images)",
    )
    parser.add_argument(
        "--images", type=whole(2), default=200, metavar="N", help="photos to compare on (default: %(default)s)"
    )
    parser.add_argument(
        "--input",
        choices=("tensor", "pixels"),
        default="tensor",
        help="what the files take: normalised float32 (B, C, H, W), or uint8 (B, H, W, C) (default: %(default)s)",
    )
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument(
        "--img-size", type=positive, metavar="N", help="side length of the images (default: the model's)"
    )
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="FOLDER",
        help="of a page: the npm package onnxruntime-web, unpacked (default: a public CDN)",
    )
    parser.add_argument("--opset", type=positive, metavar="N", help="of ONNX files (default: the exporter's own)")


def run(args: argparse.Namespace) -> None:
    """Exports and prints a table. Raises `UserError`, after all targets were tried, where one failed."""
    if PAGE in args.to:
        _write_page(args)
        return
    if args.runtime is not None:
        raise UserError(f"--runtime is for --to {PAGE}")
    from ..export.folder import export_model

    failed: list[str] = []

    def note(target: str, error: UserError) -> None:
        failed.append(target)
        print(f"failed: {error}", file=sys.stderr)

    names = ("input", "precision", "img_size", "opset", "images")
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options |= {"data": args.data, "pretrained": args.pretrained or None}
    targets = [*dict.fromkeys(args.to)]
    alone = len(targets) == 1
    record = export_model(args.model, targets, args.output, on_failure=None if alone else note, **options)
    if record["note"]:
        print(f"note: {record['note']}", file=sys.stderr)
    written = [
        entry
        for entry in record["files"].values()
        if entry["target"] in targets and entry["precision"] == args.precision
    ]
    if written:
        _print(written)
        print(f"\n{record['folder']}: README.md says how to run each of them")
    if failed:
        raise UserError(f"{len(failed)} of {len(targets)} targets failed: {', '.join(failed)}")


def _write_page(args: argparse.Namespace) -> None:
    """Writes a page and says what it loads from where. Raises `UserError`."""
    from ..export.page import export_page

    if set(args.to) != {PAGE}:
        raise UserError(
            f"--to {PAGE} writes a folder of its own: expected no other targets beside it, got {' '.join(args.to)}"
        )
    if args.output is None:
        raise UserError(f"--to {PAGE}: expected --output, the folder of the page")
    if args.input != "tensor" or args.precision != "fp32" or args.img_size is not None or args.opset is not None:
        raise UserError(f"--to {PAGE}: expected no --input, --precision, --img-size or --opset, as a page takes photos")
    page = export_page(
        args.model,
        args.output,
        runtime=args.runtime,
        data=args.data,
        pretrained=args.pretrained or None,
        images=args.images,
    )
    runtime = page["runtime"]
    place = "in the folder" if args.runtime is not None else f"loaded from {runtime['base']}"
    print(f"{args.output}: a page of {page['architecture']}; ONNX Runtime Web {runtime['version']} is {place}")
    print(
        f"to see it: python -m http.server --directory {shlex.quote(str(args.output))}, or effzoo demo {shlex.quote(args.model)}"
    )


def _print(entries: list[dict[str, Any]]) -> None:
    head = ("target", "file", "MB", "largest error", "cosine", "same class, %", "metric", "in torch", "ms")
    print_table(head, [_cells(entry) for entry in entries], right=range(2, len(head)))
    proven = next((entry["agreement"] for entry in entries if "agreement" in entry), None)
    if proven is not None:
        print(
            f"\n{proven['images']} images of {proven['data']}; ms are of one image with one thread on {proven['processor']}"
        )
    for entry in entries:
        if "agreement" not in entry:
            print(f"{entry['name']}: {TARGETS[entry['target']].elsewhere}")


def _cells(entry: Mapping[str, Any]) -> list[str]:
    start = [entry["target"], entry["name"], f"{entry['bytes'] / 1e6:.1f}"]
    found = entry.get("agreement")
    if found is None:
        return [*start, *["-"] * 6]
    same = found.get("same_class")
    cells = [f"{found['largest_error']:.1e}", f"{found['cosine']:.6f}", "-" if same is None else f"{same:.1f}"]
    return [*start, *cells, _metric(found.get("metrics")), _metric(found.get("model")), f"{found['milliseconds']:.2f}"]


def _metric(measured: Mapping[str, Any] | None) -> str:
    """The first of the task's metrics, with its interval."""
    if not measured:
        return "-"
    name = next(iter(measured))
    ends = measured.get(f"{name}_interval")
    return f"{name} {measured[name]:.1f}" + (f" ({ends[0]:.1f} to {ends[1]:.1f})" if ends else "")
