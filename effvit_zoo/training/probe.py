"""The first result of fine-tuning: the layer of the outputs is solved on frozen features, before all layers are trained.

A run that starts from trained weights and has new outputs begins with it and records it as epoch 0. Features are computed once, by all
processes, and kept in the run folder until the first checkpoint, so that a run that is cut before it does not compute them again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .. import config as strict
from ..data import Feed, listing, readable
from ..errors import UserError
from ..evaluation.loop import OnBad
from ..run_folder import FEATURES, replacing
from ..tasks import HeadSolver, Task
from ..version import __version__
from .config import RunConfig

FOUND_BY = ("model", "data", "augment", "task")
"""Sections of a config that features depend on."""


@dataclass(frozen=True)
class Probe:
    """What a run does about its new outputs.

    Attributes:
        solver: Solves for them; None where they start from random weights.
        is_required: `train.head_init` asks for it, so that a failure ends the run.
        note: For the user; "" for nothing.
    """

    solver: HeadSolver | None = None
    is_required: bool = False
    note: str = ""


def plan_probe(task: Task, model: nn.Module, config: RunConfig, sharded: bool) -> Probe:
    """Whether a run begins with a linear probe. Raises `UserError` where it is asked for and can't be."""
    asked = config.train.head_init
    if asked == "random" or (asked is None and not (config.starts_trained and task.new_outputs)):
        return Probe()
    try:
        if sharded:
            raise UserError("FSDP cuts weights into shards")
        solver = task.head_solver(model)
    except UserError as error:
        if asked == "probe":
            raise UserError(f"train.head_init is probe: {error}") from None
        return Probe(note=no_probe(error))
    replaced = "train.head_init is probe: the outputs' layer of the weights gives way to a linear probe"
    is_replaced = config.starts_trained and not task.new_outputs
    return Probe(solver, asked == "probe", replaced if is_replaced else "")


def no_probe(reason: object) -> str:
    """What the user is told where the outputs start from random weights."""
    return f"no linear probe, so the new outputs start from random weights: {reason}"


def run_probe(
    probe: Probe,
    model: nn.Module,
    feed: Feed,
    config: RunConfig,
    accelerator: Accelerator,
    folder: Path,
    on_bad: OnBad,
) -> str | None:
    """Does what a run planned, with the arguments of `solve_head`; says how the outputs were solved for, None where they weren't.

    Raises:
        UserError: There is no solution where one is required.
    """
    if probe.solver is None:
        return None
    try:
        return solve_head(probe.solver, model, feed, config, accelerator, folder, on_bad)
    except UserError as error:
        if probe.is_required:
            raise UserError(f"train.head_init is probe: {error}") from None
        accelerator.print(no_probe(error))
        return None


def solve_head(
    solver: HeadSolver,
    model: nn.Module,
    feed: Feed,
    config: RunConfig,
    accelerator: Accelerator,
    folder: Path,
    on_bad: OnBad,
) -> str:
    """Solves for the outputs' layer of a model and sets it on every process; says how.

    Args:
        solver: Of the task for this model.
        model: Any mode, which is restored.
        feed: Training images.
        config: The run's config.
        accelerator: Device and processes.
        folder: Run folder, where features are kept.
        on_bad: Called with the (name, reason) pairs of unreadable images.

    Raises:
        UserError: There is no solution; on every process.
    """
    was_training = model.training
    key, path = _key(model, feed, config), folder / FEATURES
    rows = _read(path, key) if accelerator.is_main_process else None
    if not _agreed(accelerator, rows is not None):
        rows = _compute(solver, model.eval(), feed, config, accelerator, on_bad)
        model.train(was_training)
        if accelerator.is_main_process:
            with replacing(path) as writing:
                save_file(rows, writing, metadata={"key": key})
    said = error = ""
    if accelerator.is_main_process and rows is not None:
        images, total = len(rows["index"]), feed.describe()["train_images"]
        try:
            how = solver.solve({name: value for name, value in rows.items() if name != "index"})
            said = f"{how}, on {images:,} images" + (f" of {total:,}" if total and images < total else "")
        except UserError as failure:
            error = str(failure)
    said, error = _agreed(accelerator, (said, error))
    if error:
        raise UserError(error)
    for parameter in solver.parameters():
        parameter.copy_(broadcast(parameter))
    return said


def forget_features(folder: Path) -> None:
    """Removes the features that `solve_head` kept."""
    (folder / FEATURES).unlink(missing_ok=True)


def _compute(
    solver: HeadSolver, model: nn.Module, feed: Feed, config: RunConfig, accelerator: Accelerator, on_bad: OnBad
) -> dict[str, Tensor]:
    """Rows of all processes' images, in the order of the images."""
    parts: list[dict[str, Tensor]] = []
    total, most = feed.describe()["train_images"], solver.most_images
    own, error = -(-min(most, total or most) // accelerator.num_processes), ""
    bar = tqdm(
        total=own,
        desc="linear probe",
        unit="image",
        leave=False,
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 5.0,
    )
    # compiled code would be compiled for this pass alone
    with bar, torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        try:
            for batch in readable(feed.plain_batches(accelerator.process_index, most), on_bad):
                rows = solver.features(batch.to(accelerator.device, config.train.channels_last))
                parts.append({"index": batch.index, **rows})
                bar.update(len(batch))
        except UserError as failure:  # the other processes have to know
            error = str(failure)
    errors = _gathered(accelerator, [error])
    if any(errors):
        raise UserError(next(filter(None, errors)))
    return _in_order(_gathered(accelerator, parts))


def _in_order(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows by ascending index, each once: a stream's shares may be padded."""
    if not parts:
        raise UserError("the training set holds no readable image")
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = rows["index"].argsort(stable=True)
    index = rows["index"][order]
    order = order[torch.cat([torch.ones(1, dtype=torch.bool), index[1:] != index[:-1]])]
    return {name: value[order].contiguous() for name, value in rows.items()}


def _gathered(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """The items of all processes."""
    return gather_object(items) if accelerator.num_processes > 1 else items


def _agreed(accelerator: Accelerator, value: Any) -> Any:
    """The main process's value, on every process."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def _key(model: nn.Module, feed: Feed, config: RunConfig) -> str:
    """What features depend on: weights, images, transform, settings and version."""
    digest = blake2b(digest_size=16)
    sections = strict.as_dict(config)
    facts = [__version__, feed.data_config, {name: sections[name] for name in FOUND_BY}, listing(feed.splits)["train"]]
    digest.update(json.dumps(facts, default=str, sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """Features that were kept under this key; None where there are none."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names} if file.metadata().get("key") == key else None
    except (OSError, SafetensorError):  # not there, or cut off by a full disk
        return None
