#!/usr/bin/env python
"""What the engine costs over a bare training loop: images per second of both, turn by turn, and memory over many steps.

Both train the same timm model with the same transforms, loader workers, optimizer and batches. The bare loop has nothing else: no
progress, no metrics, no guards, no schedule. Each turn has a process of its own, with the allocator set as the training command sets it.
Turns alternate and each side's median counts, so that other work on the machine affects both; the processor time of the training process
is compared too.

    python tools/training_overhead.py                    # speed
    python tools/training_overhead.py --memory-steps 2000
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset

import effvit_zoo  # registers effzoo_*
from effvit_zoo.data import Batch
from effvit_zoo.measure.allocator import keep_freed_memory
from effvit_zoo.training.config import RunConfig, load_config
from effvit_zoo.training.engine import Loop
from effvit_zoo.training.optim import make_optimizer
from effvit_zoo.training.prepare import prepare


class Bare(Dataset):
    """The same images and transforms as the engine's, by index alone."""

    def __init__(self, source: Any, transform: Any) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(*self.source.load(index))


def bare_rate(config: RunConfig, steps: int) -> tuple[float, float]:
    """Images per second, and per second of processor time, of a loop that does nothing but train."""
    keep_freed_memory()
    prepared: Any = prepare(config, 1)
    dataset = Bare(prepared.feed.splits.train, prepared.feed.transforms.train)
    model = prepared.model.train()
    optimizer = make_optimizer(model, config.optim)
    workers = config.data.num_workers or 0
    loader = DataLoader(
        dataset,
        config.train.batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        prefetch_factor=4 if workers else None,
    )
    images, started = 0, (0.0, 0.0)
    for step, (image, target) in enumerate(loader):
        if step == 1:  # the first step waits for the workers to start
            started = _clocks()
        if step == steps:
            return _rates(images, started)
        loss = F.cross_entropy(model(image), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        images += len(target) if step else 0
    sys.exit(f"an epoch has only {len(loader)} steps: fewer --steps or a smaller --batch-size")


class _Enough(Exception):
    """Ends the engine's run after the steps that are measured."""


def engine_rate(
    config: RunConfig, steps: int, memory: list[tuple[int, float]] | None = None, every: int = 50
) -> tuple[float, float]:
    """As `bare_rate`, of the engine over its first steps; with `memory`, (step, MiB of this process) goes into it."""
    keep_freed_memory()
    prepared = prepare(config, 1)
    task, process = prepared.task, psutil.Process()
    images, step, started, rates = 0, -1, (0.0, 0.0), (0.0, 0.0)

    class Counted:
        """The task, with its steps counted."""

        def trainable(self, model: nn.Module) -> nn.Module:
            return task.trainable(model)

        def loss(self, model: Any, batch: Batch) -> Any:
            nonlocal images, step, started, rates
            step += 1
            if step == 1:
                started = _clocks()
            if step == steps:
                rates = _rates(images, started)
                raise _Enough
            if memory is not None and step % every == 0:
                memory.append((step, process.memory_info().rss / 2**20))
            images += len(batch) if step else 0
            return task.loss(model, batch)

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(_Enough),
    ):
        Loop(task, Counted(), prepared.model, prepared.feed, config, Accelerator(), Path(folder)).run()
    return rates


def _clocks() -> tuple[float, float]:
    """Seconds on the wall, and of this process' processor time (its loader workers' not included)."""
    return time.perf_counter(), time.process_time()


def _rates(images: int, started: tuple[float, float]) -> tuple[float, float]:
    wall, processor = (now - then for now, then in zip(_clocks(), started, strict=True))
    return images / wall, images / processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="effzoo_swiftformer_xs", help="(default: %(default)s)")
    parser.add_argument("--img-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="a turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="of each side (default: %(default)s)")
    parser.add_argument("--memory-steps", type=int, help="measure memory over so many steps instead of speed")
    args = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(f"model: {{name: {args.model}}}\n")
        file.flush()
        settings = [
            f"data.img_size={args.img_size}",
            f"train.batch_size={args.batch_size}",
            f"data.num_workers={args.workers}",
            "train.epochs=1000",
            "train.trackers=[]",
        ]
        config = load_config(file.name, settings)
    print(
        f"effvit_zoo {effvit_zoo.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.model}"
    )
    if args.memory_steps:
        memory: list[tuple[int, float]] = []
        engine_rate(config, args.memory_steps, memory, max(1, args.memory_steps // 40))
        for step, size in memory:
            print(f"step {step:6d}: {size:.0f} MiB")
        settled = memory[len(memory) // 4 :]
        print(f"from step {settled[0][0]} to {settled[-1][0]}: {settled[-1][1] - settled[0][1]:+.1f} MiB")
        return
    rates: dict[str, list[tuple[float, float]]] = {"bare": [], "engine": []}
    sides = {"bare": bare_rate, "engine": engine_rate}
    for turn in range(args.turns):
        for name in ("bare", "engine") if turn % 2 else ("engine", "bare"):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as own_process:
                rates[name].append(own_process.submit(sides[name], config, args.steps).result())
    for which, unit in enumerate(("images/s", "images per second of processor time")):
        columns = {name: [each[which] for each in values] for name, values in rates.items()}
        for name, values in columns.items():
            low, middle, high = min(values), statistics.median(values), max(values)
            print(f"{name:7} {middle:7.1f} {unit}, median of {len(values)} ({low:.1f} to {high:.1f})")
        ratios = [engine / bare for engine, bare in zip(columns["engine"], columns["bare"], strict=True)]
        print(f"overhead {100 * (1 - statistics.median(ratios)):+.1f} % (median of the turns' ratios)")


if __name__ == "__main__":
    sys.exit(main())
