"""What the engine trains on: transforms, batches and their order, for data with random access and for streams."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader

from ..errors import UserError
from ..training.config import RunConfig
from .loader import Batch, BatchPlan, KeyedImages, make_loader, picture_of, worker_count
from .splits import DataSplits, StreamSource
from .streams.batches import StreamFeed


class Feed(Protocol):
    """Everything about the data that the engine needs.

    Attributes:
        class_names: Names of the classes, by index.
        data_config: timm's preprocessing settings (input_size, mean, std, crop_pct, interpolation) that a saved model has to carry.
        steps_per_epoch: Optimizer steps of an epoch.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def data_config(self) -> dict[str, Any]: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def step_size(self, step: int) -> int:
        """Images in an optimizer step, over all processes."""

    def train_batches(self, process: int, start_step: int, stop_step: int) -> Iterable[Batch]:
        """This process' augmented micro-batches from one optimizer step up to another."""

    def val_batches(self, process: int) -> Iterable[Batch]:
        """This process' share of the validation images."""

    def describe(self) -> dict[str, int | None]:
        """train_images and val_images, None where a stream doesn't tell."""

    def val_picture(self, index: int) -> tuple[str, Image.Image] | None:
        """Name and picture of a validation image by its index in the batches; None where they are not at hand."""


@dataclass(frozen=True)
class PlannedFeed:
    """The feed of data sets with random access.

    Args:
        train: Augmented training images.
        val: Validation images.
        plan: Optimizer steps of the training images.
        val_plan: Batches of the validation images.
        class_names: As in `Feed`.
        data_config: As in `Feed`.
        num_workers: Loader workers of this process.
    """

    train: KeyedImages
    val: KeyedImages
    plan: BatchPlan
    val_plan: BatchPlan
    class_names: tuple[str, ...]
    data_config: dict[str, Any]
    num_workers: int

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def step_size(self, step: int) -> int:
        return self.plan.step_size(step)

    def train_batches(self, process: int, start_step: int, stop_step: int) -> DataLoader:
        return make_loader(self.train, self.plan.batches(process, start_step, stop_step), self.num_workers)

    def val_batches(self, process: int) -> DataLoader:
        return make_loader(self.val, self.val_plan.batches(process, 0, self.val_plan.steps_per_epoch), self.num_workers)

    def describe(self) -> dict[str, int | None]:
        return {"train_images": len(self.train.source), "val_images": len(self.val.source)}

    def val_picture(self, index: int) -> tuple[str, Image.Image] | None:
        return picture_of(self.val.source, index)


def make_feed(splits: DataSplits, config: RunConfig, data_config: dict[str, Any], num_processes: int) -> Feed:
    """Transforms (timm's), batches and order for a run's data.

    Args:
        splits: Training and validation images.
        config: The run's config.
        data_config: timm's resolved preprocessing for the model, with `data.img_size` and `data.crop_pct` already in it.
        num_processes: Processes of the run.
    """
    augment, train = config.augment, config.train
    make_transform = functools.partial(
        create_transform,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        re_prob=augment.random_erasing,
        re_mode=augment.erasing_mode,
    )
    channels = data_config["input_size"][0]
    transform = make_transform(input_size=data_config["input_size"])
    sized = {size: make_transform(input_size=(channels, size, size)) for size in augment.sizes}
    num_workers = worker_count(config.data.num_workers, num_processes)
    if isinstance(splits.train, StreamSource):
        if augment.repeats > 1:
            raise UserError(f"augment.repeats is {augment.repeats}, expected 1 for a stream ({splits.train.title})")
        if augment.sizes:
            raise UserError(
                f"augment.sizes is {list(augment.sizes)}, expected none for a stream ({splits.train.title})"
            )
        return StreamFeed(
            train=splits.train,
            val=splits.val,
            transforms=(transform, validation_transform(data_config)),
            batch_size=train.batch_size,
            num_processes=num_processes,
            grad_accum=train.grad_accum,
            seed=train.seed,
            class_names=splits.class_names,
            data_config=data_config,
            num_workers=num_workers,
        )
    if isinstance(splits.val, StreamSource):
        raise UserError(
            f"{splits.val.title} is a stream, the training images aren't: expected both or only the training images to be"
        )
    return PlannedFeed(
        train=KeyedImages(splits.train, transform, seed=train.seed, replace_bad=True, sized=sized),
        val=KeyedImages(splits.val, validation_transform(data_config), seed=None, replace_bad=False),
        plan=BatchPlan(
            len(splits.train),
            train.batch_size,
            num_processes,
            train.grad_accum,
            train.seed,
            augment.repeats,
            augment.sizes,
        ),
        val_plan=BatchPlan(len(splits.val), train.batch_size, num_processes),
        class_names=splits.class_names,
        data_config=data_config,
        num_workers=num_workers,
    )


def validation_transform(data_config: dict[str, Any]) -> Callable:
    """timm's evaluation transform for these preprocessing settings."""
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(**{key: data_config[key] for key in keys})
