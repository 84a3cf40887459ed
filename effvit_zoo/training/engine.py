"""The one training loop. Everything that differs between trainings is in the task, the data or the config.

A run can be cut at any moment and resumed to the same final weights: see `loader` for the order of images and `checkpoint`
for what is kept. With several processes a step's gradient is the mean over its images, however they are shared out, so that
two processes equal one.
"""

from __future__ import annotations

import copy
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, gather_object
from timm.utils import ModelEmaV3, adaptive_clip_grad
from torch import Tensor, nn
from tqdm import tqdm

from .. import hub
from ..data.feed import Feed
from ..data.loader import Batch, seed_everything
from ..errors import UserError
from ..evaluation.loop import Evaluation, evaluate
from ..measure.allocator import keep_freed_memory
from ..report.run_page import write_figures, write_metrics
from ..tasks._card import classification_card
from ..tasks.classification import Task
from .checkpoint import RunState, load_checkpoint, save_checkpoint
from .config import RunConfig
from .freezing import FrozenBackbone
from .guards import BufferKeeper, SigtermWatch, save_batches, watched_loader
from .optim import make_optimizer, make_scheduler

TRACK_EVERY = 20  # optimizer steps between two points of the step curves
DRAW_AFTER = 30.0  # seconds an epoch has to take for the figures to be drawn after it, not only at the end


@dataclass(frozen=True)
class FitResult:
    """What a run came to: counters, the model that was validated (averaged weights where they are kept), training images/s."""

    state: RunState
    model: nn.Module
    images_per_second: float


def fit(
    task: Task, feed: Feed, config: RunConfig, accelerator: Accelerator, folder: Path, checkpoint: Path | None = None
) -> FitResult:
    """Trains `task.model` and fills the run folder, from the start or from a checkpoint.

    Args:
        task: Model and loss.
        feed: Training and validation batches.
        config: The run's config.
        accelerator: Device, processes, precision, trackers.
        folder: Run folder; metrics.csv, figures, `best/`, `last/` and `checkpoints/` are written there.
        checkpoint: A checkpoint folder of the same run to go on from.

    Raises:
        UserError: For a checkpoint that doesn't fit, a training set without a readable image, an unreadable file with
            `on_bad_file: raise`, a loss that stays infinite or NaN, a dead loader worker, or a disk that is full.
        SystemExit: With code 0, after a SIGTERM and the checkpoint that it asks for.
    """
    keep_freed_memory()
    return _Run(task, feed, config, accelerator, folder, checkpoint).finish()


