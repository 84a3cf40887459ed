"""Decoded images of small data sets, kept in memory, so that a file is decoded once in a run, whichever process loads it.

What is kept is the decoded image itself, without loss, so that a run sees the same pixels with and without it. It lies in memory
that forked loader processes share; in processes that are started anew (macOS, Windows), each image is decoded every time.
"""

from __future__ import annotations

import mmap
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from .images import DECODE_ERRORS
from .sources import ImageSource
from .splits import DataSplits

LARGEST = 2 * 2**30
"""Bytes that are used at most, unless `data.cache` names another number."""
SHARE = 0.25  # of the free memory
SAMPLED = 32  # images whose sizes are read to estimate the size of all
SLACK = 1.25  # room for images that are larger than the sampled ones
_CGROUP = Path("/sys/fs/cgroup")


class ImageCache:
    """Images by row, in memory that forked processes share. Pickled, it is None.

    Args:
        rows: Number of rows.
        limit: Bytes for pixels; an image that doesn't fit any more isn't kept.
        mode: Pillow's mode of all images.
    """

    def __init__(self, rows: int, limit: int, mode: str) -> None:
        self.mode = mode
        self.pixels = mmap.mmap(-1, max(1, limit))  # a page takes memory when it is first written to
        self.places = np.frombuffer(mmap.mmap(-1, 24 * (rows + 1)), dtype=np.int64).reshape(-1, 3)
        """A row's end in `pixels`, 0 where it isn't kept, width and height; and in a last row, the end of all."""
        self.lock = multiprocessing.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def get(self, row: int) -> Image.Image | None:
        """An image, None where it isn't kept."""
        with self.lock:
            end, width, height = self.places[row].tolist()
        if not end:
            return None
        start = end - width * height * len(self.mode)
        return Image.frombytes(self.mode, (width, height), memoryview(self.pixels)[start:end])

    def put(self, row: int, image: Image.Image) -> None:
        """Keeps an image if there is room for it."""
        pixels = image.tobytes()
        with self.lock:
            start = int(self.places[-1, 0])
            end = start + len(pixels)
            if end > len(self.pixels) or self.places[row, 0]:
                return
            self.pixels[start:end] = pixels
            self.places[row], self.places[-1, 0] = (end, *image.size), end


def with_cache(splits: DataSplits, wanted: bool | int | None, processes: int = 1) -> DataSplits:
    """Splits whose images are kept in memory once they are decoded, with a note that says so.

    Args:
        splits: Training and validation samples; streams and data that is decoded already are left as they are.
        wanted: `data.cache`: megabytes; True for as many images as fit into 2 GB and a quarter of the free memory, None for all
            where all fit, False for none.
        processes: Processes that train together, each of which keeps its own.
    """
    sizes = {name: _expected_bytes(getattr(splits, name)) for name in ("train", "val")} if wanted is not False else {}
    total = sum(sizes.values())
    if not total:
        return splits
    given = isinstance(wanted, int) and not isinstance(wanted, bool)
    limit = wanted * 2**20 if given else int(min(LARGEST, SHARE * free_memory())) // processes  # type: ignore[operator]
    expected, bound = _megabytes(total), _megabytes(limit)
    if SLACK * total > limit and wanted is None:
        keeps = "data.cache=MEGABYTES keeps a part"
        note = f"decoded anew in every epoch: the images take about {expected}, {bound} at most are kept ({keeps})"
        return replace(splits, notes=(*splits.notes, note))
    room = {name: int(min(SLACK * size, limit * size / total)) for name, size in sizes.items() if size}
    train, val = (_cached(source, room.get(name, 0)) for name, source in (("train", splits.train), ("val", splits.val)))
    part = (
        f"as many as fit into {bound}"
        if total > limit
        else f"about {expected}, at most {_megabytes(sum(room.values()))}"
    )
    note = f"images are decoded once and kept in memory: {part} (data.cache=false keeps none)"
    return replace(splits, train=train, val=val, notes=(*splits.notes, note))


def _cached(source: Any, limit: int) -> Any:
    """A source of images with a cache of so many bytes; the source itself where it is to have none."""
    if not limit:
        return source
    rows = len(source) if source.rows is None else int(source.rows.max()) + 1
    return replace(source, cache=ImageCache(rows, limit, source.img_mode))


def _expected_bytes(source: Any) -> int:
    """Bytes of all images decoded, from the sizes of some; 0 where they are decoded already or can't be loaded by their number."""
    if not isinstance(source, ImageSource) or not len(source):
        return 0
    pixels = []
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int)).tolist():
        try:
            item = source.item(index)
            if hasattr(item, "read"):
                with item as file, Image.open(file) as image:
                    pixels.append(image.width * image.height)
            elif isinstance(item, Image.Image):
                pixels.append(item.width * item.height)
        except DECODE_ERRORS:
            continue  # it is reported when it is loaded
    return int(np.mean(pixels) * len(source.img_mode) * len(source)) if pixels else 0


def free_memory() -> int:
    """Bytes that this process may still use, in a container too."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no control group of version 2
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def _megabytes(size: float) -> str:
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{max(1, round(size / 2**20))} MB"
