"""`effzoo train`, and `train.py`: trains a model, or the stages of a pipeline, as a config says."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..pipelines import Pipeline

HELP = "train a model, on one process or many"
DEFAULT_CONFIG = "quickstart"
RANKS = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which launchers say which of several processes this is, or how many there are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .config import settings_help

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = settings_help()
    parser.add_argument("--config", metavar="NAME|FILE", help=f"config of the run (default: {DEFAULT_CONFIG})")
    lists: dict[str, object] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--set", metavar="SECTION.KEY=VALUE", help="overrides of config values", **lists)  # type: ignore[arg-type]
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="run folder (default: runs/NAME-OF-CONFIG)")
    parser.add_argument(
        "--resume",
        metavar="auto|FOLDER",
        help="resume: auto from the latest checkpoint in the output folder, or from run FOLDER",
    )
    allowed = "config keys that may differ on resuming; data.files for other images"
    parser.add_argument("--allow-change", metavar="KEY", help=allowed, **lists)  # type: ignore[arg-type]
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print model, data, images per step, learning rate and steps; train nothing",
    )
    parser.add_argument("--stage", help="of a pipeline: run this stage alone")


def run(args: argparse.Namespace) -> None:
    from ..measure.allocator import keep_freed_memory
    from ..training._processes import process_group

    require_processes(os.environ)
    keep_freed_memory()
    with process_group():
        _train(args)


def _train(args: argparse.Namespace) -> None:
    from ..pipelines import PIPELINES, pipeline_of
    from ..training.config import find_config
    from ..training.run import dry_run, print_dry_run, train

    name = args.config or (None if args.resume not in (None, "auto") else DEFAULT_CONFIG)
    config = None if name is None else find_config(name)
    if config is not None and (pipeline := pipeline_of(config)) is not None:
        if args.dry_run:
            raise UserError(f"--dry-run: {config} has several stages, expected the config of a single run")
        _train_pipeline(PIPELINES[pipeline], config, args)
    elif args.stage:
        raise UserError(f"--stage {args.stage}: {config or args.resume} has no stages, expected a pipeline's config")
    elif args.dry_run:
        if config is None:
            raise UserError("--dry-run: expected --config, as there is nothing to plan for a resumed run")
        print_dry_run(dry_run(config, args.set))
    else:
        train(config, args.set, args.output, args.resume, args.allow_change)


def _train_pipeline(pipeline: Pipeline, config: Path, args: argparse.Namespace) -> None:
    """Trains the stages, and after the last one runs the pipeline's benchmark."""
    from ..pipelines.contract import on_main_process

    folder = pipeline.train(config, args.set, args.output, args.resume, args.stage)
    if pipeline.benchmark is not None and args.stage in (None, pipeline.stages[-1].name):
        benchmark = importlib.import_module(f"..benchmark.{pipeline.benchmark}", __package__)
        on_main_process(lambda: benchmark.conclude(folder))


def require_processes(environment: Mapping[str, str]) -> None:
    """Raises `UserError` where accelerate was to start several processes and started one.

    `accelerate launch --cpu --num_processes N` without mpirun runs the script once (accelerate 1.15,
    https://github.com/huggingface/accelerate/issues/2741). It sets a rendezvous address only if N > 1, and no ranks. Trained
    so, a run's steps would have a fraction of the images that were asked for.
    """
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    if on_cpu and "MASTER_PORT" in environment and not any(name in environment for name in RANKS):
        raise UserError(
            "accelerate launch --cpu started a single process: use `torchrun --nproc_per_node N train.py ...`"
        )
