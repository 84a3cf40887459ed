"""A whole training run: model, data, task and engine put together from a config, into a run folder."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.data import resolve_data_config
from torch import nn

from .. import config as strict
from .. import hub
from ..data.feed import Feed, PlannedFeed, make_feed
from ..data.images import MODES
from ..data.loader import seed_everything
from ..data.splits import StreamSource, open_splits
from ..errors import UserError
from ..measure import cost
from ..report.run_page import write_atomically, write_report, write_summary
from ..tasks._card import classification_card
from ..tasks.classification import Classification, Task, balanced_weights
from ..tasks.distillation import Distillation, load_teacher
from .checkpoint import find_checkpoint
from .config import RunConfig, load_config
from .engine import FitResult, fit
from .guards import DUPLICATES_UP_TO, duplicates
from .launch import process_state

CONFIG_FILE = "config.yaml"
RUN_FILES = (CONFIG_FILE, "summary.json", "metrics.csv", "best", "last", "checkpoints")
HARMLESS_CHANGES = (
    "data.num_workers",
    "data.check_duplicates",
    "train.checkpoint_steps",
    "train.keep_checkpoints",
    "train.max_bad_steps",
    "train.trackers",
    "hub.push",
    "hub.push_best",
    "hub.push_every_best",
)
UNEQUAL = 2  # largest over smallest class, from which on it's worth a line


def train(
    config_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    resume: str | None = None,
    allow_change: Sequence[str] = (),
    adapt: Callable[[Task], Task] | None = None,
) -> Path:
    """Trains what a config says and returns the run folder.

    Args:
        config_path: YAML of a run; may be left out when `resume` names a run folder, which has its own.
        overrides: `section.key=value` settings that go before the file's.
        output: Run folder. None: `runs/NAME-OF-CONFIG`, numbered when that is taken.
        resume: None starts anew; "auto" goes on in the run folder where there is something to go on from; a run folder goes on there.
        allow_change: Config keys that may differ from what the resumed run was started with.
        adapt: What a stage of a pipeline makes of the config's task before it is trained: freezes, another loss.

    Raises:
        UserError: For bad input of any kind; what is on disk stays as it was.
    """
    folder, asked, checkpoint = _plan(config_path, overrides, output, resume, allow_change)
    accelerator = _make_accelerator(asked, folder)
    config = asked.shared_by(accelerator.num_processes)
    torch.use_deterministic_algorithms(config.train.deterministic)
    seed_everything(config.train.seed)
    feed, classification = prepare(config, accelerator.num_processes)
    task: Task = classification
    if config.distill.teacher is not None:
        teacher = load_teacher(config.distill, feed.data_config, feed.class_names, config.train.precision)
        task = Distillation(classification, teacher, config.distill)
    if adapt is not None:
        task = adapt(task)
    if config.hub.push is not None and accelerator.is_main_process:
        hub.require_pushable(config.hub.push)  # now, not after hours
    accelerator.wait_for_everyone()  # every process has looked at the folder before one writes into it
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG_FILE, strict.dump(asked))
    # TensorBoard takes the project's name for a folder, the others for what the run belongs to
    project = "effvit_zoo" if set(config.train.trackers) - {"tensorboard"} else "tensorboard"
    accelerator.init_trackers(project, config=_tracker_config(config))
    accelerator.print(
        f"{'resuming' if checkpoint else 'training'} {config.model.name} on {config.data.root}: {_size(feed, accelerator)} -> {folder}"
    )
    notes = start_notes(config) + data_notes(feed, config) if accelerator.is_main_process else []
    for note in notes:
        print(note)
    result = fit(task, feed, config, accelerator, folder, checkpoint)
    for tracker in accelerator.trackers:
        tracker.finish()  # `end_training` would part the processes, which may have another run to do
    if accelerator.is_main_process:
        summary = _summary(config, feed, result, accelerator)
        write_summary(folder, summary)
        write_report(folder, summary, result.state, feed, notes)
        bad = f", {len(result.state.bad_files)} unreadable files skipped" if result.state.bad_files else ""
        print(
            f"top-1 {result.state.best_top1:.2f} % (epoch {result.state.best_epoch}) in {result.state.seconds:.0f} s{bad}"
        )
        print(f'model: timm.create_model("local-dir:{folder / "best"}", pretrained=True) after import effvit_zoo')
        print(f"report: {folder / 'report.html'}")
        if config.hub.push is not None:
            pushed = folder / ("best" if config.hub.push_best else "last")
            print(f"uploaded: {hub.push(pushed, config.hub.push, classification_card)}")
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
    for name in config.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracker {name} needs another package: pip install {name.replace('_', '-')}")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    AcceleratorState._reset_state()  # a process may train one run after another, in other precisions
    try:
        return Accelerator(
            mixed_precision=config.train.precision,
            log_with=list(config.train.trackers) or None,
            project_dir=str(folder),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate refuses these settings: {error}") from None


def prepare(config: RunConfig, num_processes: int) -> tuple[Feed, Classification]:
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
    for shape in (data_config["input_size"], *((in_chans, side, side) for side in config.augment.sizes)):
        _try_size(model, shape, config.model.name)
    for key in ("mean", "std"):
        if len(data_config[key]) != in_chans:  # colour statistics for a network that sees grey
            data_config[key] = (sum(data_config[key]) / len(data_config[key]),) * in_chans
    feed = make_feed(splits, config, data_config, num_processes)
    weights = None
    if config.train.class_weights:
        if isinstance(splits.train, StreamSource):
            raise UserError(f"train.class_weights: {data.root} is a stream, its classes aren't counted beforehand")
        weights = balanced_weights(splits.train.targets, len(splits.class_names))
    return feed, Classification.from_config(model, len(splits.class_names), config.train, config.augment, weights)


def build_model(config: RunConfig, num_classes: int | None) -> nn.Module:
    """The config's model with a head for `num_classes` (None: its own number), made for `data.img_size`. Raises `UserError`."""
    name, size = config.model.name, config.data.img_size
    pretrained = config.model.pretrained or hub.brings_weights(name)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    model: Any = hub.load(name, pretrained=pretrained, **{**config.model.kwargs, **classes})
    if size is not None:
        try:
            if hasattr(model, "set_input_size"):
                model.set_input_size(img_size=size)
        except (ValueError, AssertionError) as error:
            raise UserError(f"{name} can't take images of {size} pixels: {error}") from None
    if config.train.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, NotImplementedError):
            raise UserError(f"train.grad_checkpointing: {name} has no gradient checkpointing, expected false") from None
    return model


