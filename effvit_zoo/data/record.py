"""What a training records about its data, so that validation recognises the data wherever it lies and however its path is written.

A record is a JSON object, stored in a model folder's config.json under effvit_zoo.data:

    root, kind, path           root as written; its row of the table of kinds; resolved path, which is not published
    labels                     of a table: where it lies relative to the data folder
    train_split, val_split     names of the splits, null for an undivided folder and for a part that was held out
    val_fraction, split_seed   of the held-out part
    held_out, ranked_by        with a held-out part: group name -> largest rank (16 hex digits) in it, and what ranks are of
    train, val                 fingerprints: number of images, a digest of all relative names, and a sketch

A relative name is relative to the split's folder. A sketch holds the smallest 64-bit hashes of relative names (a bottom-k sketch), so
that the share of it that occurs in other data estimates the share of names that do. Training's has only names that don't occur in
the validation split, because in many data sets every folder begins with 0.png.

An image belongs to the held-out part if its keyed hash, its rank, is at most its group's largest. Images that are added or
removed later change nothing for the others.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np

from ..errors import UserError
from .roots._names import composed
from .sources import Source

SKETCH = 64  # hashes in a sketch


def _hashes(names: Iterable[bytes], key: bytes = b"") -> np.ndarray:
    """(N,) uint64."""
    digests = (blake2b(name, digest_size=8, key=key).digest() for name in names)
    return np.fromiter(
        (int.from_bytes(digest, "big") for digest in digests), dtype=np.uint64
    )  # no list of a million objects


def _composed(name: bytes) -> bytes:
    """A relative name in Unicode's composed form, as a copy on another system may have it."""
    return name if name.isascii() else os.fsencode(composed(os.fsdecode(name)))


def name_hashes(source: Source, edit: Callable[[bytes], bytes] | None = None) -> np.ndarray:
    """(N,) uint64 hashes of relative names, after `edit`."""
    names = (_composed(source.relative_name(index)) for index in range(len(source)))
    return _hashes(names if edit is None else map(edit, names))


RANKED_BY: Mapping[str, Callable[[Source, int], bytes]] = {
    "index": lambda source, index: str(index).encode(),
    "stored name": lambda source, index: source.relative_name(index),
    "name": lambda source, index: _composed(source.relative_name(index)),
}
"""What an image is ranked by: its index, its relative name as stored (in earlier versions), or that in Unicode's composed form."""


def names_digest(hashes: np.ndarray) -> str:
    """A digest of a set of names from their hashes, in any order."""
    return blake2b(np.sort(hashes).astype(">u8").tobytes(), digest_size=16).hexdigest()


def fingerprint(hashes: np.ndarray, other: np.ndarray | None = None) -> dict[str, Any]:
    """Fingerprint of a split from its hashes of names; its sketch is of names that are not among `other`."""
    own = np.unique(hashes) if other is None else np.setdiff1d(hashes, other)
    return {
        "images": len(hashes),
        "names": names_digest(hashes),
        "sketch": " ".join(f"{value:016x}" for value in own[:SKETCH].tolist()),
    }


def split_ranks(source: Source, seed: int, ranked_by: str) -> np.ndarray:
    """(N,) uint64: the order in which images are held out, from what `RANKED_BY` says for each image."""
    key = RANKED_BY[ranked_by]
    return _hashes((key(source, index) for index in range(len(source))), str(seed).encode())


def ranking(source: Source) -> str:
    """What the images of a source are ranked by."""
    return "name" if source.ranked_by_name else "index"


def thresholds(source: Source, groups: np.ndarray, ranks: np.ndarray, in_val: np.ndarray) -> dict[str, str]:
    """Group name -> largest rank of its held-out images, 16 hex digits."""
    largest = np.zeros(groups.max(initial=0) + 1, dtype=np.uint64)
    np.maximum.at(largest, groups[in_val], ranks[in_val])
    return {source.group_name(group): f"{largest[group]:016x}" for group in np.unique(groups[in_val]).tolist()}


