"""From image sources to batches, as a pure function of (seed, epoch, index).

The order of images depends on (seed, epoch); an image's augmentation on (seed, epoch, index). Neither depends on the number of
loader workers, on how many processes share a batch, or on where a run was cut, so exact resume and "two processes equal one" are
properties of the arithmetic, not of saved generator states.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .images import BadImage
from .splits import ImageSource, Source, StreamSource

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


def picture_of(source: Source, index: int) -> tuple[str, Image.Image] | None:
    """Name and picture of an image of the source; None where they are not at hand, as in streams."""
    if isinstance(source, StreamSource):
        return None
    try:
        return source.name(index), source.load(index)[0]
    except BadImage:
        return None
