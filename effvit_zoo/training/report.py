"""The files of a run folder that people and scripts read: metrics.csv, curves.png, confusion_matrix.png, summary.json."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..cost import processor_name
from ..viz.training import confusion_matrix, curves

COLUMNS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_top1",
    "val_loss",
    "top1",
    "top5",
    "images_per_second",
    "seconds",
)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by a complete new one, or leaves it as it was."""
    writing = path.with_name(path.name + ".writing")
    writing.write_text(text, encoding="utf-8")
    os.replace(writing, path)


def write_metrics(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """metrics.csv: a row per finished epoch (losses are means, accuracies percent, lr the rate of the epoch's last step)."""
    writing = folder / "metrics.csv.writing"
    with writing.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(history)
    os.replace(writing, folder / "metrics.csv")


def write_figures(
    folder: Path, history: Sequence[dict[str, Any]], confusion: np.ndarray, class_names: Sequence[str]
) -> None:
    """curves.png over the epochs, and confusion_matrix.png of the best one (counts, rows are true classes)."""
    curves(list(history), folder / "curves.png")
    confusion_matrix(confusion, list(class_names), folder / "confusion_matrix.png")


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """summary.json, with where it was computed added."""
    write_atomically(folder / "summary.json", json.dumps(summary | environment(), indent=2, ensure_ascii=False) + "\n")


def environment() -> dict[str, Any]:
    """The git commit of the code that runs (None outside a checkout), versions, platform and processor."""
    root = Path(__file__).resolve().parents[2]
    commit = None
    if (root / ".git").exists():
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        commit = answer.stdout.strip() or None
    packages = ("effvit_zoo", "torch", "torchvision", "timm", "accelerate", "numpy")
    return {
        "git_commit": commit,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "platform": platform.platform(terse=True),
        "processor": processor_name(),
    }
