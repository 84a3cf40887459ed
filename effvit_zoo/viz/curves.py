"""Training curves: loss, metrics and learning rate over the epochs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from . import style

PANEL_INCHES, RATE_SHARE = 12 / 2.8, 0.8
"""Width of a panel, and that of the learning rate as a share of it."""


_BESIDE: Any = {"loc": "right", "fontsize": 9.5, "fontweight": "normal"}  # text on the line of a panel's title


class Panel(NamedTuple):
    """A metric's panel.

    Attributes:
        title: Heading, with the unit.
        training: Column of the training values, "" for none.
        validation: Column of the validation values, "" for none.
        higher_is_better: Direction in which the best epoch is sought; None marks none.
    """

    title: str
    training: str
    validation: str
    higher_is_better: bool | None = None


LOSS = Panel("Loss", "train_loss", "val_loss")


def curves(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    panels: Iterable[tuple[str, str, str, bool | None]] = (),
    loss: str = "",
) -> None:
    """Draws loss, metrics and learning rate over the epochs, a panel each. A panel or line without values is left out.

    Args:
        rows: A mapping per epoch: epoch, train_loss, val_loss, lr, images_per_second and the columns of `panels`. Numbers or
            their text; all but `epoch` may be missing, empty or None.
        path: The file to write.
        panels: The metrics, each a `Panel` or a tuple of its values.
        loss: What the training loss is, where it is another than the validation's and so has axes of its own.

    Raises:
        ValueError: There are no rows.
    """
    drawn = _drawers(rows, panels, loss)
    widths = [1.0] * (len(drawn) - 1) + [RATE_SHARE]
    with style.figure(PANEL_INCHES * sum(widths), 3.9, path) as fig:
        axes = fig.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        for ax, draw in zip(axes, drawn, strict=True):
            draw(ax)


def single_curves(
    rows: Sequence[Mapping[str, Any]], panels: Iterable[tuple[str, str, str, bool | None]] = (), loss: str = ""
) -> list[bytes]:
    """The panels of `curves` as a PNG each, for narrow screens."""
    images = []
    for draw in _drawers(rows, panels, loss):
        png = io.BytesIO()
        with style.figure(PANEL_INCHES, 3.6, png) as fig:
            draw(fig.subplots())
        images.append(png.getvalue())
    return images


def _drawers(
    rows: Sequence[Mapping[str, Any]], panels: Iterable[tuple[str, str, str, bool | None]], loss: str
) -> list[Callable[[Axes], None]]:
    """What fills the axes of each panel that has values, the learning rate's last."""
    if not rows:
        raise ValueError("no epochs to draw: expected at least one row")
    epochs = _column(rows, "epoch")

    def values(panel: Panel, ax: Axes, columns: Sequence[list[float]]) -> None:
        _draw(ax, panel.title, epochs, [("training", style.ORANGE), ("validation", style.BLUE)], columns)
        if loss and panel.training == LOSS.training:
            ax.set_title(loss, **_BESIDE, color=style.QUIET)
        if panel.higher_is_better is not None:
            _mark_best(ax, epochs, columns[1], panel.higher_is_better)

    def rate(ax: Axes) -> None:
        _draw(ax, "Learning rate", epochs, [("", style.QUIET)], [_column(rows, "lr")])
        ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        speeds = [speed for speed in _column(rows, "images_per_second") if np.isfinite(speed)]
        if speeds:
            ax.set_xlabel(f"epoch\n{median(speeds):,.0f} training images per second")

    losses: tuple[Panel, ...] = (LOSS,)
    if loss:
        losses = Panel("Training loss", "train_loss", ""), Panel("Validation loss", "", "val_loss")
    drawers: list[Callable[[Axes], None]] = []
    for panel in (*losses, *(Panel(*panel) for panel in panels)):
        columns = _column(rows, panel.training), _column(rows, panel.validation)
        if _any_finite(*columns):
            drawers.append(partial(values, panel, columns=columns))
    return [*drawers, rate]


def _any_finite(*columns: Sequence[float]) -> bool:
    return any(np.isfinite(column).any() for column in columns)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """A column as numbers, NaN where there is no value."""
    return [float("nan") if row.get(key) in (None, "") else float(row[key]) for row in rows]


def _draw(
    ax: Axes, title: str, epochs: list[float], lines: Sequence[tuple[str, str]], columns: Sequence[list[float]]
) -> None:
    """Fills axes with a line (name, colour) per column; a line without any value is left out."""
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


def _mark_best(ax: Axes, epochs: Sequence[float], values: Sequence[float], higher_is_better: bool) -> None:
    """Rings the first epoch of the best value, and states both."""
    if not _any_finite(values):
        return
    best = int(np.nanargmax(values) if higher_is_better else np.nanargmin(values))
    ax.plot(epochs[best], values[best], "o", markersize=9, markerfacecolor="none", markeredgecolor=style.BLUE)
    ax.set_title(
        f"best {values[best]:.2f} at epoch {epochs[best]:.0f}",
        **_BESIDE,
        color=style.BLUE,
    )
