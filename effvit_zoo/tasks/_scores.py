"""Scores of a classifier from counts of (true class, predicted class), and the interval of a share."""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TOP5_FROM = 7
"""Number of classes from which on top-5 is shown; of fewer it says next to nothing."""


def per_class(cells: Sequence[Sequence[int]]) -> dict[int, dict[str, Any]]:
    """Class -> images, recall, precision and F1 in percent (None where undefined), and the class it is most often taken for.

    Args:
        cells: [true class, predicted class, count] entries.
    """
    true, predicted, hits = Counter[int](), Counter[int](), Counter[int]()
    confused: dict[int, tuple[int, int]] = {}  # true class -> (count, -predicted class)
    for t, p, count in cells:
        true[t] += count
        predicted[p] += count
        if t == p:
            hits[t] += count
        else:
            confused[t] = max(confused.get(t, (0, 0)), (count, -p))
    return {
        t: {
            "images": true[t],
            "recall": 100 * hits[t] / true[t],
            "precision": 100 * hits[t] / predicted[t] if predicted[t] else None,
            "f1": 200 * hits[t] / (true[t] + predicted[t]),
            "taken_for": -confused[t][1] if t in confused else None,
            "taken_for_images": confused[t][0] if t in confused else 0,
        }
        for t in sorted(true)
    }


def macro_f1(cells: Sequence[Sequence[int]]) -> float:
    """Mean of the F1 scores in percent over the classes that occur or are predicted; one that only is predicted has 0.

    Args:
        cells: [true class, predicted class, count] entries.
    """
    classes = {index for true, predicted, _ in cells for index in (true, predicted)}
    return sum(row["f1"] for row in per_class(cells).values()) / len(classes)


def wilson_interval(share: float, number: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share that was observed in a number of independent trials; 95 % for the default `z`."""
    centre, square = share + z**2 / (2 * number), z**2 / number
    half = z * math.sqrt(share * (1 - share) / number + square / (4 * number))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))


def pack_hits(index: np.ndarray, hits: np.ndarray) -> dict[str, str] | None:
    """Which images were measured and which of them are right, as JSON: bits by index; None where an index comes twice.

    Args:
        index: (N,) whole numbers.
        hits: (N,) bool.
    """
    if len(np.unique(index)) != len(index):
        return None
    seen, right = (np.zeros(int(index.max()) + 1, dtype=bool) for _ in range(2))
    seen[index], right[index] = True, hits
    return {name: b64encode(np.packbits(bits)).decode() for name, bits in (("seen", seen), ("right", right))}


def paired_interval(
    after: Mapping[str, str], before: Mapping[str, str], z: float = 1.96
) -> tuple[float, float, float, int]:
    """Difference of the shares that are right of the images measured in both, its interval, and their number.

    The interval is Wald's for matched pairs with half an image added to each of the four counts, which is near its level for few
    images too: Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", 2005. 95 % for the
    default `z`.

    Args:
        after: Of `pack_hits`.
        before: Likewise.
    """
    bits = {}
    for when, packed in (("after", after), ("before", before)):
        for name, text in packed.items():
            bits[when, name] = np.unpackbits(np.frombuffer(b64decode(text), dtype=np.uint8)).astype(bool)
    length = min(len(each) for each in bits.values())
    seen = bits["after", "seen"][:length] & bits["before", "seen"][:length]
    now, then = (bits[when, "right"][:length][seen] for when in ("after", "before"))
    number, gained, lost = len(now), int((now & ~then).sum()), int((then & ~now).sum())
    total, up, down = number + 2, gained + 0.5, lost + 0.5
    centre = (up - down) / total
    half = z * math.sqrt(up + down - (up - down) ** 2 / total) / total
    return (gained - lost) / number, max(-1.0, centre - half), min(1.0, centre + half), number


def dense_counts(cells: Sequence[Sequence[int]], num_classes: int) -> np.ndarray:
    """(C, C) image counts, rows are true classes, from [true, predicted, count] entries."""
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    for true, predicted, count in cells:
        counts[true, predicted] = count
    return counts
