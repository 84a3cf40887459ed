"""A whole training run: model, data, task and engine assembled from a config, into a run folder."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.data import resolve_data_config
from torch import nn

from .. import config as strict
from .. import hub, run_folder
from ..data import MODES, Feed, make_feed, seed_everything
from ..errors import UserError, one_line
from ..measure import cost
from ..report.run_page import write_summary
from ..tasks import TASKS, Distillation, Objective, Task, card_facts
from ..tasks.distillation import load_teacher
from ._data_checks import data_notes, record_images, require_recorded_images
from ._processes import on_cpu, process_state
from .checkpoint import find_checkpoint
from .config import RunConfig, load_config, load_run
from .engine import FitResult, fit
from .report import RunReport

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

Adapt = Callable[[Task, Objective, nn.Module], Objective]
"""What a stage of a pipeline makes of a run's task, objective and model: freezes, another trainable module, another loss."""


@dataclass(frozen=True)
class Prepared:
    """Data, task and model of a run."""

    feed: Feed
    task: Task
    model: nn.Module


def train(
    config_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    resume: str | None = None,
    allow_change: Sequence[str] = (),
    adapt: Adapt | None = None,
    again: str = "",
) -> Path:
    """Trains what a config says and returns the run folder.

    Args:
        config_path: YAML of a run; may be left out when `resume` names a run folder, which has its own.
        overrides: `section.key=value` settings that override the file's.
        output: Run folder. None: `runs/NAME-OF-CONFIG`, numbered when that is taken.
        resume: None starts anew; "auto" resumes in the run folder if it holds a run; a run folder resumes there.
        allow_change: Config keys that may differ from those the resumed run was started with; `data.files` allows other images.
        adapt: Makes the objective of a pipeline's stage.
        again: Command that continues an interrupted run; "" for `effzoo train --resume RUN`.

    Raises:
        UserError: For bad input of any kind; what is on disk stays as it was.
    """
    folder, asked, checkpoint = _plan(config_path, overrides, output, resume, allow_change)
    accelerator = _make_accelerator(asked, folder)
    config = asked.resolve_for_processes(accelerator.num_processes)
    torch.use_deterministic_algorithms(config.train.deterministic)
    seed_everything(config.train.seed)
    run = prepare(config, accelerator.num_processes)
    objective = _objective(run, config, adapt)
    if checkpoint is not None:
        require_recorded_images(folder, run.feed.splits, config.data.root, allow_change)
    if config.hub.push is not None and accelerator.is_main_process:
        hub.require_pushable(config.hub.push)  # now, not after hours
    accelerator.wait_for_everyone()  # every process has looked at the folder before one writes into it
    if accelerator.is_main_process:
        run_folder.write_text(folder / run_folder.CONFIG, strict.dump(asked))
        record_images(folder, run.feed.splits)
    # TensorBoard takes the project's name for a folder, the others for what the run belongs to
    project = "effvit_zoo" if set(config.train.trackers) - {"tensorboard"} else "tensorboard"
    accelerator.init_trackers(project, config=_tracker_config(config))
    verb = "resuming" if checkpoint else "training"
    accelerator.print(f"{verb} {config.model.name} on {config.data.root}: {_size(run, accelerator)} -> {folder}")
    report = _report(run, config, objective, accelerator, folder, again)
    result = fit(run.task, objective, run.model, run.feed, config, accelerator, folder, checkpoint, report)
    for tracker in accelerator.trackers:
        tracker.finish()  # `end_training` would part the processes, which may have another run to do
    if accelerator.is_main_process:
        _conclude(run, config, result, accelerator, folder, report)
    return folder


def _report(
    run: Prepared, config: RunConfig, objective: Objective, accelerator: Accelerator, folder: Path, again: str
) -> RunReport:
    """The run's report; prints its notes."""
    notes = _print_notes(run, config) if accelerator.is_main_process else []
    loss, processes = getattr(objective, "loss_title", ""), accelerator.num_processes
    return RunReport(run.task, run.feed, config, folder, run.model, processes, notes=notes, again=again, loss=loss)


def _objective(run: Prepared, config: RunConfig, adapt: Adapt | None) -> Objective:
    objective: Objective = run.task
    if config.distill.teacher is not None:
        labels = run.task.label_names or ()
        teacher = load_teacher(config.distill, run.feed.data_config, labels, config.train.precision)
        objective = Distillation(run.task, teacher, config.distill)
    return objective if adapt is None else adapt(run.task, objective, run.model)


