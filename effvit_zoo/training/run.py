"""A whole training run: model, data, task and engine put together from a config, into a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import resolve_data_config
from torch import nn

from .. import config as strict
from .. import cost, hub
from ..errors import UserError
from ..images import MODES
from .checkpoint import find_checkpoint
from .config import RunConfig, load_config
from .data import open_splits
from .engine import FitResult, fit
from .loader import Feed, make_feed, seed_everything
from .report import write_atomically, write_summary
from .tasks import Classification

CONFIG_FILE = "config.yaml"
RUN_FILES = (CONFIG_FILE, "summary.json", "metrics.csv", "best", "last", "checkpoints")
HARMLESS_CHANGES = ("data.num_workers", "train.checkpoint_steps", "train.keep_checkpoints", "train.trackers")


def train(
    config_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    resume: str | None = None,
    allow_change: Sequence[str] = (),
) -> Path:
    """Trains what a config says and returns the run folder.

    Args:
        config_path: YAML of a run; may be left out when `resume` names a run folder, which has its own.
        overrides: `section.key=value` settings that go before the file's.
        output: Run folder. None: `runs/NAME-OF-CONFIG`, numbered when that is taken.
        resume: None starts anew; "auto" goes on in the run folder where there is something to go on from; a run folder goes on there.
        allow_change: Config keys that may differ from what the resumed run was started with.

    Raises:
        UserError: For bad input of any kind; what is on disk stays as it was.
    """
    folder, config, checkpoint = _plan(config_path, overrides, output, resume, allow_change)
    accelerator = _make_accelerator(config, folder)
    seed_everything(config.train.seed)
    feed, task = _prepare(config, accelerator.num_processes)
    accelerator.wait_for_everyone()  # every process has looked at the folder before one writes into it
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG_FILE, strict.dump(config))
    accelerator.init_trackers("tensorboard", config=_tracker_config(config))
    accelerator.print(
        f"{'resuming' if checkpoint else 'training'} {config.model.name} on {config.data.root}: {_size(feed, accelerator)} -> {folder}"
    )
    result = fit(task, feed, config, accelerator, folder, checkpoint)
    accelerator.end_training()
    if accelerator.is_main_process:
        write_summary(folder, _summary(config, feed, result, accelerator))
        bad = f", {len(result.state.bad_files)} unreadable files skipped" if result.state.bad_files else ""
        print(
            f"top-1 {result.state.best_top1:.2f} % (epoch {result.state.best_epoch}) in {result.state.seconds:.0f} s{bad}"
        )
        print(f'model: timm.create_model("local-dir:{folder / "best"}", pretrained=True) after import effvit_zoo')
    return folder


def _plan(
    config_path: str | Path | None,
    overrides: Sequence[str],
    output: str | Path | None,
    resume: str | None,
    allow_change: Sequence[str],
) -> tuple[Path, RunConfig, Path | None]:
    """The run folder, its config, and the checkpoint to go on from, if any."""
    if resume not in (None, "auto"):
        folder, checkpoint = _resumed(Path(resume))
        if output is not None and Path(output).resolve() != folder.resolve():
            raise UserError(f"--resume {resume} goes on in {folder}, but --output says {output}: leave --output out")
        return folder, _resumed_config(folder, config_path, overrides, allow_change), checkpoint
    if config_path is None:
        raise UserError("no config given: expected the path of a YAML file")
    config = load_config(config_path, overrides)
    folder = Path(output) if output is not None else Path("runs") / Path(config_path).stem
    if resume == "auto" and (folder / CONFIG_FILE).is_file():
        return folder, _resumed_config(folder, config_path, overrides, allow_change), find_checkpoint(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file, expected a folder or nothing")
    if _is_taken(folder):
        if output is not None:
            raise UserError(f"{folder} already holds a run: go on with it by --resume auto, or name another --output")
        folder = next(
            path for number in range(2, 10**6) if not _is_taken(path := folder.with_name(f"{folder.name}-{number}"))
        )
    return folder, config, None


def _is_taken(folder: Path) -> bool:
    return any((folder / name).exists() for name in RUN_FILES)


def _resumed(path: Path) -> tuple[Path, Path | None]:
    """Run folder and checkpoint for a path to either."""
    if (path / CONFIG_FILE).is_file():
        return path, find_checkpoint(path)
    if (path / "state.json").is_file() and (path.parent.parent / CONFIG_FILE).is_file():
        return path.parent.parent, path
    reason = f"it has no {CONFIG_FILE}" if path.is_dir() else "there is no such folder"
    raise UserError(f"--resume {path} is not a run folder: {reason}")


def _resumed_config(
    folder: Path, config_path: str | Path | None, overrides: Sequence[str], allow_change: Sequence[str]
) -> RunConfig:
    """The config to go on with; anything that would make another run of it has to be allowed by name."""
    before = load_config(folder / CONFIG_FILE)
    config = load_config(folder / CONFIG_FILE if config_path is None else config_path, overrides)
    refused = [key for key in strict.changed_keys(before, config) if key not in (*HARMLESS_CHANGES, *allow_change)]
    if refused:
        raise UserError(
            f"{folder} was started with other settings of {', '.join(refused)}: "
            f"resume with the same, or allow it by --allow-change {' '.join(refused)}"
        )
    return config


def _make_accelerator(config: RunConfig, folder: Path) -> Accelerator:
    try:
        return Accelerator(
            mixed_precision=config.train.precision,
            log_with=list(config.train.trackers) or None,
            project_dir=str(folder),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate refuses these settings: {error}") from None


def _prepare(config: RunConfig, num_processes: int) -> tuple[Feed, Classification]:
    """Data and task of a run."""
    in_chans = config.model.kwargs.get("in_chans", 3)
    if in_chans not in MODES:
        raise UserError(f"model.kwargs.in_chans is {in_chans}, expected 3 (RGB) or 1 (grey)")
    data = config.data
    splits = open_splits(
        data.root,
        train_split=data.train_split,
        val_split=data.val_split,
        val_fraction=data.val_fraction,
        seed=config.train.seed,
        img_mode=MODES[in_chans],
    )
    model = build_model(config, len(splits.class_names))
    overrides = {"crop_pct": data.crop_pct} if data.crop_pct else {}
    data_config = resolve_data_config(overrides, model=model)
    size = data.img_size or tuple(data_config["input_size"][1:])
    data_config["input_size"] = (in_chans, *(size if isinstance(size, tuple) else (size, size)))
    for key in ("mean", "std"):
        if len(data_config[key]) != in_chans:  # colour statistics for a network that sees grey
            data_config[key] = (sum(data_config[key]) / len(data_config[key]),) * in_chans
    feed = make_feed(splits, config, data_config, num_processes)
    return feed, Classification.from_config(model, len(splits.class_names), config.train, config.augment)


def build_model(config: RunConfig, num_classes: int) -> nn.Module:
    """The config's model with a head for `num_classes`, made for `data.img_size`. Raises `UserError`."""
    name, size = config.model.name, config.data.img_size
    pretrained = config.model.pretrained or hub.brings_weights(name)
    model: Any = hub.load(name, pretrained=pretrained, **{**config.model.kwargs, "num_classes": num_classes})
    if size is not None:
        try:
            if hasattr(model, "set_input_size"):
                model.set_input_size(img_size=size)
        except (ValueError, AssertionError) as error:
            raise UserError(f"{name} can't take images of {size} pixels: {error}") from None
    return model


