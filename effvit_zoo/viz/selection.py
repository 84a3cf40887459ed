"""Token selection: the tokens that each layer keeps, over the image, and a metric against its cost in MACs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from . import style
from .fonts import clean, is_drawable

Point = Mapping[str, Any]

VEIL = (214, 224, 243)  # has a hue, so that it differs from any part of a grey image


def selected_tokens(
    image: Image.Image, layers: Mapping[str, np.ndarray], title: str, subtitle: str, path: str | Path
) -> None:
    """The image as the model sees it, and per layer the same with the patches veiled that did not enter it.

    Args:
        image: What the model sees.
        layers: Name of a layer -> (rows, columns) of booleans, True where a patch entered it.
        title: First line; left out where no font here can draw it.
        subtitle: Second line.
        path: The file to write.

    Raises:
        ValueError: There is no layer to draw.
    """
    if not layers:
        raise ValueError("no layer selects tokens: expected an attention ratio below 1")
    scale = max(1, math.ceil(224 / max(image.size)))
    pixels = np.asarray(
        image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    )
    panels = {"input": None, **layers}
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    with style.figure(2.6 * columns, 0.9 + 2.85 * rows, path, [title]) as fig:
        fig.suptitle(
            f"{clean(title) if is_drawable(title) else ''}\n", x=0.02, ha="left", fontsize=12, fontweight="bold"
        )
        fig.text(0.02, 1 - 0.42 / fig.get_figheight(), subtitle, fontsize=9.5, color=style.QUIET, va="top")
        axes = fig.subplots(rows, columns, squeeze=False).flatten()
        for ax in axes:
            ax.set_axis_off()
        for ax, (name, kept) in zip(axes, panels.items(), strict=False):
            shown = pixels if kept is None else _veiled(pixels, kept)
            ax.imshow(shown)
            share = "" if kept is None else f", {int(kept.sum())} of {kept.size}"
            ax.set_title(f"{name}{share}", fontsize=9.5, fontweight="normal", pad=5)


def _veiled(pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) with the patches outside `kept`, (rows, columns), behind a coloured veil."""
    height, width = pixels.shape[:2]
    rows = np.arange(height) * kept.shape[0] // height
    columns = np.arange(width) * kept.shape[1] // width
    inside = kept[rows][:, columns][..., None]
    grey = pixels.mean(axis=2, keepdims=True)
    return np.where(inside, pixels, 0.2 * grey + 0.8 * np.array(VEIL)).astype(np.uint8)


def metric_over_cost(
    name: str,
    points: Sequence[Point],
    dense: Point,
    path: str | Path,
    *,
    key: str,
    label: str,
    subtitle: str = "",
    controls: Mapping[str, Sequence[Point]] | None = None,
) -> None:
    """Draws a metric over multiply-accumulates, and over measured time beside it; with controls also over the attention ratio.

    Costs start at zero; the metric's axis does where that leaves something to see, else it says where it starts. Points are joined by
    nothing: between them nothing was measured.

    Args:
        name: What was measured at several attention ratios.
        points: Its points with `macs`, `ratio`, the metric and, where time was measured, `ms`.
        dense: The dense model's point.
        path: The file to write.
        key: The metric's key in a point.
        label: Its title, with the unit.
        subtitle: On what host it was measured, and how.
        controls: Name -> points with `ratio` and the metric; what they cost was not measured.
    """
    costs = [("multiply-accumulates per image, millions", lambda point: point["macs"] / 1e6)]
    if all("ms" in point for point in (dense, *points)):
        costs.append(("time per image, ms", lambda point: point["ms"]))
    panels = len(costs) + bool(controls)
    values = [point[key] for point in (dense, *points, *chain.from_iterable((controls or {}).values()))]
    with style.figure(4.9 * panels, 4.6, path) as fig:
        fig.suptitle("Token selection against the dense model\n", x=0.012, ha="left", fontsize=12, fontweight="bold")
        fig.text(0.012, 1 - 0.42 / 4.6, subtitle, fontsize=9, color=style.QUIET, va="top")
        axes = fig.subplots(1, panels, squeeze=False)[0]
        for ax, (title, cost) in zip(axes, costs, strict=False):
            ax.set_xlabel(title)
            _scatter(ax, name, [(cost(point), point[key], f"r = {point['ratio']:g}") for point in points], style.BLUE)
            _scatter(ax, "dense", [(cost(dense), dense[key], "dense")], style.INK, "D")
            ax.set_xlim(0, 1.15 * max(map(cost, (dense, *points))))
        if controls:
            _by_ratio(axes[-1], {name: points, **controls}, key)
        for ax in axes:
            _honest_axis(ax, values, label)


def _by_ratio(ax: Axes, groups: Mapping[str, Sequence[Point]], key: str) -> None:
    ax.set_xlabel("attention ratio")
    for (title, points), colour in zip(groups.items(), cycle(style.SERIES), strict=False):
        marker = "o" if points is next(iter(groups.values())) else "_"
        _scatter(ax, title, [(point["ratio"], point[key], "") for point in points], colour, marker)
    ax.set_xlim(-0.05, 1.05)
    ax.legend(frameon=False, fontsize=8.5, loc="best")


def _scatter(ax: Axes, name: str, places: Sequence[tuple[float, float, str]], colour: str, marker: str = "o") -> None:
    """Marks without a line, each with its text."""
    for x, y, text in places:
        ax.annotate(text, (x, y), (0, 8), textcoords="offset points", ha="center", fontsize=8.5, color=colour)
    xs, ys, _ = zip(*places, strict=True)
    ax.plot(xs, ys, marker, color=colour, label=name, markersize=12 if marker == "_" else 6, markeredgewidth=2)


def _honest_axis(ax: Axes, values: Sequence[float], label: str) -> None:
    """From zero, or from where the values are and saying so."""
    low, high = min(values), max(values)
    pad = 0.15 * (high - low) or 0.05 * abs(high) or 1.0
    start = low - pad if 0 < high - low < 0.5 * high else 0.0
    ax.set_ylim(start, high + 1.3 * pad)
    ax.set_ylabel(f"{label} (axis from {start:.3g}, not from 0)" if start else label)
