"""`effzoo benchmark models`: the speed of any models here, registered names, folders, runs and models on the Hub, in turns in one process.

Each is measured in torch's eager mode after `timm.models.reparameterize_model`, on random images of its own size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import get_model_input_config, reparameterize_model
from torch import nn

from .. import hub
from ..errors import UserError, one_line
from ..export import target_of
from ..export.deployed import open_exported
from ..measure import cost
from ..measure.host import processor_name
from ..measure.progress import progress
from ..measure.timing import time_in_turns
from ..report.rows import check_output, figures, print_table, shown, write_rows

SECONDS, MOST = 1.0, 20
"""A model of `effzoo list --time` is timed for about so long, and not more often."""


def run(args: argparse.Namespace) -> None:
    """Measures and prints; `args` as `arguments.models` defines them. Raises `UserError`."""
    check_output(args.output)
    names = [*dict.fromkeys(args.models)]
    for name in names:
        if target_of(name) is None:
            hub.resolve_name(name)
    torch.set_num_threads(args.threads)
    host = {"processor": processor_name(), "threads": args.threads, "torch": torch.__version__}
    rows = measure(names, args.batch_sizes, args.img_size, args.repeats)
    print(f"{host['processor']}, {args.threads} thread(s), torch {torch.__version__}\n")
    head = ("model", "batch", "input", "params, M", "MACs, G", "ms", "images/s")
    cells = [
        [
            *(row["model"], str(row["batch"]), shown(row["input_size"][1:])),
            *(shown(row[key] and row[key] / unit) for key, unit in (("params", 1e6), ("macs", 1e9))),
            *(figures(row["milliseconds"]), figures(row["images_per_second"])),
        ]
        for row in rows
    ]
    print_table(head, cells, right=(1, 3, 4, 5, 6))
    if args.output:
        write_rows([row | host for row in rows], args.output)


def measure(
    names: Sequence[str], batch_sizes: Sequence[int] = (1,), img_size: int | None = None, repeats: int = 20
) -> list[dict[str, Any]]:
    """A row per batch size and model; all models of a batch size take turns.

    Args:
        names: Of models, folders or exported files.
        batch_sizes: Images per call.
        img_size: Side length in pixels; None for each model's own size.
        repeats: Timed calls of each.

    Returns:
        Rows: model, batch, input_size (C, H, W), params and macs of one image (None for files), milliseconds of a call,
        images_per_second.

    Raises:
        UserError: A model can't be loaded, or can't take images of that size.
    """
    models = {name: deployed(name, img_size) for name in progress(names, "loading")}
    rows = []
    for batch in batch_sizes:
        samples = {name: sample_for(name, model, batch, img_size) for name, model in models.items()}
        with torch.inference_mode():
            calls = {name: partial(model, samples[name]) for name, model in models.items()}
            times = time_in_turns(calls, repeats, title=f"batches of {batch}, round")
        for name, model in models.items():
            size = tuple(samples[name].shape[1:])
            counted = any(True for _ in model.parameters())
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "input_size": [*size],
                    "params": cost.count_params(model) if counted else None,
                    "macs": cost.count_macs(model, size) if counted else None,
                    "milliseconds": times[name],
                    "images_per_second": 1e3 * batch / times[name],
                }
            )
    return rows


def deployed(name: str, img_size: int | None = None) -> nn.Module:
    """A model of any name, ready for inference, or an exported file. Only folders and the Hub bring weights. Raises `UserError`."""
    if target_of(name) is not None:
        return open_exported(name, threads=torch.get_num_threads())
    model: Any = hub.load(name).eval()
    if img_size is not None and hasattr(model, "set_input_size"):
        try:
            model.set_input_size(img_size=img_size)
        except (ValueError, AssertionError) as error:
            raise UserError(f"{name} can't take images of {img_size} pixels: {one_line(error)}") from None
    return reparameterize_model(model)


@torch.inference_mode()
def sample_for(name: str, model: nn.Module, batch: int, img_size: int | None = None) -> torch.Tensor:
    """Random images (B, C, H, W) of a model's own size, or squares of `img_size` pixels, which it was tried on."""
    channels, *size = get_model_input_config(model)["input_size"]
    sample = torch.randn(batch, channels, *((img_size, img_size) if img_size else size))
    try:
        model(sample)
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = " x ".join(map(str, sample.shape))
        raise UserError(f"{name} can't take images of shape {shape}: {one_line(error)}") from error
    return sample


def time_names(names: Sequence[str]) -> list[float]:
    """Milliseconds of one image for each name, one model after the other, so that only one is in memory."""
    return [quick_milliseconds(name, deployed(name)) for name in progress(names, "timing")]


@torch.inference_mode()
def quick_milliseconds(name: str, model: nn.Module) -> float:
    """Median milliseconds of one image, over about `SECONDS`."""
    call = partial(model, sample_for(name, model, 1))
    start = time.perf_counter()
    call()
    repeats = min(MOST, max(1, int(SECONDS / (time.perf_counter() - start))))
    return time_in_turns({"": call}, repeats, warmup=0)[""]
