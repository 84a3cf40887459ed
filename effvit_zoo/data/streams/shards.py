"""Streams as sequences that can be cut anywhere, so that each sample comes once per epoch however they are distributed.

An epoch's sequence is its shards one after the other, in training in an order drawn from (seed, epoch). Reading the places
[low, high) of it opens only the shards that lie there and decodes no sample before `low`. timm's readers
(timm 1.0.31, `timm.data.readers`, Apache-2.0) find shards, columns and classes, decode webdataset's samples and set the sizes
of the shuffle buffers. The deliberate difference: they distribute whole shards, and workers with fewer images repeat theirs.

The lengths of shards are in webdataset's `_info.json`; the samples of local tars without one are counted, which reads their headers.
The lengths of Hugging Face data sets are known if they are prepared on the disk or consist of Parquet files. Any other stream of
theirs is one long shard: exact too, but reading its end means reading up to there. Remote tars without an `_info.json` have no sequence.
"""

from __future__ import annotations

import inspect
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice, repeat
from typing import Any, Protocol

import numpy as np

from ...errors import UserError
from ..images import DECODE_ERRORS, BadImage, decode_reason

PREPARED_SHARD = 1000  # samples that stay together where a whole data set lies prepared on the disk
READ_AHEAD = 16  # samples that are taken out of an arrow table at once
_META_FILE = re.compile("__[^/]*__($|/)")  # no part of a sample, says webdataset

Sample = tuple[str, dict[str, Any]]  # name for messages, undecoded content


class Shards(Protocol):
    """How one format's shards are read."""

    def __len__(self) -> int: ...

    def name(self, shard: int) -> str:
        """Name of a shard in messages."""

    def samples(self, shards: Sequence[int], start: int) -> Iterator[Sample]:
        """The samples of these shards, one after the other, from place `start` on."""

    def decode(self, content: dict[str, Any]) -> tuple[Any, int]:
        """Image and class index. Raises any of `DECODE_ERRORS` for damaged data."""


@dataclass(frozen=True)
class ShardSequence:
    """A split as a sequence of samples, in training a different one in each epoch.

    Args:
        shards: Its shards.
        lengths: Samples of each shard, or the one total where only that is known.
        seed: Seed of the order; None keeps the stored one.
        buffer: Samples in the shuffle buffer before it yields the first, and at most; unused without a seed.
    """

    shards: Shards
    lengths: tuple[int, ...]
    seed: int | None
    buffer: tuple[int, int]

    @property
    def num_samples(self) -> int:
        return sum(self.lengths)

    def read(self, epoch: int, low: int, high: int, skip: int = 0) -> Iterator[tuple[Any, int]]:
        """Images and class indices of the places [low, high) of an epoch's sequence, without the first `skip` of them.

        They are shuffled within the range. A damaged or missing sample keeps its place, as (`BadImage`, -1).
        """
        samples: Iterable[Sample | BadImage] = self._samples(epoch, low, high)
        if self.seed is not None:
            samples = shuffled(samples, np.random.default_rng([self.seed, epoch, low]), *self.buffer)
        for sample in islice(samples, skip, None):
            if isinstance(sample, BadImage):
                yield sample, -1
                continue
            name, content = sample
            try:
                item = self.shards.decode(content)
            except UserError:
                raise
            except DECODE_ERRORS as error:
                reason = f"has no {error.args[0]}" if isinstance(error, KeyError) else decode_reason(error)
                item = BadImage(name, reason), -1
            yield item

    def _samples(self, epoch: int, low: int, high: int) -> Iterator[Sample | BadImage]:
        order = list(range(len(self.shards)))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order).tolist()
        if len(self.lengths) == len(order):
            pieces = [([shard], self.lengths[shard]) for shard in order]
        else:
            pieces = [(order, self.num_samples)]
        for shards, length in pieces:
            start, stop = max(low, 0), min(high, length)
            if start < stop:
                lost = BadImage(self.shards.name(shards[0]), f"has fewer than {length} samples that can be read")
                yield from islice(chain(self.shards.samples(shards, start), repeat(lost)), stop - start)
            low, high = low - length, high - length


def shuffled(samples: Iterable[Any], rng: np.random.Generator, initial: int, size: int) -> Iterator[Any]:
    """The samples in the order in which a shuffle buffer yields them, each time one at random.

    Args:
        samples: Samples.
        rng: Source of the random choices.
        initial: Samples in the buffer before it yields the first.
        size: Largest number of samples in the buffer, which grows while it yields.
    """
    samples = iter(samples)
    buffer = list(islice(samples, initial))
    for sample in samples:
        buffer.append(sample)
        if len(buffer) < size:
            buffer.extend(islice(samples, 1))
        place = int(rng.integers(len(buffer)))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        yield buffer.pop()
    for place in rng.permutation(len(buffer)).tolist():
        yield buffer[place]


# webdataset


@dataclass(frozen=True)
class TarShards:
    """Tars in webdataset's layout. `decoder` is timm's, a sample's files to {"jpg": image, "target": class index}."""

    urls: tuple[str, ...]
    decoder: Callable[[dict[str, Any]], dict[str, Any] | None]

    def __len__(self) -> int:
        return len(self.urls)

    def name(self, shard: int) -> str:
        return self.urls[shard]

    def samples(self, shards: Sequence[int], start: int) -> Iterator[Sample]:
        from webdataset import ignore_and_continue, tarfile_samples

        tars = ({"url": self.urls[shard]} for shard in shards)
        # the sequence notices and names what a damaged tar doesn't give
        for files in islice(tarfile_samples(tars, handler=ignore_and_continue), start, None):
            yield os.path.join(files["__url__"], files["__key__"]), files

    def decode(self, content: dict[str, Any]) -> tuple[Any, int]:
        from timm.data.readers.reader_wds import WdsTargetKeyError

        try:
            decoded = self.decoder(content)
        except WdsTargetKeyError as error:
            raise UserError(str(error)) from error
        return (None, -1) if decoded is None else (decoded["jpg"], decoded["target"])


