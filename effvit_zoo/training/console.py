"""What a run says while it trains: a bar of its steps and a line per validated epoch."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from ..tasks import Metric, Task


class ProgressBar(tqdm):
    """A bar of optimizer steps that says how long the run goes on, validation, figures and saving included.

    Args:
        step: Finished steps.
        steps: Steps of the run.
        hidden: Show nothing.
    """

    left: float | None = None
    """Seconds that are left; None where that isn't known."""

    def __init__(self, step: int, steps: int, hidden: bool) -> None:
        super().__init__(
            total=steps,
            initial=step,
            unit="step",
            disable=hidden,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 5.0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{left}{postfix}]",
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        left = "?" if self.left is None else tqdm.format_interval(self.left)
        return {**super().format_dict, "left": left}


def shown(task: Task, name: str, value: float, digits: int | None = None) -> str:
    """A named value for people, e.g. "top-1 87.95 %"."""
    metric = task.metrics.get(name, Metric(name.replace("_", " "), digits=3))
    return f"{metric.title} {metric.show(value, digits)}"


def epoch_line(task: Task, row: dict[str, Any], epochs: int, is_best: bool) -> str:
    """The line on a validated epoch, or on the linear probe, which is epoch 0."""
    validated = [shown(task, name, row[name]) for name in task.metrics]
    if not row["epoch"]:
        return f"linear probe: {', '.join(validated)} after {row['seconds']:.0f} s"
    trained = [
        shown(task, name.removeprefix("train_"), value, digits=1)
        for name, value in row.items()
        if name.startswith("train_") and name != "train_loss"
    ]
    training = ", ".join([f"train loss {row['train_loss']:.3f}", *trained])
    validation = ", ".join([f"validation loss {row['val_loss']:.3f}", *validated])
    return f"epoch {row['epoch']:3d}/{epochs}: {training} | {validation}{' (best so far)' if is_best else ''}"
