#!/usr/bin/env python
"""Trains a model: `python train.py` runs configs/quickstart.yaml; `accelerate launch train.py ...` runs the same on many processes."""

import argparse
import sys
from pathlib import Path

from effvit_zoo.errors import OneLineParser, UserError, run_command

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
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print model, data, images per step, learning rate and steps; train nothing",
    )
    parser.add_argument("--stage", help="of a pipeline: run this stage alone")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    from effvit_zoo.training.launch import process_group, start_missing_processes

    start_missing_processes()
    with process_group():
        run(args)


def run(args: argparse.Namespace) -> None:
    """Trains, or plans, what the command line says."""
    from effvit_zoo.pipelines.tosa import is_pipeline, train_tosa
    from effvit_zoo.training.run import dry_run, print_dry_run, train

    config = args.config or (None if args.resume not in (None, "auto") else QUICKSTART)
    if config is not None and is_pipeline(config):
        if args.dry_run:
            raise UserError(f"--dry-run: {config} has several stages, expected the config of a single run")
        train_tosa(config, args.set, args.output, args.resume, args.stage)
    elif args.stage:
        raise UserError(f"--stage {args.stage}: {config or args.resume} has no stages, expected a pipeline's config")
    elif args.dry_run:
        if config is None:
            raise UserError("--dry-run: expected --config, as there is nothing to plan where a run goes on")
        print_dry_run(dry_run(config, args.set))
    else:
        train(config, args.set, args.output, args.resume, args.allow_change)


if __name__ == "__main__":
    sys.exit(run_command(main))
