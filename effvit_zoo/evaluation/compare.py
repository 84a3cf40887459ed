"""Validation of models, sizes and opened files on data sets, as rows of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from accelerate import Accelerator
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
from ..tasks import Task, task_of
from .loop import evaluate


@dataclass(frozen=True)
class Candidate:
    """A model to be validated.

    Attributes:
        name: Name in the results.
        build: Makes the model, anew for every input size: position tables that were resized once are not what they were.
        record: What the model folder recorded of its training (`EXTRA_KEY` of its config.json).
    """

    name: str
    build: Callable[[], Any]
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What validation is told beyond models and data.

    Attributes:
        split: Name of a split, "all", or "auto": what the model was validated on in training, if it was trained on this data.
        crop_pct: Share of the resized image that is evaluated; None for the model's.
        batch_size: Images per forward pass.
        num_workers: Loader processes; None for one per core, at most 8.
    """

    split: str = "auto"
    crop_pct: float | None = None
    batch_size: int = 128
    num_workers: int | None = None


def validate(
    candidates: Iterable[Candidate],
    data: str,
    options: Options | None = None,
    img_sizes: Sequence[int | None] = (None,),
    on_failure: Callable[[str, UserError], None] | None = None,
) -> list[dict[str, Any]]:
    """A row of results per model and input size, in order.

    Args:
        candidates: Models.
        data: Root of the data, as `data.root` in a config.
        options: Split, crop and batches.
        img_sizes: Side lengths in pixels; None for the model's own size.
        on_failure: Called with the name and error of a model that can't be measured, which is then skipped; None raises it.

    Returns:
        Rows: model, data, split, fingerprint, input_size, crop_pct, images, bad_files, the task's metrics, loss,
        images_per_second, params and macs (None for files), tables (title, head, rows), and the environment.

    Raises:
        UserError: As described in one line.
    """
    rows = []
    for candidate in candidates:
        try:
            for size in img_sizes:
                rows.append(validate_one(candidate, data, options or Options(), size))
        except UserError as error:
            if on_failure is None:
                raise
            on_failure(candidate.name, error)
    return rows


def validate_one(candidate: Candidate, data: str, options: Options, img_size: int | None = None) -> dict[str, Any]:
    """The row of one model at one input size. Raises `UserError`."""
    model = candidate.build()
    task = task_of(model)
    channels = model.pretrained_cfg["input_size"][0]
    if channels not in MODES:
        raise UserError(f"{candidate.name} takes {channels} channels, images have 3 (RGB) or 1 (grey)")
    config = DataConfig(root=data)
    measured = task.open_measured(config, options.split, record_of(candidate.record), MODES[channels])
    for line in measured.source.notes:
        tqdm.write(line)
    data_config = _resized(candidate, model, options, img_size)
    bad: dict[str, str] = {}
    try:
        result = _measure(model, task, measured, data_config, options, bad)
    except (RuntimeError, ValueError, AssertionError) as error:
        if img_size is None or isinstance(error, UserError):
            raise
        raise UserError(f"{candidate.name} can't take images of {img_size} pixels: {one_line(error)}") from error
    counted = any(True for _ in model.parameters())
    return {
        "model": candidate.name,
        "data": data,
        "split": measured.split,
        "fingerprint": measured.fingerprint,
        "input_size": list(data_config["input_size"]),
        "crop_pct": data_config["crop_pct"],
        "images": result.images,
        "bad_files": len(bad),
        **result.metrics,
        "images_per_second": result.images_per_second,
        "params": cost.count_params(model) if counted else None,
        "macs": cost.count_macs(model, data_config["input_size"]) if counted else None,
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
    bad: dict[str, str],
) -> Any:
    source = task.align(measured.source)
    transforms = task.transforms(data_config)
    accelerator = Accelerator(cpu=next(model.parameters(), None) is None)
    loader = validation_batches(source, transforms.val, options.batch_size, worker_count(options.num_workers, 1))
    total = None if isinstance(source, StreamSource) else -(-len(source) // options.batch_size)

    def note(entries: Sequence[tuple[str, str]]) -> None:
        for name, reason in entries:
            bad[name] = reason
            tqdm.write(f"skipped {name}: {reason}")

    batches = tqdm(loader, total=total, unit="batch", leave=False)
    return evaluate(model.to(accelerator.device), batches, task.evaluator(accelerator.device), accelerator, note)