def _try_size(model: nn.Module, size: Sequence[int], name: str) -> None:
    """Shows the model one black image, so that a size which it can't take is told before anything is written."""
    was_training = model.training
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *size, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{name} can't take images of {' x '.join(map(str, size[1:]))} pixels: {text}") from error
    finally:
        model.train(was_training)


def start_notes(config: RunConfig) -> list[str]:
    """What doesn't go together with random weights to start from."""
    meant_for_trained = {
        "optim.layer_decay": config.optim.layer_decay not in (None, 1.0),
        "train.freeze_epochs": config.train.freeze_epochs > 0,
    }
    used = [key for key, is_used in meant_for_trained.items() if is_used]
    if not used or config.model.pretrained or hub.brings_weights(config.model.name):
        return []
    return [
        f"{config.model.name} starts from random weights, and {' and '.join(used)} hold its layers back: model.pretrained=true?"
    ]


def data_notes(feed: Feed, config: RunConfig) -> list[str]:
    """What the user should know of the data before training on it: unequal classes, and files that are in both splits."""
    if not isinstance(feed, PlannedFeed):
        return []
    notes = []
    train, val = feed.train.source, feed.val.source
    counts = np.bincount(train.targets, minlength=len(feed.class_names))
    if counts.max() >= UNEQUAL * counts.min():
        least, most = (f"{feed.class_names[i]!r} {counts[i]}" for i in (counts.argmin(), counts.argmax()))
        advice = "weighted" if config.train.class_weights else "train.class_weights=true weighs them equally"
        notes.append(f"classes are unequal: {most} training images, {least} ({advice})")
    wanted = config.data.check_duplicates
    if wanted or (wanted is None and len(train) + len(val) <= DUPLICATES_UP_TO):
        pairs = duplicates(train, val)
        if pairs:
            notes.append(
                f"warning: {len(pairs)} of {len(val)} validation files are training files too, "
                f"e.g. {pairs[0][0]} is {pairs[0][1]}: top-1 will be too high"
            )
    return notes


