"""What a kind of root is asked for, and what it has to provide."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..sources import AnySource, ImageSource


@dataclass(frozen=True)
class Request:
    """A root, taken apart.

    Attributes:
        root: The whole text, with ~ expanded.
        kind: Row of the table of kinds.
        name: What follows the kind; for a folder the whole text.
        folder: What follows the "@", or the folder of shards; None where there is none.
        img_mode: "RGB" or "L".
        download: Whether client libraries may fetch what is missing.
        labels: Path of the table of labels, None for other kinds.
        training: Whether a stream is read for training, in a random order.
    """

    root: str
    kind: str
    name: str
    folder: str | None
    img_mode: str
    download: bool = False
    labels: str | None = None
    training: bool = False


class Kind(NamedTuple):
    """A row of the table of kinds.

    Attributes:
        splits: Names of the splits that exist; empty when unknown or when the root is not divided.
        open: The split of that name; None opens everything.
        modules: Modules that must be importable.
        package: What to `pip install` for them.
        free_form: Whether split names have a grammar of their own, e.g. "train[:10%]" or "train-{0..9}.tar".
        unused: Notes on what is there beside the splits that are used, given their names and their classes. Raises `UserError`.
    """

    splits: Callable[[Request], Sequence[str]]
    open: Callable[[Request, str | None], AnySource]
    modules: tuple[str, ...] = ()
    package: str = ""
    free_form: bool = True
    unused: Callable[[Request, Collection[str], Collection[str]], list[str]] = lambda request, used, class_names: []


def image_source(
    title: str, data: Any, class_names: Iterable[str], targets: Any, request: Request, notes: Iterable[str] = ()
) -> ImageSource:
    classes = np.asarray(targets, dtype=np.int32)
    return ImageSource(title, data, tuple(class_names), classes, request.img_mode, notes=tuple(notes))


def cache_folder() -> str:
    """Where torchvision's data sets are downloaded to unless a root names a folder."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "effvit_zoo"))
