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
            size = self.sizes[mix_seed(self.seed or 0, step, len(self.sizes)) % len(self.sizes)] if self.sizes else None
            for places in self._places(process, step_in_epoch):
                yield [Key(epoch, int(order[place]), place % self.repeats, size) for place in places]

    def batch_sizes(self, process: int) -> list[int]:
        """Images in each of a process' micro-batches of an epoch."""
        return [len(places) for step in range(self.steps_per_epoch) for places in self._places(process, step)]

    def first(self, process: int) -> int:
        """Images in an epoch's micro-batches of the processes before this one."""
        return sum(sum(self.batch_sizes(before)) for before in range(process))

    def _places(self, process: int, step_in_epoch: int) -> Iterator[range]:
        low, high = self._bounds(step_in_epoch, self.num_images, self.steps_per_epoch)
        for micro in range(self.grad_accum):
            micro_low, micro_high = self._bounds(micro, high - low, self.grad_accum)
            own_low, own_high = self._bounds(process, micro_high - micro_low, self.num_processes)
            yield range(low + micro_low + own_low, low + micro_low + own_high)

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


class StreamedBatches(IterableDataset):
    """A process' batches of a stream, one pass. Of W loader workers, w makes the batches w, w + W, ... in that order.

    That is the order in which a DataLoader takes them, so `sizes` says where in the stream the samples of each worker begin.

    Args:
        source: The stream.
        transform: PIL image to tensor (3, H, W).
        sizes: Images in each of the process' batches; an int cuts all that timm gives this process into batches of that size.
        first: Place of the process' first sample in the epoch's sequence.
        start: Batches that each worker leaves out, having made them before.
        seed: For training: a sample's augmentation depends on these numbers and on its place, and an unreadable image's place
            is given to the next readable one. None leaves that place empty.
    """

    def __init__(
        self,
        source: StreamSource,
        transform: Callable,
        sizes: list[int] | int,
        first: int = 0,
        start: int = 0,
        seed: tuple[int, ...] | None = None,
    ):
        self.source, self.transform, self.sizes, self.first = source, transform, sizes, first
        self.start, self.seed = start, seed

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.sizes, int):
            images = self._images(0, 0, 0)
            while samples := list(itertools.islice(images, self.sizes)):
                yield collate(samples)
            return
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        shares = [self.sizes[start::count] for start in range(count)]
        low = self.first + sum(map(sum, shares[:number]))
        own = shares[number]
        place = low, low + sum(own), sum(own[: self.start])
        images = self._images(*place) if self.seed is None else self._replaced(*place)
        for size in own[self.start :]:
            yield collate(list(itertools.islice(images, size)))

    def _images(self, low: int, high: int, skip: int) -> Iterator[dict[str, Any]]:
        """Samples as `collate` takes them, from what `StreamSource.read` reads there."""
        for place, (image, target) in enumerate(self.source.read(low, high, skip), low + skip):
            sample: dict[str, Any] = {"image": None, "target": target, "index": place, "bad": []}
            if isinstance(image, BadImage):
                sample["bad"] = [(image.name, image.reason)]
            elif image is not None:
                if self.seed is not None:
                    seed_everything(*self.seed, place)
                sample["image"] = self.transform(image)
            yield sample

    def _replaced(self, low: int, high: int, skip: int) -> Iterator[dict[str, Any]]:
        """As `_images`, with each empty place given to the next readable image, if need be from beyond the range."""
        end = self.source.num_samples or high
        beyond = itertools.chain(self._images(high, end, 0), self._images(0, high, 0))
        empty, bad = 0, []
        for sample in itertools.chain(self._images(low, high, skip), beyond):
            bad += sample["bad"]
            if sample["image"] is None:
                empty += 1
                continue
            yield sample | {"bad": bad}
            yield from itertools.repeat(sample, empty)
            empty, bad = 0, []
        yield {"image": None, "target": -1, "index": -1, "bad": bad}  # not one is readable


def _as_made(batch: Any) -> Any:
    return batch


def stream_loader(batches: StreamedBatches, num_workers: int, seed: int = 0) -> DataLoader:
    """A torch DataLoader over batches that are made in its workers; what those draw depends on the seed only."""
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_made,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator().manual_seed(seed),
    )


