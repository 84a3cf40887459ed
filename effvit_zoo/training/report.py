"""The report of a run at any moment: while it trains, after an interruption, and at the end."""

from __future__ import annotations

import re
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from timm.layers.attention import Attention
from torch import nn

from .. import run_folder
from ..data import Feed
from ..errors import one_line
from ..measure import cost
from ..measure.host import environment
from ..report.run_page import Page, write_report
from ..tasks import Task
from ..viz.curves import single_curves
from .checkpoint import RunState
from .config import RunConfig

FIRST_PICTURES = 30.0  # seconds into a run from which on its report has pictures before the end
SHARE = 50  # a report with pictures is written again when that many times its own duration has passed
_HIDDEN = ("bad_files", "bad_file_names", "skipped_steps", "threads")


class RunReport:
    """report.html and curves.png of a run; used by the main process only.

    Args:
        task: Result and sections.
        feed: Data.
        config: The run's config.
        folder: The run folder.
        model: What is trained.
        processes: Number of processes.
        notes: Lines on data and settings.
        again: Command that continues the run; "" for the usual one.
        loss: What the training loss is, where it is another than the validation's.
    """

    def __init__(
        self,
        task: Task,
        feed: Feed,
        config: RunConfig,
        folder: Path,
        model: nn.Module,
        processes: int = 1,
        *,
        notes: Sequence[str] = (),
        again: str = "",
        loss: str = "",
    ) -> None:
        self.task, self.feed, self.config, self.folder = task, feed, config, folder
        self.notes, self.loss = notes, loss
        self.again = again or resume_command(folder, processes)
        self.settings = _settings(config, feed, model, processes)
        self.has_pictures, self.next_pictures = False, time.monotonic() + FIRST_PICTURES

    def progress(self, state: RunState) -> None:
        """Writes the report of a run that goes on: at first without pictures, later with pictures but not each time it is called."""
        done, epochs = state.epoch, self.config.train.epochs
        now = datetime.now().strftime("%Y-%m-%d %H:%M")
        status = f"Not finished: {done} of {epochs} epochs at {now}. If the run was interrupted, this continues it:"
        if done and time.monotonic() >= self.next_pictures:
            self.write(state, status)
        elif not self.has_pictures:
            self.write(state, status, pictures=False)

    def interrupted(self, state: RunState, error: BaseException) -> None:
        """Writes the report of a run that ends before its time."""
        reasons = {KeyboardInterrupt: "by Ctrl-C", SystemExit: "by a signal to stop"}
        reason = reasons.get(type(error), f"by an error ({one_line(error)})")
        steps = self.config.train.epochs * self.feed.steps_per_epoch
        place = f"{state.epoch} of {self.config.train.epochs} epochs, step {state.step:,} of {steps:,}"
        self.write(state, f"Interrupted {reason} after {place}. This continues it:", pictures=bool(state.history))

    def write(
        self, state: RunState, status: str = "", measured: Mapping[str, Any] | None = None, pictures: bool = True
    ) -> None:
        """Writes the report.

        Args:
            state: Counters and results.
            status: Why the run is not finished, "" if it is.
            measured: Further technical rows.
            pictures: With figures and images.
        """
        started = time.monotonic()
        best, details = state.best.get("metrics"), state.best.get("details") or {}
        name, metric = next(iter(self.task.metrics.items()))
        headline, subline, result = "No epoch is finished yet", "", []
        if best:
            headline = f"{metric.title} {metric.show(best[name])}"
            epoch = f"at epoch {state.best_epoch} of {self.config.train.epochs}"
            subline = f"on the validation images, {epoch if state.best_epoch else 'by the linear probe'}"
            result = [*self.task.result(best, details), *probe_result(self.task, state)]
        folder = self.folder if pictures else None
        facts = {**self.facts(state), **(measured or {}), **environment()}
        page = Page(
            title=f"{self.config.model.name} on {self.config.data.root}",
            headline=headline,
            subline=subline,
            sections=self.task.sections(details, self.feed.val_image, folder) if best else (),
            summary=[*result, *self.settings],
            technical=[(key.replace("_", " "), value) for key, value in facts.items() if key not in _HIDDEN],
            curves=self._curves(state) if pictures and state.history else (),
            notes=[*self.notes, *_trouble(state)],
            status=status,
            command=self.again if status else "",
        )
        write_report(self.folder, page)
        if pictures:
            ended = time.monotonic()
            self.has_pictures, self.next_pictures = True, ended + SHARE * (ended - started)

    def facts(self, state: RunState) -> dict[str, Any]:
        """What summary.json says of a run's data, result and length."""
        metrics = dict(state.best.get("metrics", {}))
        loss = {"val_loss": metrics.pop("loss")} if metrics else {}
        return {
            "model": self.config.model.name,
            "task": self.config.task.kind,
            "data": self.config.data.root,
            **self.task.facts(),
            **self.feed.describe(),
            "bad_files": len(state.bad_files),
            "bad_file_names": sorted(state.bad_files),
            "input_size": list(self.feed.data_config["input_size"]),
            **metrics,
            **loss,
            "best_epoch": state.best_epoch if metrics else None,
            "epochs": self.config.train.epochs,
            "epochs_run": state.epoch,
            **probe_facts(self.task, state),
            "skipped_steps": state.skipped_steps,
            "steps": state.step,
            "seconds": state.seconds,
            "precision": self.config.train.precision,
            "seed": self.config.train.seed,
            "training_loss": self.loss,
        }

    def _curves(self, state: RunState) -> list[tuple[str, str, list[bytes]]]:
        name, metric = next(iter(self.task.metrics.items()))
        title = f"{metric.title}{f', {metric.unit}' if metric.unit else ''}"
        panels = [(title, f"train_{name}", name, metric.higher_is_better)]
        return [("Curves", "", single_curves(state.history, panels, self.loss, self.folder / run_folder.CURVES))]


