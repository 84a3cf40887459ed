"""Batches of streams: made in the loader's workers, each image once per epoch, in steps as `BatchPlan` cuts them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ...errors import UserError
from ..images import BadImage
from ..loader import Batch, BatchPlan, KeyedImages, collate, make_loader, mix_seed, picture_of, seed_everything
from ..splits import Source, StreamSource


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
        return picture_of(self.val, index)
