"""Names of splits and classes, and how lists of names are shown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

from ...errors import UserError

TRAIN, VAL, TEST = ("train", "training"), ("val", "validation", "valid", "eval", "evaluation"), ("test", "testing")
SPLITS = (TRAIN, VAL, TEST)
"""Synonyms of split names."""


def find_split(wanted: str, names: Iterable[str]) -> str | None:
    """The one among `names` that is `wanted` or a synonym of it, in any case, with or without .tar."""
    by_stem = {name.casefold().removesuffix(".tar"): name for name in names}
    wanted = wanted.casefold().removesuffix(".tar")
    synonyms = next((group for group in SPLITS if wanted in group), ())
    return next((by_stem[name] for name in (wanted, *synonyms) if name in by_stem), None)


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC): macOS stores decomposed letters, other systems what was typed."""
    return unicodedata.normalize("NFC", name)


def few(names: Iterable[str]) -> str:
    """The first five names and the number of the others."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def natural_order(names: Iterable[str]) -> list[str]:
    """Distinct names in timm's order: numbers as numbers, case ignored; equal ones in the order of their characters."""

    def key(name: str) -> tuple[list[int | str], str]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name

    return sorted(set(names), key=key)


def by_index(class_to_idx: Mapping[str, int]) -> tuple[str, ...]:
    """Names in the order of their indices; an index that several names share goes by the first. Raises `UserError` for gaps."""
    names: dict[int, str] = {}
    for name, index in class_to_idx.items():
        names.setdefault(index, name)
    if sorted(names) != list(range(len(names))):
        raise UserError(f"class indices must be 0 to n-1 without gaps, got {few(map(str, sorted(names)))}")
    return tuple(names[index] for index in range(len(names)))
