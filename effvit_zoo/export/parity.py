"""Proof that an exported file computes what its model does: on photos, in a fresh process, at several batch sizes. For every target alike.

Outputs are compared after the mean over the images is taken away from both: what all images have in common, often the largest part of
logits, would hide differences. "Largest" values are over all images and outputs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data import (
    MODES,
    Batch,
    DataConfig,
    StreamSource,
    find_images,
    open_image,
    open_source,
    readable,
    record_of,
    validation_batches,
    validation_transform,
)
from ..errors import UserError, one_line
from ..measure.host import processor_name
from ..tasks import Evaluation, Task
from ._graph import output_list
from ._pixels import to_images, to_pixels
from .contract import Record, Target

BATCHES = (8, 1, 2, 3)
FEW = 12
"""Images that are computed with all but the first of `BATCHES`."""
EMBEDDED = "builtin:fashion-mnist-mini"
TOLERANCE = 1e-4
"""Largest error in fp32, relative to the largest centred output. Images whose best two classes are nearer than that are not asked which
of them is the best."""
SAME_CLASS = {"fp32": 100.0, "fp16": 99.0, "bf16": 99.0}
"""Precision -> least percentage of the images that get the same class."""
REPEATS = 20


ALMOST_NOTHING = 1e-6
"""Outputs that vary less over the images, relative to the largest output, prove nothing."""


@dataclass(frozen=True)
class Photos:
    """What a model and its files are compared on.

    Attributes:
        title: Where they are from.
        pixels: uint8 (N, H, W, C), resized and cropped for the model.
        batches: The same with their targets, where these mean what the model's outputs mean; else empty.
        note: What the user should know about how targets and outputs correspond.
    """

    title: str
    pixels: np.ndarray
    batches: Sequence[Batch] = field(default=(), repr=False)
    note: str = ""


def open_photos(task: Task, record: Record, data: str | None, count: int) -> Photos:
    """Photos from all over the data, or the embedded images.

    Args:
        task: The model's task, which reads targets.
        record: What all files of the model have in common.
        data: As `data.root` in a config, or a folder of images without classes; None for the embedded images.
        count: How many.

    Raises:
        UserError: There is no such data, or no image in it.
    """
    mode = MODES[record["preprocessing"]["input_size"][0]]
    note, has_targets = "", True
    try:
        measured = task.open_measured(DataConfig(root=data or EMBEDDED), "auto", record_of(record["trained"]), mode)
        source, title = measured.source, f"{data} ({measured.split})" if data else "embedded images"
    except UserError:
        if data is not None:
            return _without_targets(record, data, count)
        source, title, has_targets = open_source(EMBEDDED, img_mode=mode), "embedded images", False
    if has_targets:
        try:
            source, note = task.align(source)
            has_targets = data is not None or not note  # nobody said that the embedded images' classes are the model's
        except UserError as error:
            note, has_targets = one_line(error), False
    if not isinstance(source, StreamSource):
        source = source.select(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))
    batches: list[Batch] = []
    for batch in readable(validation_batches(source, task.transforms(timm_steps(record)).val, 16, 0), lambda bad: None):
        batches.append(batch)
        if sum(map(len, batches)) >= count:
            break
    if not batches:
        raise UserError(f"{title}: no image could be read")
    pixels = np.concatenate([to_pixels(batch.image, record) for batch in batches])
    return Photos(title, pixels, batches if has_targets else (), note if data else "")


def _without_targets(record: Record, data: str, count: int) -> Photos:
    """Images of a folder, whatever its structure. Raises `UserError`."""
    found = [*find_images([data])]
    chosen = [found[index] for index in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]
    transform, mode = validation_transform(timm_steps(record)), MODES[record["preprocessing"]["input_size"][0]]
    images = torch.stack([transform(open_image(path, mode=mode)) for path in chosen])
    return Photos(data, to_pixels(images, record), note="the folder has no classes that the model knows")


def timm_steps(record: Record) -> dict[str, Any]:
    """Preprocessing as timm has it."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in record["preprocessing"].items()}


@torch.inference_mode()
def reference(model: nn.Module, photos: Photos, record: Record, names: Sequence[str]) -> list[np.ndarray]:
    """The model's own outputs for the photos, in float32. Raises `UserError` where they hardly vary: nothing could be told from them."""
    parts = []
    for start in range(0, len(photos.pixels), BATCHES[0]):
        images = to_images(photos.pixels[start : start + BATCHES[0]], record)
        parts.append([output.float().numpy() for output in output_list(model(images), names)])
    outputs = [np.concatenate(output) for output in zip(*parts, strict=True)]
    spread, largest = np.abs(_centred(outputs[0], outputs[0])).max(), np.abs(outputs[0]).max()
    if not spread > ALMOST_NOTHING * largest:
        raise UserError(
            f"the model's outputs for {len(photos.pixels)} images of {photos.title} are the same (largest difference {spread:.1e}), "
            "nothing can be compared: has it weights?"
        )
    return outputs