def _conclude(
    run: Prepared, config: RunConfig, result: FitResult, accelerator: Accelerator, folder: Path, report: RunReport
) -> None:
    """Summary, report and the lines that end a run."""
    state = result.state
    measured = _measured(run, result, accelerator)
    write_summary(folder, report.facts(state) | measured)
    report.write(state, measured=measured)
    name, metric = next(iter(run.task.metrics.items()))
    best = f"{metric.title} {metric.show(state.best['metrics'][name])}"
    bad = f", {len(state.bad_files)} unreadable files skipped" if state.bad_files else ""
    print(f"{best} (epoch {state.best_epoch}) in {state.seconds:.0f} s{bad}")
    saved = folder / run_folder.BEST
    print(f'model: timm.create_model("local-dir:{saved}", pretrained=True) after import effvit_zoo')
    print(f"report: {folder / run_folder.REPORT}")
    if config.hub.push is not None:
        model_folder = folder / (run_folder.BEST if config.hub.push_best else run_folder.LAST)
        print(f"uploaded: {hub.push(model_folder, config.hub.push, card_facts)}")


def _plan(
    config_path: str | Path | None,
    overrides: Sequence[str],
    output: str | Path | None,
    resume: str | None,
    allow_change: Sequence[str],
) -> tuple[Path, RunConfig, Path | None]:
    """The run folder, its config, and the checkpoint to resume from, if any."""
    if resume not in (None, "auto"):
        folder, checkpoint = _resumed(Path(resume))
        if output is not None and Path(output).resolve() != folder.resolve():
            raise UserError(f"--resume {resume} continues in {folder}, but --output says {output}: leave --output out")
        return folder, _resumed_config(folder, config_path, overrides, allow_change), checkpoint
    if config_path is None:
        raise UserError("no config given: expected the path of a YAML file")
    config = load_config(config_path, overrides)
    folder = Path(output) if output is not None else Path("runs") / Path(config_path).stem
    if resume == "auto" and (folder / run_folder.CONFIG).is_file():
        return folder, _resumed_config(folder, config_path, overrides, allow_change), find_checkpoint(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file, expected a folder or nothing")
    if run_folder.is_taken(folder):
        if output is not None:
            raise UserError(f"{folder} already holds a run: resume it with --resume auto, or name another --output")
        numbered = (folder.with_name(f"{folder.name}-{number}") for number in range(2, 10**6))
        folder = next(path for path in numbered if not run_folder.is_taken(path))
    return folder, config, None


def _resumed(path: Path) -> tuple[Path, Path | None]:
    """Run folder and checkpoint for a path to either."""
    if (path / run_folder.CONFIG).is_file():
        return path, find_checkpoint(path)
    if (path / run_folder.STATE).is_file() and (path.parent.parent / run_folder.CONFIG).is_file():
        return path.parent.parent, path
    reason = f"it has no {run_folder.CONFIG}" if path.is_dir() else "there is no such folder"
    raise UserError(f"--resume {path} is not a run folder: {reason}")


def _resumed_config(
    folder: Path, config_path: str | Path | None, overrides: Sequence[str], allow_change: Sequence[str]
) -> RunConfig:
    """The config to resume with; anything that would make it another run has to be allowed by name."""
    before = load_run(folder)
    config = load_run(folder, overrides) if config_path is None else load_config(config_path, overrides)
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
            cpu=on_cpu(),
            mixed_precision=config.train.precision,
            log_with=list(config.train.trackers) or None,
            project_dir=str(folder),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate refuses these settings: {error}") from None


def prepare(config: RunConfig, num_processes: int) -> Prepared:
    """Data, task and model of a run. Raises `UserError`."""
    in_chans = config.model.kwargs.get("in_chans", 3)
    if in_chans not in MODES:
        raise UserError(f"model.kwargs.in_chans is {in_chans}, expected 3 (RGB) or 1 (grey)")
    kind, data, train, augment = TASKS[config.task.kind], config.data, config.train, config.augment
    splits = kind.open_splits(data, MODES[in_chans])
    task = kind.for_training(config.task, augment, splits)
    model = build_model(config, task)
    data_config = _data_config(config, model, in_chans)
    for shape in (data_config["input_size"], *((in_chans, side, side) for side in augment.sizes)):
        try_size(model, shape, config.model.name)
    feed = make_feed(
        splits,
        task.transforms(data_config),
        data_config,
        batch_size=train.batch_size,
        num_processes=num_processes,
        grad_accum=train.grad_accum,
        seed=train.seed,
        repeats=augment.repeats,
        sizes=augment.sizes,
        num_workers=data.num_workers,
    )
    return Prepared(feed, task, model)


def _data_config(config: RunConfig, model: Any, in_chans: int) -> dict[str, Any]:
    """timm's preprocessing settings for the model, with the run's size and crop."""
    data = config.data
    data_config: dict[str, Any] = resolve_data_config({"crop_pct": data.crop_pct} if data.crop_pct else {}, model=model)
    size = data.img_size or tuple(data_config["input_size"][1:])
    data_config["input_size"] = (in_chans, *(size if isinstance(size, tuple) else (size, size)))
    for key in ("mean", "std"):
        if len(data_config[key]) != in_chans:  # colour statistics for a network that sees grey
            data_config[key] = (sum(data_config[key]) / len(data_config[key]),) * in_chans
    return data_config


def build_model(config: RunConfig, task: Task | None) -> nn.Module:
    """The config's model with outputs for a task (None: its own), made for `data.img_size`. Raises `UserError`."""
    name, size = config.model.name, config.data.img_size
    pretrained = config.model.pretrained or hub.brings_weights(name)
    model: Any
    if task is None:
        model = hub.load(name, pretrained=pretrained, **config.model.kwargs)
    else:
        model = task.build(name, pretrained, config.model.kwargs)
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


def try_size(model: nn.Module, size: Sequence[int], name: str) -> None:
    """Runs the model on one black image, so that a size that it can't take is a `UserError` at the start."""
    was_training = model.training
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *size, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = " x ".join(map(str, size[1:]))
        raise UserError(f"{name} can't take images of {shape} pixels: {one_line(error)}") from error
    finally:
        model.train(was_training)


def _print_notes(run: Prepared, config: RunConfig) -> list[str]:
    """Prints what the user should know before the first step, and returns it."""
    notes = start_notes(config) + data_notes(run.feed.splits, run.task, config.data)
    for note in notes:
        print(note)
    return notes


def start_notes(config: RunConfig) -> list[str]:
    """Settings that don't suit random initial weights."""
    meant_for_trained = {
        "optim.layer_decay": config.optim.layer_decay not in (None, 1.0),
        "train.freeze_epochs": config.train.freeze_epochs > 0,
    }
    used = [key for key, is_used in meant_for_trained.items() if is_used]
    if not used or config.model.pretrained or hub.brings_weights(config.model.name):
        return []
    name, settings = config.model.name, " and ".join(used)
    return [f"{name} starts from random weights, and {settings} slow its layers down: model.pretrained=true?"]


def dry_run(config_path: str | Path, overrides: Sequence[str] = (), num_processes: int | None = None) -> dict[str, Any]:
    """What `train` would do with a config, without training: name -> value, in the order to read it in.

    Data that isn't there is no error, so that a recipe can be inspected anywhere; the model then has its own outputs.

    Args:
        config_path: YAML of a run.
        overrides: As for `train`.
        num_processes: Number of processes to plan for. None: those of this run.

    Raises:
        UserError: For bad input of any other kind.
    """
    processes = num_processes or process_state().num_processes
    asked = load_config(config_path, overrides)
    config = asked.resolve_for_processes(processes)
    train, optim = config.train, config.optim
    run: Prepared | None = None
    try:
        run = prepare(config, processes)
        data = f"{config.data.root}: {_scope(run)}{_counts(run.feed)}"
    except UserError as error:
        if _data_is_there(config):
            raise
        data = f"{config.data.root}: not there ({error}), so the number of steps is not known"
    model = run.model if run else build_model(config, None)
    steps = run.feed.steps_per_epoch if run else None
    return {
        "model": config.model.name,
        "params": cost.count_params(model),
        "input_size": list(run.feed.data_config["input_size"]) if run else config.data.img_size,
        "data": data,
        "notes": data_notes(run.feed.splits, run.task, config.data) if run else [],
        "images_per_step": train.batch_size * processes * train.grad_accum,
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
        TASKS[config.task.kind].open_splits(config.data, "RGB")
    except UserError:
        return os.path.exists(os.path.expanduser(config.data.root))  # it is, and something is wrong with it
    return True


def print_dry_run(facts: dict[str, Any]) -> None:
    """Facts of `dry_run`, a line each."""
    for note in facts["notes"]:
        print(note)
    for name, value in facts.items():
        if value is not None and name != "notes":
            shown = f"{value:,}" if name == "params" else f"{value:g}" if isinstance(value, float) else value
            print(f"{name.replace('_', ' '):16} {shown}")


def _tracker_config(config: RunConfig) -> dict[str, Any]:
    flat = strict.flatten(strict.as_dict(config))
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in flat.items()}


def _size(run: Prepared, accelerator: Accelerator) -> str:
    where = f"{accelerator.num_processes} x {accelerator.device.type}"
    return f"{_scope(run)}{_counts(run.feed)}, {run.feed.steps_per_epoch} steps per epoch on {where}"


def _scope(run: Prepared) -> str:
    return f"{run.task.scope}, " if run.task.scope else ""


def _counts(feed: Feed) -> str:
    counts = feed.describe()
    return f"{counts['train_images']} training and {counts['val_images'] or '?'} validation images"


def _measured(run: Prepared, result: FitResult, accelerator: Accelerator) -> dict[str, Any]:
    """What summary.json says of a finished run's model and of the machine."""
    on_gpu = accelerator.device.type == "cuda"
    return {
        "images_per_second": result.images_per_second,
        "params": cost.count_params(result.model),
        "macs": cost.count_macs(result.model, run.feed.data_config["input_size"]),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(accelerator.device) if on_gpu else accelerator.device.type,
        "threads": torch.get_num_threads(),
    }
