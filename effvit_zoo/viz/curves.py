"""What a training run came to, at a glance: curves over the epochs, and which classes were taken for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator

from . import style

MAX_TEXT_CLASSES = 20
MAX_COUNT_CLASSES = 12
TICKS = 24  # names along an axis of a matrix too large for all of them


_TRAINING, _VALIDATION = ("training", style.ORANGE), ("validation", style.BLUE)


def curves(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Loss, accuracy and learning rate over the epochs, in one figure.

    Args:
        rows: A mapping per epoch: epoch; train_loss and val_loss; top1, train_top1, top5 in percent; lr;
            images_per_second. Numbers or their text; all but `epoch` may be missing, empty or None.
        path: The file to write.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("no epochs to draw: expected at least one row")
    epochs = _column(rows, "epoch")
    with style.figure(12, 3.9, path) as fig:
        loss, accuracy, rate = fig.subplots(1, 3, width_ratios=(1, 1, 0.8))
        losses = _column(rows, "train_loss"), _column(rows, "val_loss")
        top1s = _column(rows, "train_top1"), _column(rows, "top1")
        _panel(loss, "Loss", epochs, [_TRAINING, _VALIDATION], losses)
        _panel(accuracy, "Top-1, %", epochs, [_TRAINING, _VALIDATION], top1s)
        _mark_best(accuracy, epochs, top1s[1])
        _panel(rate, "Learning rate", epochs, [("", style.QUIET)], [_column(rows, "lr")])
        rate.set_ylim(0, 1.05 * rate.get_ylim()[1])
        rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        speeds = [speed for speed in _column(rows, "images_per_second") if np.isfinite(speed)]
        if speeds:
            rate.set_xlabel(f"epoch\n{median(speeds):,.0f} training images per second")


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str], path: str | Path) -> None:
    """Rows are true classes, columns predicted ones; colour is the share of the row.

    Up to 20 classes each cell says its percentage, up to 12 its count too; beyond, colours alone and a name here and there.

    Args:
        counts: (C, C) image counts.
        class_names: C names.
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
    totals = counts.sum(axis=1, keepdims=True)
    percent = np.divide(100.0 * counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    side = float(np.clip(0.62 * num_classes, 4.2, 9))
    with style.figure(side + 2.4, side + 1.6, path) as fig:
        ax = fig.subplots()
        ax.grid(False)
        ax.set_facecolor(style.RULE)  # shows through where a class has no images
        # Errors are a few percent of a row: a linear scale would show the diagonal and nothing else.
        image = ax.imshow(percent, cmap=style.HEAT, norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
        _name_ticks(ax, class_names, inches=side / num_classes)
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


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """A column as numbers, NaN where there is none."""
    return [float("nan") if row.get(key) in (None, "") else float(row[key]) for row in rows]


def _panel(
    ax: Axes, title: str, epochs: list[float], lines: Sequence[tuple[str, str]], columns: Sequence[list[float]]
) -> None:
    """One set of axes with a line (name, colour) per column; a line without any value is left out."""
    ends = []
    for (name, colour), values in zip(lines, columns, strict=True):
        drawn = [(x, y) for x, y in zip(epochs, values, strict=True) if np.isfinite(y)]
        if not drawn:
            continue
        marker = "o" if len(drawn) <= 12 else ""
        ax.plot(*zip(*drawn, strict=True), color=colour, marker=marker, markersize=3.5)
        ends.append((*drawn[-1], name, colour))
    ax.set_title(title)
    ax.set_xlabel("epoch")
    ax.tick_params(length=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    ax.margins(x=0.04, y=0.1)
    if len(epochs) == 1:
        ax.set_xlim(epochs[0] - 1, epochs[0] + 1)
        ax.set_xticks(epochs)
    style.label_ends(ax, [end for end in ends if end[2]])


def _mark_best(ax: Axes, epochs: list[float], top1: list[float]) -> None:
    """A ring around the first epoch of the highest accuracy, and what it is."""
    if not np.isfinite(top1).any():
        return
    best = int(np.nanargmax(top1))
    ax.plot(epochs[best], top1[best], "o", markersize=9, markerfacecolor="none", markeredgecolor=style.BLUE)
    ax.set_title(
        f"best {top1[best]:.2f} at epoch {epochs[best]:.0f}",
        loc="right",
        fontsize=9.5,
        fontweight="normal",
        color=style.BLUE,
    )


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
