"""A whole training run: model, data, task and engine assembled from a config, into a run folder."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

from .. import config as strict
from .. import hub, run_folder
from ..data import Feed, seed_everything
from ..errors import UserError
from ..measure import cost
from ..report.run_page import write_summary
from ..tasks import TASKS, Distillation, Objective, Task, card_facts
from ..tasks.distillation import load_teacher
from ._data_checks import data_notes, record_images, require_recorded_images
from ._processes import launched_compile, launched_precision, on_cpu, process_state, require_same_launch
from .checkpoint import find_checkpoint
from .config import RunConfig, load_config, load_run
from .engine import FitResult, Loop
from .prepare import Prepared, build_model, prepare
from .report import RunReport, probe_result

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

FEW_IMAGES = 2_000
"""Training images below which a run from random weights is warned of."""

Adapt = Callable[[Task, Objective, nn.Module], Objective]
"""What a stage of a pipeline makes of a run's task, objective and model: freezes, another trainable module, another loss."""


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
    loop = Loop(run.task, objective, run.model, run.feed, config, accelerator, folder, checkpoint)
    accelerator.wait_for_everyone()  # every process has looked at the folder before one writes into it
    with run_folder.claimed(folder) if accelerator.is_main_process else nullcontext():
        _train(loop, run, asked, again)
    return folder


def _train(loop: Loop, run: Prepared, asked: RunConfig, again: str) -> None:
    """Records the config, trains, and concludes."""
    folder, config, accelerator = loop.folder, loop.config, loop.accelerator
    if accelerator.is_main_process:
        run_folder.write_text(folder / run_folder.CONFIG, strict.dump(asked))
        record_images(folder, run.feed.splits)
    # TensorBoard takes the project's name for a folder, the others for what the run belongs to
    project = "effvit_zoo" if set(config.train.trackers) - {"tensorboard"} else "tensorboard"
    accelerator.init_trackers(project, config=_tracker_config(config))
    verb = "resuming" if loop.state.history or loop.state.step else "training"
    accelerator.print(f"{verb} {config.model.name} on {config.data.root}: {_size(run, accelerator)} -> {folder}")
    report = _report(loop, run, asked, again)
    result = loop.run(report)
    for tracker in accelerator.trackers:
        tracker.finish()  # `end_training` would part the processes, which may have another run to do
    if accelerator.is_main_process:
        _conclude(run, config, result, accelerator, folder, report)


def _report(loop: Loop, run: Prepared, asked: RunConfig, again: str) -> RunReport:
    """The run's report; prints its notes."""
    config, processes = loop.config, loop.accelerator.num_processes
    notes = _print_notes(run, asked, loop) if loop.accelerator.is_main_process else []
    loss = getattr(loop.objective, "loss_title", "")
    return RunReport(run.task, run.feed, config, loop.folder, run.model, processes, notes=notes, again=again, loss=loss)


def _objective(run: Prepared, config: RunConfig, adapt: Adapt | None) -> Objective:
    objective: Objective = run.task
    if config.distill.teacher is not None:
        labels = run.task.label_names or ()
        teacher = load_teacher(config.distill, run.feed.data_config, labels, config.train.precision or "no")
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
    where = f"epoch {state.best_epoch}" if state.best_epoch else "linear probe"
    print(f"{best} ({where}) in {state.seconds:.0f} s{bad}")
    for title, text in probe_result(run.task, state):
        print(f"{title}: {text}")
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
        return folder, _resumed_config(folder, checkpoint, config_path, overrides, allow_change), checkpoint
    if config_path is None:
        raise UserError("no config given: expected the path of a YAML file")
    config = load_config(config_path, overrides)
    folder = Path(output) if output is not None else Path("runs") / Path(config_path).stem
    if resume == "auto" and (folder / run_folder.CONFIG).is_file():
        checkpoint = find_checkpoint(folder)
        return folder, _resumed_config(folder, checkpoint, config_path, overrides, allow_change), checkpoint
    run_folder.require_writable(folder)
    if output is None:
        numbered = (folder.with_name(f"{folder.name}-{number}") for number in range(2, 10**6))
        folder = next(path for path in (folder, *numbered) if not _is_used(path))
    elif run_folder.is_taken(folder):
        raise UserError(f"{folder} already holds a run: resume it with --resume auto, or name another --output")
    return folder, config, None


def _is_used(folder: Path) -> bool:
    """Whether a folder holds a run, or one that may have just started."""
    return (folder / run_folder.CONFIG).is_file() or run_folder.is_taken(folder)


