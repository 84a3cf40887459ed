"""Confusion matrix: which classes were taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import FuncFormatter

from . import style
from .fonts import drawable

MAX_TEXT_CLASSES = 20
MAX_COUNT_CLASSES = 12
TICKS = 24
"""Number of names along an axis of a matrix too large for all of them."""


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str], path: str | Path) -> None:
    """Rows are true classes, columns predicted ones; colour is the share of the row.

    Up to 20 classes each cell says its percentage, up to 12 its count too; beyond, colours alone and a name here and there.

    Args:
        counts: (C, C) image counts.
        class_names: C names; numbers stand for those that no font here can draw.
        path: The file to write.

    Raises:
        ValueError: The shapes don't fit.
    """
    counts = np.asarray(counts)
    num_classes = len(class_names)
    if counts.shape != (num_classes, num_classes) or not num_classes:
        raise ValueError(
            f"expected counts of shape {(num_classes, num_classes)} for {num_classes} names, got {counts.shape}"
        )
    names = drawable(class_names)
    totals = counts.sum(axis=1, keepdims=True)
    percent = np.divide(100.0 * counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    side = float(np.clip(0.62 * num_classes, 4.2, 9))
    with style.figure(side + 2.4, side + 1.6, path, names) as fig:
        ax = fig.subplots()
        ax.grid(False)
        ax.set_facecolor(style.RULE)  # shows through where a class has no images
        # Errors are a few percent of a row: a linear scale would show the diagonal and nothing else.
        image = ax.imshow(percent, cmap=style.HEAT, norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
        _name_ticks(ax, names, inches=side / num_classes)
        ax.set(xlabel="predicted", ylabel="true")
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.set_title(_matrix_title(counts))
        if num_classes <= MAX_TEXT_CLASSES:
            _write_cells(ax, counts, percent)
        bar = fig.colorbar(image, ax=ax, shrink=0.72, aspect=32, pad=0.02, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
        bar.ax.tick_params(length=0)


def _matrix_title(counts: np.ndarray) -> str:
    images = int(counts.sum())
    share = f": {100 * np.trace(counts) / images:.2f} % right" if images else ""
    return f"{images:,} images{share}"


def _name_ticks(ax: Axes, class_names: Sequence[str], inches: float) -> None:
    """Class names along both axes, `inches` per class; slanted where they wouldn't fit side by side."""
    step = max(1, -(-len(class_names) // TICKS))
    places = range(0, len(class_names), step)
    names = [style.shorten(class_names[place], 26) for place in places]
    slanted = max(map(len, names)) * 0.085 > inches * step
    layout: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    ax.set_xticks(list(places), names, **layout)
    ax.set_yticks(list(places), names)
    ax.tick_params(length=0 if step == 1 else 3, labelcolor=style.INK)


def _write_cells(ax: Axes, counts: np.ndarray, percent: np.ndarray) -> None:
    """Percentages, and counts below them where there is room; a cell without images stays empty."""
    few = len(counts) <= MAX_COUNT_CLASSES
    cell: Any = {"textcoords": "offset points", "ha": "center", "va": "center"}
    for row, column in np.argwhere(counts > 0):
        share = percent[row, column]
        text = f"{share:.0f}" if share >= 9.95 else f"{share:.1f}"
        colour = style.PAPER if share > 30 else style.INK
        ax.annotate(text, (column, row), (0, 4 if few else 0), color=colour, fontsize=9 if few else 7.5, **cell)
        if few:
            count = f"{counts[row, column]:,}"
            ax.annotate(count, (column, row), (0, -8), color=colour, fontsize=6.5, alpha=0.75, **cell)
    meaning = "cells: percent of the true class" + (", number of images below" if few else "")
    ax.set_xlabel(f"predicted\n({meaning})")
