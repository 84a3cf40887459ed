"""The one training loop. Everything that differs between trainings is in the task, the objective, the data or the config.

A run can be cut at any moment and resumed to the same final weights: see `data.plan` for the order of images and `checkpoint`
for what is kept. With several processes a step's gradient is the mean over its images, however they are distributed, so that
two processes equal one.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, gather_object
from timm.utils import ModelEmaV3, adaptive_clip_grad
from torch import Tensor, nn
from tqdm import tqdm

from ..data import Batch, Feed, seed_everything
from ..errors import UserError
from ..evaluation.loop import evaluate
from ..tasks import Evaluation, Objective, Task
from .checkpoint import RunState, load_checkpoint, save_checkpoint
from .config import RunConfig
from .console import epoch_line, shown
from .freezing import FrozenBackbone, fixed_norms
from .guards import BufferSnapshot, SigtermWatch, save_batches, watched_loader
from .optim import make_optimizer, make_scheduler
from .probe import forget_features, plan_probe, run_probe
from .recorder import Recorder
from .report import RunReport, resume_command

TRACK_EVERY = 20  # optimizer steps between two points of the step curves


@dataclass(frozen=True)
class FitResult:
    """Counters of a run, the model that was validated (averaged weights where they are kept), training images per second."""

    state: RunState
    model: nn.Module
    images_per_second: float


class Loop:
    """A training: everything that can be refused is made here, before the run folder is written to; `run` trains and fills the folder.

    Args:
        task: Evaluation, metric and presentation.
        objective: What is trained and by which loss; the task itself, or one around it.
        model: The model that is validated and saved.
        feed: Training and validation batches.
        config: The run's config.
        accelerator: Device, processes, precision, trackers.
        folder: Run folder; metrics.csv, figures, `best/`, `last/` and `checkpoints/` are written there.
        checkpoint: A checkpoint folder of the same run to resume from.

    Raises:
        UserError: An optimizer that doesn't take its settings, a model that can't be trained so, or a checkpoint that doesn't fit.
    """

    def __init__(
        self,
        task: Task,
        objective: Objective,
        model: nn.Module,
        feed: Feed,
        config: RunConfig,
        accelerator: Accelerator,
        folder: Path,
        checkpoint: Path | None = None,
    ):
        self.task, self.objective, self.feed, self.config = task, objective, feed, config
        self.accelerator, self.folder = accelerator, folder
        train = config.train
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and train.ema_decay:
            raise UserError(
                f"train.ema_decay is {train.ema_decay}, expected 0 with FSDP, which cuts weights into shards"
            )
        self.model = model.to(accelerator.device)  # what is validated and saved
        if train.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.probe = plan_probe(task, self.model, config, self.sharded)
        trainable = objective.trainable(self.model)
        self.wraps_model = trainable is not self.model
        # FSDP's shards are gathered into this copy, without values until then
        self.unsharded = copy.deepcopy(trainable).to("meta") if self.sharded else None
        self.ema = ModelEmaV3(self.model, decay=train.ema_decay, use_warmup=True) if train.ema_decay else None
        optimizer = make_optimizer(self.model, config.optim)
        self.freezer = None
        if train.freeze_epochs:
            until_step = train.freeze_epochs * feed.steps_per_epoch
            self.freezer = FrozenBackbone(self.model, until_step, wrapped=accelerator.num_processes > 1)
        self.fixed_norms = fixed_norms(self.model, config)
        self.buffers = BufferSnapshot(self.model)
        self.sigterm = SigtermWatch()
        self.stop_now = False  # SIGTERM reached one of the processes
        if train.compile:
            trainable.compile()
        self.module, self.optimizer = accelerator.prepare(trainable, optimizer)
        self.scheduler = make_scheduler(self.optimizer, config.optim, train.epochs, feed.steps_per_epoch)
        self.total_steps = train.epochs * feed.steps_per_epoch
        self.state = self._initial_state(checkpoint)
        self.sums = {
            name: torch.tensor(value, dtype=torch.float64, device=accelerator.device)
            for name, value in self.state.sums.items()
        }
        self.recorder = Recorder(task, feed, config, folder)
        self.report: RunReport | None = None
        self.seconds_before = self.state.seconds
        self.started = time.perf_counter()
        self.images_since_start = 0
        self.step_seconds = 0.0

    def _initial_state(self, checkpoint: Path | None) -> RunState:
        train = self.config.train
        batch = train.batch_size * train.grad_accum * self.accelerator.num_processes
        steps_per_epoch = self.feed.steps_per_epoch
        if checkpoint is None:
            return RunState(batch=batch, steps_per_epoch=steps_per_epoch)
        state = load_checkpoint(checkpoint, self.accelerator, self.ema)
        if state.batch != batch:
            raise UserError(
                f"checkpoint {checkpoint} was made with {state.batch} images per step, this run has {batch} "
                f"(train.batch_size x train.grad_accum x processes): keep this product unchanged"
            )
        if state.steps_per_epoch not in (0, steps_per_epoch):  # other images, which were allowed: begin the epoch again
            state.step, state.sums = state.epoch * steps_per_epoch, {}
        state.steps_per_epoch = steps_per_epoch
        self.scheduler.step_update(state.step)
        return state

    def run(self, report: RunReport | None = None) -> FitResult:
        """Trains from the start or from the checkpoint.

        Args:
            report: Report to write while the run is not finished; None for none.

        Raises:
            UserError: A training set without a readable image, an unreadable file with `on_bad_file: raise`, a loss that stays
                infinite or NaN, a dead loader worker, or a disk that is full.
            SystemExit: With code 0, after a SIGTERM and the checkpoint that it causes.
        """
        self.report = report if self.accelerator.is_main_process else None
        try:
            return self._train()
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            if self.report is not None:
                with contextlib.suppress(OSError):  # a full disk may be why the run ends
                    self.report.interrupted(self.state, error)
            raise

    def _train(self) -> FitResult:
        self.started = self.epoch_started = time.perf_counter()
        state, per_epoch, checkpoint_steps = self.state, self.feed.steps_per_epoch, self.config.train.checkpoint_steps
        loader = self.feed.train_batches(self.accelerator.process_index, state.step, self.total_steps)
        batches = watched_loader(loader)
        self._report_progress()
        if not state.history and not state.step:
            self._start_from_probe()
        with self.sigterm, self._progress_bar() as bar:
            while True:
                epochs, steps_into_epoch = divmod(state.step, per_epoch)
                if steps_into_epoch == 0 and state.epoch < epochs:
                    line = self._end_epoch(epochs)
                    if self.accelerator.is_main_process:
                        bar.write(line)
                    self._save_checkpoint()
                    self._report_progress()
                if self._is_finished():
                    break
                bar.set_description_str(f"epoch {epochs + 1}/{self.config.train.epochs}", refresh=False)
                step_started = time.perf_counter()
                values = self._optimizer_step(batches)
                self.step_seconds += time.perf_counter() - step_started
                self._show(bar, values)
                if self.stop_now:
                    self._checkpoint_and_exit(bar)
                if checkpoint_steps and state.step % checkpoint_steps == 0 and state.step % per_epoch:
                    self._save_checkpoint()
                    self._report_progress()
        # FSDP's shards can't be called by one process alone; their gathered copy can
        model = self.validated_model if self.unsharded is None else self._inner(self.unsharded)
        return FitResult(state, model, self._rate())

    def _start_from_probe(self) -> None:
        """Gives new outputs their first weights where the run begins with a linear probe, which is its epoch 0."""
        how = run_probe(self.probe, self.model, self.feed, self.config, self.accelerator, self.folder, self._note_bad)
        if how is None:
            return
        if self.ema is not None:
            self.ema.set(self.model)
        self.accelerator.print(f"{self._end_epoch(0)} ({how})")
        self._save_checkpoint()
        if self.accelerator.is_main_process:
            forget_features(self.folder)
        self._report_progress()

    def _report_progress(self) -> None:
        if self.report is not None:
            self.report.progress(self.state)

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.total_steps,
            initial=self.state.step,
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            smoothing=0.05,
            mininterval=0.2 if sys.stderr.isatty() else 5.0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]",
        )

    def _is_finished(self) -> bool:
        state, patience = self.state, self.config.train.patience
        stalled = bool(state.history) and state.epoch - state.best_epoch >= patience > 0
        return state.step >= self.total_steps or stalled

    def _checkpoint_and_exit(self, bar: tqdm) -> None:
        """Clusters send SIGTERM before they reclaim a machine."""
        self._save_checkpoint()
        if self.accelerator.is_main_process:
            again = resume_command(self.folder) if self.report is None else self.report.again
            bar.write(f"SIGTERM: stopped after step {self.state.step}; continue with {again}")
        self.accelerator.end_training()
        raise SystemExit(0)

    @property
    def validated_model(self) -> nn.Module:
        return self.ema.module if self.ema is not None else self.model

    def _optimizer_step(self, batches: Any) -> dict[str, Tensor]:
        """One optimizer step over its micro-batches; means of the loss and the task's values on this process, on the device."""
        train, accelerator = self.config.train, self.accelerator
        step = self.state.step
        before = {name: value.clone() for name, value in self.sums.items()}
        self.buffers.take()
        self.module.train()
        for norm in self.fixed_norms:
            norm.eval()
        if self.freezer is not None:
            self.freezer.before_step(step)
        step_batches: list[Batch] = []
        for micro in range(train.grad_accum):
            batch = self._next_batch(batches)
            step_batches.append(batch)
            weight = len(batch) * accelerator.num_processes / self.feed.step_size(step)
            seed_everything(train.seed, step, micro, accelerator.process_index)
            last = micro == train.grad_accum - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.module):
                loss, values = self.objective.loss(self.module, batch)
                accelerator.backward(loss * weight)
            self._add(len(batch), {"loss": loss.detach(), **values})
        if self.freezer is not None:
            self.freezer.after_backward(step)
        norm = self._clip_gradients()
        means = self._means_since(before)
        bad = self._any_process_nonfinite(means["loss"] if norm is None else means["loss"] + norm)
        # in fp16 the gradient scaler leaves out the step itself, and adapts its scale by it
        if not bad or train.precision == "fp16":
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step = step + 1
        self.scheduler.step_update(self.state.step)
        if bad:
            self.sums = before
            self._undo_step(step_batches, means["loss"])
        else:
            self.state.skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.update(self.model, step=self.state.step)
        self.images_since_start += self.feed.step_size(step)
        return means

    def _next_batch(self, batches: Any) -> Batch:
        batch = next(batches)
        self._note_bad(batch.bad)
        if not len(batch):
            raise UserError("the training set holds no readable image")
        return batch.to(self.accelerator.device, self.config.train.channels_last)

    def _add(self, images: int, values: dict[str, Tensor]) -> None:
        """Adds batch means, weighted by the number of images, to the sums of the epoch."""
        for name, value in {"images": torch.ones_like(values["loss"]), **values}.items():
            total = self.sums.setdefault(name, torch.zeros((), dtype=torch.float64, device=self.accelerator.device))
            self.sums[name] = total + images * value.double()

    def _means_since(self, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the images since the sums were `before`."""
        since = {name: value - before.get(name, 0) for name, value in self.sums.items()}
        images = since.pop("images")
        return {name: value / images for name, value in since.items()}

    def _clip_gradients(self) -> Tensor | None:
        """Clips as `optim.clip_mode` says; the gradient norm where it is known and tells whether the step is sound."""
        optim, parameters = self.config.optim, self.module.parameters()
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

    def _any_process_nonfinite(self, number: Tensor) -> bool:
        """Whether the number is infinite or NaN on any process; also records whether any process received SIGTERM."""
        bad, stop = not bool(torch.isfinite(number)), self.sigterm.received
        if self.accelerator.num_processes > 1:
            flags = torch.tensor([bad, stop], dtype=torch.float32, device=self.accelerator.device)
            bad, stop = (count > 0 for count in self.accelerator.reduce(flags, "sum").tolist())
        self.stop_now = stop
        return bad

    def _undo_step(self, batches: list[Batch], loss: Tensor) -> None:
        """Rolls back a step whose loss was not finite; aborts the run after too many in a row."""
        state, limit = self.state, self.config.train.max_bad_steps
        self.buffers.restore()
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        if self.accelerator.is_main_process:
            tqdm.write(f"skipped step {state.step}: its loss or gradient is not finite (loss {loss.item():.3g})")
        if state.skipped_in_a_row >= limit:
            path = save_batches(self.folder, state.step, self.accelerator.process_index, batches)
            raise UserError(
                f"the loss or its gradient was not finite in {limit} steps in a row, the last is step {state.step}; "
                f"its batch is in {path}: a lower optim.lr, optim.clip_grad or train.precision bf16 instead of fp16 may help"
            )

    def _note_bad(self, bad: Sequence[tuple[str, str]]) -> None:
        """Reports each unreadable file once, or aborts at the first."""
        for name, reason in bad:
            if self.config.data.on_bad_file == "raise":
                raise UserError(f"{name} can't be read: {reason}")
            if name not in self.state.bad_files:
                self.state.bad_files[name] = reason
                if self.accelerator.is_main_process:
                    tqdm.write(f"skipped {name}: {reason}")

    def _show(self, bar: tqdm, values: dict[str, Tensor]) -> None:
        """Advances the bar; values are read from the device only when it is redrawn."""
        rate = self.images_since_start / self.step_seconds
        if bar.update():
            parts = [f"loss {values['loss'].item():.3f}"]
            parts += [shown(self.task, name, v.item(), digits=1) for name, v in values.items() if name != "loss"]
            bar.set_postfix_str(", ".join([*parts, f"{rate:.0f} images/s"]), refresh=False)
        if self.state.step % TRACK_EVERY == 0:
            tracked = {f"step/{name}": value.item() for name, value in values.items()}
            tracked |= {"step/lr": self._lr(), "step/images_per_second": rate}
            self.accelerator.log(tracked, step=self.state.step)

    def _rate(self) -> float:
        """Training images per second since the start, or of the last epoch where nothing was trained since."""
        if self.step_seconds:
            return self.images_since_start / self.step_seconds
        return self.state.history[-1]["images_per_second"] if self.state.history else 0.0

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _end_epoch(self, epoch: int) -> str:
        """Validates, records the epoch and saves the model folders; returns the line to print."""
        sums = {name: self.accelerator.reduce(value, "sum").item() for name, value in sorted(self.sums.items())}
        images = sums.pop("images", 0.0)
        self.sums = {}
        result = self._validate()
        state = self.state
        metrics = {name: value for name, value in result.metrics.items() if name != "loss"}
        row = {
            "epoch": epoch,
            "step": state.step,
            "lr": self._lr() if epoch else None,
            "train_loss": None,  # of the probe
            **{f"train_{name}": value / images for name, value in sums.items()},
            "val_loss": result.metrics["loss"],
            **metrics,
            "images_per_second": self._rate() if epoch else None,
            "seconds": self._seconds(),
        }
        state.history.append(row)
        self._gather_bad_files()
        is_best = state.consider(epoch, result, *next(iter(self.task.metrics.items())))
        values = {
            f"epoch/{key}": value for key, value in row.items() if key not in ("epoch", "step") and value is not None
        }
        self.accelerator.log(values, step=state.step)
        saved = self._gathered_model()
        if self.accelerator.is_main_process:
            self.recorder.record(saved, state.history, result, is_best)
        return epoch_line(self.task, row, self.config.train.epochs, is_best)

    def _gathered_model(self) -> nn.Module:
        """The model to save. FSDP's shards are gathered on the main process; call it on every process."""
        if self.unsharded is None:
            return self.validated_model
        weights = self.accelerator.get_state_dict(self.module)
        if self.accelerator.is_main_process:
            self.unsharded = self.unsharded.to_empty(device="cpu")
            self.unsharded.load_state_dict(weights)
        return self._inner(self.unsharded)

    def _inner(self, trainable: nn.Module) -> Any:
        """The saved model inside a trainable module."""
        return trainable.model if self.wraps_model else trainable

    def _validate(self) -> Evaluation:
        model = self.validated_model
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():  # BatchNorm's statistics are each process's own; the main one's are saved
                buffer.copy_(broadcast(buffer))
        return evaluate(
            model,
            self.feed.val_batches(self.accelerator.process_index),
            self.task.evaluator(self.accelerator.device),
            self.accelerator,
            self._note_bad,
            channels_last=self.config.train.channels_last,
            lockstep=self.sharded,
        )

    def _gather_bad_files(self) -> None:
        """Reports to every process, and through the main one to the user, the unreadable files that the others met."""
        if self.accelerator.num_processes > 1:
            self._note_bad(gather_object(list(self.state.bad_files.items())))

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _save_checkpoint(self) -> None:
        self.state.sums = {
            name: self.accelerator.reduce(value, "sum").item() for name, value in sorted(self.sums.items())
        }
        self.state.seconds = self._seconds()
        save_checkpoint(self.folder, self.accelerator, self.ema, self.state, self.config.train.keep_checkpoints)
