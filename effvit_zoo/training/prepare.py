"""What a run is made of, from its config: data, task and model, tried before anything is trained."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.data.transforms import str_to_pil_interp
from torch import nn

from .. import hub
from ..data import MODES, Feed, make_feed
from ..errors import UserError, one_line
from ..tasks import TASKS, Task
from .config import RunConfig
from .freezing import fixed_norms
from .optim import check_optim

RESERVED = frozenset({"checkpoint_path", "device", "features_only", "name", "out_indices", "scriptable"})
"""Arguments of `hub.load` and `timm.create_model` that make something else than a network to train."""


@dataclass(frozen=True)
class Prepared:
    """Data, task and model of a run."""

    feed: Feed
    task: Task
    model: nn.Module


def prepare(config: RunConfig, num_processes: int) -> Prepared:
    """Data, task and model of a run. Raises `UserError`."""
    check_optim(config.optim, config.train.epochs)
    in_chans = config.model.kwargs.get("in_chans", 3)
    if in_chans not in tuple(MODES):
        raise UserError(f"model.kwargs.in_chans is {in_chans}, expected 3 (RGB) or 1 (grey)")
    kind, data, train, augment = TASKS[config.task.kind], config.data, config.train, config.augment
    splits = kind.open_splits(data, MODES[in_chans])
    task = kind.for_training(config.task, augment, splits)
    model = build_model(config, task)
    data_config = _data_config(config, model, in_chans)
    shapes = [data_config["input_size"], *((in_chans, side, side) for side in augment.sizes)]
    for shape in shapes:
        try_size(model, shape, config.model.name)
    feed = make_feed(
        splits,
        task.transforms(data_config),
        data_config,
        batch_size=train.batch_size,
        num_processes=num_processes,
        grad_accum=train.grad_accum,
        seed=train.seed,
        repeats=augment.repeats,
        sizes=augment.sizes,
        num_workers=data.num_workers,
    )
    if feed.plan.smallest_batch == 1:
        for shape in shapes:
            try_single(model, shape, config)
    return Prepared(feed, task, model)


def _data_config(config: RunConfig, model: Any, in_chans: int) -> dict[str, Any]:
    """timm's preprocessing settings for the model, with the run's size and crop."""
    data = config.data
    data_config: dict[str, Any] = resolve_data_config({"crop_pct": data.crop_pct} if data.crop_pct else {}, model=model)
    size = data.img_size or tuple(data_config["input_size"][1:])
    data_config["input_size"] = (in_chans, *(size if isinstance(size, tuple) else (size, size)))
    for key in ("mean", "std"):
        given = data_config[key]
        is_numbers = isinstance(given, list | tuple) and all(isinstance(value, int | float) for value in given)
        if not is_numbers or len(given) not in (1, 3) or (key == "std" and min(given) <= 0):
            raise UserError(f"{config.model.name}: {key} is {given}, expected one number or three")
        if len(given) != in_chans:  # colour statistics for a network that sees grey
            data_config[key] = (sum(given) / len(given),) * in_chans
    _require_interpolation(data_config["interpolation"], config.model.name)
    return data_config


def _require_interpolation(mode: Any, name: str) -> None:
    try:
        str_to_pil_interp(mode)
    except (KeyError, TypeError):
        known = "nearest, bilinear, bicubic, box, hamming, lanczos"
        raise UserError(f"{name}: interpolation is {mode!r}, expected one of {known}") from None


def build_model(config: RunConfig, task: Task | None) -> nn.Module:
    """The config's model with outputs for a task (None: its own), made for `data.img_size`. Raises `UserError`."""
    name, size, kwargs = config.model.name, config.data.img_size, config.model.kwargs
    for given in kwargs.keys() & RESERVED:
        raise UserError(f"model.kwargs.{given} is not a setting of the network, expected none")
    if config.model.architecture is not None:
        kwargs = kwargs | {"architecture": config.model.architecture}

    def build(**sized: Any) -> Any:
        if task is None:
            return hub.load(name, pretrained=config.starts_trained, **kwargs, **sized)
        return task.build(name, config.starts_trained, {**kwargs, **sized})

    model = build()
    if size is not None:
        try:
            if hasattr(model, "set_input_size"):
                model.set_input_size(img_size=size)
            elif "img_size" in inspect.signature(type(model).__init__).parameters:
                model = build(img_size=size)
        except UserError:
            raise
        except (ValueError, AssertionError, TypeError, RuntimeError, ArithmeticError) as error:
            raise UserError(f"{name} can't take images of {size} pixels: {one_line(error)}") from error
    if config.train.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, NotImplementedError):
            raise UserError(f"train.grad_checkpointing: {name} has no gradient checkpointing, expected false") from None
    return model


def try_size(model: nn.Module, size: Sequence[int], name: str) -> None:
    """Runs the model on one black image, so that a size that it can't take is a `UserError` at the start."""
    was_training = model.training
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *size, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = " x ".join(map(str, size[1:]))
        raise UserError(f"{name} can't take images of {shape} pixels: {one_line(error)}") from error
    finally:
        model.train(was_training)


def try_single(model: nn.Module, size: Sequence[int], config: RunConfig) -> None:
    """Trains the model's forward pass on one black image, so that a BatchNorm that a batch of one leaves a single value per channel
    is a `UserError` at the start."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        model.train()
        for norm in fixed_norms(model, config):
            norm.eval()
        with torch.no_grad():
            model(torch.zeros(1, *size, device=next(model.parameters()).device))
    except ValueError as error:
        batch, steps = config.train.batch_size, config.train.grad_accum
        raise UserError(
            f"{config.model.name} can't be trained on a single image of {' x '.join(map(str, size[1:]))} pixels, which train.batch_size "
            f"{batch} and train.grad_accum {steps} leave to a process ({one_line(error)}): larger batches, fewer accumulation steps or "
            "a larger data.img_size help"
        ) from error
    finally:
        for buffer, copy in before:
            buffer.copy_(copy)
        for module, training in modes:
            module.training = training
