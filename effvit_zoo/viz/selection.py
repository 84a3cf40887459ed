"""Token selection: the tokens that each layer keeps, over the image, and a metric against its cost in MACs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
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


def metric_over_macs(
    lines: Mapping[str, Sequence[Point]],
    dense: Point,
    path: str | Path,
    *,
    key: str,
    label: str,
    controls: Mapping[str, Sequence[Point]] | None = None,
) -> None:
    """Draws a metric over multiply-accumulates.

    Args:
        lines: Name -> points with `macs`, `ratio` and the metric, drawn as a line with its ratios.
        dense: The dense model's point.
        path: The file to write.
        key: The metric's key in a point.
        label: Its title, with the unit.
        controls: Name -> points of the same form, drawn as marks without a line.
    """
    colours = cycle(style.SERIES)
    with style.figure(8, 5, path) as fig:
        ax = fig.subplots()
        ax.set_title("Accuracy against computation, by attention ratio")
        ax.set_xlabel("multiply-accumulates per image, millions")
        ax.set_ylabel(label)
        ax.axhline(dense[key], color=style.RULE, linewidth=1, zorder=1)
        for name, points in lines.items():
            xs, ys = _places(sorted(points, key=lambda point: point["macs"]), key)
            colour = next(colours)
            ax.plot(xs, ys, marker="o", color=colour, label=name)
            ratios: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 8.5, "color": colour}
            for point in points:
                ax.annotate(f"r = {point['ratio']:g}", (point["macs"] / 1e6, point[key]), (0, 8), **ratios)
        marks: Any = {"linestyle": "none", "marker": "_", "markersize": 12, "markeredgewidth": 2}
        for name, points in (controls or {}).items():
            ax.plot(*_places(points, key), color=next(colours), label=name, **marks)
        ax.plot(*_places([dense], key), marker="D", color=style.INK, linestyle="none", label="dense")
        ax.margins(0.12, 0.18)
        ax.legend(frameon=False, fontsize=9, loc="lower right")


def _places(points: Sequence[Point], key: str) -> tuple[list[float], list[float]]:
    """Million MACs and the metric of points."""
    return [point["macs"] / 1e6 for point in points], [point[key] for point in points]
