"""Style of all figures: colours, type sizes, lines, and how a figure is written to its file.

Figures are drawn on their own canvas; pyplot, its current figure and the caller's backend stay untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ..run_folder import replacing
from .fonts import families

INK, QUIET, RULE, PAPER = "#22272e", "#6b7480", "#d9dde2", "#ffffff"
BLUE, ORANGE, GREEN = "#2f6db0", "#d4682a", "#3d8f5f"
SERIES = (BLUE, ORANGE, GREEN, "#8c5aa8", "#b98a1d", "#4a9aa8", "#b8475f", "#7a6a58", "#6d7fd1")
HEAT = LinearSegmentedColormap.from_list("heat", ["#f6f8fb", "#c5d8ec", "#7fabd6", "#3a78b8", "#153d6b"])

_RC: Any = {
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$5 note"
    "axes.edgecolor": RULE,
    "axes.labelcolor": QUIET,
    "axes.labelsize": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff2",
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


@contextmanager
def figure(width: float, height: float, path: str | Path | BinaryIO, texts: Iterable[str] = ()) -> Iterator[Figure]:
    """A figure of the given size in inches, written when the block ends, at 150 dpi.

    Args:
        width: In inches.
        height: In inches.
        path: The file to write, of the type that its suffix says; or an open one, which gets a PNG.
        texts: Texts in the figure that come from outside, in any script.
    """
    with matplotlib.rc_context(_RC | {"font.family": families(texts)}), _quiet_fonts():
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15, wspace=0.06)
        fig = Figure(figsize=(width, height), layout=layout)
        FigureCanvasAgg(fig)
        yield fig
        if not isinstance(path, str | Path):
            fig.savefig(path, format="png", dpi=150)
            return
        with replacing(Path(path)) as writing:
            fig.savefig(writing, format=Path(path).suffix.lstrip(".") or "png", dpi=150)


@contextmanager
def _quiet_fonts() -> Iterator[None]:
    """No warning for each font that has no bold face."""
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def label_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.075) -> None:
    """Writes each line's name right of its last point, instead of a legend. Names that would overlap are moved apart.

    Args:
        ax: Axes with all their lines.
        ends: (x, y, name, colour) per line, in data coordinates.
        gap: Least distance between two names as a share of the axes' height.
    """
    ax.autoscale_view()  # limits are settled lazily
    to_axes = ax.transData + ax.transAxes.inverted()
    placed: list[tuple[float, float, str, str]] = []
    for x, y, name, colour in ends:
        x_axes, y_axes = to_axes.transform((x, y))
        placed.append((y_axes, x_axes, name, colour))
    placed.sort()
    heights = [y for y, *_ in placed]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    overflow = max(0.0, heights[-1] - 1) if heights else 0.0
    for height, (_, x_axes, name, colour) in zip(heights, placed, strict=True):
        ax.annotate(
            name,
            (x_axes, height - overflow),
            xycoords="axes fraction",
            xytext=(7, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9.5,
            annotation_clip=False,
        )


def shorten(text: str, length: int) -> str:
    """At most `length` characters, the end replaced by an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