def held_out_rows(source: Source, record: Mapping[str, Any]) -> np.ndarray:
    """(N,) bool: the images that belong to the record's held-out part."""
    groups = group_indices(source)
    known = [record["held_out"].get(source.group_name(group)) for group in range(groups.max(initial=-1) + 1)]
    limits = np.array([int(limit or "0", 16) for limit in known], dtype=np.uint64)
    has_limit = np.array([limit is not None for limit in known], dtype=bool)
    ranks = split_ranks(source, record["split_seed"], record["ranked_by"])
    return has_limit[groups] & (ranks <= limits[groups])


def group_indices(source: Source) -> np.ndarray:
    """(N,) group of each image; all 0 where the source has no groups."""
    groups = source.groups()
    return np.zeros(len(source), dtype=np.int64) if groups is None else groups


def record_of(extra: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The data record in a model folder's `effvit_zoo` entry, None where there is none.

    The models of earlier versions have the root with `seed` and `val_fraction` instead: a record without splits and fingerprints.
    """
    data = extra.get("data")
    if isinstance(data, Mapping):
        if not isinstance(data.get("root"), str):
            return None
        if lacking := _lacking(data):
            raise UserError(
                f"the model's record of its training data lacks {', '.join(lacking)}: choose what to measure by --split"
            )
        return data
    if not isinstance(data, str):
        return None
    return {"root": data, "split_seed": extra.get("seed", 0), "val_fraction": extra.get("val_fraction", 0.1)}


def _lacking(data: Mapping[str, Any]) -> list[str]:
    """Keys that a record needs beside those that it has."""
    if "train_split" not in data:
        return [key for key in ("val_fraction", "split_seed") if key not in data]  # of an earlier version
    needed = ["val_split", *(("ranked_by", "val_fraction", "split_seed", "train", "val") if "held_out" in data else ())]
    sides = [side for side in ("train", "val") if side in data]  # of streams there are none
    needed += ["train", "val"] if sides else []
    missing = [key for key in dict.fromkeys(needed) if key not in data]
    return missing + [
        f"{side}.{key}" for side in sides for key in ("images", "names", "sketch") if key not in data[side]
    ]


def shared(part: Mapping[str, Any], hashes: np.ndarray) -> float:
    """Share of a recorded split's sketch that occurs among hashes of names, 0 to 1."""
    sketch = np.array([int(value, 16) for value in part["sketch"].split()], dtype=np.uint64)
    return float(np.isin(sketch, hashes).mean()) if len(sketch) else 0.0


def is_named_alike(record: Mapping[str, Any], hashes: np.ndarray) -> bool:
    """Whether any of the hashes of names is in one of the record's sketches."""
    return any(shared(record[part], hashes) > 0 for part in ("train", "val"))


def training_images(record: Mapping[str, Any], source: Source, inside: str = "") -> int:
    """About how many images of a source have the name of a training image, 0 if none is known.

    Names are compared as they are, without their first one or two folders, and below `inside`: the source may be a folder around
    or inside the one that was trained on.

    Args:
        record: A record with fingerprints.
        source: Images.
        inside: Path of the source's folder relative to the recorded training folder, where it is known to lie in there.
    """
    hashes = name_hashes(source)
    if names_digest(hashes) == record["train"]["names"]:
        return len(source)
    edits = [_without_folders(1), _without_folders(2)]
    if inside:
        prefix = os.fsencode(inside) + b"/"
        edits.append(lambda name: prefix + name)
    for seen in itertools.chain([hashes], (name_hashes(source, edit) for edit in edits)):
        if share := shared(record["train"], seen):
            return min(len(source), max(1, round(share * record["train"]["images"])))
    return 0


def _without_folders(count: int) -> Callable[[bytes], bytes]:
    return lambda name: name.split(b"/", count)[-1]
