"""What a run's images are when it starts, kept in its folder, so that resuming over other images is noticed."""

from __future__ import annotations

import gzip
import json
import os
import posixpath
from pathlib import Path
from typing import Any

from .splits import DataSplits
from .streams.source import StreamSource

Listing = dict[str, dict[str, str]]
"""Split -> relative name of an image -> its group, e.g. its class. A stream has its number of images as a name."""


def listing(splits: DataSplits) -> Listing:
    """The images of a run. No file is opened."""
    return {"train": _names(splits.train), "val": _names(splits.val)}


def _names(source: Any) -> dict[str, str]:
    if isinstance(source, StreamSource):
        return {f"a stream of {source.num_samples or '?'} images": ""}
    groups = source.groups()
    labels = [""] if groups is None else [source.group_name(group) for group in range(groups.max(initial=-1) + 1)]
    return {
        os.fsdecode(source.relative_name(index)): labels[0 if groups is None else groups[index]]
        for index in range(len(source))
    }


def write_listing(path: Path, images: Listing) -> None:
    """Writes a listing as compressed JSON."""
    path.write_bytes(gzip.compress(json.dumps(images).encode(), compresslevel=6, mtime=0))


def read_listing(path: Path) -> Listing:
    return json.loads(gzip.decompress(path.read_bytes()))


def changes(before: Listing, now: Listing) -> list[str]:
    """What differs between two listings: images added, removed and in another group, with their numbers and an example; [] for nothing."""
    found = []
    for split in ("train", "val"):
        old, new = before[split], now[split]
        added, removed = new.keys() - old.keys(), old.keys() - new.keys()
        moved = [
            (name, f"{old[name]} -> {new[name]}") for name in sorted(old.keys() & new.keys()) if old[name] != new[name]
        ]
        by_file = {posixpath.basename(name): name for name in sorted(removed)}
        moved_names: set[str] = set()
        for name in sorted(added):  # a file that was moved to another class folder
            source = by_file.pop(posixpath.basename(name), None)
            if source is not None and old[source] != new[name]:
                moved_names |= {name, source}
                moved.append((source, f"{old[source]} -> {new[name]}"))
        found += [_counted(split, "added", added - moved_names), _counted(split, "removed", removed - moved_names)]
        if moved:
            found.append(f"{len(moved)} {split} images in another class (e.g. {moved[0][0]}: {moved[0][1]})")
    return [line for line in found if line]


def _counted(split: str, verb: str, names: set[str]) -> str:
    return f"{len(names)} {split} images {verb} (e.g. {min(names)})" if names else ""
