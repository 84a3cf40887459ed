"""`validate.py` and `effzoo validate`: top-1, top-5, per-class table and speed of any models, exported files too, on any data set."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from timm.data import resolve_data_config
from tqdm import tqdm

from .. import hub
from ..data.feed import validation_transform
from ..data.images import MODES
from ..data.loader import Batch, BatchPlan, KeyedImages, make_loader, worker_count
from ..data.splits import Source, StreamSource, open_source, open_splits
from ..data.streams.batches import stream_val_batches
from ..errors import UserError
from ..export.deployed import EXPORTED, ExportedModel, load_exported
from ..hub import class_order as class_order
from ..measure import cost
from ..report.run_page import environment, write_atomically
from ..run_folder import EXTRA_KEY
from .loop import Evaluation, evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        nargs="+",
        help="effzoo_* or timm name, model or run folder, local-dir:FOLDER, hf-hub:USER/NAME, or a file .onnx, .xml or .pte; several "
        "are measured in turn",
    )
    parser.add_argument("--like", metavar="MODEL", help="where an exported file's preprocessing and labels come from")
    parser.add_argument("--pretrained", action="store_true", help="with a model name: its public weights")
    parser.add_argument(
        "--data", default="builtin:fashion-mnist-mini", help="as data.root in a config (default: %(default)s)"
    )
    parser.add_argument(
        "--split",
        default="auto",
        help="split of the data (default: what the model was validated on, if it was trained on this data; else val or test)",
    )
    parser.add_argument("--img-size", type=int, nargs="+", help="one or more sizes in pixels (default: the model's)")
    parser.add_argument(
        "--crop-pct", type=float, help="share of the resized image that is looked at (default: the model's)"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, help="loader processes (default: one per core, at most 8)")
    parser.add_argument("--results-file", type=Path, help="write results to FILE.json or FILE.csv")


def run(args: argparse.Namespace) -> None:
    """Validates, prints and writes; `args` as `add_arguments` defines them. Raises `UserError`."""
    if args.results_file and args.results_file.suffix not in (".json", ".csv"):
        raise UserError(f"--results-file {args.results_file}: expected a name that ends in .json or .csv")
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    if min(args.img_size or [1]) < 1:
        raise UserError(f"--img-size must be at least 1, got {' '.join(map(str, args.img_size))}")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise UserError(f"--crop-pct must lie in (0, 1], got {args.crop_pct}")
    names = [args.model] if isinstance(args.model, str) else list(args.model)
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for name in names:
        try:
            for size in args.img_size or [None]:
                results.append(_validate_named(name, args, size))
        except UserError as error:
            if len(names) == 1:
                raise
            failed.append(name)
            print(f"skipped {name}: {error}", file=sys.stderr)
    if not results:
        raise UserError(f"none of the {len(names)} models could be measured")
    for result in results:
        _print(result)
    if args.results_file:
        args.results_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            args.results_file, _as_json(results) if args.results_file.suffix == ".json" else _as_csv(results)
        )
    if failed:
        raise UserError(f"{len(failed)} of {len(names)} models could not be measured: {', '.join(failed)}")


def _validate_named(name: str, args: argparse.Namespace, size: int | None) -> dict[str, Any]:
    """One model, built anew for each size: position tables that were resized once are not what they were."""
    model: Any
    trained: dict[str, Any] = {}
    if Path(name).suffix in EXPORTED:
        model = load_exported(name, args.like, torch.get_num_threads())
    else:
        brought = hub.brings_weights(name)
        model = hub.load(name, pretrained=args.pretrained or brought)
        trained = hub.read_config(name).get(EXTRA_KEY, {}) if brought else {}
    labels = hub.label_names(model)
    channels = model.pretrained_cfg["input_size"][0]
    if channels not in MODES:
        raise UserError(f"{name} takes {channels} channels, pictures have 3 (RGB) or 1 (grey)")
    if not model.num_classes:
        raise UserError(f"{name} has no classifier to measure (num_classes is 0)")
    mode = MODES[channels]
    source: Source
    if args.split == "auto" and trained.get("data") == args.data:
        # what training held out of an undivided folder is found again by its seed and share
        held_out = {key: trained[key] for key in ("seed", "val_fraction") if key in trained}
        source = open_splits(args.data, img_mode=mode, **held_out).val
    else:
        source = open_source(args.data, args.split, img_mode=mode)
    return validate(model, source, labels, args, size, name)


def validate(
    model: Any,
    source: Source,
    labels: tuple[str, ...] | None,
    args: argparse.Namespace,
    size: int | None,
    name: str | None = None,
) -> dict[str, Any]:
    """One model on one source at one input size, as a row of results."""
    order = class_order(source.class_names, labels, model.num_classes)
    data_config = resolve_data_config({"crop_pct": args.crop_pct} if args.crop_pct else {}, model=model)
    exported = isinstance(model, ExportedModel)
    if size is not None:
        if exported and model.shape[2:] not in ([None, None], [size, size]):
            raise UserError(
                f"{name} was exported for {model.shape[2]} x {model.shape[3]} pixels, got --img-size {size}"
            )
        if hasattr(model, "set_input_size"):
            try:
                model.set_input_size(img_size=size)
            except (ValueError, AssertionError) as error:
                raise UserError(f"{name} can't take images of {size} pixels: {error}") from None
        data_config["input_size"] = (data_config["input_size"][0], size, size)
    accelerator = Accelerator(cpu=exported)
    model = model.to(accelerator.device)
    transform, workers = validation_transform(data_config), worker_count(args.workers, 1)
    if isinstance(source, StreamSource):
        loader, total = stream_val_batches(source, transform, args.batch_size, workers), None
    else:
        plan = BatchPlan(len(source), args.batch_size)
        total = plan.steps_per_epoch
        images = KeyedImages(source, transform, seed=None, replace_bad=False)
        loader = make_loader(images, plan.batches(0, 0, total), workers)
    bad: dict[str, str] = {}

    def note(entries: list[tuple[str, str]]) -> None:
        for name, reason in entries:
            bad[name] = reason
            tqdm.write(f"skipped {name}: {reason}")

    batches = tqdm(relabelled(loader, order), total=total, unit="batch", leave=False)
    try:
        result = evaluate(model, batches, model.num_classes, accelerator, note)
    except (RuntimeError, AssertionError) as error:
        if size is None:
            raise
        raise UserError(f"{name} can't take images of {size} pixels: {' '.join(str(error).split())[:200]}") from error
    names = labels or source.class_names
    return {
        "model": name or args.model,
        "data": args.data,
        "split": args.split,
        "input_size": list(data_config["input_size"]),
        "crop_pct": data_config["crop_pct"],
        "images": result.images,
        "bad_files": len(bad),
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "images_per_second": result.images_per_second,
        "params": None if exported else cost.count_params(model),
        "macs": None if exported else cost.count_macs(model, data_config["input_size"]),
        "per_class": _named(result, names),
    } | environment()


def relabelled(batches: Iterable[Batch], order: list[int]) -> Iterator[Batch]:
    """Batches whose class indices are the model's instead of the data's."""
    table = torch.tensor(order)
    for batch in batches:
        yield batch if batch["target"] is None else batch | {"target": table[batch["target"]]}


def _named(result: Evaluation, names: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = result.per_class()
    confused = result.confusion - np.diag(np.diag(result.confusion))
    return [
        {"class": names[index] if index < len(names) else str(index)}
        | row
        | {
            "taken_for": names[int(confused[index].argmax())]
            if confused[index].any() and int(confused[index].argmax()) < len(names)
            else None
        }
        for index, row in enumerate(rows)
        if row["images"]
    ]


def _print(result: dict[str, Any]) -> None:
    table = Table(
        title=f"{result['model']} on {result['data']} ({result['split']}), {'x'.join(map(str, result['input_size'][1:]))} pixels"
    )
    for column, justify in (
        ("class", "left"),
        ("images", "right"),
        ("recall %", "right"),
        ("precision %", "right"),
        ("F1 %", "right"),
        ("most taken for", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in result["per_class"]:
        percent = ["-" if row[key] is None else f"{row[key]:.1f}" for key in ("recall", "precision", "f1")]
        table.add_row(row["class"], str(row["images"]), *percent, row["taken_for"] or "")
    console = Console()
    console.print(table)
    skipped = f", {result['bad_files']} unreadable files skipped" if result["bad_files"] else ""
    console.print(
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f} on {result['images']} images, "
        f"{result['images_per_second']:.0f} images/s{skipped}",
        highlight=False,
        soft_wrap=True,
    )


def _as_json(results: list[dict[str, Any]]) -> str:
    return json.dumps(results[0] if len(results) == 1 else results, indent=2, ensure_ascii=False) + "\n"


def _as_csv(results: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    plain = [
        {key: value for key, value in result.items() if not isinstance(value, list | dict) or key == "input_size"}
        for result in results
    ]
    writer = csv.DictWriter(text, list(plain[0]))
    writer.writeheader()
    writer.writerows(row | {"input_size": "x".join(map(str, row["input_size"]))} for row in plain)
    return text.getvalue()
