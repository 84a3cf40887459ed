"""Batches of streams: made in the loader's workers, each image once per epoch, in steps as `BatchPlan` cuts them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..images import BadImage
from ..loader import Batch, Sample, collate
from ..plan import seed_everything
from ..transforms import Transform
from .source import StreamSource


class StreamedBatches(IterableDataset):
    """A process's batches of a stream, one pass. Worker w of W loader workers makes the batches w, w + W, ... in that order.

    A DataLoader takes them in that order, so `sizes` determines where in the stream each worker's samples begin.

    Args:
        source: The stream.
        transform: (image, target) to (tensor (C, H, W), target).
        sizes: Images in each of the process's batches; an int cuts everything that timm gives this process into batches of that size.
        offset: Place of the process's first sample in the epoch's sequence.
        start: Batches that each worker skips because they were made before.
        seed: For training: a sample's augmentation depends on these numbers and on its place, and an unreadable image is replaced by
            the next readable one. None leaves it out.
    """

    def __init__(
        self,
        source: StreamSource,
        transform: Transform,
        sizes: list[int] | int,
        offset: int = 0,
        start: int = 0,
        seed: tuple[int, ...] | None = None,
    ):
        self.source, self.transform, self.sizes, self.offset = source, transform, sizes, offset
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
        own = shares[number]
        low = self.offset + sum(map(sum, shares[:number]))
        high, skip = low + sum(own), sum(own[: self.start])
        images = self._images(low, high, skip) if self.seed is None else self._replaced(low, high, skip)
        for size in own[self.start :]:
            yield collate(list(itertools.islice(images, size)))

    def _images(self, low: int, high: int, skip: int) -> Iterator[Sample]:
        """Samples from what `StreamSource.read` reads there."""
        for place, (image, target) in enumerate(self.source.read(low, high, skip), low + skip):
            if image is None:
                yield Sample(None, target, place)
            elif isinstance(image, BadImage):
                yield Sample(None, target, place, ((image.name, image.reason),))
            else:
                if self.seed is not None:
                    seed_everything(*self.seed, place)
                yield Sample(*self.transform(image, target), place)

    def _replaced(self, low: int, high: int, skip: int) -> Iterator[Sample]:
        """As `_images`, with each unreadable image replaced by the next readable one, if necessary from beyond the range."""
        end = self.source.num_samples or high
        beyond = itertools.chain(self._images(high, end, 0), self._images(0, high, 0))
        empty = 0
        bad: tuple[tuple[str, str], ...] = ()
        for sample in itertools.chain(self._images(low, high, skip), beyond):
            bad += sample.bad
            if sample.image is None:
                empty += 1
                continue
            yield replace(sample, bad=bad)
            yield from itertools.repeat(sample, empty)
            empty, bad = 0, ()
        yield Sample(None, None, -1, bad)  # none is readable


def _identity(batch: Any) -> Any:
    return batch


def stream_loader(batches: StreamedBatches, num_workers: int, seed: int = 0) -> DataLoader:
    """A torch DataLoader over batches that are made in its workers, whose random numbers depend on the seed only."""
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator().manual_seed(seed),
    )


@dataclass(frozen=True)
class WholeBatches:
    """Optimizer steps of equal micro-batches, in place of a `BatchPlan`, for streams whose shards timm distributes.

    Args:
        num_batches: Batches that timm gives each process in an epoch; the remainder after the last whole step is skipped.
        batch_size: Images per batch.
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

    @property
    def smallest_batch(self) -> int:
        return self.batch_size

    def step_size(self, step: int) -> int:
        return self.batch_size * self.num_processes * self.grad_accum

    def batch_sizes(self, process: int) -> list[int]:
        return [self.batch_size] * (self.steps_per_epoch * self.grad_accum)

    def offset(self, process: int) -> int:
        return process * self.num_batches * self.batch_size
