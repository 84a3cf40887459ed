"""Opening data by a root: what a run trains and validates on, and single splits. Nothing is decoded here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import UserError
from .classes import ClassMap, open_labelled, require_classes, with_same_classes
from .record import fingerprint, group_indices, name_hashes, ranking, split_ranks, thresholds
from .roots import KINDS, Root
from .roots._names import few, find_split
from .roots._request import Kind
from .roots.table import place_of
from .sources import AnySource, Source
from .streams.source import StreamSource


@dataclass(frozen=True)
class DataSplits:
    """Training and validation samples of a run; in labelled data both have the same classes in the same order.

    Attributes:
        train: Training samples.
        val: Validation samples.
        origin: Where they come from: the record without fingerprints.
        notes: What the user should know about how the data was read and what was left out, a line each.
    """

    train: AnySource
    val: AnySource
    origin: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of labelled data."""
        return self.train.class_names  # type: ignore[union-attr]

    @cached_property
    def record(self) -> dict[str, Any]:
        """What a model folder stores about its training data, see record.py: JSON, made from names without opening a file."""
        if isinstance(self.train, StreamSource) or isinstance(self.val, StreamSource):
            return dict(self.origin)
        train, val = name_hashes(self.train), name_hashes(self.val)
        return {**self.origin, "train": fingerprint(train, other=val), "val": fingerprint(val)}


def hold_out(source: Source, fraction: float, seed: int, ranked_by: str = "") -> tuple[Source, Source, dict[str, str]]:
    """Splits off `fraction` of each group: at least one image, never all of them.

    Images are ranked by a hash of seed and relative name, so the side of an image depends neither on the order of the file
    system nor on the version of a random generator, and added images move few of the others.

    Args:
        source: Images.
        fraction: Share of each group to hold out.
        seed: Seed of the choice.
        ranked_by: See `record.RANKED_BY`; "" for the source's own.

    Returns:
        The remaining and the held-out images, and the held-out part's largest rank in each group, for `record.held_out_rows`.

    Raises:
        UserError: Every group has a single image.
    """
    ranks, groups = split_ranks(source, seed, ranked_by or ranking(source)), group_indices(source)
    in_val = np.zeros(len(source), dtype=bool)
    for members in np.split(np.lexsort((ranks, groups)), np.cumsum(np.bincount(groups))[:-1]):
        in_val[members[: min(max(round(len(members) * fraction), 1), len(members) - 1)]] = True
    if not in_val.any():
        raise UserError(f"every class of {source.title} has a single image: none can be held out for validation")
    parts = source.select(np.flatnonzero(~in_val)), source.select(np.flatnonzero(in_val))
    return *parts, thresholds(source, groups, ranks, in_val)


def open_splits(
    root: str | os.PathLike[str],
    *,
    train_split: str = "train",
    val_split: str | None = "auto",
    val_fraction: float = 0.1,
    split_seed: int = 0,
    labels: str | os.PathLike[str] | None = None,
    class_map: ClassMap | None = None,
    download: bool = False,
    img_mode: str = "RGB",
    kinds: Mapping[str, Kind] = KINDS,
) -> DataSplits:
    """Opens training and validation samples.

    Args:
        root: See roots/__init__.py.
        train_split: Name of the training split, or a synonym. Roots that timm reads take its grammar, e.g. "train[:10%]" for hfds
            and "train-{000..009}.tar|12345" for shards of 12345 images without an _info.json.
        val_split: Name of the validation split. "auto" takes val (or validation, valid, eval), else test, else holds out a part of
            the training images; None always does the last.
        val_fraction: Share of each class to hold out. A class of at least two images is on both sides.
        split_seed: Seed of the choice of held-out images.
        labels: Table of labels of a folder, see roots/table.py; None where folders are classes.
        class_map: Class name -> index, or a .txt with one name a line; classes that are not in it are left out.
        download: Whether torchvision, datasets and tfds may fetch what is missing. With several processes, one should open first.
        img_mode: "RGB" or "L".
        kinds: Table of kinds of roots; tasks whose targets are not classes have their own.

    Raises:
        UserError: One line that says what is missing, empty or contradictory.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"expected val_fraction between 0 and 1, both excluded, got {val_fraction}")
    found = Root.find(root, img_mode, download, kinds, labels)
    train_name = found.choose(train_split)
    val_name = None if val_split is None else found.choose(val_split)
    origin = _origin(found, train_name, val_name, val_fraction, split_seed)
    train = open_labelled(found, train_name, class_map, training=True)
    require_classes(train)
    if val_name is not None:
        val = open_labelled(found, val_name, class_map)
    elif isinstance(train, StreamSource):
        raise UserError(f"nothing can be held out of a stream: name a val_split of {found.request.root}")
    else:
        origin["ranked_by"] = ranking(train)
        train, val, origin["held_out"] = hold_out(train, val_fraction, split_seed)
    val = with_same_classes(found.request.root, train, val)
    return DataSplits(train, val, origin, _notes(found, train_name, val_name, train, val))


def _notes(
    found: Root, train_name: str | None, val_name: str | None, train: AnySource, val: AnySource
) -> tuple[str, ...]:
    """Distinct notes on the root, on its splits and on what lies beside them. Raises `UserError`."""
    notes = [*found.notes, *train.notes, *val.notes]
    if train_name is not None:
        used = [name for name in (train_name, val_name) if name is not None]
        notes += found.unused(used, getattr(train, "class_names", ()))
    return tuple(dict.fromkeys(notes))


def _origin(
    found: Root, train_name: str | None, val_name: str | None, val_fraction: float, split_seed: int
) -> dict[str, Any]:
    """The record of data that was opened, without its images."""
    request = found.request
    labels = {"labels": place_of(request.labels, request.name)} if request.labels else {}
    return {
        "root": request.root,
        "kind": request.kind,
        "path": found.path,
        **labels,
        "train_split": train_name,
        "val_split": val_name,
        "val_fraction": val_fraction,
        "split_seed": split_seed,
    }


def open_source(
    root: str | os.PathLike[str],
    split: str = "auto",
    *,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    labels: str | os.PathLike[str] | None = None,
    class_map: ClassMap | None = None,
    download: bool = False,
    img_mode: str = "RGB",
    kinds: Mapping[str, Kind] = KINDS,
) -> AnySource:
    """Opens one split; further arguments and errors as in `open_splits`.

    Args:
        root: See roots/__init__.py.
        split: Name of a split. "auto" is val, else test, else everything in an undivided folder. In an undivided folder, "all" is
            everything, and "train" and "val" are the parts that `open_splits` makes with the same seed and fraction. Where class
            folders lie beside val/ or test/, "train" is the class folders.
    """
    found = Root.find(root, img_mode, download, kinds, labels)
    undivided = found.is_folder and found.choose("auto") is None
    if undivided and split in ("auto", "all"):
        return open_labelled(found, None, class_map)
    chosen = found.choose(split)
    if chosen is not None:
        return open_labelled(found, chosen, class_map)
    if not found.is_folder:
        raise unnamed_split(found)
    if not undivided and find_split(split, ("train",)):
        return open_labelled(found, None, class_map)
    splits = open_splits(
        root,
        val_split=None,
        val_fraction=val_fraction,
        split_seed=split_seed,
        labels=labels,
        class_map=class_map,
        img_mode=img_mode,
        kinds=kinds,
    )
    return splits.train if find_split(split, ("train",)) else splits.val


def unnamed_split(root: Root) -> UserError:
    """The error for a root that is not a folder and has no split that could be chosen automatically."""
    return UserError(f"name a split of {root.request.root}: {few(root.splits) or 'it does not say which it has'}")