def stream_val_batches(
    source: StreamSource,
    transform: Callable,
    batch_size: int,
    num_workers: int,
    process: int = 0,
    num_processes: int = 1,
) -> DataLoader:
    """A process' share of a stream to validate on, in its stored order; as many batches as every other process has.

    Where timm does the sharing, it fills up what several processes get to the same number of images.
    """
    if source.sequence is None:
        return stream_loader(StreamedBatches(source, transform, batch_size), num_workers)
    plan = BatchPlan(source.sequence.num_samples, batch_size, num_processes)
    batches = StreamedBatches(source, transform, plan.batch_sizes(process), plan.first(process))
    return stream_loader(batches, num_workers)


@dataclass(frozen=True)
class WholeBatches:
    """Optimizer steps of equal micro-batches, as `BatchPlan` has steps: for streams that timm shares out.

    Args:
        num_batches: Batches that timm gives each process in an epoch; what is left after the last whole step is not seen.
        batch_size: Images in each.
        num_processes: Processes that share a step.
        grad_accum: Micro-batches per optimizer step.
    """

    num_batches: int
    batch_size: int
    num_processes: int
    grad_accum: int

    @property
    def steps_per_epoch(self) -> int:
        return self.num_batches // self.grad_accum

    def step_size(self, step: int) -> int:
        return self.batch_size * self.num_processes * self.grad_accum

    def batch_sizes(self, process: int) -> list[int]:
        return [self.batch_size] * (self.steps_per_epoch * self.grad_accum)

    def first(self, process: int) -> int:
        return process * self.num_batches * self.batch_size


@dataclass(frozen=True)
class StreamFeed:
    """The feed of streaming data sets.

    Each image comes once per epoch, for any number of shards, processes and loader workers, in steps as `BatchPlan` cuts them.
    The order depends on the number of workers too: a run that is resumed in mid-epoch sees the rest of that epoch's images
    only with as many as before. It comes to where it was without decoding what it has seen.

    Not so where a stream has no `sequence`. timm then shares out whole shards: each image comes once where shards are equal,
    their number is a multiple of processes x workers and a worker's images fill its batches; otherwise workers begin theirs again.

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
        if self.train.new_index is not None and (self.train.new_index < 0).any():
            raise UserError(
                f"{self.train.title} has classes that the class map leaves out: how many images are left isn't known, "
                "which it has to be for training"
            )
        if self.steps_per_epoch < 1:
            raise UserError(
                f"{self.train.title} has {self.train.num_samples} images, fewer than one optimizer step takes"
            )
        self.val_batches(0)  # too few to share are told of now, not after an epoch

    @functools.cached_property
    def plan(self) -> BatchPlan | WholeBatches:
        if self.train.sequence is not None:
            return BatchPlan(self.train.sequence.num_samples, self.batch_size, self.num_processes, self.grad_accum)
        samples = self.train.samples_per_process(max(1, self.num_workers), self.batch_size)
        return WholeBatches(samples // self.batch_size, self.batch_size, self.num_processes, self.grad_accum)

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def step_size(self, step: int) -> int:
        return self.plan.step_size(step)

    def train_batches(self, process: int, start_step: int, stop_step: int) -> Iterator[Batch]:
        batches = self._train_batches(process, *divmod(start_step, self.steps_per_epoch))
        return itertools.islice(batches, (stop_step - start_step) * self.grad_accum)

    def _train_batches(self, process: int, epoch: int, step_in_epoch: int) -> Iterator[Batch]:
        sizes, first = self.plan.batch_sizes(process), self.plan.first(process)
        # what each worker has given already; of the next round some have given one more
        start, more = divmod(step_in_epoch * self.grad_accum, max(1, self.num_workers))
        while True:
            self.train.set_epoch(epoch)
            batches = StreamedBatches(self.train, self.transforms[0], sizes, first, start, (self.seed, epoch))
            loader = stream_loader(batches, self.num_workers, mix_seed(self.seed, epoch, process))
            yield from itertools.islice(loader, more, None)
            epoch, start, more = epoch + 1, 0, 0

    def val_batches(self, process: int) -> DataLoader:
        transform = self.transforms[1]
        if isinstance(self.val, StreamSource):
            return stream_val_batches(
                self.val, transform, self.batch_size, self.num_workers, process, self.num_processes
            )
        images = KeyedImages(self.val, transform, seed=None, replace_bad=False)
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
