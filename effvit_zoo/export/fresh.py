"""A process that opens one exported file and computes images with it: `python -m effvit_zoo.export.fresh FOLDER`.

It knows what the file itself says and no more, as a stranger's program would, and imports the file's runtime and numpy. FOLDER holds
request.json (file, batches, few, threads, repeats) and pixels.npy, uint8 (N, H, W, C). It receives outputs-BATCH-INDEX.npy, of all images
for the first batch size and of the first `few` for the others, and answer.json: record, milliseconds, and accepted, the kinds of wrong
input for which the runtime gave an answer instead of an error. A runtime that dies of one leaves "trying" there.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import target_of
from .contract import Opened, Record

SECONDS = 2.0
"""For about so long a call is timed."""


def as_input(pixels: np.ndarray, record: Record) -> np.ndarray:
    """Pixels (B, H, W, C) as the file takes them."""
    if record["file"]["input"]["dtype"] == "uint8":
        return np.ascontiguousarray(pixels)
    mean, std = (np.array(record["preprocessing"][key], dtype=np.float32) for key in ("mean", "std"))
    images = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def wrong_inputs(array: np.ndarray, shape: list[int | None]) -> dict[str, np.ndarray]:
    """Inputs that no file of this input's type and shape may answer."""
    wrong = {"another size": np.concatenate([array, array], axis=2), "another type": array.astype(np.int32)}
    if shape[0] is not None:
        wrong["another number of images"] = np.concatenate([array, array])
    return wrong


def compute(opened: Opened, pixels: np.ndarray, record: Record, batch: int) -> list[np.ndarray]:
    """Outputs of all pixels (N, H, W, C), in batches; the last one may be smaller where the file takes any number."""
    parts = [opened.run(as_input(pixels[start : start + batch], record)) for start in range(0, len(pixels), batch)]
    return [np.concatenate(output) for output in zip(*parts, strict=True)]


def milliseconds(opened: Opened, array: np.ndarray, repeats: int) -> float:
    """Median of a call."""
    times: list[float] = []
    opened.run(array)
    while len(times) < repeats and (not times or sum(times) < SECONDS):
        start = time.perf_counter()
        opened.run(array)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main(folder: Path) -> None:
    request: dict[str, Any] = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    path = Path(request["file"])
    target = target_of(path)
    assert target is not None
    opened, record = target.open(path, request["threads"]), target.read(path)
    assert record is not None
    pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    for number, batch in enumerate(request["batches"]):
        some = pixels if number == 0 else pixels[: request["few"]]
        for index, output in enumerate(compute(opened, some, record, batch)):
            np.save(folder / f"outputs-{batch}-{index}.npy", output)
    one = as_input(pixels[:1], record)
    answer: dict[str, Any] = {"record": record, "milliseconds": milliseconds(opened, one, request["repeats"])}
    answer["accepted"] = []
    for kind, array in wrong_inputs(one, opened.shape).items():
        _write(folder, answer | {"trying": kind})
        try:
            opened.run(array)
        except target.errors():
            continue
        answer["accepted"].append(kind)
    _write(folder, answer)


def _write(folder: Path, answer: dict[str, Any]) -> None:
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
