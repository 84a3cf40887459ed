"""What token selection looks like: the tokens that each layer kept, over the image, and what they cost against what they are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import style

VEIL = (214, 224, 243)  # has a hue, so that it differs from any part of a grey picture


def selected_tokens(
    image: Image.Image, layers: Mapping[str, np.ndarray], title: str, subtitle: str, path: str | Path
) -> None:
    """The image as the model sees it, and per layer the same with the patches veiled that did not enter it.

    Args:
        image: What the model sees.
        layers: Name of a layer -> (rows, columns) of booleans, True where a patch entered it.
        title: First line.
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
    with style.figure(2.6 * columns, 0.9 + 2.85 * rows, path) as fig:
        fig.suptitle(f"{title}\n", x=0.02, ha="left", fontsize=12, fontweight="bold")
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


def accuracy_over_macs(
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    dense: Mapping[str, Any],
    path: str | Path,
    controls: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Top-1 over multiply-accumulates.

    Args:
        lines: Name -> points with `macs`, `top1` and `ratio`, drawn as a line with its ratios.
        dense: The point of the dense model.
        path: The file to write.
        controls: Name -> points of the same form, drawn as marks without a line.
    """
    with style.figure(8, 5, path) as fig:
        ax = fig.subplots()
        ax.set_title("Accuracy against computation, by attention ratio")
        ax.set_xlabel("multiply-accumulates per image, millions")
        ax.set_ylabel("top-1, %")
        ax.axhline(dense["top1"], color=style.RULE, linewidth=1, zorder=1)
        for index, (name, points) in enumerate(lines.items()):
            ordered = sorted(points, key=lambda point: point["macs"])
            colour = style.SERIES[index]
            ax.plot(
                [p["macs"] / 1e6 for p in ordered], [p["top1"] for p in ordered], marker="o", color=colour, label=name
            )
            for point in ordered:
                place = (point["macs"] / 1e6, point["top1"])
                ax.annotate(
                    f"r = {point['ratio']:g}",
                    place,
                    (0, 8),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                    color=colour,
                )
        for index, (name, points) in enumerate((controls or {}).items(), start=len(lines)):
            ax.plot(
                [p["macs"] / 1e6 for p in points],
                [p["top1"] for p in points],
                linestyle="none",
                marker="_",
                markersize=12,
                markeredgewidth=2,
                color=style.SERIES[index % len(style.SERIES)],
                label=name,
            )
        ax.plot(dense["macs"] / 1e6, dense["top1"], marker="D", color=style.INK, linestyle="none", label="dense")
        ax.margins(0.12, 0.18)
        ax.legend(frameon=False, fontsize=9, loc="lower right")
