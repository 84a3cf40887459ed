"""From image sources to batches, as a pure function of (seed, epoch, index).

The order of images depends on (seed, epoch); an image's augmentation on (seed, epoch, index). Neither depends on the number of
loader workers, on how many processes share a batch, or on where a run was cut, so exact resume and "two processes equal one" are
properties of the arithmetic, not of saved generator states.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..errors import UserError
from ..images import BadImage
from .config import RunConfig
from .data import DataSplits, ImageSource, Source, StreamSource

Batch = dict[str, Any]  # as `collate` makes it


class Key(NamedTuple):
    """What a sample is made from.

    Attributes:
        epoch: Number of the epoch, from 0.
        image: Its index in the source.
        copy: With repeated augmentation, which of the image's versions it is.
        size: With multi-scale training, the side length in pixels.
    """

    epoch: int
    image: int
    copy: int = 0
    size: int | None = None


def mix_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part and on their order (splitmix64 steps)."""
    mask = (1 << 64) - 1
    state = 0x243F6A8885A308D3
    for part in parts:
        state = (state ^ (part & mask)) * 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1


def seed_everything(*parts: int) -> None:
    """Seeds Python's, numpy's and torch's generators of this process from the parts."""
    seed = mix_seed(*parts)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def worker_count(requested: int | None, num_processes: int) -> int:
    """Loader workers a process gets: as requested, else its share of the cores that it may run on, at most 8."""
    if requested is not None:
        return requested
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // num_processes))


