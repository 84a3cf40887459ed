"""`effzoo train`, and `train.py`: trains a model, or the stages of a pipeline, as a config says."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .. import run_folder
from ..errors import UserError

if TYPE_CHECKING:
    from ..pipelines import Pipeline

HELP = "train a model, on one process or many"
DEFAULT_CONFIG = "quickstart"
FOLDER_CONFIG = "finetune"
"""Config of a run on images that the command names."""
SHORT = {
    "images": ("IMAGES", "data.root"),
    "model": ("--model", "model.name"),
    "minutes": ("--minutes", "train.minutes"),
}
"""Destination of an argument -> its name and the setting that it stands for."""
RANKS = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which launchers say which of several processes this is, or how many there are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .config import settings_help

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = settings_help()
    parser.add_argument(
        "images",
        nargs="?",
        metavar="IMAGES",
        help="folder with a folder of images per class, or other data that data.root names: fine-tunes a trained model on it",
    )
    defaults = f"default: {FOLDER_CONFIG} with IMAGES, {DEFAULT_CONFIG} without"
    parser.add_argument("--config", metavar="NAME|FILE", help=f"config of the run ({defaults})")
    parser.add_argument("--model", help="model to start from, as model.name (default: the config's)")
    parser.add_argument(
        "--minutes", metavar="N", help="time of the whole run, as train.minutes (default: the config's epochs)"
    )
    lists: dict[str, object] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--set", metavar="SECTION.KEY=VALUE", help="overrides of config values", **lists)  # type: ignore[arg-type]
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="run folder (default: runs/NAME of IMAGES or config)"
    )
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
    started = time.perf_counter()  # importing torch is a part of the run's time
    from ..measure.allocator import keep_freed_memory
    from ..training._processes import process_group

    require_processes(os.environ)
    keep_freed_memory()
    with process_group():
        _train(args, started)


def _train(args: argparse.Namespace, started: float) -> None:
    from ..pipelines import PIPELINES, pipeline_of
    from ..training.config import find_config
    from ..training.run import dry_run, print_dry_run, train

    default = DEFAULT_CONFIG if args.images is None else FOLDER_CONFIG
    name = args.config or (None if args.resume not in (None, "auto") else default)
    config = None if name is None else find_config(name)
    settings = [*_short_settings(args), *args.set]
    if config is not None and (pipeline := pipeline_of(config)) is not None:
        if args.minutes is not None:
            raise UserError(
                f"--minutes: {config} has several stages, expected train.minutes of one, e.g. dense.train.minutes"
            )
        if args.dry_run:
            raise UserError(f"--dry-run: {config} has several stages, expected the config of a single run")
        _train_pipeline(PIPELINES[pipeline], config, settings, args)
    elif args.stage:
        raise UserError(f"--stage {args.stage}: {config or args.resume} has no stages, expected a pipeline's config")
    elif args.dry_run:
        if config is None:
            raise UserError("--dry-run: expected --config, as there is nothing to plan for a resumed run")
        print_dry_run(dry_run(config, settings))
    else:
        place = None if args.images is None else run_name(args.images)
        before = time.perf_counter() - started
        resumed = (args.resume, args.allow_change)
        folder = train(config, settings, args.output, *resumed, name=place, seconds_before=before)
        _print_next(folder)


def _short_settings(args: argparse.Namespace) -> list[str]:
    """The settings that IMAGES, --model and --minutes stand for. Raises `UserError`."""
    given = {row: value for key, row in SHORT.items() if (value := getattr(args, key)) is not None}
    for (argument, key), value in given.items():
        if any(setting.partition("=")[0].strip() == key for setting in args.set):
            raise UserError(f"{argument} is {value} and --set has {key} too: expected one of them")
    if args.images is not None:
        require_images(args.images)
    return [f"{key}={value if key == 'train.minutes' else json.dumps(value)}" for (_, key), value in given.items()]


def require_images(name: str) -> None:
    """Raises `UserError` where a name is that of a config or of a model rather than of images. A path that exists is images."""
    from ..training.config import find_config

    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{name} is a config, expected a folder of images: effzoo train --config {shlex.quote(name)}")
    if path.exists():
        return
    try:
        find_config(name)
    except UserError:
        from ._index import models

        if name in models():
            command = f"effzoo train IMAGES --model {name}"
            raise UserError(f"{name} is a model, expected a folder of images: {command}") from None
    else:
        raise UserError(f"{name} is a config, and there is no such folder of images: effzoo train --config {name}")


def run_name(images: str) -> str:
    """The name of a run on images: that of their folder, file or data set."""
    path = Path(images).expanduser()
    name = path.resolve().name if path.exists() else images.replace(":", "/").rstrip("/").rpartition("/")[2]
    return (Path(name).stem if path.is_file() else name) or "images"


def _print_next(folder: Path) -> None:
    """Prints the commands that go on with a trained model, ready to paste."""
    from ..config import read_yaml
    from ..training._processes import process_state

    if not process_state().is_main_process:
        return
    content = read_yaml(folder / run_folder.CONFIG)
    root = str(content.get("data", {}).get("root", ""))
    run, images = shlex.quote(str(folder)), shlex.quote(root)
    lines = [f"effzoo validate --model {run} --data {images}"]
    if Path(root).expanduser().is_dir():
        drawn = shlex.quote(str(folder / "drawn"))
        lines.append(f"effzoo predict --model {run} {images} --draw {drawn}")
    photos = f" --data {images}" if Path(root).expanduser().is_dir() else ""
    lines += [f"effzoo export {run} --to onnx{photos}", f"effzoo push {run} USER/NAME"]
    print("next:", *lines, sep="\n  ")


def _train_pipeline(pipeline: Pipeline, config: Path, settings: list[str], args: argparse.Namespace) -> None:
    """Trains the stages, and after the last one runs the pipeline's benchmark."""
    from ..pipelines.contract import on_main_process

    folder = pipeline.train(config, settings, args.output, args.resume, args.stage)
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