def probe_result(task: Task, state: RunState) -> list[tuple[str, str]]:
    """The lines of a summary on the linear probe and on what training all layers made of it; none without a probe."""
    if not state.probe:
        return []
    name, metric = next(iter(task.metrics.items()))
    lines = [
        (
            "linear probe",
            f"{metric.title} {metric.show(state.probe['metrics'][name])}, before the other layers were trained",
        )
    ]
    if state.tuned:
        reached = f"{metric.title} {metric.show(state.tuned['metrics'][name])} at epoch {state.tuned['epoch']}"
        difference = task.difference(state.tuned["details"], state.probe["details"])
        better = "fine-tuned" if state.best_epoch else "linear probe"
        gain = f"; against the probe {difference}" if difference else ""
        lines.append(("fine-tuning", f"{reached}{gain}; best/ is the {better} model"))
    return lines


def probe_facts(task: Task, state: RunState) -> dict[str, Any]:
    """The same for summary.json."""
    if not state.probe:
        return {}
    facts = {f"probe_{name}": state.probe["metrics"][name] for name in task.metrics}
    if state.tuned and (gain := task.difference(state.tuned["details"], state.probe["details"])):
        facts |= {"gain": gain.points, "gain_interval": [gain.low, gain.high]}
    return facts


def resume_command(folder: Path, processes: int = 1) -> str:
    """The command that continues a run."""
    return f"{launcher(processes)} --resume {shlex.quote(str(folder))}"


def launcher(processes: int) -> str:
    """The command that trains in a number of processes."""
    return "effzoo train" if processes == 1 else f"torchrun --nproc_per_node {processes} train.py"


def mixers(model: nn.Module) -> str:
    """The token mixers of a model and how many there are of each, e.g. "12 x softmax"; "" where none is known."""
    found: Counter[str] = Counter()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        kind = type(module)
        known = kind.__module__.startswith("effvit_zoo.attention.") or isinstance(module, Attention)
        if known and not name.startswith(inside):
            words = re.sub("(?<=[a-z])(?=[A-Z])", " ", kind.__name__).lower()
            found[(getattr(kind, "label", "") or words).partition(",")[0]] += 1
            inside = (*inside, f"{name}.")
    return ", ".join(f"{count} x {name}" for name, count in found.items())


def _settings(config: RunConfig, feed: Feed, model: nn.Module, processes: int) -> list[tuple[str, str]]:
    """The lines of the summary that say what was trained, and how."""
    optim, train = config.optim, config.train
    weights = "trained weights" if config.starts_trained else "random weights"
    parts = [f"{cost.count_params(model):,} parameters", mixers(model), f"starts from {weights}"]
    counts = feed.describe()
    images = " and ".join(
        f"{'an unknown number of' if counts[f'{split}_images'] is None else format(counts[f'{split}_images'], ',')} {title} images"
        for split, title in (("train", "training"), ("val", "validation"))
    )
    rate = [f"{optim.lr:g} at its peak", f"{optim.schedule} schedule", optim.name]
    if optim.warmup_epochs:
        rate.append(f"warm-up of {optim.warmup_epochs:g} epochs")
    if optim.layer_decay not in (None, 1.0):
        rate.append(f"times {optim.layer_decay:g} per layer downwards")
    step = train.batch_size * train.grad_accum * processes
    return [
        ("data", f"{config.data.root}: {images}"),
        ("model", "; ".join([config.model.name, *filter(None, parts)])),
        ("learning rate", ", ".join(rate)),
        ("batch", f"{step:,} images per step"),
        ("augmentation", config.augment.in_words()),
        *([("teacher", config.distill.teacher)] if config.distill.teacher else []),
    ]


def _trouble(state: RunState) -> list[str]:
    """Unreadable files, and steps that were left out."""
    lines = [f"unreadable: {file}: {reason}" for file, reason in sorted(state.bad_files.items())]
    if state.skipped_steps:
        lines.append(f"{state.skipped_steps} steps were skipped because their loss was not finite")
    return lines
