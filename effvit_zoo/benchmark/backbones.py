"""`effzoo benchmark backbones`: our backbones against timm's with the same weights, timed in turns in one process.

For each model and batch size: timm's model in eager mode and under `torch.compile` with frozen weights; ours fused, in eager mode; ours
after `optimize_for_inference`, with torch's forms only and with those of the installed runtimes; and a training step (forward and
backward) of both. Next to each time stands its share of the host's own matrix product rate.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.models import reparameterize_model
from torch import nn

from ..errors import UserError, one_line, unknown_choice
from ..export.optimize import COMPILED_FORMS, EAGER_FORMS, RUNTIME_FORMS, optimize_for_inference
from ..measure import cost
from ..measure.allocator import keep_freed_memory
from ..measure.host import gemm_gflops, processor_name
from ..measure.peak import peak_bytes
from ..measure.timing import time_in_turns
from ..report.rows import check_output, make_console, write_rows
from ..training.prepare import try_size

MODELS = ("swin_tiny_patch4_window7_224", "efficientvit_b1", "edgenext_small", "swiftformer_s")
MEMORY_SIDE = 1024
OPTIMIZED = ("optimized_torch", "optimized")


def run(args: argparse.Namespace) -> None:
    """Measures and prints; `args` as `arguments.backbones` defines them. Raises `UserError`.

    Memory that is freed is kept, as `train.py` does: otherwise page faults take a quarter of a training step or more, and how many of
    them a model gets changes from run to run.
    """
    known = [name.removeprefix("effzoo_") for name in timm.list_models("effzoo_*")]
    known = [name for name in known if timm.is_model(name)]
    names = args.models or MODELS
    for name in names:
        if name not in known:
            raise unknown_choice("model", name, known)
    check_output(args.output)
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    console = make_console()
    rate = gemm_gflops()
    console.print(
        f"{processor_name()}, {args.threads} thread(s), float32 matrix products {rate:.0f} GFLOP/s, torch {torch.__version__}"
    )
    rows = []
    for name in names:
        for batch in args.batch_sizes:
            rows.append(inference_row(name, batch, args.img_size, args.repeats) | {"gemm_gflops": rate})
            _print_inference(console, rows[-1])
        if args.train_batch:
            rows.append(training_row(name, args.train_batch, args.img_size, args.repeats) | {"gemm_gflops": rate})
            console.print(f"  {name}: training step, batch {args.train_batch}: {rows[-1]['train_ratio']:.2f} x timm")
        if args.memory:
            rows.append(memory_row(name))
            console.print(
                f"  {name}: peak at {MEMORY_SIDE} pixels: timm {rows[-1]['timm_mb']:.0f} MB, ours {rows[-1]['ours_mb']:.0f}, "
                f"fused {rows[-1]['fused_mb']:.0f}"
            )
    _print_table(console, rows)
    if args.output:
        write_rows(rows, args.output)


def same_weights(name: str, img_size: int) -> tuple[nn.Module, nn.Module]:
    """timm's model and ours with the same weights and with random BatchNorm statistics, in eval mode.

    Raises:
        UserError: The model can't take images of that size.
    """
    sized: dict[str, Any] = {"img_size": img_size} if name.startswith("swin") else {}
    try:
        theirs, ours = (timm.create_model(prefix + name, **sized).eval() for prefix in ("", "effzoo_"))
    except (ValueError, AssertionError) as error:
        raise UserError(f"{name} can't take images of {img_size} pixels: {one_line(error)}") from error
    generator = torch.Generator().manual_seed(0)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
            module.running_var.uniform_(0.8, 1.2, generator=generator)  # type: ignore[union-attr]
    ours.load_state_dict(theirs.state_dict())
    try_size(ours, (3, img_size, img_size), name)
    return theirs, ours


def inference_row(name: str, batch: int, img_size: int, repeats: int) -> dict[str, Any]:
    """Times in ms of timm's (timm_eager, timm_compiled) and ours (fused in eager mode; optimized_torch, the fastest of torch's forms;
    optimized, the fastest of all), and ratios of timm's time to ours."""
    theirs, ours = same_weights(name, img_size)
    sample = torch.randn(batch, 3, img_size, img_size)
    macs = batch * cost.count_macs(theirs, (3, img_size, img_size))
    fused = reparameterize_model(ours)
    in_torch = optimize_for_inference(ours, sample, forms=[*EAGER_FORMS, *COMPILED_FORMS], repeats=repeats)
    optimized = optimize_for_inference(ours, sample, forms=[in_torch.form, *RUNTIME_FORMS], repeats=repeats)
    with torch.inference_mode():
        compiled = torch.compile(theirs, options={"freezing": True})
        calls: dict[str, Callable[[], Any]] = {
            "timm_eager": lambda: theirs(sample),
            "timm_compiled": lambda: compiled(sample),
            "fused": lambda: fused(sample),
            "optimized_torch": lambda: in_torch(sample),
            "optimized": lambda: optimized(sample),
        }
        expected = theirs(sample)
        error = max(float((run(sample) - expected).abs().max() / expected.abs().max()) for run in (in_torch, optimized))
        times = time_in_turns(calls, repeats)
    return {
        "model": name,
        "batch": batch,
        **times,
        "form_torch": in_torch.form,
        "form": optimized.form,
        "error": error,
        "fused_ratio": times["timm_eager"] / times["fused"],
        **{
            f"{form}_ratio_{over}": time / times[form]
            for form in OPTIMIZED
            for over, time in (
                ("eager", times["timm_eager"]),
                ("best", min(times["timm_eager"], times["timm_compiled"])),
            )
        },
        "gflop": 2 * macs / 1e9,
    }


