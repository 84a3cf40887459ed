"""`effzoo benchmark attention`: time and memory of every mechanism alone, as the number of tokens grows.

Each is the function of q, k and v of one image, without projections, that its mixer gives by `benchmark_function`. q, k and v are
contiguous in the axis order that the function takes (`--layout separate`), or views of one projection's output, (1, N, 3, H, D) (`--layout
packed`): tokens that no longer fit the cache cost more there. Naive softmax (which writes the N x N table) and torch's fused one are the
references. Convolutional modulation and the 2-D form of cosFormer take the tokens as a grid; multi-scale linear attention is measured at
one scale.

Time is the median of calls that take turns; calls of more than half a second are repeated three times only. Memory is the peak on top of
inputs and output (`peak.peak_bytes`), forward + backward including the gradients. Exponents are slopes in the double logarithmic plot
between 1,024 and 16,384 tokens: 1 is linear, 2 quadratic. Forward runs without gradients.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_leaves

from ..attention import TOKEN_MIXERS, MixerShape, TokenMixer
from ..attention.softmax import naive_softmax_attention
from ..errors import unknown_choice
from ..measure.host import gemm_gflops, processor_name
from ..measure.peak import peak_bytes
from ..measure.timing import time_in_turns
from ..report.rows import check_output, make_console, write_rows
from ..viz.scaling import Line, scaling

Tensor = torch.Tensor
Function = Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]]

FIT = (1024, 16384)
"""Tokens between which the exponents are fitted."""
SLOW_SECONDS, SLOW_REPEATS = 0.5, 3
REFERENCE = "sdpa"


AXES: dict[str, Callable[[Tensor], Tensor]] = {
    "heads": lambda x: x.transpose(1, 2),  # (B, H, N, D)
    "tokens": lambda x: x.flatten(2),  # (B, N, C)
    "channels": lambda x: x.permute(0, 2, 3, 1),  # (B, H, D, N)
}
"""`TokenMixer.axes` -> view of (B, N, H, D) in that order."""


class NaiveSoftmax(TokenMixer):
    """Softmax attention with all weights in memory."""

    label = "softmax, naive"
    function = staticmethod(naive_softmax_attention)


MECHANISMS: dict[str, type[TokenMixer]] = {
    "naive": NaiveSoftmax,
    REFERENCE: TOKEN_MIXERS["softmax"],
    **{name: mixer for name, mixer in TOKEN_MIXERS.items() if name != "softmax"},
}


def make_inputs(mixer: type[TokenMixer], qkv: Tensor, packed: bool) -> tuple[Tensor, ...]:
    """(1, N, 3, H, D) -> q, k and v for a mixer's function, views of it or contiguous copies."""
    views = (AXES[mixer.axes](x) for x in qkv.unbind(2))
    return tuple(views) if packed else tuple(x.clone(memory_format=torch.contiguous_format) for x in views)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(args: argparse.Namespace) -> None:
    """Measures, prints and draws; `args` as `arguments.attention` defines them. Raises `UserError`."""
    mechanisms = args.mechanisms or list(MECHANISMS)
    for name in mechanisms:
        if name not in MECHANISMS:
            raise unknown_choice("mechanism", name, MECHANISMS)
    check_output(args.output)
    torch.set_num_threads(args.threads)
    console = make_console(150)
    host = {"processor": processor_name(), "threads": args.threads, "gemm_gflops": gemm_gflops()}
    header = f"{host['processor']}, {args.threads} thread(s), float32 matrix products {host['gemm_gflops']:.0f} GFLOP/s"
    console.print(f"{header}, torch {torch.__version__}", highlight=False)
    rows = []
    for dtype in args.dtype:
        for backward in (False,) if args.no_backward else (False, True):
            shapes = [MixerShape(tokens, args.heads, args.dim, DTYPES[dtype]) for tokens in sorted(set(args.tokens))]
            with console.status(f"{dtype}, {pass_name(backward)}"):
                block = measure(mechanisms, shapes, backward, args.repeats, args.layout)
            add_exponents(block)
            print_table(
                console,
                block,
                f"{dtype}, {pass_name(backward)}, {args.heads} heads of {args.dim} channels, {args.layout}",
            )
            rows += [{"dtype": dtype, **row, **host} for row in block]
    if args.output:
        write_rows(rows, args.output)
        for dtype in args.dtype:
            path = args.output.with_name(f"{args.output.stem}-{dtype}.png")
            title = f"One image, {args.heads} heads of {args.dim} channels, {dtype}, q, k, v {args.layout}"
            subtitle = (
                f"{header}. Memory: peak on top of inputs and output. "
                f"Numbers after names: exponent of N, {FIT[0]:,} to {FIT[1]:,} tokens."
            )
            scaling(lines([row for row in rows if row["dtype"] == dtype]), title, subtitle, path)
            console.print(f"plot: {path}", highlight=False)


