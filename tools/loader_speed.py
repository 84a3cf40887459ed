#!/usr/bin/env python
"""How fast images are read, decoded and augmented, without a network: images per second by number of loader workers.

python tools/loader_speed.py --data photos --workers 0 1 2 4
"""

from __future__ import annotations

import argparse
import tempfile
import time

from effvit_zoo.errors import OneLineParser, run_command
from effvit_zoo.training.config import load_config
from effvit_zoo.training.prepare import prepare


def rate(settings: list[str], seconds: float) -> float:
    """Images per second of the training batches, from the first batch on, for about so many seconds."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write("model: {name: effzoo_vit_pico}\n")
        file.flush()
        prepared = prepare(load_config(file.name, settings), 1)
    batches = iter(prepared.feed.train_batches(0, 0, 10**6))
    next(batches)
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        images += len(next(batches))
    return images / (time.perf_counter() - started)


def main() -> None:
    parser: argparse.ArgumentParser = OneLineParser(description=__doc__)
    parser.add_argument("--data", default="builtin:fashion-mnist-mini", help="as data.root (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--img-size", type=int, default=224, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="a measurement (default: %(default)s)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="e.g. augment.auto_augment=rand-m9"
    )
    args = parser.parse_args()
    for workers in args.workers:
        settings = [
            f"data.root={args.data}",
            f"data.img_size={args.img_size}",
            f"data.num_workers={workers}",
            f"train.batch_size={args.batch_size}",
            *args.set,
        ]
        print(f"{workers} workers: {rate(settings, args.seconds):.0f} images/s", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
