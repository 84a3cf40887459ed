"""Small folders of images and runs of train.py on them, for the tests of training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import train
from effvit_zoo.errors import run_command

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"blue": (40, 60, 200), "red": (200, 60, 40), "green": (60, 180, 60)}
SMALL = [
    "model.name=effzoo_vit_pico",
    "train.batch_size=8",
    "train.epochs=1",
    "data.num_workers=0",
    "optim.lr=1e-3",
    "train.trackers=[]",
]


def make_photos(root, counts, seed=0, size=(20, 24)):
    """PNG files of noise around a colour; `counts` is {folder below root: {class: images}}. Returns root."""
    rng = np.random.default_rng(seed)
    for folder, classes in counts.items():
        for label, count in classes.items():
            place = root / folder / label
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = np.clip(np.array(COLOURS[label]) + rng.normal(0, 40, (*size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return root


def train_small(output, *settings, more=(), config=None):
    """train.py in this process with `SMALL` and further settings; returns its exit code."""
    if config is None:
        config = output.parent / "small.yaml"
        config.write_text("model: {name: effzoo_vit_pico}\n")
    arguments = ["--config", str(config), "--output", str(output), *more, "--set", *SMALL, *map(str, settings)]
    return run_command(lambda: train.main(arguments))


def start(*arguments):
    """train.py in a process of its own, on one thread."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def summary(folder):
    return json.loads((folder / "summary.json").read_text())
