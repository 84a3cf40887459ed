"""The evaluator's loop over batches, for any task and any number of processes; shared by training and validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..data import Batch, readable
from ..errors import UserError
from ..tasks.contract import Evaluation, Evaluator

OnBad = Callable[[Sequence[tuple[str, str]]], None]


@dataclass(frozen=True)
class Alone:
    """One process, with what `evaluate` needs of an `Accelerator`, whose device can't change once a process has made one."""

    device: torch.device
    num_processes: int = 1

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    evaluator: Evaluator,
    accelerator: Accelerator | Alone,
    on_bad: OnBad,
    *,
    channels_last: bool = False,
    lockstep: bool = False,
) -> Evaluation:
    """Runs a model in eval mode over this process's batches and combines the counts of all processes.

    Args:
        model: Images (B, C, H, W) to the task's output; its mode is restored afterwards.
        batches: This process's share of the data.
        evaluator: A fresh one.
        accelerator: Device and processes.
        on_bad: Called with the (name, reason) pairs of unreadable images.
        channels_last: Memory format of the images.
        lockstep: All processes make the same number of forward calls (required under FSDP).

    Raises:
        UserError: No process has a readable image.
    """
    was_training = model.training
    model.eval()
    start = time.perf_counter()
    with torch.inference_mode(), accelerator.autocast():
        for batch in _lockstep(batches, accelerator, on_bad) if lockstep else readable(batches, on_bad):
            batch = batch.to(accelerator.device, channels_last)
            output = model(batch.image)
            if len(batch):
                evaluator.update(output, batch)
    model.train(was_training)
    totals = {name: accelerator.reduce(value, "sum") for name, value in evaluator.totals().items()}
    rows = evaluator.rows()
    if accelerator.num_processes > 1:
        rows = gather_object(rows)
    if not totals["images"]:
        raise UserError("validation found no readable image")
    return replace(evaluator.result(totals, rows), seconds=time.perf_counter() - start)


def _lockstep(batches: Iterable[Batch], accelerator: Accelerator | Alone, on_bad: OnBad) -> Iterator[Batch]:
    """The batches; an image of zeros without a target where this process has no image while another one has."""
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        if batch is not None and batch.bad:
            on_bad(batch.bad)
        has_images = batch is not None and len(batch) > 0
        state = [batch is not None, *(batch.image.shape[1:] if batch is not None and has_images else (0, 0, 0))]
        any_running, *shape = accelerator.gather(torch.tensor([state], device=accelerator.device)).amax(0).tolist()
        if not any_running:
            return
        if batch is not None and has_images:
            yield batch
        elif shape[0]:
            nothing = torch.zeros(0, dtype=torch.int64)
            yield Batch(image=torch.zeros(1, *shape), target=nothing, index=nothing)
