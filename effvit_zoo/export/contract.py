"""The contract of an export target: one row that says how a model becomes a file, and how such a file runs on this host."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UserError

Runner = Callable[[torch.Tensor], torch.Tensor]
"""float32 images (B, C, H, W) on the CPU, in any memory format -> outputs (B, ...) that later calls don't overwrite."""


class Opened(NamedTuple):
    """An exported file in its runtime.

    Attributes:
        run: Computes it.
        shape: Its input's (B, C, H, W), with None for a free dimension.
    """

    run: Runner
    shape: list[int | None]


def _runtime_error() -> tuple[type[Exception], ...]:
    return (RuntimeError,)


@dataclass(frozen=True)
class Target:
    """A row of `TARGETS`. Its functions import the packages that they need, and raise `UserError` where one is missing.

    Attributes:
        name: Key in `TARGETS`.
        suffix: File name suffix, with its dot.
        extra: This package's extra that installs what the target needs.
        package: Importable name of the runtime.
        open: (file, number of threads) -> the file in its runtime. Raises one of `errors` for a damaged file.
        export: (model in eval mode, images (B, C, H, W), file) -> None; the file takes any number of images of that size.
            None where there is no exporter.
        errors: Returns the types of exceptions that the runtime raises, for a damaged file or an input that it doesn't take.
    """

    name: str
    suffix: str
    extra: str
    package: str
    open: Callable[[Path, int], Opened]
    export: Callable[[nn.Module, torch.Tensor, Path], None] | None = None
    errors: Callable[[], tuple[type[Exception], ...]] = _runtime_error

    @property
    def installed(self) -> bool:
        """Whether the runtime's package is there."""
        return importlib.util.find_spec(self.package) is not None


def need(package: str, extra: str) -> Any:
    """Imports a package of one of this package's extras. Raises `UserError` with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f'{package} is not installed: pip install "effvit_zoo[{extra}]"') from None