def count_samples(path: str) -> int:
    """Samples in a local tar: runs of files that share a key, as webdataset groups them. Raises `UserError`."""
    from webdataset.tariterators import base_plus_ext

    try:
        with tarfile.open(path) as tar:
            names = (member.name for member in tar if member.isreg() and not _META_FILE.match(member.name))
            keys = (base_plus_ext(name)[0] for name in names)
            return sum(1 for _ in groupby(key for key in keys if key is not None))
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"cannot read shard {path}: {getattr(error, 'strerror', None) or error}") from error


def tar_sequence(reader: Any) -> ShardSequence | None:
    """The sequence of timm's `ReaderWds`, None where the lengths of its shards are unknown. Raises `UserError`."""
    from timm.data.readers.reader_wds import _decode

    split = reader.split_info
    urls = tuple(os.path.join(reader.root, name) for name in split.filenames)
    lengths = tuple(split.shard_lengths)
    if not lengths:
        if any(":" in url for url in urls):  # a URL or a pipe
            return None
        lengths = tuple(map(count_samples, urls))
    if len(lengths) != len(urls):
        raise UserError(
            f"{reader.root} lists {len(urls)} shards and the lengths of {len(lengths)}: expected equal numbers"
        )
    options = {
        "image_key": reader.input_key,
        "image_mode": reader.input_img_mode,
        "target_key": reader.target_keys or reader.target_key,
        "alt_label": split.alt_label,
    }
    inspect.signature(_decode).bind({}, **options)  # a timm that decodes in another way is an error now
    return ShardSequence(
        TarShards(urls, partial(_decode, **options)),
        lengths,
        reader.common_seed if reader.is_training else None,
        (reader.sample_initial_size, reader.sample_shuffle_size),
    )


# Hugging Face


@dataclass(frozen=True)
class HubShards:
    """Shards of a Hugging Face data set, `examples`, whose images are still encoded.

    Args:
        examples: A `datasets.Dataset` or `IterableDataset`.
        names: Name of each shard.
        target: Class index of an example.
        image_key: Column of the images.
        image: The column's feature, which decodes; None where it holds decoded images.
    """

    examples: Any
    names: tuple[str, ...]
    target: Callable[[dict[str, Any]], int]
    image_key: str
    image: Any

    def __len__(self) -> int:
        return len(self.names)

    def name(self, shard: int) -> str:
        return self.names[shard]

    def samples(self, shards: Sequence[int], start: int) -> Iterator[Sample]:
        from datasets import concatenate_datasets

        parts = [self.examples.shard(num_shards=len(self), index=shard, contiguous=True) for shard in shards]
        place = start
        # `iter`, unlike `__iter__`, doesn't distribute once more over loader workers
        for columns in concatenate_datasets(parts).skip(start).iter(READ_AHEAD):
            for row in zip(*columns.values(), strict=True):
                yield f"{self.name(shards[0])}[{place}]", dict(zip(columns, row, strict=True))
                place += 1

    def decode(self, content: dict[str, Any]) -> tuple[Any, int]:
        image = content[self.image_key]
        return image if self.image is None else self.image.decode_example(image), self.target(content)


def hub_sequence(reader: Any) -> ShardSequence:
    """The sequence of timm's `ReaderHfids`. Raises `UserError`, and what `datasets` raises for a split that doesn't exist."""
    import datasets
    from timm.data.readers.targets import get_field

    title = f"{reader.name} {reader.split}"
    if reader.download:
        examples = reader.builder.as_dataset(split=reader.split)
        count = max(1, len(examples) // PREPARED_SHARD)
        names = tuple(title for _ in range(count))
        lengths = tuple(len(examples.shard(num_shards=count, index=shard, contiguous=True)) for shard in range(count))
    else:
        examples = reader.builder.as_streaming_dataset(split=reader.split)
        files = _parquet_files(reader.builder, reader.split)
        if len(files) == examples.num_shards:
            names = files
            with ThreadPoolExecutor(16) as pool:
                lengths = tuple(pool.map(_parquet_rows, files))
        else:
            names = tuple(title for _ in range(examples.num_shards))
            lengths = (reader.num_samples,)
    image = (examples.features or {}).get(reader.input_key)
    if isinstance(image, datasets.Image):
        examples = examples.cast_column(reader.input_key, datasets.Image(mode=image.mode, decode=False))
    else:
        image = None
    return ShardSequence(
        HubShards(examples, names, partial(get_field, path=reader.target_key), reader.input_key, image),
        lengths,
        reader.common_seed if reader.is_training else None,
        (reader.shuffle_size, reader.shuffle_size),
    )


def _parquet_files(builder: Any, split: str) -> tuple[str, ...]:
    """The split's files where all are Parquet, else none."""
    by_split = {str(name): tuple(files) for name, files in (builder.config.data_files or {}).items()}
    files = by_split.get(split, ())
    return files if all(file.endswith(".parquet") for file in files) else ()


def _parquet_rows(url: str) -> int:
    import fsspec
    from pyarrow import parquet

    with fsspec.open(url, "rb") as file:
        return parquet.read_metadata(file).num_rows


SEQUENCES: dict[str, Callable[[Any], ShardSequence | None]] = {"wds": tar_sequence, "hfids": hub_sequence}
