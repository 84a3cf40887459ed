"""Parts of command lines that several commands have."""

from __future__ import annotations

import argparse

from ..errors import UserError, one_line

MODEL_HELP = "effzoo_* or timm name, model or run folder, local-dir:FOLDER, hf-hub:USER/NAME"


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one, else cpu)")


def check_device(name: str | None) -> str:
    """The name of a device, tried out; of a GPU where there is one, if None is given. Raises `UserError`."""
    import torch

    from ..evaluation.device import pick_device

    try:
        device = pick_device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0] or error
        raise UserError(f"device {name!r} can't be used: {one_line(reason)}") from None
    return str(device)
