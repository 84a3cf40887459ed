"""What a training says on the console."""

from __future__ import annotations

from typing import Any

from ..tasks import Metric, Task


def shown(task: Task, name: str, value: float, digits: int | None = None) -> str:
    """A named value for people, e.g. "top-1 87.95 %"."""
    metric = task.metrics.get(name, Metric(name.replace("_", " "), digits=3))
    return f"{metric.title} {metric.show(value, digits)}"


def epoch_line(task: Task, row: dict[str, Any], epochs: int, is_best: bool) -> str:
    """The line on a finished epoch, or on the linear probe, which is epoch 0."""
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
