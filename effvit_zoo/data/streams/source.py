"""Streaming data sets of images with one class each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from ..images import BadImage, decode, decoding
from .shards import ShardSequence


class StreamSource:
    """A streaming data set of (PIL image, class index).

    Attributes:
        title: Readable name of the split.
        class_names: Name of each class index.
        sequence: Its samples by place, each once per epoch; None where timm distributes whole shards over processes and loader
            workers: in tfds, and in remote tars without an _info.json.
        num_samples: Images in the whole split, None when unknown.
        notes: As in `Source`.
    """

    def __init__(
        self,
        title: str,
        dataset: Any,
        class_names: Iterable[str],
        img_mode: str = "RGB",
        sequence: ShardSequence | None = None,
    ) -> None:
        self.title, self.dataset, self.img_mode, self.sequence = title, dataset, img_mode, sequence
        self.class_names = tuple(class_names)
        self.num_samples: int | None = (sequence or dataset.reader).num_samples or None
        self.new_index: np.ndarray | None = None  # class index in the data -> in `class_names`; -1 is left out
        self.epoch = 0
        self.notes: tuple[str, ...] = ()

    def with_classes(self, class_names: tuple[str, ...], new_index: np.ndarray) -> StreamSource:
        """The same images with other class indices; arguments as in `ImageSource.with_classes`."""
        changed = copy.copy(self)
        changed.class_names = class_names
        changed.new_index = new_index if self.new_index is None else np.append(new_index, -1)[self.new_index]
        return changed

    def with_notes(self, *notes: str) -> StreamSource:
        """The same images with further notes, as in `Source`."""
        changed = copy.copy(self)
        changed.notes = (*self.notes, *notes)
        return changed

    def set_seed(self, seed: int) -> None:
        """Seed of the training order; call it before the first pass."""
        if self.sequence is not None and self.sequence.seed is not None:
            self.sequence = replace(self.sequence, seed=seed)
        self.dataset.reader.common_seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Selects the shuffle of an epoch for the next pass; call it in the main process."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def samples_per_process(self, num_workers: int, batch_size: int) -> int:
        """Samples per epoch that timm gives this process where it distributes shards, 0 when unknown. Call it before the first pass.

        In training, timm pads the share of each of `num_workers` loader workers to whole batches of `batch_size`.
        """
        self.dataset.set_loader_cfg(num_workers=num_workers)
        self.dataset.reader.batch_size = batch_size
        return len(self.dataset)

    def read(self, low: int, high: int, skip: int = 0) -> Iterator[tuple[Image.Image | BadImage | None, int]]:
        """Images and class indices at the places [low, high) of this epoch's sequence, without the first `skip`.

        An unreadable image is represented by its `BadImage`, one whose class is left out by None, -1. Without a `sequence` the
        places are those that timm gives to this worker, whatever `low` and `high` are.
        """
        if self.sequence is not None:
            items = self.sequence.read(self.epoch, low, high, skip)
        else:
            items = itertools.islice(self.dataset, skip, None)
        for place, (item, target) in enumerate(items, low + skip):
            if isinstance(item, BadImage):
                yield item, -1
                continue
            target = int(target if self.new_index is None or target < 0 else self.new_index[target])
            if target < 0:
                yield None, -1
                continue
            image: Image.Image | BadImage
            try:
                with decoding(f"{self.title}[{place}]"):
                    image = decode(item, self.img_mode)
            except BadImage as bad:
                image = bad
            yield image, target

    def __iter__(self) -> Iterator[tuple[Image.Image | BadImage, int]]:
        """All images of the epoch and their class indices; an unreadable image is represented by its `BadImage`."""
        for item, target in self.read(0, self.num_samples or 0):
            if item is not None:
                yield item, target

    def image(self, index: int) -> None:
        """A stream has no access by index."""
