"""Classes of unequal size: how the loss weighs them, and which metric "best" means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

UNEQUAL = 2
"""Ratio of the largest to the smallest class from which on the run says so."""
VERY_UNEQUAL = 5
"""Ratio above which the loss is weighted and "best" is by macro-F1, unless settings say otherwise."""


def ratio(counts: np.ndarray) -> float:
    """How many times the images of the smallest class the largest has. Classes without images don't count.

    Args:
        counts: (C,) images of each class.
    """
    present = counts[counts > 0]
    return float(present.max() / present.min()) if len(present) else 1.0


def balanced_weights(counts: np.ndarray) -> Tensor:
    """(C,) inverse class frequencies, scaled so that the mean over images is 1. A class without images gets 1.

    Args:
        counts: (C,) images of each class.
    """
    present = np.count_nonzero(counts)
    weights = np.where(counts, counts.sum() / (max(1, present) * np.maximum(counts, 1)), 1.0)
    return torch.tensor(weights, dtype=torch.float32)


def balance_note(counts: np.ndarray, names: Sequence[str], is_weighted: bool, best: str) -> str:
    """What a run says of unequal classes; "" of equal ones.

    Args:
        counts: (C,) training images of each class.
        names: Names of the classes.
        is_weighted: The loss weighs classes equally.
        best: Metric by which the best epoch is chosen.
    """
    times = ratio(counts)
    if times < UNEQUAL:
        return ""
    smallest, largest = int(np.where(counts > 0, counts, counts.max()).argmin()), int(counts.argmax())
    most, least = (f"{names[index]!r} {counts[index]}" for index in (largest, smallest))
    weighted = (
        "images are weighted by the inverse size of their class (task.class_weights=false weighs them equally)"
        if is_weighted
        else "task.class_weights=true weighs them equally"
    )
    note = f"classes are unequal: {most} training images, {least}; {weighted}"
    if times > VERY_UNEQUAL or best != "top1":
        other = "top1" if best == "macro_f1" else "macro_f1"
        note += f'; "best" is by {best.replace("_f1", "-F1").replace("top1", "top-1")} (task.best={other} changes that)'
    return note
