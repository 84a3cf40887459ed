"""The processes that train together, as accelerate sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """This process among the others; the same that an `Accelerator` makes. (`PartialState()` overlooks `--cpu`.)"""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@contextmanager
def process_group() -> Iterator[None]:
    """Closes the connection between processes after all runs inside are trained."""
    try:
        yield
    finally:
        process_state().destroy_process_group()