def _resumed(path: Path) -> tuple[Path, Path | None]:
    """Run folder and checkpoint for a path to either."""
    if (path / run_folder.CONFIG).is_file():
        return path, find_checkpoint(path)
    if (path / run_folder.STATE).is_file() and (path.parent.parent / run_folder.CONFIG).is_file():
        return path.parent.parent, path
    reason = f"it has no {run_folder.CONFIG}" if path.is_dir() else "there is no such folder"
    raise UserError(f"--resume {path} is not a run folder: {reason}")


def _resumed_config(
    folder: Path,
    checkpoint: Path | None,
    config_path: str | Path | None,
    overrides: Sequence[str],
    allow_change: Sequence[str],
) -> RunConfig:
    """The config to resume with; anything that would make it another run has to be allowed by name, if there is a checkpoint."""
    before = load_run(folder)
    config = load_run(folder, overrides) if config_path is None else load_config(config_path, overrides)
    refused = [key for key in strict.changed_keys(before, config) if key not in (*HARMLESS_CHANGES, *allow_change)]
    if refused and checkpoint is not None:
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
    require_same_launch(config.train.grad_accum)
    AcceleratorState._reset_state()  # a process may train one run after another, in other precisions
    try:
        return Accelerator(
            cpu=on_cpu(),
            mixed_precision=config.train.precision,
            dynamo_backend="no",  # `train.compile` compiles
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the engine accumulates
            log_with=list(config.train.trackers) or None,
            project_dir=str(folder),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate refuses these settings: {error}") from None


def config_notes(asked: RunConfig, config: RunConfig) -> list[str]:
    """Settings that give way to others.

    Args:
        asked: As the file, the command and the launcher say.
        config: As it was resolved for the run.
    """
    notes, train = [], config.train
    launched = launched_precision()
    if launched not in (None, train.precision):
        notes.append(
            f"train.precision is {train.precision}, accelerate launch was told {launched}: {train.precision} is used"
        )
    if launched_compile():
        notes.append("accelerate launch was told to compile: train.compile is true")
    if asked.optim.warmup_epochs != config.optim.warmup_epochs:
        notes.append(
            f"optim.warmup_epochs is {asked.optim.warmup_epochs:g} and train.epochs {train.epochs}: "
            f"the warm-up is shortened to {config.optim.warmup_epochs:g} epochs"
        )
    for name in ("min_lr", "warmup_lr") if config.optim.warmup_epochs else ("min_lr",):
        if getattr(asked.optim, name) > config.optim.lr:
            notes.append(f"optim.{name} is {getattr(asked.optim, name):g}, above the peak: {config.optim.lr:g} is used")
    if train.freeze_epochs >= train.epochs:
        notes.append(
            f"train.freeze_epochs is {train.freeze_epochs} and train.epochs {train.epochs}: only the classifier is trained"
        )
    return notes


def _print_notes(run: Prepared, asked: RunConfig, loop: Loop) -> list[str]:
    """Prints what the user should know before the first step, and returns it."""
    config, compared = loop.config, getattr(loop.objective, "compared", "")
    notes = [note for note in (run.task.start_note, loop.probe.note, compared) if note]
    notes += (
        config_notes(asked, config)
        + start_notes(config, run.feed.describe()["train_images"])
        + data_notes(run.feed.splits, run.task, config.data)
    )
    for note in notes:
        print(note)
    return notes


def start_notes(config: RunConfig, images: int | None) -> list[str]:
    """What doesn't suit random initial weights: settings, and few training images (None: their number isn't known)."""
    if config.starts_trained:
        return []
    name, notes = config.model.name, []
    if images is not None and images < FEW_IMAGES:
        notes.append(
            f"warning: {name} starts from random weights, for which {images:,} training images are few (under {FEW_IMAGES:,}): "
            "model.pretrained=true, or a trained model as model.name, learns far more from them"
        )
    meant_for_trained = {
        "optim.layer_decay": config.optim.layer_decay not in (None, 1.0),
        "train.freeze_epochs": config.train.freeze_epochs > 0,
    }
    used = [key for key, is_used in meant_for_trained.items() if is_used]
    if used:
        settings = " and ".join(used)
        notes.append(f"{name} starts from random weights, and {settings} slow its layers down: model.pretrained=true?")
    return notes


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
        "outputs": (run and run.task.start_note) or None,
        "input_size": list(run.feed.data_config["input_size"]) if run else config.data.img_size,
        "data": data,
        "notes": config_notes(asked, config) + (data_notes(run.feed.splits, run.task, config.data) if run else []),
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
        "precision": train.precision,
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
