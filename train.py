#!/usr/bin/env python
"""`effzoo train` from a checkout: `python train.py --help`, or on several processes `torchrun --nproc_per_node N train.py ...`."""

import sys
from collections.abc import Sequence

from effvit_zoo.commands import dispatch
from effvit_zoo.errors import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line. Raises `UserError`."""
    dispatch(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(run_command(main))
