"""Optimizer and learning-rate schedule, from timm's factories."""

from __future__ import annotations

from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from ..errors import UserError
from .config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """timm's optimizer by name; weights of norms, biases and what the model names in `no_weight_decay` don't decay."""
    # one kernel per tensor saves a tenth of a small model's step
    fused = True if config.name.lower() in ("adam", "adamw") else None
    optional: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "fused": fused}
    try:
        return create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
            **{key: value for key, value in optional.items() if value is not None},
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"optimizer {config.name!r} does not take these settings: {error}") from None


def make_scheduler(optimizer: Optimizer, config: OptimConfig, epochs: int, steps_per_epoch: int) -> Scheduler:
    """timm's schedule, a function of the number of finished optimizer steps: `scheduler.step_update(step)`."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        num_epochs=epochs - config.warmup_epochs if config.warmup_prefix else epochs,  # type: ignore[arg-type]
        warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]  # timm multiplies it by the updates per epoch
        warmup_lr=config.warmup_lr,
        warmup_prefix=config.warmup_prefix,
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler
