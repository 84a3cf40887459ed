"""The contract of an export target: one row that says how a model becomes a file, and how such a file runs on this host.

A row's functions know nothing of photos, labels or preprocessing: proof, record, timing and the folder are shared code. Nothing here
imports torch at run time, so that a file can be opened in a process that has the runtime and numpy only.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from ..run_folder import EXPORT_RECORD

if TYPE_CHECKING:
    import numpy as np

    from ._graph import Graph

Record = Mapping[str, Any]
"""What is known of an exported file, see record.py: JSON values."""

RECORD = EXPORT_RECORD
"""Name of the record in a folder of exported files, and inside the formats that hold other files."""

MARK = "effvit_zoo"
RECORD_KEYS = (
    *(MARK, "architecture", "task", "num_classes", "weights_sha256", "license", "labels", "label_descriptions"),
    *("preprocessing", "trained", "file"),
)
"""Keys of a record. The first, this package's version, tells one from other metadata."""

Runner = Callable[["np.ndarray"], "list[np.ndarray]"]
"""One array of images, as the file takes them -> its outputs, which later calls don't overwrite."""


class Opened(NamedTuple):
    """An exported file in its runtime.

    Attributes:
        run: Computes it; what it does with an array of another shape or type is the runtime's own.
        shape: Its input's shape, with None for a free dimension.
        dtype: Its input's type, as numpy calls it.
    """

    run: Runner
    shape: list[int | None]
    dtype: str = "float32"


class Converted(NamedTuple):
    """A model in a target's form.

    Attributes:
        save: (file, record) -> None; writes the file with the record inside, as often as it is called.
        facts: What the conversion says of the file, for the record: operations, highest rank, delegated share.
    """

    save: Callable[[Path, Record], None]
    facts: Mapping[str, Any] = {}


def _runtime_error() -> tuple[type[Exception], ...]:
    return (RuntimeError,)


def _no_record(path: Path) -> Record | None:
    return None


@dataclass(frozen=True)
class Target:
    """A row of `TARGETS`. Its functions import the packages that they need, and raise `UserError` where one is missing.

    Attributes:
        name: Key in `TARGETS`.
        suffix: File name suffix, with its dot.
        extra: This package's extra that installs what the target needs.
        packages: Importable names of the runtime and of what the conversion needs besides.
        convert: A graph in the target's form.
        open: (file, number of threads) -> the file in its runtime. Raises one of `errors` for a damaged file, and `UserError`
            where the runtime doesn't exist for this system.
        read: The record inside a file, None where there is none. It may raise one of `errors`.
        errors: Returns the types of exceptions that the runtime raises, for a damaged file or an input that it doesn't take.
        forms: Names of the graph's forms in `_forms.FORMS` that suit the runtime.
        precisions: Those that the target can write.
        any_batch: Whether a file can take any number of images; otherwise it takes one.
        elsewhere: Why a file can't run on this system, "" if it can.
        companions: Suffixes of further files that belong to one.
        readme: The section of the folder's README: Markdown with {file}, {input} and {output} to be filled in.
    """

    name: str
    suffix: str
    extra: str
    packages: Sequence[str]
    convert: Callable[[Graph], Converted]
    open: Callable[[Path, int], Opened]
    read: Callable[[Path], Record | None] = _no_record
    errors: Callable[[], tuple[type[Exception], ...]] = _runtime_error
    forms: Sequence[str] = ()
    precisions: Sequence[str] = ("fp32",)
    any_batch: bool = False
    elsewhere: str = ""
    companions: Sequence[str] = ()
    readme: str = field(default="", repr=False)

    @property
    def package(self) -> str:
        """Importable name of the runtime."""
        return self.packages[0]

    @property
    def installed(self) -> bool:
        """Whether all packages are there."""
        return all(importlib.util.find_spec(package) is not None for package in self.packages)

    def require(self) -> None:
        """Raises `UserError` with the command that installs what is missing."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise missing(package, self.extra)


def missing(package: str, extra: str) -> UserError:
    """The error that says how to install a package of one of this package's extras."""
    return UserError(f'{package} is not installed: pip install "effvit_zoo[{extra}]"')


def need(package: str, extra: str) -> Any:
    """Imports a package of one of this package's extras. Raises `UserError` with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise missing(package, extra) from None


def as_texts(record: Record) -> dict[str, str]:
    """A record for a format that holds texts by name: text as it is, everything else, and text that looks like JSON, as JSON."""
    return {key: _as_text(value) for key, value in record.items()}


def from_texts(texts: Mapping[str, str]) -> dict[str, Any] | None:
    """The record that `as_texts` was given, from among other texts; None where there is none."""
    if MARK not in texts:
        return None
    return {key: _from_text(text) for key, text in texts.items() if key in RECORD_KEYS}


def _as_text(value: Any) -> str:
    if isinstance(value, str) and _from_text(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _from_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
