"""What the engine trains on: samples, batches and their order, for data with random access and for streams."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from ..errors import UserError
from .loader import Batch, SampleDataset, make_loader
from .plan import BatchPlan, mix_seed, worker_count
from .sources import AnySource
from .splits import DataSplits
from .streams.batches import StreamedBatches, WholeBatches, stream_loader
from .streams.source import StreamSource
from .transforms import Transform, Transforms


class Feed(Protocol):
    """Everything about the data that the engine needs.

    Attributes:
        splits: Training and validation samples.
        data_config: timm's preprocessing settings (input_size, mean, std, crop_pct, interpolation), saved with the model.
        steps_per_epoch: Optimizer steps of an epoch.
        plan: How images are cut into steps and micro-batches.
    """

    @property
    def splits(self) -> DataSplits: ...

    @property
    def data_config(self) -> dict[str, Any]: ...

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def plan(self) -> BatchPlan | WholeBatches: ...

    def step_size(self, step: int) -> int:
        """Images in an optimizer step, over all processes."""

    def train_batches(self, process: int, start_step: int, stop_step: int) -> Iterable[Batch]:
        """This process's augmented micro-batches from one optimizer step up to another; for `loader.readable`."""

    def val_batches(self, process: int) -> Iterable[Batch]:
        """This process's share of the validation images; for `loader.readable`."""

    def plain_batches(self, process: int, most: int) -> Iterable[Batch]:
        """This process's share of the training images, prepared like validation images, in stored order; for `loader.readable`. Of
        more than `most` images that number is taken: evenly from each group of the source, the first ones of a stream."""

    def describe(self) -> dict[str, int | None]:
        """train_images and val_images, None where a stream doesn't know."""

    def val_image(self, index: int) -> tuple[str, Image.Image] | None:
        """Name and image of a validation sample by its index in the batches; None where it isn't available."""


class _Feed:
    """What all feeds share."""

    splits: DataSplits

    def describe(self) -> dict[str, int | None]:
        return {"train_images": count_images(self.splits.train), "val_images": count_images(self.splits.val)}

    def val_image(self, index: int) -> tuple[str, Image.Image] | None:
        return self.splits.val.image(index)


@dataclass(frozen=True)
class PlannedFeed(_Feed):
    """The feed of data sets with random access.

    Attributes:
        splits: As in `Feed`.
        transforms: For training and validation.
        plan: Optimizer steps of the training images.
        data_config: As in `Feed`.
        num_workers: Loader workers of this process.
    """

    splits: DataSplits
    transforms: Transforms
    plan: BatchPlan
    data_config: dict[str, Any]
    num_workers: int

    def __post_init__(self) -> None:
        self.plan.require_shares()

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def step_size(self, step: int) -> int:
        return self.plan.step_size(step)

    def train_batches(self, process: int, start_step: int, stop_step: int) -> DataLoader:
        source: Any = self.splits.train
        transforms = self.transforms
        dataset = SampleDataset(source, transforms.train, self.plan.seed, replace_bad=True, sized=transforms.sized)
        return make_loader(dataset, self.plan.batches(process, start_step, stop_step), self.num_workers)

    def val_batches(self, process: int) -> DataLoader:
        plan = self.plan
        return validation_batches(
            self.splits.val, self.transforms.val, plan.batch_size, self.num_workers, process, plan.num_processes
        )

    def plain_batches(self, process: int, most: int) -> DataLoader:
        source: Any = self.splits.train
        if len(source) > most:
            source = source.select(spread_rows(source.groups(), len(source), most))
        plan = self.plan
        return validation_batches(
            source, self.transforms.val, plan.batch_size, self.num_workers, process, plan.num_processes
        )


