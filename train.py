#!/usr/bin/env python
"""Trains a model: `python train.py` runs configs/quickstart.yaml; `accelerate launch train.py ...` runs the same on many processes."""

import argparse
import sys
from pathlib import Path

from effvit_zoo.errors import OneLineParser, run_command

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--config", type=Path, help=f"YAML of the run (default: {QUICKSTART.relative_to(Path(__file__).parent)})"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="settings that go before the config's",
    )
    parser.add_argument("--output", type=Path, help="run folder (default: runs/NAME-OF-CONFIG)")
    parser.add_argument(
        "--resume",
        metavar="auto|FOLDER",
        help="go on: in the output folder where there is something to go on from, or in FOLDER",
    )
    parser.add_argument(
        "--allow-change",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="config keys that may differ when resuming",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    from effvit_zoo.training.launch import start_missing_processes
    from effvit_zoo.training.run import train

    start_missing_processes()
    config = args.config or (None if args.resume not in (None, "auto") else QUICKSTART)
    train(config, args.set, args.output, args.resume, args.allow_change)


if __name__ == "__main__":
    sys.exit(run_command(main))
