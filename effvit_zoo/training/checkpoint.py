"""Resumable checkpoints of a run: accelerate's state of model, optimizer and scaler, the averaged weights, and our counters.

A checkpoint is a folder `checkpoints/step-00000500`. It is written under another name and renamed when complete, so that a
kill or a full disk at any moment leaves the last good one. Weights are safetensors; optimizer files are read back by
accelerate with weights_only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3

from ..errors import UserError, one_line
from ..run_folder import CHECKPOINTS, STATE, open_up
from ..tasks import Evaluation, Metric

_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass
class RunState:
    """Counters and history of a run. Random numbers are functions of (seed, step), so no generator state is needed."""

    step: int = 0
    """Finished optimizer steps."""
    batch: int = 0
    """Largest number of images per optimizer step, over all processes."""
    steps_per_epoch: int = 0
    """Optimizer steps of an epoch; 0 in checkpoints of earlier versions."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sums over the images of the current epoch: their number ("images"), the loss and the task's values."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """A row per validated epoch; a linear probe is epoch 0."""
    best_epoch: int = -1
    best: dict[str, Any] = field(default_factory=dict)
    """Evaluation of the best epoch: its `metrics` and `details`."""
    probe: dict[str, Any] = field(default_factory=dict)
    """Evaluation of the linear probe, empty without one."""
    tuned: dict[str, Any] = field(default_factory=dict)
    """Evaluation of the best epoch after the probe, with its number `epoch`; empty without a probe."""
    seconds: float = 0.0
    """Wall-clock time of the run, summed over its parts."""
    bad_files: dict[str, str] = field(default_factory=dict)
    """Unreadable files and the reasons."""
    skipped_steps: int = 0
    """Steps that changed nothing, because their loss was not finite."""
    skipped_in_a_row: int = 0

    @property
    def epoch(self) -> int:
        """The last validated epoch, 0 before the first."""
        return self.history[-1]["epoch"] if self.history else 0

    def consider(self, epoch: int, result: Evaluation, name: str, metric: Metric) -> bool:
        """Keeps an epoch's evaluation if it is the best so far by the named metric; whether it is."""
        better = metric.is_better(result.metrics[name], self.best["metrics"][name] if self.best else None)
        if better:
            self.best_epoch = epoch
            self.best = {"metrics": result.metrics, "details": result.details}
        if not epoch:
            self.probe = self.best
        elif self.probe and metric.is_better(result.metrics[name], self.tuned["metrics"][name] if self.tuned else None):
            self.tuned = {"epoch": epoch, "metrics": result.metrics, "details": result.details}
        return better


def find_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    found = [path for path in (run / CHECKPOINTS).glob("step-*") if _FOLDER.fullmatch(path.name)]
    return max(found, key=lambda path: int(path.name[5:]), default=None)


def save_checkpoint(run: Path, accelerator: Accelerator, ema: ModelEmaV3 | None, state: RunState, keep: int) -> Path:
    """Writes `checkpoints/step-N` and removes all but the newest `keep`. Call it on every process, with equal states.

    Raises:
        UserError: The disk is full or not writable; the checkpoints that were there still are.
    """
    try:
        return _write(run, accelerator, ema, state, keep)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(run / CHECKPOINTS / "writing", ignore_errors=True)
        last = find_checkpoint(run)
        free = shutil.disk_usage(run).free // 2**20
        raise UserError(
            f"cannot write a checkpoint of step {state.step} into {run}: {one_line(error)} ({free} MiB free); "
            f"{f'the last good one is {last.name}: free some space and continue with --resume {run}' if last else 'there is none yet'}"
        ) from error


def _write(run: Path, accelerator: Accelerator, ema: ModelEmaV3 | None, state: RunState, keep: int) -> Path:
    folder = run / CHECKPOINTS
    target, writing = folder / f"step-{state.step:08d}", folder / "writing"
    if accelerator.is_main_process:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(writing))
    if accelerator.is_main_process:
        if ema is not None:
            save_file(
                {key: value.contiguous() for key, value in ema.module.state_dict().items()}, writing / "ema.safetensors"
            )
        (writing / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        open_up(writing)
        for path in writing.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # some disks say only now that they are full
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        writing.rename(target)
        complete = sorted(
            (path for path in folder.glob("step-*") if _FOLDER.fullmatch(path.name)),
            key=lambda path: int(path.name[5:]),
        )
        for old in complete[:-keep]:
            shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path, accelerator: Accelerator, ema: ModelEmaV3 | None) -> RunState:
    """Puts a checkpoint's tensors into what was prepared with the accelerator, and returns its counters."""
    try:
        state = RunState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
        accelerator.load_state(str(folder))
        if ema is not None:
            ema.module.load_state_dict(load_file(folder / "ema.safetensors", device=str(accelerator.device)))
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        torch.serialization.pickle.UnpicklingError,
    ) as error:
        raise UserError(f"checkpoint {folder} can't be resumed from: {one_line(error, 300)}") from error
    if not accelerator.is_main_process:
        state.sums = dict.fromkeys(state.sums, 0.0)  # the main process has the sums of all
    return state
