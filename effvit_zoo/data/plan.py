"""Which images form which batch, as a pure function of (seed, epoch, index).

The order of images depends on (seed, epoch); an image's augmentation on (seed, epoch, index). Neither depends on the number of
loader workers, on the number of processes that share a batch, or on where a run was interrupted, so exact resume and "two processes
equal one" are properties of the arithmetic, not of saved generator states.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UserError


class Key(NamedTuple):
    """Key of a sample.

    Attributes:
        epoch: Number of the epoch, from 0.
        image: Its index in the source.
        copy: Number of the version, with repeated augmentation.
        size: Side length in pixels, with multi-scale training.
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
    """Loader workers of a process: as requested, else its share of the cores that it may run on, at most 8."""
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
        repeats: Consecutive copies of each image in the order; an epoch then has 1/repeats of the different images. This is timm's
            `RepeatAugSampler` as a function of the seed; the one difference is that an epoch isn't rounded down to 256 images.
        sizes: Side lengths, one of which is sampled for each step, by seed and step; empty for images of one size.
    """

    num_images: int
    batch_size: int
    num_processes: int = 1
    grad_accum: int = 1
    seed: int | None = None
    repeats: int = 1
    sizes: tuple[int, ...] = ()

    def require_shares(self) -> None:
        """Raises `UserError` where a training step would leave a process without an image; validation may."""
        pieces = self.num_processes * self.grad_accum
        if self.num_images < pieces:
            raise UserError(
                f"{self.num_images} training images can't be shared by {self.num_processes} processes x {self.grad_accum} accumulation "
                f"steps (train.grad_accum): at least {pieces} are needed"
            )

    @property
    def steps_per_epoch(self) -> int:
        pieces = self.num_processes * self.grad_accum
        steps = -(-self.num_images // (self.batch_size * pieces))
        # the second term counts only where batch_size is 1: no piece may stay empty
        return max(1, min(steps, self.num_images // pieces))

    @property
    def smallest_batch(self) -> int:
        """Fewest images in a micro-batch of a process."""
        return self.num_images // self.steps_per_epoch // self.grad_accum // self.num_processes

    def step_size(self, step: int) -> int:
        """Images in an optimizer step (0-based over the whole run), over all processes and micro-batches."""
        low, high = self._bounds(step % self.steps_per_epoch, self.num_images, self.steps_per_epoch)
        return high - low

    def batches(self, process: int, start_step: int, stop_step: int) -> Iterator[list[Key]]:
        """This process's micro-batches of keys from one optimizer step up to another."""
        for step in range(start_step, stop_step):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if step == start_step or step_in_epoch == 0:
                order = self._order(epoch)
            size = self.sizes[mix_seed(self.seed or 0, step, len(self.sizes)) % len(self.sizes)] if self.sizes else None
            for places in self._places(process, step_in_epoch):
                yield [Key(epoch, int(order[place]), place % self.repeats, size) for place in places]

    def batch_sizes(self, process: int) -> list[int]:
        """Images in each of a process's micro-batches of an epoch."""
        return [len(places) for step in range(self.steps_per_epoch) for places in self._places(process, step)]

    def offset(self, process: int) -> int:
        """Images in an epoch's micro-batches of the preceding processes."""
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
        """The piece's range when `total` items are cut into pieces whose sizes differ by at most one."""
        return piece * total // pieces, (piece + 1) * total // pieces