def pass_name(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


def measure(
    names: list[str], shapes: list[MixerShape], backward: bool, repeats: int, layout: str = "separate"
) -> list[dict[str, Any]]:
    """A row per shape and mechanism: milliseconds, peak_mb, and the speed relative to fused softmax.

    Shapes take turns too, so that a change of the clock does not look like a change of the exponent. A row is skipped if the naive form's
    tables do not fit the free memory.
    """
    calls: dict[tuple[str, MixerShape], Callable[[], Any]] = {}
    for shape in shapes:
        qkv = torch.randn(1, shape.tokens, 3, shape.heads, shape.dim, generator=torch.Generator().manual_seed(0))
        tables = (4 if backward else 2) * shape.heads * shape.tokens**2 * shape.dtype.itemsize
        fits = tables < 0.8 * psutil.virtual_memory().available
        for name in names:
            if name != "naive" or fits:
                inputs = make_inputs(MECHANISMS[name], qkv.to(shape.dtype), packed=layout == "packed")
                calls[name, shape] = bound(MECHANISMS[name].benchmark_function(shape), inputs, backward)
    with torch.set_grad_enabled(backward):
        megabytes = {key: peak_bytes(call) / 2**20 for key, call in calls.items()}
        milliseconds = _milliseconds(calls, repeats)
    return [
        {
            "mechanism": name,
            "pass": pass_name(backward),
            "tokens": shape.tokens,
            "heads": shape.heads,
            "dim": shape.dim,
            "layout": layout,
            "milliseconds": milliseconds[name, shape],
            "peak_mb": megabytes[name, shape],
            "times_sdpa": milliseconds[REFERENCE, shape] / milliseconds[name, shape]
            if (REFERENCE, shape) in milliseconds
            else None,
        }
        for name, shape in calls
    ]


def _milliseconds(
    calls: dict[tuple[str, MixerShape], Callable[[], Any]], repeats: int
) -> dict[tuple[str, MixerShape], float]:
    """Median time of each call; quick ones take turns between single calls of slow ones."""
    quick: dict[tuple[str, MixerShape], Callable[[], Any]] = {}
    slow: dict[tuple[str, MixerShape], Callable[[], Any]] = {}
    for key, call in calls.items():
        start = time.perf_counter()
        call()
        (quick if time.perf_counter() - start <= SLOW_SECONDS else slow)[key] = call
    parts = [
        time_in_turns(quick, math.ceil(repeats / SLOW_REPEATS)) | time_in_turns(slow, 1, burst=1, warmup=0)
        for _ in range(SLOW_REPEATS)
    ]
    return {key: statistics.median(part[key] for part in parts) for key in calls}


def bound(function: Function, inputs: tuple[Tensor, ...], backward: bool) -> Callable[[], Any]:
    """The call to be measured: the function on its inputs, with `backward` also the gradients of its inputs."""
    if not backward:
        return lambda: function(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        gradients = [torch.ones_like(x) for x in tree_leaves(function(*leaves))]

    def call() -> Any:
        out = function(*leaves)
        # `additive` has no values, `conv_mod` no keys
        torch.autograd.grad(tree_leaves(out), leaves, gradients, allow_unused=True)
        return out

    return call


def add_exponents(rows: list[dict[str, Any]]) -> None:
    """Adds time_exponent and memory_exponent to all rows of a mechanism; None where there are no two points to fit."""
    for name in {row["mechanism"] for row in rows}:
        own = [row for row in rows if row["mechanism"] == name]
        for key, value in (("time_exponent", "milliseconds"), ("memory_exponent", "peak_mb")):
            exponent = slope([(row["tokens"], row[value]) for row in own])
            for row in own:
                row[key] = exponent


def slope(points: list[tuple[int, float]]) -> float | None:
    """Least-squares slope of log y over log x, for the x within `FIT` and the y above 0."""
    logs = [(math.log(x), math.log(y)) for x, y in points if FIT[0] <= x <= FIT[1] and y > 0]
    if len(logs) < 2:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def lines(rows: list[dict[str, Any]]) -> dict[str, list[Line]]:
    """Rows of one dtype -> the lines of the plot, per pass."""
    passes: dict[str, list[Line]] = {}
    for row in rows:
        if any(line.name == MECHANISMS[row["mechanism"]].label for line in passes.setdefault(row["pass"], [])):
            continue
        own = [r for r in rows if r["mechanism"] == row["mechanism"] and r["pass"] == row["pass"]]
        passes[row["pass"]].append(
            Line(
                name=MECHANISMS[row["mechanism"]].label,
                tokens=[r["tokens"] for r in own],
                milliseconds=[r["milliseconds"] for r in own],
                megabytes=[r["peak_mb"] for r in own],
                time_exponent=row["time_exponent"],
                memory_exponent=row["memory_exponent"],
                reference=row["mechanism"] in ("naive", REFERENCE),
            )
        )
    return passes


def print_table(console: Console, rows: list[dict[str, Any]], title: str) -> None:
    """Two tables, time and memory."""
    tokens = sorted({row["tokens"] for row in rows})
    for caption, cell, exponent in (
        ("ms (times as fast as SDPA)", _time_cell, "time_exponent"),
        ("MB on top of inputs and output", _memory_cell, "memory_exponent"),
    ):
        table = Table(title=f"{title}: {caption}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
        table.add_column("mechanism")
        for n in tokens:
            table.add_column(f"N = {n:,}", justify="right")
        table.add_column("exponent", justify="right")
        for name in dict.fromkeys(row["mechanism"] for row in rows):
            own = {row["tokens"]: row for row in rows if row["mechanism"] == name}
            cells = [cell(own[n]) if n in own else "too large" for n in tokens]
            fitted = next(iter(own.values()))[exponent]
            table.add_row(MECHANISMS[name].label, *cells, "" if fitted is None else f"{fitted:.2f}")
        console.print(table)


def _time_cell(row: dict[str, Any]) -> str:
    times = row["times_sdpa"]
    return _three_digits(row["milliseconds"]) + (f" ({_three_digits(times)}x)" if times else "")


def _memory_cell(row: dict[str, Any]) -> str:
    return _three_digits(row["peak_mb"])


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