def _tracker_config(config: RunConfig) -> dict[str, Any]:
    flat = strict.flatten(strict.as_dict(config))
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in flat.items()}


def _size(feed: Feed, accelerator: Accelerator) -> str:
    counts = feed.describe()
    return (
        f"{len(feed.class_names)} classes, {counts['train_images']} training and {counts['val_images'] or '?'} validation images, "
        f"{feed.steps_per_epoch} steps per epoch on {accelerator.num_processes} x {accelerator.device.type}"
    )


def _summary(config: RunConfig, feed: Feed, result: FitResult, accelerator: Accelerator) -> dict[str, Any]:
    state = result.state
    return {
        "model": config.model.name,
        "data": config.data.root,
        "num_classes": len(feed.class_names),
        **feed.describe(),
        "bad_files": len(state.bad_files),
        "bad_file_names": sorted(state.bad_files),
        "input_size": list(feed.data_config["input_size"]),
        "top1": state.best_top1,
        "top5": state.best["top5"],
        "val_loss": state.best["loss"],
        "best_epoch": state.best_epoch,
        "epochs": config.train.epochs,
        "steps": state.step,
        "images_per_second": result.images_per_second,
        "seconds": state.seconds,
        "params": cost.count_params(result.model),
        "macs": cost.count_macs(result.model, feed.data_config["input_size"]),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(accelerator.device)
        if accelerator.device.type == "cuda"
        else accelerator.device.type,
        "threads": torch.get_num_threads(),
        "seed": config.train.seed,
    }