def training_row(name: str, batch: int, img_size: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of forward and backward, timm's and ours, and their ratio."""
    theirs, ours = same_weights(name, img_size)
    image, target = torch.randn(batch, 3, img_size, img_size), torch.randint(1000, (batch,))

    def step(model: nn.Module) -> Callable[[], None]:
        model.train()

        def call() -> None:
            model.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(image), target).backward()

        return call

    times = time_in_turns({"timm": step(theirs), "ours": step(ours)}, repeats, burst=1, warmup=1)
    return {
        "model": name,
        "batch": batch,
        "timm_train": times["timm"],
        "ours_train": times["ours"],
        "train_ratio": times["timm"] / times["ours"],
    }


def memory_row(name: str) -> dict[str, Any]:
    """Peak MB of a forward pass for one image of `MEMORY_SIDE` pixels, without weights and result: timm's, ours, ours fused."""
    theirs, ours = same_weights(name, MEMORY_SIDE)
    image = torch.randn(1, 3, MEMORY_SIDE, MEMORY_SIDE)
    row: dict[str, Any] = {"model": name, "batch": 1}
    for key, model in {"timm_mb": theirs, "ours_mb": ours, "fused_mb": reparameterize_model(ours)}.items():
        with torch.inference_mode():
            row[key] = peak_bytes(partial(model, image)) / 2**20
    return row


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _print_inference(console: Console, row: dict[str, Any]) -> None:
    console.print(
        f"  {row['model']}, batch {row['batch']}: timm eager {row['timm_eager']:.1f} ms, compiled {row['timm_compiled']:.1f}; "
        f"ours fused {row['fused']:.1f}, optimized in torch {row['optimized_torch']:.1f} ({row['form_torch']}), "
        f"in all {row['optimized']:.1f} ({row['form']}), error {row['error']:.1e}",
        highlight=False,
    )


def _print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    measured = [row for row in rows if "fused_ratio" in row]
    ratios = ("fused_ratio", *(f"{form}_ratio_{over}" for form in OPTIMIZED for over in ("eager", "best")))
    table = Table(title="ms (share of the matrix product rate); x: timm's time over ours")
    for column in ("model", "batch", "timm eager", "timm compiled", "fused", "x eager"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for column in ("optimized, torch", "optimized"):
        for title in (column, "x eager", "x best of timm"):
            table.add_column(title, justify="right")
    for row in measured:
        times = {
            key: f"{row[key]:.1f} ({100 * row['gflop'] / row[key] * 1e3 / row['gemm_gflops']:.0f} %)"
            for key in ("timm_eager", "timm_compiled", "fused", *OPTIMIZED)
        }
        x = [f"{row[key]:.2f}" for key in ratios]
        chosen = [f"{times['optimized_torch']} {row['form_torch']}", f"{times['optimized']} {row['form']}"]
        eager = (times["timm_eager"], times["timm_compiled"], times["fused"])
        table.add_row(row["model"], str(row["batch"]), *eager, x[0], chosen[0], *x[1:3], chosen[1], *x[3:])
    if measured:
        means = [f"{geometric_mean([row[key] for row in measured]):.2f}" for key in ratios]
        table.add_section()
        table.add_row("geometric mean", "", "", "", "", means[0], "", *means[1:3], "", *means[3:])
    console.print(table)
