"""Image files with the same content: in training and validation, or in two classes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from .sources import FilePaths, ImageSource, TarFiles

DUPLICATES_UP_TO = 50_000
"""Number of files up to which a run looks for duplicates by default, because every file may have to be read."""

_HEAD = 4096  # bytes that are compared before whole files are


@dataclass(frozen=True)
class Duplicates:
    """Files with the same content.

    Attributes:
        shared: (validation file, training file) pairs, the first partner of each validation file.
        contradictions: Groups of files that stand in several classes, sorted.
    """

    shared: list[tuple[str, str]] = field(default_factory=list)
    contradictions: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    source: ImageSource
    index: int
    is_training: bool

    @property
    def name(self) -> str:
        return self.source.name(self.index)

    @property
    def label(self) -> str:
        return self.source.class_names[self.source.target(self.index)]

    def read(self, count: int | None = None) -> bytes:
        with self.source.open(self.index) as file:
            return file.read() if count is None else file.read(count)


def duplicates(train: Any, val: Any) -> Duplicates:
    """Files of the same content in folders and tars; none in other sources.

    Files are compared by size, then by their first 4 KiB, then as a whole, so that most are never read.
    """
    sides = [
        (source, source is not val)
        for source in (train, val)
        if isinstance(source, ImageSource) and isinstance(source.data, FilePaths | TarFiles)
    ]
    groups = [[_File(source, index, first) for source, first in sides for index in range(len(source))]]
    for key in (lambda file: file.source.size(file.index), lambda file: file.read(_HEAD), _digest):
        groups = [part for group in groups for part in _equal(group, key)]
    found = Duplicates()
    for group in groups:
        training = sorted(file.name for file in group if file.is_training)
        if training:
            found.shared.extend((file.name, training[0]) for file in group if not file.is_training)
        if len({file.label for file in group}) > 1:
            found.contradictions.append(tuple(sorted({file.name for file in group})))
    found.shared.sort()
    found.contradictions.sort()
    return found


def _digest(file: _File) -> bytes:
    return blake2b(file.read(), digest_size=16).digest()


def _equal(files: list[_File], key: Callable[[_File], Hashable]) -> list[list[_File]]:
    """Groups of at least two files of equal keys."""
    groups = defaultdict(list)
    for file in files:
        try:
            groups[key(file)].append(file)
        except OSError:
            continue  # unreadable files are reported where they are decoded
    return [group for group in groups.values() if len(group) > 1]