class _Run:
    """One call of `fit`: the loop's parts, with what they share as attributes."""

    def __init__(
        self, task: Task, feed: Feed, config: RunConfig, accelerator: Accelerator, folder: Path, checkpoint: Path | None
    ):
        self.task, self.feed, self.config, self.accelerator, self.folder = task, feed, config, accelerator, folder
        train = config.train
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and train.ema_decay:
            raise UserError(
                f"train.ema_decay is {train.ema_decay}, expected 0 with FSDP, which cuts weights into shards"
            )
        self.whole = copy.deepcopy(task.model).to("meta") if self.sharded else None  # to put gathered shards into
        self.plain = task.model.to(accelerator.device)  # what is saved; `task.model` becomes its wrapped form
        if train.channels_last:
            self.plain.to(memory_format=torch.channels_last)
        self.ema = ModelEmaV3(self.plain, decay=train.ema_decay, use_warmup=True) if train.ema_decay else None
        optimizer = make_optimizer(self.plain, config.optim)
        self.freezer = None
        if train.freeze_epochs:
            until_step = train.freeze_epochs * feed.steps_per_epoch
            self.freezer = FrozenBackbone(self.plain, until_step, wrapped=accelerator.num_processes > 1)
        self.keeper = BufferKeeper(self.plain)
        self.sigterm = SigtermWatch()
        self.stop_now = False  # SIGTERM reached one of the processes
        if train.compile:
            self.plain.compile()
        task.model, self.optimizer = accelerator.prepare(self.plain, optimizer)
        self.scheduler = make_scheduler(self.optimizer, config.optim, train.epochs, feed.steps_per_epoch)
        self.total_steps = train.epochs * feed.steps_per_epoch
        batch = train.batch_size * train.grad_accum * accelerator.num_processes
        self.state = RunState(batch=batch)
        if checkpoint is not None:
            self.state = load_checkpoint(checkpoint, accelerator, self.ema)
            if self.state.batch != batch:
                raise UserError(
                    f"checkpoint {checkpoint} was made with {self.state.batch} images per step, this run has {batch} "
                    f"(train.batch_size x train.grad_accum x processes): keep the product"
                )
            self.scheduler.step_update(self.state.step)
        self.sums = torch.tensor(self.state.sums, dtype=torch.float64, device=accelerator.device)
        self.seconds_before = self.state.seconds
        self.started = self.epoch_started = time.perf_counter()
        self.images_this_sitting = 0
        self.step_seconds = 0.0

    def finish(self) -> FitResult:
        state, per_epoch, checkpoint_steps = self.state, self.feed.steps_per_epoch, self.config.train.checkpoint_steps
        process = self.accelerator.process_index
        batches = watched_loader(self.feed.train_batches(process, state.step, self.total_steps))
        with (
            self.sigterm,
            tqdm(
                total=self.total_steps,
                initial=state.step,
                unit="step",
                disable=not self.accelerator.is_main_process,
                dynamic_ncols=True,
                smoothing=0.05,
                mininterval=0.2 if sys.stderr.isatty() else 5.0,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed} gone, {remaining} to go{postfix}",
            ) as bar,
        ):
            while True:
                epochs, steps_into_epoch = divmod(state.step, per_epoch)
                if steps_into_epoch == 0 and len(state.history) < epochs:
                    line = self._end_epoch(epochs - 1)
                    if self.accelerator.is_main_process:
                        bar.write(line)
                    self._save_checkpoint()
                if self._is_through():
                    break
                bar.set_description_str(f"epoch {epochs + 1}/{self.config.train.epochs}", refresh=False)
                step_started = time.perf_counter()
                loss, top1 = self._optimizer_step(batches)
                self.step_seconds += time.perf_counter() - step_started
                self._show(bar, loss, top1)
                if self.stop_now:
                    self._leave(bar)
                if checkpoint_steps and state.step % checkpoint_steps == 0 and state.step % per_epoch:
                    self._save_checkpoint()
        if self.accelerator.is_main_process:
            self._draw()
        # FSDP's shards can't be called by one process alone; their gathered copy can
        return FitResult(state, self.validated_model if self.whole is None else self.whole, self._rate())

    def _is_through(self) -> bool:
        state, patience = self.state, self.config.train.patience
        stalled = bool(state.history) and len(state.history) - state.best_epoch >= patience > 0
        return state.step >= self.total_steps or stalled

    def _leave(self, bar: tqdm) -> None:
        """Ends the process well: clusters send SIGTERM before they take a machine away."""
        self._save_checkpoint()
        if self.accelerator.is_main_process:
            bar.write(f"SIGTERM: stopped after step {self.state.step}; --resume {self.folder} goes on from there")
        self.accelerator.end_training()
        raise SystemExit(0)

    @property
    def validated_model(self) -> nn.Module:
        return self.ema.module if self.ema is not None else self.plain

    def _optimizer_step(self, batches: Any) -> tuple[Tensor, Tensor]:
        """One optimizer step over its micro-batches; the step's mean loss and top-1 on this process, still on the device."""
        train, accelerator = self.config.train, self.accelerator
        step = self.state.step
        before = self.sums.clone()
        self.keeper.keep()
        self.task.model.train()
        if self.freezer is not None:
            self.freezer.before_step(step)
        step_batches: list[Batch] = []
        for micro in range(train.grad_accum):
            batch = self._to_device(next(batches))
            step_batches.append(batch)
            images = len(batch["target"])
            weight = images * accelerator.num_processes / self.feed.step_size(step)
            seed_everything(train.seed, step, micro, accelerator.process_index)
            last = micro == train.grad_accum - 1
            with nullcontext() if last else accelerator.no_sync(self.task.model):
                loss, metrics = self.task.loss(batch)
                accelerator.backward(loss * weight)
            top1 = metrics.get("top1", torch.zeros_like(loss))
            self.sums += images * torch.stack([torch.ones_like(loss), loss.detach(), top1]).double()
        if self.freezer is not None:
            self.freezer.after_backward(step)
        norm = self._clip_gradients()
        images_seen, loss_sum, top1_sum = (self.sums - before).unbind()
        bad = self._agree(loss_sum if norm is None else loss_sum + norm)
        if (
            not bad or train.precision == "fp16"
        ):  # in fp16 the gradient scaler leaves out the step itself, and learns from it
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step = step + 1
        self.scheduler.step_update(self.state.step)
        if bad:
            self.sums = before
            self._take_back(step_batches, loss_sum / images_seen)
        else:
            self.state.skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.update(self.plain, step=self.state.step)
        self.images_this_sitting += self.feed.step_size(step)
        return loss_sum / images_seen, top1_sum / images_seen

    def _clip_gradients(self) -> Tensor | None:
        """Clips as `optim.clip_mode` says; the gradient norm where that is known and says whether the step is sound."""
        optim, parameters = self.config.optim, self.task.model.parameters()
        if optim.clip_grad is None:
            return None
        if optim.clip_mode == "norm":
            norm = self.accelerator.clip_grad_norm_(parameters, optim.clip_grad)
            return None if self.config.train.precision == "fp16" else norm  # infinite now and then by design
        self.accelerator.unscale_gradients()
        if optim.clip_mode == "value":
            nn.utils.clip_grad_value_(parameters, optim.clip_grad)
        else:
            adaptive_clip_grad(parameters, optim.clip_grad)
        return None

    def _agree(self, number: Tensor) -> bool:
        """Whether the number is infinite or NaN on any process; notes too whether one got a SIGTERM."""
        bad, stop = not bool(torch.isfinite(number)), self.sigterm.received
        if self.accelerator.num_processes > 1:
            flags = torch.tensor([bad, stop], dtype=torch.float32, device=self.accelerator.device)
            bad, stop = (count > 0 for count in self.accelerator.reduce(flags, "sum").tolist())
        self.stop_now = stop
        return bad

    def _take_back(self, batches: list[Batch], loss: Tensor) -> None:
        """Makes a step with a bad loss undone; stops the run when there were too many in a row."""
        state, most = self.state, self.config.train.max_bad_steps
        self.keeper.take_back()
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        if self.accelerator.is_main_process:
            tqdm.write(f"skipped step {state.step}: its loss or gradient is not finite (loss {loss.item():.3g})")
        if state.skipped_in_a_row >= most:
            path = save_batches(self.folder, state.step, self.accelerator.process_index, batches)
            raise UserError(
                f"the loss or its gradient was not finite in {most} steps in a row, the last is step {state.step}; "
                f"its batch is in {path}: a lower optim.lr, optim.clip_grad or train.precision bf16 instead of fp16 may help"
            )

    def _to_device(self, batch: Batch) -> Batch:
        self._note_bad(batch["bad"])
        if batch["image"] is None:
            raise UserError("the training set holds no readable image")
        image = batch["image"].to(self.accelerator.device, non_blocking=True)
        if self.config.train.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return batch | {"image": image, "target": batch["target"].to(self.accelerator.device, non_blocking=True)}

    def _note_bad(self, bad: list[tuple[str, str]]) -> None:
        """Names each unreadable file once, or stops at the first."""
        for name, reason in bad:
            if self.config.data.on_bad_file == "raise":
                raise UserError(f"{name} can't be read: {reason}")
            if name not in self.state.bad_files:
                self.state.bad_files[name] = reason
                if self.accelerator.is_main_process:
                    tqdm.write(f"skipped {name}: {reason}")

    def _show(self, bar: tqdm, loss: Tensor, top1: Tensor) -> None:
        """Moves the bar on; its numbers are read from the device only when it is redrawn."""
        rate = self.images_this_sitting / self.step_seconds
        if bar.update():
            bar.set_postfix_str(
                f" loss {loss.item():.3f}, top-1 {top1.item():.1f} %, {rate:.0f} images/s", refresh=False
            )
        if self.state.step % TRACK_EVERY == 0:
            values = {
                "step/loss": loss.item(),
                "step/top1": top1.item(),
                "step/lr": self._lr(),
                "step/images_per_second": rate,
            }
            self.accelerator.log(values, step=self.state.step)

    def _rate(self) -> float:
        """Training images per second of this sitting, or of the last epoch where it has trained nothing."""
        if self.step_seconds:
            return self.images_this_sitting / self.step_seconds
        return self.state.history[-1]["images_per_second"] if self.state.history else 0.0

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _end_epoch(self, epoch: int) -> str:
        """Validates, records the epoch and saves the model folders; returns the epoch's line."""
        train_seconds = time.perf_counter() - self.epoch_started
        images, loss_sum, top1_sum = self.accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        result = self._validate()
        state, train = self.state, self.config.train
        row = {
            "epoch": epoch + 1,
            "step": state.step,
            "lr": self._lr(),
            "train_loss": loss_sum / images,
            "train_top1": top1_sum / images,
            "val_loss": result.loss,
            "top1": result.top1,
            "top5": result.top5,
            "images_per_second": self._rate(),
            "seconds": self._seconds(),
        }
        state.history.append(row)
        self._gather_bad_files()
        better = result.top1 > state.best_top1
        if better:
            state.best_top1, state.best_epoch = result.top1, epoch + 1
            state.best = {
                "loss": result.loss,
                "top1": result.top1,
                "top5": result.top5,
                "confusion": result.confusion.tolist(),
                "mistakes": [list(mistake) for mistake in result.mistakes],
            }
        self.accelerator.log(
            {f"epoch/{key}": value for key, value in row.items() if key not in ("epoch", "step")}, step=state.step
        )
        saved = self._unsharded()
        if self.accelerator.is_main_process:
            for name in ("best", "last") if better else ("last",):
                hub.save(
                    saved,
                    self.folder / name,
                    label_names=self.feed.class_names,
                    data_config=self.feed.data_config,
                    extra={
                        "top1": result.top1,
                        "top5": result.top5,
                        "epoch": epoch + 1,
                        "data": self.config.data.root,
                        "seed": train.seed,
                        "val_fraction": self.config.data.val_fraction,
                    },
                )
            write_metrics(self.folder, state.history)
            if train_seconds > DRAW_AFTER:
                self._draw()
            if better and self.config.hub.push is not None and self.config.hub.push_every_best:
                self._push_best(self.config.hub.push)
        self.epoch_started = time.perf_counter()
        return (
            f"epoch {epoch + 1:3d}/{self.config.train.epochs}: train loss {row['train_loss']:.3f}, top-1 {row['train_top1']:.1f} % | "
            f"validation loss {result.loss:.3f}, top-1 {result.top1:.2f} %, top-5 {result.top5:.1f} %{' (best so far)' if better else ''}"
        )

    def _push_best(self, repo_id: str) -> None:
        try:
            tqdm.write(f"uploaded: {hub.push(self.folder / 'best', repo_id, classification_card)}")
        except UserError as error:
            tqdm.write(f"not uploaded, training goes on: {error}")

    def _unsharded(self) -> nn.Module:
        """What to save. FSDP's shards are gathered on the main process; call it on every one."""
        if self.whole is None:
            return self.validated_model
        weights = self.accelerator.get_state_dict(self.task.model)
        if self.accelerator.is_main_process:
            self.whole = self.whole.to_empty(device="cpu")
            self.whole.load_state_dict(weights)
        return self.whole

    def _validate(self) -> Evaluation:
        model = self.validated_model
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():  # BatchNorm's statistics are each process' own; the main one's are saved
                buffer.copy_(broadcast(buffer))
        batches = self.feed.val_batches(self.accelerator.process_index)
        return evaluate(
            model,
            batches,
            len(self.feed.class_names),
            self.accelerator,
            self._note_bad,
            self.config.train.channels_last,
            in_step=self.sharded,
        )

    def _gather_bad_files(self) -> None:
        """Tells every process, and through the main one the user, of the unreadable files that the others met."""
        if self.accelerator.num_processes > 1:
            self._note_bad(gather_object(list(self.state.bad_files.items())))

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _save_checkpoint(self) -> None:
        self.state.sums = self.accelerator.reduce(self.sums, "sum").tolist()
        self.state.seconds = self._seconds()
        save_checkpoint(self.folder, self.accelerator, self.ema, self.state, self.config.train.keep_checkpoints)

    def _draw(self) -> None:
        write_figures(self.folder, self.state.history, np.array(self.state.best["confusion"]), self.feed.class_names)