@dataclass(frozen=True)
class StreamFeed(_Feed):
    """The feed of streaming data sets.

    Each image comes once per epoch, for any number of shards, processes and loader workers, in steps as `BatchPlan` cuts them.
    The order depends on the number of workers too: a run that is resumed in the middle of an epoch sees the rest of that epoch's
    images only with the same number as before. It skips what it has seen without decoding it.

    Streams without a `sequence` are different. timm then distributes whole shards: each image comes once where shards are equal,
    their number is a multiple of processes x workers and a worker's images fill its batches; otherwise workers repeat theirs.

    Attributes:
        splits: A training stream, and validation images or a stream of them.
        transforms: For training and validation.
        batch_size: Images per process and micro-batch.
        num_processes: Processes that share a step.
        grad_accum: Micro-batches per optimizer step.
        seed: Seed of order and augmentation.
        data_config: As in `Feed`.
        num_workers: Loader workers of this process.
    """

    splits: DataSplits
    transforms: Transforms
    batch_size: int
    num_processes: int
    grad_accum: int
    seed: int
    data_config: dict[str, Any]
    num_workers: int

    def __post_init__(self) -> None:
        train = self.train
        train.set_seed(self.seed)
        if not train.num_samples:
            raise UserError(
                f"{train.title} doesn't say how many images it has: its length has to be known for training"
            )
        if train.new_index is not None and (train.new_index < 0).any():
            raise UserError(
                f"{train.title} has classes that the class map leaves out: how many images are left isn't known, "
                "which it has to be for training"
            )
        if isinstance(self.plan, BatchPlan):
            self.plan.require_shares()
        if self.steps_per_epoch < 1:
            raise UserError(f"{train.title} has {train.num_samples} images, fewer than one optimizer step takes")

    @property
    def train(self) -> StreamSource:
        train = self.splits.train
        if not isinstance(train, StreamSource):
            raise TypeError(f"expected a training stream, got {type(train).__name__}")
        return train

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
        sizes, offset = self.plan.batch_sizes(process), self.plan.offset(process)
        # complete rounds over the workers that were made before; `more` workers have made one batch of the next round
        start, more = divmod(step_in_epoch * self.grad_accum, max(1, self.num_workers))
        while True:
            self.train.set_epoch(epoch)
            batches = StreamedBatches(self.train, self.transforms.train, sizes, offset, start, (self.seed, epoch))
            loader = stream_loader(batches, self.num_workers, mix_seed(self.seed, epoch, process))
            yield from itertools.islice(loader, more, None)
            epoch, start, more = epoch + 1, 0, 0

    def val_batches(self, process: int) -> DataLoader:
        return validation_batches(
            self.splits.val, self.transforms.val, self.batch_size, self.num_workers, process, self.num_processes
        )

    def plain_batches(self, process: int, most: int) -> Iterator[Batch]:
        train, transform, size, processes = self.train, self.transforms.val, self.batch_size, self.num_processes
        train.set_epoch(0)
        if train.sequence is None:
            loader = validation_batches(train, transform, size, self.num_workers, process, processes)
            return itertools.islice(loader, max(1, most // (size * processes)))
        plan = BatchPlan(min(most, train.sequence.num_samples), size, processes)
        batches = StreamedBatches(train, transform, plan.batch_sizes(process), plan.offset(process))
        return iter(stream_loader(batches, self.num_workers))


def make_feed(
    splits: DataSplits,
    transforms: Transforms,
    data_config: dict[str, Any],
    *,
    batch_size: int,
    num_processes: int,
    grad_accum: int = 1,
    seed: int = 0,
    repeats: int = 1,
    sizes: Sequence[int] = (),
    num_workers: int | None = None,
) -> Feed:
    """The feed of a run.

    Args:
        splits: Training and validation samples.
        transforms: For training and validation; `sized` has a transform for each of `sizes`.
        data_config: timm's preprocessing settings, saved with the model.
        batch_size: Images per process and micro-batch.
        num_processes: Processes of the run.
        grad_accum: Micro-batches per optimizer step.
        seed: Seed of order and augmentation.
        repeats: Versions of each image in a step (repeated augmentation).
        sizes: Side lengths in pixels, one of which is sampled for each step.
        num_workers: Loader workers per process; None: a share of the cores.

    Raises:
        UserError: A stream with options that need random access, or fewer images than a step takes.
    """
    workers = worker_count(num_workers, num_processes)
    if isinstance(splits.train, StreamSource):
        if repeats > 1:
            raise UserError(f"augment.repeats is {repeats}, expected 1 for a stream ({splits.train.title})")
        if sizes:
            raise UserError(f"augment.sizes is {list(sizes)}, expected none for a stream ({splits.train.title})")
        return StreamFeed(splits, transforms, batch_size, num_processes, grad_accum, seed, data_config, workers)
    if isinstance(splits.val, StreamSource):
        raise UserError(
            f"{splits.val.title} is a stream and the training images aren't: expected both or only training to be"
        )
    plan = BatchPlan(len(splits.train), batch_size, num_processes, grad_accum, seed, repeats, tuple(sizes))
    return PlannedFeed(splits, transforms, plan, data_config, workers)


def validation_batches(
    source: AnySource,
    transform: Transform,
    batch_size: int,
    num_workers: int,
    process: int = 0,
    num_processes: int = 1,
) -> DataLoader:
    """A process's share of data to validate on, in its stored order, in the same number of batches as every other process's. Where
    there are fewer images than processes, some of the shares are empty.

    Where timm distributes a stream's shards, it pads the shares of several processes to the same number of images.

    Args:
        source: Samples.
        transform: (image, target) to (tensor, target), without randomness.
        batch_size: Largest number of images in a batch.
        num_workers: Loader workers.
        process: Index of this process.
        num_processes: Processes that share the data.
    """
    if not isinstance(source, StreamSource):
        plan = BatchPlan(len(source), batch_size, num_processes)
        dataset = SampleDataset(source, transform, seed=None, replace_bad=False)
        return make_loader(dataset, plan.batches(process, 0, plan.steps_per_epoch), num_workers)
    if source.sequence is None:
        return stream_loader(StreamedBatches(source, transform, batch_size), num_workers)
    plan = BatchPlan(source.sequence.num_samples, batch_size, num_processes)
    batches = StreamedBatches(source, transform, plan.batch_sizes(process), plan.offset(process))
    return stream_loader(batches, num_workers)


def spread_rows(groups: np.ndarray | None, images: int, number: int) -> np.ndarray:
    """Ascending indices of at most `number` images, evenly from each group in its stored order, and at least the first of each."""
    groups = np.zeros(images, dtype=np.int64) if groups is None else groups
    order = np.argsort(groups, kind="stable")
    firsts = np.searchsorted(groups[order], np.unique(groups))
    rest = max(0, number - len(firsts))
    evenly = (2 * np.arange(rest) + 1) * images // max(1, 2 * rest)
    return np.sort(order[np.union1d(firsts[:number], evenly)])


def count_images(source: AnySource) -> int | None:
    """Number of images; None where a stream doesn't know it."""
    return source.num_samples if isinstance(source, StreamSource) else len(source)
