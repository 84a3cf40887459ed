"""Arguments of the benchmarks, apart from their bodies: help and completion need no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import number, positive, whole


def _common(parser: argparse.ArgumentParser, repeats: int = 20) -> None:
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--repeats", type=positive, default=repeats, metavar="N", help="timed calls of each (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rows to FILE.csv or FILE.json")


def models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="effzoo_* or timm name, model or run folder, hf-hub:USER/NAME, or a file .onnx, .xml or .pte",
    )
    parser.add_argument("--batch-sizes", nargs="+", type=positive, default=[1], metavar="N", help="(default: 1)")
    parser.add_argument("--img-size", type=positive, metavar="N", help="pixels (default: each model's own size)")
    _common(parser)


def attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mechanisms", nargs="+", metavar="NAME", help="(default: all)")
    parser.add_argument("--tokens", nargs="+", type=positive, default=[196, 1024, 4096, 16384], metavar="N")
    parser.add_argument("--heads", type=positive, default=3, help="(default: %(default)s)")
    parser.add_argument("--dim", type=positive, default=64, help="channels of a head (default: %(default)s)")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--layout",
        choices=("separate", "packed"),
        default="separate",
        help="contiguous q, k, v, or views of one projection's output (default: %(default)s)",
    )
    parser.add_argument("--no-backward", action="store_true", help="skip forward + backward")
    _common(parser)


def backbones(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", metavar="NAME", help="timm's names (default: four of them)")
    parser.add_argument("--batch-sizes", nargs="+", type=positive, default=[1, 8], metavar="N", help="(default: 1 8)")
    parser.add_argument("--train-batch", type=whole(0), default=32, help="images per training step; 0 skips training")
    parser.add_argument("--img-size", type=positive, default=224, help="(default: %(default)s)")
    parser.add_argument(
        "--memory", action="store_true", help="also measure the peak memory of a forward pass at 1024 pixels"
    )
    _common(parser)


def tosa(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", type=Path, help="output folder of a ToSA training (default: speed alone)")
    parser.add_argument(
        "--ratios", nargs="+", type=number(0, 1), default=None, metavar="R", help="(default: 0.5; of a run: 0.5 0.25)"
    )
    parser.add_argument("--model", default="effzoo_vit_small", help="dense ViT to time (default: %(default)s)")
    parser.add_argument("--img-sizes", nargs="+", type=positive, default=[224, 512], metavar="N")
    parser.add_argument("--batch-size", type=positive, default=1, help="(default: %(default)s)")
    parser.add_argument("--runtimes", nargs="*", help="other runtimes to time in (default: those that are installed)")
    _common(parser)
