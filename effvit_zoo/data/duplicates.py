"""Files of a validation split that are training files too."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from hashlib import blake2b
from typing import Any

from .sources import FilePaths, ImageSource

DUPLICATES_UP_TO = 50_000
"""Number of files up to which a run looks for duplicates by default, because every file may have to be read."""

_HEAD = 4096  # bytes that are compared before whole files are


def duplicates(train: Any, val: Any) -> list[tuple[str, str]]:
    """(validation file, training file) pairs of the same content, the first partner of each; none for sources that are not folders.

    Files are compared by size, then by their first 4 KiB, then as a whole, so that most are never read.
    """
    sides = [
        source for source in (train, val) if isinstance(source, ImageSource) and isinstance(source.data, FilePaths)
    ]
    if len(sides) < 2:
        return []
    names = [[source.name(index) for index in range(len(source))] for source in sides]
    groups = [(names[0], names[1])]
    for key in (os.path.getsize, _head, _whole):
        groups = [part for group in groups for part in _matching(*group, key)]
    return sorted((path, sorted(training)[0]) for training, validation in groups for path in validation)


def _matching(
    train: list[str], val: list[str], key: Callable[[str], Hashable]
) -> Iterator[tuple[list[str], list[str]]]:
    """Splits files into groups of equal keys that have members on both sides."""
    sides: list[defaultdict[Any, list[str]]] = [defaultdict(list), defaultdict(list)]
    for side, paths in zip(sides, (train, val), strict=True):
        for path in paths:
            try:
                side[key(path)].append(path)
            except OSError:
                continue  # unreadable files are reported where they are decoded
    for found in sides[0].keys() & sides[1].keys():
        yield sides[0][found], sides[1][found]


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD)


def _whole(path: str) -> bytes:
    with open(path, "rb") as file:
        return blake2b(file.read(), digest_size=16).digest()
