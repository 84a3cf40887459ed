"""Optimizer and learning-rate schedule, from timm's optimizers and schedulers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import Accelerator
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import (
    CosineLRScheduler,
    MultiStepLRScheduler,
    PolyLRScheduler,
    StepLRScheduler,
    TanhLRScheduler,
    WSDLRScheduler,
)
from timm.scheduler.scheduler import Scheduler
from timm.utils import adaptive_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UserError, one_line
from .config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """timm's optimizer by name; weights of norms, biases and what the model names in `no_weight_decay` don't decay."""
    info = get_optimizer_info(config.name)  # timm leaves out what an optimizer doesn't have
    expected = info.num_betas if info.has_betas else 0
    if config.betas is not None and len(config.betas) != expected:
        raise UserError(
            f"optim.betas is {list(config.betas)}, expected {f'{expected} numbers' if expected else 'null'} with {config.name}"
        )
    if config.eps is not None and not info.has_eps:
        raise UserError(f"optim.eps is {config.eps:g}, expected null: {config.name} has none")
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
    except (TypeError, AssertionError, ValueError, RuntimeError, AttributeError, LookupError, ImportError) as error:
        reason = one_line(error)
        raise UserError(f"optimizer {config.name!r} (optim.name) does not take these settings: {reason}") from error


def make_scheduler(optimizer: Optimizer, config: OptimConfig, epochs: int, steps_per_epoch: int) -> Scheduler:
    """timm's schedule, a function of the number of finished optimizer steps: `scheduler.step_update(step)`.

    Raises:
        UserError: The last phase of `wsd` or `rsqrt` is longer than the run without its warm-up.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    return _SCHEDULERS[config.schedule](
        optimizer,
        config=config,
        steps=epochs * steps_per_epoch,
        per_epoch=steps_per_epoch,
        common={"warmup_t": warmup, "warmup_lr_init": config.warmup_lr, "t_in_epochs": False},
    )


def _cyclic(
    optimizer: Optimizer, config: OptimConfig, steps: int, per_epoch: int, common: Any, *, kind: Any, **own: Any
) -> Scheduler:
    """Cosine, tanh and poly: from the peak to `min_lr`, in one or several cycles."""
    length, cycles = steps - common["warmup_t"] if config.warmup_prefix else steps, config.cycles or 1
    decay = (config.cycle_decay or 1.0) if cycles > 1 else 0.0  # without a second cycle it is not used
    cycle = {"t_initial": length / cycles, "cycle_limit": cycles, "cycle_decay": decay}
    return kind(optimizer, **cycle, **own, lr_min=config.min_lr, warmup_prefix=config.warmup_prefix, **common)


def _poly(optimizer: Optimizer, config: OptimConfig, steps: int, per_epoch: int, common: Any) -> Scheduler:
    return _cyclic(optimizer, config, steps, per_epoch, common, kind=PolyLRScheduler, power=config.power or 0.9)


def _step(optimizer: Optimizer, config: OptimConfig, steps: int, per_epoch: int, common: Any) -> Scheduler:
    every = max(1, 0.3 * steps if config.decay_epochs is None else config.decay_epochs * per_epoch)
    rate = config.decay_rate or 0.1
    return StepLRScheduler(optimizer, decay_t=every, decay_rate=rate, warmup_prefix=config.warmup_prefix, **common)


def _multistep(optimizer: Optimizer, config: OptimConfig, steps: int, per_epoch: int, common: Any) -> Scheduler:
    given = (
        [0.3 * steps, 0.6 * steps, 0.9 * steps]
        if config.milestones is None
        else [m * per_epoch for m in config.milestones]
    )
    after = [max(1, round(step)) + 1 for step in given]  # timm compares with the number of the step, from 1
    rate = config.decay_rate or 0.1
    return MultiStepLRScheduler(optimizer, decay_t=after, decay_rate=rate, warmup_prefix=config.warmup_prefix, **common)


def _constant(optimizer: Optimizer, config: OptimConfig, steps: int, per_epoch: int, common: Any) -> Scheduler:
    return StepLRScheduler(optimizer, decay_t=1, decay_rate=1.0, **common)


def _stable(
    optimizer: Optimizer, config: OptimConfig, steps: int, per_epoch: int, common: Any, *, stable: str, decay: str
) -> Scheduler:
    """wsd and rsqrt: warm-up, stable phase, and decay to `min_lr` in the last phase."""
    length = max(1, steps - common["warmup_t"])
    last = 0.2 * length if config.decay_epochs is None else config.decay_epochs * per_epoch
    if last > length:
        raise UserError(
            f"optim.decay_epochs is {config.decay_epochs:g}, expected at most the {length / per_epoch:g} epochs after the warm-up"
        )
    timescale = (config.timescale_epochs or config.warmup_epochs or 1) * per_epoch
    kinds: dict[str, Any] = {"stable_fn": stable, "decay_fn": decay, "stable_timescale": timescale}
    return WSDLRScheduler(
        optimizer, t_initial=length, decay_t=min(length, max(1, round(last))), lr_min=config.min_lr, **kinds, **common
    )


_SCHEDULERS: dict[str, Callable[..., Scheduler]] = {
    "cosine": partial(_cyclic, kind=CosineLRScheduler),
    "tanh": partial(_cyclic, kind=TanhLRScheduler),
    "poly": _poly,
    "step": _step,
    "multistep": _multistep,
    "constant": _constant,
    "wsd": partial(_stable, stable="constant", decay="1-sqrt"),
    "rsqrt": partial(_stable, stable="rsqrt", decay="linear"),
}


def clip_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter], config: OptimConfig) -> Tensor | None:
    """Clips gradients as `clip_mode` says; their norm before it where it is known."""
    if config.clip_grad is None:
        return None
    if config.clip_mode == "norm":
        return accelerator.clip_grad_norm_(parameters, config.clip_grad)
    accelerator.unscale_gradients()
    if config.clip_mode == "value":
        nn.utils.clip_grad_value_(parameters, config.clip_grad)
    else:
        adaptive_clip_grad(parameters, config.clip_grad)
    return None


def check_optim(config: OptimConfig, epochs: int) -> None:
    """Raises `UserError` for an optimizer or a schedule that can't be made, before anything that takes time."""
    single = make_optimizer(nn.utils.skip_init(nn.Linear, 1, 1), replace(config, layer_decay=None))
    make_scheduler(single, config, epochs, steps_per_epoch=1)
