"""From sources and keys to batches of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, default_collate

from .images import BadImage
from .plan import Key, seed_everything
from .sources import Source
from .transforms import Transform


@dataclass(frozen=True)
class Batch:
    """Readable samples of a batch. Loaders give batches without images too; iterate through `readable`.

    Attributes:
        image: (B, C, H, W) float.
        target: The samples' targets, collated: a tensor (B, ...) or a nesting of such tensors.
        index: (B,) int64, each sample's index in the source, or its place in a stream.
        bad: (name, reason) of the unreadable images that were met.
    """

    image: Tensor
    target: Any
    index: Tensor
    bad: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        """B."""
        return len(self.index)

    def to(self, device: torch.device | str, channels_last: bool = False) -> Batch:
        """The batch with image and target on a device.

        Args:
            device: Where to.
            channels_last: Memory format of the images.
        """
        image = self.image.to(device, non_blocking=True)
        if channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        target = pytree.tree_map_only(Tensor, lambda part: part.to(device, non_blocking=True), self.target)
        return replace(self, image=image, target=target)

    def pin_memory(self) -> Batch:
        """The batch with image and target in page-locked memory; a DataLoader calls it."""
        target = pytree.tree_map_only(Tensor, Tensor.pin_memory, self.target)
        return replace(self, image=self.image.pin_memory(), target=target)


@dataclass(frozen=True)
class Sample:
    """A transformed sample.

    Attributes:
        image: (C, H, W), None where there is no readable image.
        target: Its target.
        index: Its index in the source, or its place in a stream.
        bad: (name, reason) of unreadable images that were met on the way.
    """

    image: Tensor | None
    target: Any
    index: int
    bad: tuple[tuple[str, str], ...] = ()


class SampleDataset(Dataset):
    """Transformed samples of a source by their keys.

    Args:
        source: Images and their targets.
        transform: (image, target) to (tensor (C, H, W), target).
        seed: Makes the transform's random numbers depend on seed and key only; None for transforms without randomness.
        replace_bad: Replace an unreadable image by the next readable one; else it is left out.
        sized: Transform to each side length, for multi-scale training.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        seed: int | None,
        replace_bad: bool,
        sized: Mapping[int, Transform] | None = None,
    ):
        self.source, self.transform, self.seed, self.replace_bad = source, transform, seed, replace_bad
        self.sized = sized or {}

    def __getitem__(self, key: Key) -> Sample:
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
            return Sample(*transform(image, target), index, tuple(bad))
        return Sample(None, None, index, tuple(bad))


def collate(samples: Sequence[Sample]) -> Batch:
    """The readable samples as a batch, with what is known of the unreadable ones."""
    images = [sample.image for sample in samples if sample.image is not None]
    bad = tuple(entry for sample in samples for entry in sample.bad)
    if not images:
        return Batch(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64), bad)
    good = [sample for sample in samples if sample.image is not None]
    return Batch(
        torch.stack(images),
        default_collate([sample.target for sample in good]),
        torch.tensor([sample.index for sample in good]),
        bad,
    )


def readable(batches: Iterable[Batch], on_bad: Callable[[Sequence[tuple[str, str]]], None]) -> Iterator[Batch]:
    """The batches that have images; everyone outside this room iterates through it.

    Args:
        batches: Of a feed or a loader.
        on_bad: Called with (name, reason) of the unreadable images of each batch that met some.
    """
    for batch in batches:
        if batch.bad:
            on_bad(batch.bad)
        if len(batch):
            yield batch


def make_loader(dataset: SampleDataset, batches: Iterable[list[Key]], num_workers: int) -> DataLoader:
    """A torch DataLoader over planned batches; one pass over it is the whole plan, so its workers live as long as the run."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if num_workers else None,
    )