def _centred(outputs: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return outputs.astype(np.float64) - expected.astype(np.float64).mean(0)


def compared(got: np.ndarray, expected: np.ndarray, axis: int | None) -> dict[str, Any]:
    """How one output of a file compares with the model's.

    Args:
        got: (N, ...), the file's.
        expected: (N, ...), the model's.
        axis: Along which the outputs are of classes; None where they aren't.

    Returns:
        largest_error, relative to the largest centred output; cosine of all centred outputs; and with classes same_class, a percentage
        of the images (or places in them), and decided, the number that it is of.
    """
    if got.shape != expected.shape:
        return {"largest_error": float("inf"), "cosine": 0.0, "shape": [*got.shape]}
    ours, theirs = _centred(got, expected), _centred(expected, expected)
    scale = np.abs(theirs).max()
    norms = np.linalg.norm(ours) * np.linalg.norm(theirs)
    found: dict[str, Any] = {
        "largest_error": float(np.abs(ours - theirs).max() / scale) if np.isfinite(ours).all() else float("inf"),
        "cosine": float((ours * theirs).sum() / norms) if norms else 0.0,
    }
    if axis is None or expected.shape[axis] < 2:
        return found
    best = np.partition(expected.astype(np.float64), -2, axis=axis).take([-2, -1], axis=axis)
    decided = np.ptp(best, axis=axis) > TOLERANCE * scale
    same = (got.argmax(axis) == expected.argmax(axis))[decided]
    return found | {"same_class": 100 * float(same.mean()) if same.size else None, "decided": int(same.size)}


def prove(
    path: Path, target: Target, photos: Photos, expected: Sequence[np.ndarray], record: Record, task: Task
) -> dict[str, Any]:
    """Opens a file in a fresh process and compares what it computes with the model's outputs.

    Args:
        path: The file.
        target: Its target.
        photos: Images.
        expected: The model's outputs for them.
        record: The file's record, which it must hold.
        task: The model's task.

    Returns:
        What its record says under `agreement`: see `compared`, over all batch sizes, and images, data, batches, metrics of the task
        (with the model's own under "model") where there are targets, milliseconds of one image with one thread, and the processor.

    Raises:
        UserError: It can't be opened, its record is another one, it takes inputs that it shouldn't, or it doesn't agree.
    """
    fewest, most = record["file"]["batch"]
    batches = [batch for batch in BATCHES if fewest <= batch <= most] or [fewest]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        answer, outputs = run_fresh(path, photos.pixels, batches, Path(folder))
    if answer["record"] != record:
        raise UserError("the record read back from the file is another one than was written into it")
    results = [
        compared(got, own[: len(got)], task.logits_axis if index == 0 else None)
        for batch in batches
        for index, (got, own) in enumerate(zip(outputs[batch], expected, strict=True))
    ]
    found = results[0] | {"largest_error": max(result["largest_error"] for result in results)}
    found |= {"cosine": min(result["cosine"] for result in results)}
    _judge(found, results, record["file"]["precision"], answer["accepted"])
    found |= {"images": len(photos.pixels), "data": photos.title, "batches": batches}
    if photos.batches:
        measured = _metrics(task, photos, outputs[batches[0]][0])
        found |= {"metrics": measured, "model": _metrics(task, photos, expected[0])}
    return found | {"milliseconds": answer["milliseconds"], "processor": processor_name()}


def _judge(
    found: Mapping[str, Any], results: Sequence[Mapping[str, Any]], precision: str, accepted: Sequence[str]
) -> None:
    """Raises `UserError` for a file that doesn't agree with its model."""
    if "shape" in found:
        raise UserError(f"it gives outputs of shape {tuple(found['shape'])}, other than the model's")
    error, least = found["largest_error"], SAME_CLASS[precision]
    limit = TOLERANCE if precision == "fp32" else float("inf")
    if not error <= limit:
        raise UserError(
            f"it differs from the model by {error:.1e} of the largest centred output, allowed are {limit:.0e}"
        )
    shares = [result["same_class"] for result in results if result.get("same_class") is not None]
    if shares and min(shares) < least:
        raise UserError(f"it gives {min(shares):.2f} % of the images the model's class, expected are {least:g} %")
    if not np.isfinite(error):
        raise UserError("it gives outputs that are not numbers")
    if accepted:
        raise UserError(f"it answers instead of refusing {' and '.join(accepted)}")


def run_fresh(
    path: Path, pixels: np.ndarray, batches: Sequence[int], folder: Path
) -> tuple[dict[str, Any], dict[int, list[np.ndarray]]]:
    """What `fresh.py` says of a file, and the outputs by batch size. Raises `UserError` where its process fails."""
    np.save(folder / "pixels.npy", pixels)
    request = {"file": str(path.resolve()), "batches": [*batches], "few": FEW, "threads": 1, "repeats": REPEATS}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    package = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "effvit_zoo.export.fresh", str(folder)]
    done = subprocess.run(
        command, cwd=folder, env=settings, capture_output=True, text=True, errors="replace", check=False
    )
    answered = folder / "answer.json"
    answer = json.loads(answered.read_text(encoding="utf-8")) if answered.is_file() else {}
    if done.returncode and "trying" not in answer:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"its process ended with {done.returncode}"
        raise UserError(f"it can't be run: {one_line(reason)}")
    outputs = {
        batch: [np.load(file) for file in sorted(folder.glob(f"outputs-{batch}-*.npy"), key=_number)]
        for batch in batches
    }
    return answer, outputs


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _metrics(task: Task, photos: Photos, outputs: np.ndarray) -> dict[str, Any]:
    """The task's metrics of outputs for the photos, with their intervals."""
    evaluator = task.evaluator(torch.device("cpu"))
    start = 0
    for batch in photos.batches:
        evaluator.update(torch.from_numpy(outputs[start : start + len(batch)]), batch)
        start += len(batch)
    found: Evaluation = evaluator.result(evaluator.totals(), evaluator.rows())
    metrics = {name: found.metrics[name] for name in task.metrics if name in found.metrics}
    return metrics | task.intervals(metrics, found.images)
