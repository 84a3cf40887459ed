"""Cost over the number of tokens: time and memory side by side on logarithmic axes, where a power of N is a straight line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from . import style

PATCH = 16  # pixels along a patch, for the image sizes below the axis


class Line(NamedTuple):
    """One mechanism in one pass, a value per number of tokens; a reference is drawn in ink and dashes instead of a colour."""

    name: str
    tokens: Sequence[int]
    milliseconds: Sequence[float]
    megabytes: Sequence[float]
    time_exponent: float | None = None
    memory_exponent: float | None = None
    reference: bool = False


def scaling(passes: Mapping[str, Sequence[Line]], title: str, subtitle: str, path: str | Path) -> None:
    """Draws a row of two panels, time and peak memory, for every pass. Exponents stand behind the lines' names.

    Args:
        passes: Name of the pass -> its lines. A name has the same colour in all panels.
        title: What was measured.
        subtitle: On what.
        path: The file to write.

    Raises:
        ValueError: There is nothing to draw.
    """
    names = list(dict.fromkeys(line.name for lines in passes.values() for line in lines if not line.reference))
    if not any(passes.values()):
        raise ValueError("no measurements to draw: expected at least one line")
    colours = {name: style.SERIES[i % len(style.SERIES)] for i, name in enumerate(names)}
    with style.figure(13, 0.8 + 5.2 * len(passes), path) as fig:
        fig.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=13, fontweight="bold")
        fig.text(0.012, 1 - 0.46 / fig.get_figheight(), subtitle, fontsize=9.5, color=style.QUIET, va="top")
        grid = fig.subplots(len(passes), 2, squeeze=False)
        for (name, lines), (time, memory) in zip(passes.items(), grid, strict=True):
            _panel(
                time,
                f"Time, {name}",
                [(line, line.milliseconds, line.time_exponent) for line in lines],
                colours,
                FuncFormatter(lambda value, _: _seconds(value)),
            )
            _panel(
                memory,
                f"Peak memory, {name}",
                [(line, line.megabytes, line.memory_exponent) for line in lines],
                colours,
                FuncFormatter(lambda value, _: _bytes(value)),
            )


def _panel(
    ax: Axes,
    title: str,
    lines: Sequence[tuple[Line, Sequence[float], float | None]],
    colours: Mapping[str, str],
    unit: FuncFormatter,
) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ends: list[tuple[float, float, str, str]] = []
    tokens = sorted({n for line, *_ in lines for n in line.tokens})
    zeros: list[str] = []
    for line, values, exponent in lines:
        measured = dict(zip(line.tokens, values, strict=True))
        zeros += [f"{line.name} at {n:,}" for n, value in measured.items() if value <= 0]
        drawn = [(n, value) for n, value in measured.items() if value > 0]
        if not drawn:
            continue
        colour = colours.get(line.name, style.INK)
        ax.plot(
            tokens,  # the line is broken where there is no value
            [value if (value := measured.get(n, 0)) > 0 else math.nan for n in tokens],
            color=colour,
            linestyle=(0, (4, 2)) if line.reference else "-",
            marker="o",
            markersize=3.5,
            zorder=3 if line.reference else 2,
        )
        label = line.name if exponent is None else f"{line.name}  {exponent:.2f}"
        x, y = drawn[-1]
        ends.append((x, y, label, colour))
    ax.set_title(f"{title}, logarithmic axes")
    left_out = f"\n0, so not on this axis: {', '.join(zeros)}" if zeros else ""
    ax.set_xlabel(f"tokens (side of a square image, patches of 16 pixels){left_out}")
    ax.xaxis.set_major_locator(FixedLocator(tokens))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(round(value))))
    ax.yaxis.set_major_locator(LogLocator(numticks=12))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(unit)
    ax.tick_params(length=0)
    ax.margins(x=0.03, y=0.05)
    style.label_ends(ax, ends, gap=0.047)


def _tokens(n: int) -> str:
    side = math.isqrt(n)
    return f"{n:,}\n{side * PATCH} px" if side * side == n else f"{n:,}"


def _seconds(milliseconds: float) -> str:
    for limit, factor, unit in ((1, 1e3, "µs"), (1e3, 1, "ms")):
        if milliseconds < limit:
            return f"{milliseconds * factor:g} {unit}"
    return f"{milliseconds / 1e3:g} s"


def _bytes(megabytes: float) -> str:
    for limit, factor, unit in ((1, 1e3, "kB"), (1e3, 1, "MB")):
        if megabytes < limit:
            return f"{megabytes * factor:g} {unit}"
    return f"{megabytes / 1e3:g} GB"
