"""The processes that train together, as accelerate sees them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def on_cpu() -> bool:
    """Whether to tell accelerate that the processes compute on the CPU.

    That is so if `accelerate launch --cpu` says it, and where torchrun started several processes on a host without an accelerator:
    accelerate 1.15 takes each of them for a run of its own otherwise.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (
        "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    )


def process_state() -> PartialState:
    """This process among the others; the same that an `Accelerator` makes."""
    return PartialState(cpu=on_cpu())


@contextmanager
def process_group() -> Iterator[None]:
    """Closes the connection between processes after all runs inside are trained."""
    try:
        yield
    finally:
        process_state().destroy_process_group()
