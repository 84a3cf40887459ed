"""The processes that train together, as accelerate sees them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ..errors import UserError

PRECISIONS = ("no", "bf16", "fp16")


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


def _launched(name: str, choices: tuple[str, ...], option: str) -> str | None:
    """What `accelerate launch` hands on in a variable; None where it isn't set. Raises `UserError`."""
    value = os.environ.get(f"ACCELERATE_{name}", "").lower()
    if value and value not in choices:
        raise UserError(f"accelerate launch {option} is {value!r}, expected one of {', '.join(choices)}")
    return value or None


def launched_precision() -> str | None:
    """Mixed precision that `accelerate launch` was told."""
    return _launched("MIXED_PRECISION", PRECISIONS, "--mixed_precision")


def launched_compile() -> bool:
    """Whether `accelerate launch` was told to compile models."""
    return _launched("DYNAMO_BACKEND", ("no", "inductor"), "--dynamo_backend") == "inductor"


def require_same_launch(grad_accum: int) -> None:
    """Raises `UserError` where `accelerate launch` was told what isn't done, or what contradicts `train.grad_accum`."""
    for flag, name in {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}.items():
        if parse_flag_from_env(f"ACCELERATE_USE_{flag}"):
            raise UserError(f"accelerate launch was told to use {name}: expected plain data parallelism or FSDP")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto", str(grad_accum)):
        raise UserError(
            f"accelerate launch --gradient_accumulation_steps is {steps}, train.grad_accum is {grad_accum}: "
            f"set train.grad_accum={steps}, or leave the option out"
        )


@contextmanager
def process_group() -> Iterator[None]:
    """Closes the connection between processes after all runs inside are trained."""
    try:
        yield
    finally:
        process_state().destroy_process_group()
