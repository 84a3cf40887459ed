"""Validation of models, sizes and opened files on data sets, as rows of results. All rows are of the same images."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn
from tqdm import tqdm

from ..data import (
    MODES,
    DataConfig,
    Measured,
    StreamSource,
    record_of,
    validation_batches,
    worker_count,
)
from ..errors import UserError, one_line
from ..measure import cost
from ..measure.host import environment
from ..tasks import TASKS, Task, recorded_kind, task_of
from .device import pick_device
from .loop import Alone, evaluate


@dataclass(frozen=True)
class Candidate:
    """A model to be validated.

    Attributes:
        name: Name in the results.
        build: Makes the model, anew for every input size: position tables that were resized once are not what they were.
        record: What the model folder recorded of its training (`EXTRA_KEY` of its config.json).
        weights: Where the weights come from, for the results: "trained" or "random".
    """

    name: str
    build: Callable[[], Any]
    record: Mapping[str, Any] = field(default_factory=dict)
    weights: str = "trained"


@dataclass(frozen=True)
class Options:
    """What validation is told beyond models and data.

    Attributes:
        split: Name of a split, "all", or "auto": what the models were validated on in training, if one was trained on this data.
        crop_pct: Share of the resized image that is evaluated; None for the model's.
        batch_size: Images per forward pass.
        num_workers: Loader processes; None for one per core, at most 8.
        device: Where to compute; None for a GPU where there is one. Exported files compute on the CPU.
        by_position: Class number n of the data is number n of the model, whatever their names.
    """

    split: str = "auto"
    crop_pct: float | None = None
    batch_size: int = 128
    num_workers: int | None = None
    device: str | None = None
    by_position: bool = False


def validate(
    candidates: Iterable[Candidate],
    data: str,
    options: Options | None = None,
    img_sizes: Sequence[int | None] = (None,),
    on_failure: Callable[[str, UserError], None] | None = None,
) -> list[dict[str, Any]]:
    """A row of results per model and input size, in order, all of the same images.

    Where training held images of this data out, or had a validation split, all models are measured on these.

    Args:
        candidates: Models.
        data: Root of the data, as `data.root` in a config.
        options: Split, crop and batches.
        img_sizes: Side lengths in pixels; None for the model's own size.
        on_failure: Called with the name and error of a model that can't be measured, which is then skipped; None raises it.

    Returns:
        Rows: model, data, split, fingerprint, input_size, crop_pct, images, bad_files, the task's metrics, loss,
        images_per_second, params and macs (None for files), weights, device, tables (title, head, rows), and the environment.

    Raises:
        UserError: As described in one line; also where the models can't be measured on the same images, e.g. because two held
            different ones out.
    """
    options, config = options or Options(), DataConfig(root=data)
    opened: list[tuple[Candidate, Measured]] = []
    for candidate in candidates:
        with _reported(candidate.name, on_failure):
            opened.append((candidate, _open(candidate, config, options.split, record_of(candidate.record))))
    deciding = _deciding(opened)
    for note in dict.fromkeys(note for _, measured in opened for note in measured.source.notes):
        tqdm.write(note)
    rows: list[dict[str, Any]] = []
    for candidate, _ in opened:
        with _reported(candidate.name, on_failure):
            for size in img_sizes:
                record = record_of((deciding or candidate).record)
                rows.append(_row(candidate, config, options, record, size))
    _require_same_images(rows)
    return rows


@contextmanager
def _reported(name: str, on_failure: Callable[[str, UserError], None] | None) -> Iterator[None]:
    """Gives a `UserError` of the block to `on_failure`, where there is one."""
    try:
        yield
    except UserError as error:
        if on_failure is None:
            raise
        on_failure(name, error)


def _open(
    candidate: Candidate, config: DataConfig, split: str, record: Mapping[str, Any] | None, channels: int = 3
) -> Measured:
    return TASKS[recorded_kind(candidate.record)].open_measured(config, split, record, MODES[channels])


def _deciding(opened: Sequence[tuple[Candidate, Measured]]) -> Candidate | None:
    """The model whose training decides what all are measured on; None where each finds the same. Raises `UserError`."""
    found: dict[Any, tuple[Candidate, Measured]] = {}
    for candidate, measured in opened:
        key = measured.fingerprint or measured.split
        if key not in found or measured.is_recorded:
            found[key] = candidate, measured
    if len(found) < 2:
        return None
    recorded = [pair for pair in found.values() if pair[1].is_recorded]
    if len(recorded) == 1:
        return recorded[0][0]
    (one, first), (other, second) = (recorded or [*found.values()])[:2]
    raise UserError(
        f"the models can't be measured on the same images: for {one.name} they are the {_described(first)}, for {other.name} the "
        f"{_described(second)}; choose for all by --split, e.g. --split all, or measure the models one by one"
    )


def _described(measured: Measured) -> str:
    count = "" if measured.images is None else f" {measured.images} images of"
    return f"{count} {measured.split!r}".strip() + f" ({measured.fingerprint[:8]})" * bool(measured.fingerprint)


def _require_same_images(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises `UserError` where a model was measured on fewer images than another one."""
    counts = {(row["fingerprint"], row["images"]): row for row in rows}
    if len(counts) > 1:
        said = (f"{row['images']} ({row['bad_files']} unreadable) by {row['model']}" for row in counts.values())
        raise UserError(f"the models were not measured on the same images: {', '.join(said)}; did the data change?")


