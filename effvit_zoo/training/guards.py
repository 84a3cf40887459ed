"""Safeguards against failed runs: SIGTERM, dead loader workers, losses that are not finite."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..data import Batch
from ..errors import UserError, one_line
from ..run_folder import replacing


class SigtermWatch:
    """While it is entered, SIGTERM sets `received` instead of ending the process; a second one ends it.

    Clusters announce so that they will take a machine away. Outside the main thread, where Python can't set handlers, it
    watches nothing.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> SigtermWatch:
        self.active = threading.current_thread() is threading.main_thread()
        if self.active:
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = True


def watched_loader(batches: Any) -> Iterator[Batch]:
    """The batches of a DataLoader, with a dead worker as a `UserError` of one line."""
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            text = one_line(error, 120)
            if "DataLoader worker" not in text:
                raise
            raise UserError(
                f"a loader worker died ({text}), usually out of memory: reduce data.num_workers or train.batch_size"
            ) from error
        yield batch


class BufferSnapshot:
    """Copies of a model's floating-point buffers (BatchNorm's statistics), to undo a bad step."""

    def __init__(self, model: nn.Module) -> None:
        self.buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.copies = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def take(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.copies, self.buffers)

    @torch.no_grad()
    def restore(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.copies)


def save_batches(folder: Path, step: int, process: int, batches: Sequence[Batch]) -> Path:
    """Writes the images, targets and indices of a step's micro-batches into the run folder, for inspection."""
    path = folder / f"bad_step_{step:08d}_process_{process}.safetensors"
    tensors: dict[str, Tensor] = {}
    for micro, batch in enumerate(batches):
        parts = {"image": batch.image, "target": batch.target, "index": batch.index}
        for key, value in parts.items():
            for place, leaf in enumerate(tree_leaves(value)):  # targets of some tasks have several tensors
                name = f"{key}.{micro}" if isinstance(value, Tensor) else f"{key}.{place}.{micro}"
                tensors[name] = leaf.detach().contiguous().cpu()
    with replacing(path) as writing:
        save_file(tensors, writing, metadata={"step": json.dumps(step)})
    return path
