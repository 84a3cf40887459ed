#!/usr/bin/env python
"""Kills a training run at random moments and resumes it each time: the final weights have to be the uninterrupted run's, bit for bit.

The moments are drawn over the whole time that a run takes, so that they fall into starting up, loading, steps, checkpoint writes,
validation and drawing. Each trial is a run of its own on 640 images of Fashion-MNIST as PNG files, killed by SIGKILL once and resumed
to its end.

    python tools/kill_test.py --trials 20
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from effvit_zoo.data import open_source

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = [
    "model.name=effzoo_vit_pico",
    "data.img_size=32",
    "data.num_workers=1",
    "train.batch_size=16",
    "train.epochs=3",
    "optim.warmup_epochs=0.5",
    "train.checkpoint_steps=4",
    "train.ema_decay=0.99",
    "augment.mixup=0.2",
    "augment.auto_augment=rand-m5-n1",
    "train.trackers=[]",
]


def start(*arguments: str | Path) -> subprocess.Popen:
    """train.py on one thread, in a process group of its own, so that its loader workers are killed with it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def write_images(root: Path) -> None:
    """48 training and 16 validation images of each class of the embedded set."""
    source = open_source("builtin:fashion-mnist-mini", "train")
    per_class = len(source) // len(source.class_names)
    for index, name in enumerate(source.class_names):
        for number in range(64):
            path = root / ("train" if number < 48 else "val") / name.replace("/", "-") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            source.load(index * per_class + number)[0].save(path)


def finish(process: subprocess.Popen) -> None:
    output = process.communicate()[0]
    if process.returncode:
        sys.exit(f"train.py ended with code {process.returncode}:\n{output[-2000:]}")


def where(run: Path) -> str:
    """What a killed run had reached, from what is on the disk."""
    checkpoints = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    writing = " while writing a checkpoint" if (run / "checkpoints/writing").exists() else ""
    return f"{checkpoints[-1] if checkpoints else 'no checkpoint'}{writing}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=SETTINGS, metavar="SECTION.KEY=VALUE", help="the run's settings")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    equal = 0
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images")
        args.set = [f"data.root={folder}/images", *args.set]
        whole = Path(folder) / "whole"
        started = time.perf_counter()
        finish(start("--output", whole, "--set", *args.set))
        seconds = time.perf_counter() - started
        wanted = {name: (whole / name / "model.safetensors").read_bytes() for name in ("best", "last")}
        print(f"uninterrupted: {seconds:.1f} s", flush=True)
        for trial in range(args.trials):
            run = Path(folder) / f"run-{trial}"
            while True:
                process = start("--output", run, "--set", *args.set)
                moment = moments.uniform(0.1, 1.0) * seconds
                time.sleep(moment)
                if process.poll() is None:
                    break
                finish(process)
                shutil.rmtree(run)  # it was through already: no trial
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            reached = where(run)
            again = ["--resume", run] if (run / "config.yaml").is_file() else ["--output", run, "--set", *args.set]
            finish(start(*again))
            same = all((run / name / "model.safetensors").read_bytes() == content for name, content in wanted.items())
            equal += same
            print(
                f"{trial + 1:3d}: killed after {moment:5.1f} s ({reached}): {'equal' if same else 'DIFFERENT'}",
                flush=True,
            )
    print(f"{equal} of {args.trials} bit-identical")
    sys.exit(0 if equal == args.trials else 1)


if __name__ == "__main__":
    main()