def dry_run(config_path: str | Path, overrides: Sequence[str] = (), num_processes: int | None = None) -> dict[str, Any]:
    """What `train` would do with a config, without training: name -> value, in the order to read it in.

    Data that isn't there is no error, so that a recipe can be looked at anywhere; the model then has its own number of classes.

    Args:
        config_path: YAML of a run.
        overrides: As for `train`.
        num_processes: Processes to reckon with. None: those that this one was started with.

    Raises:
        UserError: For bad input of any other kind.
    """
    processes = num_processes or process_state().num_processes
    asked = load_config(config_path, overrides)
    config = asked.shared_by(processes)
    train, optim = config.train, config.optim
    facts: dict[str, Any] = {"model": config.model.name}
    feed: Feed | None = None
    try:
        feed, task = prepare(config, processes)
        model = task.model
        data = f"{config.data.root}: {len(feed.class_names)} classes, {_counts(feed)}"
    except UserError as error:
        if _data_is_there(config):
            raise
        model = build_model(config, None)
        data = f"{config.data.root}: not there ({error}), so the number of steps is not known"
    steps = feed.steps_per_epoch if feed else None
    images = train.batch_size * processes * train.grad_accum
    return facts | {
        "params": cost.count_params(model),
        "input_size": list(feed.data_config["input_size"]) if feed else config.data.img_size,
        "data": data,
        "images_per_step": images,
        "batch": f"{train.batch_size} per process x {processes} processes x {train.grad_accum} accumulated",
        "optimizer": optim.name,
        "lr": optim.lr,
        "weight_decay": optim.weight_decay,
        "schedule": optim.schedule,
        "warmup_epochs": optim.warmup_epochs,
        "warmup_steps": round(optim.warmup_epochs * steps) if steps else None,
        "epochs": train.epochs,
        "steps_per_epoch": steps,
        "steps": train.epochs * steps if steps else None,
        "teacher": config.distill.teacher,
    }


def _data_is_there(config: RunConfig) -> bool:
    try:
        open_splits(
            config.data.root,
            train_split=config.data.train_split,
            val_split=config.data.val_split,
            val_fraction=config.data.val_fraction,
            seed=config.train.seed,
        )
    except UserError:
        return False
    return True


def print_dry_run(facts: dict[str, Any]) -> None:
    """Facts of `dry_run`, a line each."""
    for name, value in facts.items():
        if value is not None:
            shown = f"{value:,}" if name == "params" else f"{value:g}" if isinstance(value, float) else value
            print(f"{name.replace('_', ' '):16} {shown}")


def _tracker_config(config: RunConfig) -> dict[str, Any]:
    flat = strict.flatten(strict.as_dict(config))
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in flat.items()}


def _size(feed: Feed, accelerator: Accelerator) -> str:
    return (
        f"{len(feed.class_names)} classes, {_counts(feed)}, "
        f"{feed.steps_per_epoch} steps per epoch on {accelerator.num_processes} x {accelerator.device.type}"
    )


def _counts(feed: Feed) -> str:
    counts = feed.describe()
    return f"{counts['train_images']} training and {counts['val_images'] or '?'} validation images"


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
        "epochs_run": len(state.history),
        "skipped_steps": state.skipped_steps,
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
