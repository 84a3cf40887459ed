#!/usr/bin/env python
"""Every kind of model in every export target: what was written, how it compares with the model, and what refused it, as rows in results/.

python tools/export_table.py [--models NAME...] [--to TARGET...] [--precision fp32 fp16 bf16] [--images 200] [--output results/export.json]

Rows are added to the file as they are measured; those that are there already are skipped, with --retry except the failed ones. Weights
are random with values wherever training starts from zeros, and BatchNorm's statistics are those of the images: otherwise outputs would
hardly depend on the image. Times are not kept: several things may run while a table of hours is made.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import effvit_zoo
from effvit_zoo.errors import UserError, run_command
from effvit_zoo.export import TARGETS
from effvit_zoo.export._graph import DTYPES
from effvit_zoo.export._pixels import to_images
from effvit_zoo.export._record import common_record
from effvit_zoo.export.folder import IMAGES
from effvit_zoo.export.parity import open_photos
from effvit_zoo.run_folder import read_json, write_json
from effvit_zoo.tasks import task_of

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "results" / "export.json"
KINDS = [
    *(
        "effzoo_swin_tiny_patch4_window7_224",
        "effzoo_efficientvit_b0",
        "effzoo_edgenext_xx_small",
        "effzoo_conv2former_n",
    ),
    *("effzoo_swiftformer_xs", "effzoo_vit_tiny", "effzoo_elu_vit_tiny", "effzoo_cosformer_vit_tiny"),
    *("effzoo_hydra_vit_tiny", "effzoo_sima_vit_tiny", "effzoo_tosa_vit_tiny"),
]
"""The smallest published size of each kind."""
TIMMS = ["resnet18", "vit_tiny_patch16_224", "convnext_atto"]
KEY = ("model", "target", "precision")
PROVEN = ("largest_error", "cosine", "same_class", "decided", "images", "batches")
KEPT = ("bytes", "batch", "forms", "rank", "delegates", "delegated_share", "opset")


def build(name: str) -> Any:
    """A model in eval mode whose outputs depend on the image, the same at every call."""
    torch.manual_seed(0)
    model: Any = effvit_zoo.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.std() < 1e-4:
            nn.init.normal_(module.weight, std=0.05)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches, with no share of the initial values
        norm.train()
    record = common_record(model)
    photos = open_photos(task_of(model), record, None, 32)
    with torch.no_grad():
        if norms:
            for start in range(0, len(photos.pixels), 8):
                model(to_images(photos.pixels[start : start + 8], record))
    return model.eval()


def row_of(name: str, target: str, precision: str, images: int) -> dict[str, Any]:
    """What became of one model in one target."""
    row = {"model": name, "target": target, "precision": precision}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            options: dict[str, Any] = {"images": images, "precision": precision}
            record = effvit_zoo.export(build(name), [target], Path(folder) / "export", **options)
        except UserError as error:
            return row | {"failed": str(error)}
    (entry,) = record["files"].values()
    return row | _facts(entry)


def _facts(entry: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: entry[key] for key in KEPT if key in entry}
    proof = {key: value for key, value in entry.get("agreement", {}).items() if key in PROVEN}
    return kept | {"versions": entry["versions"]} | proof


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*KINDS, *TIMMS], metavar="NAME")
    parser.add_argument("--to", nargs="+", default=[*TARGETS], choices=[*TARGETS], metavar="TARGET")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=[*DTYPES])
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE")
    parser.add_argument("--retry", action="store_true", help="measure failed rows again")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = read_json(args.output) if args.output.is_file() else []
    rows = [row for row in rows if not (args.retry and "failed" in row)]
    for precision, name, target in itertools.product(args.precision, args.models, args.to):
        known = {tuple(row[key] for key in KEY) for row in rows}
        if (name, target, precision) in known or precision not in TARGETS[target].precisions:
            continue
        rows.append(row_of(name, target, precision, args.images))
        write_json(args.output, rows)
        print(name, target, precision, rows[-1].get("failed") or rows[-1].get("largest_error", "converted"), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