def _row(
    candidate: Candidate, config: DataConfig, options: Options, record: Mapping[str, Any] | None, img_size: int | None
) -> dict[str, Any]:
    """The row of one model at one input size. Raises `UserError`."""
    model = candidate.build()
    task = task_of(model)
    channels = model.pretrained_cfg["input_size"][0]
    if channels not in MODES:
        raise UserError(f"{candidate.name} takes {channels} channels, images have 3 (RGB) or 1 (grey)")
    measured = _open(candidate, config, options.split, record, channels)
    data_config = _resized(candidate, model, options, img_size)
    counted = any(True for _ in model.parameters())
    device = pick_device(options.device if counted else "cpu")
    bad: dict[str, str] = {}
    try:
        result = _measure(model, task, measured, data_config, options, device, bad)
    except (RuntimeError, ValueError, AssertionError) as error:
        if img_size is None or isinstance(error, UserError):
            raise
        raise UserError(f"{candidate.name} can't take images of {img_size} pixels: {one_line(error)}") from error
    if not math.isfinite(result.metrics["loss"]):
        raise UserError(f"{candidate.name} gives outputs that are not numbers: its weights are damaged")
    return {
        "model": candidate.name,
        "data": config.root,
        "split": measured.split,
        "fingerprint": measured.fingerprint,
        "input_size": list(data_config["input_size"]),
        "crop_pct": data_config["crop_pct"],
        "images": result.images,
        "bad_files": len(bad),
        **{name: result.metrics[name] for name in (*task.metrics, "loss")},
        **task.intervals(result.metrics, result.images),
        "images_per_second": result.images_per_second,
        "params": cost.count_params(model) if counted else None,
        "macs": cost.count_macs(model.cpu(), data_config["input_size"]) if counted else None,
        "weights": candidate.weights,
        "device": str(device),
        "tables": [
            {"title": section.title, **asdict(section.table)}
            for section in task.sections(result.details, lambda index: None, None)
            if section.table is not None
        ],
    } | environment()


def _resized(candidate: Candidate, model: Any, options: Options, img_size: int | None) -> dict[str, Any]:
    """The preprocessing settings; the model takes images of the wanted size afterwards."""
    overrides = {"crop_pct": options.crop_pct} if options.crop_pct else {}
    data_config: dict[str, Any] = resolve_data_config(overrides, model=model)
    if img_size is None:
        return data_config
    if hasattr(model, "set_input_size"):
        try:
            model.set_input_size(img_size=img_size)
        except (ValueError, AssertionError) as error:
            raise UserError(f"{candidate.name} can't take images of {img_size} pixels: {error}") from None
    data_config["input_size"] = (data_config["input_size"][0], img_size, img_size)
    return data_config


def _measure(
    model: nn.Module,
    task: Task,
    measured: Measured,
    data_config: Mapping[str, Any],
    options: Options,
    device: torch.device,
    bad: dict[str, str],
) -> Any:
    source, remark = task.align(measured.source, options.by_position)
    if remark:
        tqdm.write(remark, file=sys.stderr)
    transforms = task.transforms(data_config)
    loader = validation_batches(source, transforms.val, options.batch_size, worker_count(options.num_workers, 1))
    total = None if isinstance(source, StreamSource) else -(-len(source) // options.batch_size)

    def note(entries: Sequence[tuple[str, str]]) -> None:
        for name, reason in entries:
            bad[name] = reason
            tqdm.write(f"skipped {name}: {reason}")

    batches = tqdm(loader, total=total, unit="batch", leave=False)
    return evaluate(model.to(device), batches, task.evaluator(device), Alone(device), note)