@dataclass(frozen=True)
class BatchPlan:
    """Which images form which optimizer step, on which process.

    An epoch is split into `steps_per_epoch` steps of nearly equal size, a step into `grad_accum` micro-batches, a micro-batch over the
    processes. Every image comes exactly once per epoch; no step is a tiny remainder.

    Args:
        num_images: Images in the source.
        batch_size: Largest number of images per process and micro-batch (of 1, sometimes 2).
        num_processes: Processes that share a step.
        grad_accum: Micro-batches per optimizer step.
        seed: Seed of the order; None keeps the source's order.
        repeats: Copies of each image side by side in the order; an epoch then has so many times fewer different images. timm's
            `RepeatAugSampler` as a function of the seed: what differs is that an epoch isn't rounded down to 256 images.
        sizes: Side lengths of which each step draws one, by seed and step; empty for images of one size.
    """

    num_images: int
    batch_size: int
    num_processes: int = 1
    grad_accum: int = 1
    seed: int | None = None
    repeats: int = 1
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        pieces = self.num_processes * self.grad_accum
        if self.num_images < pieces:
            raise UserError(
                f"{self.num_images} images can't be shared by {self.num_processes} processes x {self.grad_accum} accumulation steps: "
                f"at least {pieces} are needed"
            )

    @property
    def steps_per_epoch(self) -> int:
        pieces = self.num_processes * self.grad_accum
        steps = -(-self.num_images // (self.batch_size * pieces))
        return max(
            1, min(steps, self.num_images // pieces)
        )  # the second only where batch_size is 1: no piece may stay empty

    def step_size(self, step: int) -> int:
        """Images in an optimizer step (0-based over the whole run), over all processes and micro-batches."""
        low, high = self._bounds(step % self.steps_per_epoch, self.num_images, self.steps_per_epoch)
        return high - low

    def batches(self, process: int, start_step: int, stop_step: int) -> Iterator[list[Key]]:
        """This process' micro-batches of keys from one optimizer step up to another."""
        for step in range(start_step, stop_step):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if step == start_step or step_in_epoch == 0:
                order = self._order(epoch)
            low, high = self._bounds(step_in_epoch, self.num_images, self.steps_per_epoch)
            size = self.sizes[mix_seed(self.seed or 0, step, len(self.sizes)) % len(self.sizes)] if self.sizes else None
            for micro in range(self.grad_accum):
                micro_low, micro_high = self._bounds(micro, high - low, self.grad_accum)
                own_low, own_high = self._bounds(process, micro_high - micro_low, self.num_processes)
                places = range(low + micro_low + own_low, low + micro_low + own_high)
                yield [Key(epoch, int(order[place]), place % self.repeats, size) for place in places]

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.num_images)
        order = np.random.default_rng(mix_seed(self.seed, epoch)).permutation(self.num_images)
        return order if self.repeats == 1 else order.repeat(self.repeats)[: self.num_images]

    @staticmethod
    def _bounds(piece: int, total: int, pieces: int) -> tuple[int, int]:
        """The piece's range when `total` things are cut into pieces whose sizes differ by one at most."""
        return piece * total // pieces, (piece + 1) * total // pieces


class KeyedImages(Dataset):
    """Transformed images of a source under their keys.

    Args:
        source: Images and their classes.
        transform: PIL image to tensor (3, H, W).
        seed: With a seed the transform's random numbers depend on seed and key only; None for transforms that draw none.
        replace_bad: Give an unreadable image's place to the next readable one; else its place stays empty.
        sized: With multi-scale training, the transform to each side length.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable,
        seed: int | None,
        replace_bad: bool,
        sized: Mapping[int, Callable] | None = None,
    ):
        self.source, self.transform, self.seed, self.replace_bad = source, transform, seed, replace_bad
        self.sized = sized or {}

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index, copy, size = Key(*key)
        transform = self.transform if size is None else self.sized[size]
        bad: list[tuple[str, str]] = []
        for offset in range(len(self.source) if self.replace_bad else 1):
            try:
                image, target = self.source.load((index + offset) % len(self.source))
            except BadImage as error:
                bad.append((error.name, error.reason))
                continue
            if self.seed is not None:
                seed_everything(self.seed, epoch, index, *([copy] if copy else []))
            return {"image": transform(image), "target": target, "index": index, "bad": bad}
        return {"image": None, "target": -1, "index": index, "bad": bad}


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Readable samples as image (B, 3, H, W) float, target (B,) int64, index (B,) int64; bad: (name, reason) of unreadable files."""
    good = [sample for sample in samples if sample["image"] is not None]
    bad = [entry for sample in samples for entry in sample["bad"]]
    if not good:
        return {"image": None, "target": None, "index": None, "bad": bad}
    return {
        "image": torch.stack([sample["image"] for sample in good]),
        "target": torch.tensor([sample["target"] for sample in good]),
        "index": torch.tensor([sample["index"] for sample in good]),
        "bad": bad,
    }


def make_loader(
    dataset: KeyedImages, batches: Sequence[list[Key]] | Iterator[list[Key]], num_workers: int
) -> DataLoader:
    """A torch DataLoader over planned batches; one pass over it is the whole plan, so its workers live as long as the run."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if num_workers else None,
    )


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
        return _picture(self.val.source, index)


def _picture(source: Source, index: int) -> tuple[str, Image.Image] | None:
    if isinstance(source, StreamSource):
        return None
    try:
        return source.name(index), source.load(index)[0]
    except BadImage:
        return None


class StreamedImages(IterableDataset):
    """Transformed images of a stream, one pass. A training image's augmentation depends on (seed, epoch, process, worker, position)."""

    def __init__(self, source: StreamSource, transform: Callable, key: tuple[int, ...] | None):
        self.source, self.transform, self.key = source, transform, key

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        for position, (image, target) in enumerate(self.source):
            if isinstance(image, BadImage):
                yield {"image": None, "target": target, "index": position, "bad": [(image.name, image.reason)]}
                continue
            if self.key is not None:
                seed_everything(*self.key, worker.id if worker else 0, position)
            yield {"image": self.transform(image), "target": target, "index": position, "bad": []}


@dataclass(frozen=True)
class StreamFeed:
    """The feed of streaming data sets: timm shares them out over processes and workers, in its own order.

    It shares whole shards: each image comes once per epoch where shards are equal and their number is a multiple of processes x
    workers; otherwise workers with fewer images begin theirs again. Training drops what doesn't fill a last batch. Resuming in
    mid-epoch reads and discards what was seen already.

    Args:
        train: Training stream.
        val: Validation images, a stream or not.
        transforms: For training and for validation.
        batch_size: Images per process and micro-batch.
        num_processes: Processes that share a step.
        grad_accum: Micro-batches per optimizer step.
        seed: Seed of the augmentation.
        class_names: As in `Feed`.
        data_config: As in `Feed`.
        num_workers: Loader workers of this process.
    """

    train: StreamSource
    val: Source
    transforms: tuple[Callable, Callable]
    batch_size: int
    num_processes: int
    grad_accum: int
    seed: int
    class_names: tuple[str, ...]
    data_config: dict[str, Any]
    num_workers: int

    def __post_init__(self) -> None:
        if not self.train.num_samples:
            raise UserError(
                f"{self.train.title} doesn't say how many images it has: its length has to be known for training"
            )
        if self.steps_per_epoch < 1:
            raise UserError(
                f"{self.train.title} has {self.train.num_samples} images, fewer than one optimizer step takes"
            )

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        return self.train.samples_per_process(max(1, self.num_workers), self.batch_size) // (
            self.batch_size * self.grad_accum
        )

    def step_size(self, step: int) -> int:
        return self.batch_size * self.num_processes * self.grad_accum

    def train_batches(self, process: int, start_step: int, stop_step: int) -> Iterator[Batch]:
        epoch, step_in_epoch = divmod(start_step, self.steps_per_epoch)
        per_epoch = self.steps_per_epoch * self.grad_accum
        seen = step_in_epoch * self.grad_accum
        while epoch * self.steps_per_epoch < stop_step:
            self.train.set_epoch(epoch)
            stream = StreamedImages(self.train, self.transforms[0], (self.seed, epoch, process))
            loader = DataLoader(
                stream, self.batch_size, num_workers=self.num_workers, collate_fn=collate, drop_last=True
            )
            yield from itertools.islice(loader, seen, per_epoch)
            epoch, seen = epoch + 1, 0

    def val_batches(self, process: int) -> DataLoader:
        if isinstance(self.val, StreamSource):
            stream = StreamedImages(self.val, self.transforms[1], None)
            return DataLoader(stream, self.batch_size, num_workers=self.num_workers, collate_fn=collate)
        images = KeyedImages(self.val, self.transforms[1], seed=None, replace_bad=False)
        plan = BatchPlan(len(self.val), self.batch_size, self.num_processes)
        return make_loader(images, plan.batches(process, 0, plan.steps_per_epoch), self.num_workers)

    def describe(self) -> dict[str, int | None]:
        val = self.val.num_samples if isinstance(self.val, StreamSource) else len(self.val)
        return {"train_images": self.train.num_samples, "val_images": val}

    def val_picture(self, index: int) -> tuple[str, Image.Image] | None:
        return _picture(self.val, index)


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
