"""Opening data to measure a model on, without ever measuring its training images because a path is written differently."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .classes import ClassMap, open_labelled
from .record import held_out_rows, is_named_alike, name_hashes, names_digest, training_images
from .roots import KINDS, Root, parse
from .roots._names import VAL, find_split
from .roots._request import Kind, Request
from .sources import AnySource, Source
from .splits import hold_out, open_source, unnamed_split
from .streams.source import StreamSource

ALL, HELD_OUT = "all", "held-out part"


@dataclass(frozen=True)
class Measured:
    """Samples that a model is measured on.

    Attributes:
        source: The samples.
        split: Name of the split; "held-out part", of an undivided folder; or "all".
        fingerprint: Digest of the samples' relative names, "" for a stream.
        images: Number of images, None where a stream doesn't know it.
        is_recorded: Whether it is what the record's training was validated on, because the record knows the data.
    """

    source: AnySource
    split: str
    fingerprint: str
    images: int | None
    is_recorded: bool = False


def open_measured(
    root: str | os.PathLike[str],
    split: str = "auto",
    *,
    record: Mapping[str, Any] | None = None,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    labels: str | os.PathLike[str] | None = None,
    class_map: ClassMap | None = None,
    download: bool = False,
    img_mode: str = "RGB",
    kinds: Mapping[str, Kind] = KINDS,
) -> Measured:
    """Opens samples to measure a model on; further arguments as in `open_splits`.

    Args:
        root: See roots/__init__.py.
        split: As in `open_source`; "auto" depends on `record`. Data that the model was trained on is recognised by its resolved path
            or by its relative names; then it is the recorded validation split or held-out part. Other data gives val, else test,
            else everything.
        record: What the model's training recorded about its data, from `record_of`. Its fraction and seed take precedence.

    Raises:
        UserError: As in `open_splits`, and where the data contains training images and the recorded split can't be applied.
    """
    record = record or {}
    recorded = None if labels else _recorded_labels(root, record, kinds)
    labels = labels or recorded
    candidate = _Candidate(Root.find(root, img_mode, download, kinds, labels), class_map)
    source: Any
    is_automatic = candidate.is_automatic(split, record)
    source, shown, is_recorded = _find(candidate, record, kinds) if is_automatic else _Found(None, "")
    if split != "auto" and shown != HELD_OUT:
        fraction, seed = record.get("val_fraction", val_fraction), record.get("split_seed", split_seed)
        options: dict[str, Any] = {"class_map": class_map, "download": download, "img_mode": img_mode, "kinds": kinds}
        options["labels"] = labels
        source = open_source(root, split, val_fraction=fraction, split_seed=seed, **options)
        shown, is_recorded = split, False
    if recorded:
        source = source.with_notes(f"{root} is read by the table {recorded}, as in training")
    if isinstance(source, StreamSource):
        return Measured(source, shown, "", source.num_samples, is_recorded)
    return Measured(source, shown, names_digest(name_hashes(source)), len(source), is_recorded)


class _Found(NamedTuple):
    """Samples, what they are called, and `Measured.is_recorded`."""

    source: Any
    split: str
    is_recorded: bool = False


def _find(candidate: _Candidate, record: Mapping[str, Any], kinds: Mapping[str, Kind]) -> _Found:
    """What the record says to measure. Raises `UserError`, which names a table of labels that is missing."""
    try:
        return candidate.find(record, kinds)
    except UserError as error:
        if not record.get("labels") or candidate.root.request.kind != "folder":
            raise
        raise UserError(
            f"{error} (the model was trained with labels in {record['labels']}, which is not there: name the table by --data)"
        ) from None


@dataclass(frozen=True)
class _Candidate:
    """Data that a model is to be measured on and may have been trained on."""

    root: Root
    class_map: ClassMap | None

    def is_automatic(self, split: str, record: Mapping[str, Any]) -> bool:
        """Whether the record decides what to measure: for "auto", and for the "val" of an undivided folder."""
        is_part = "held_out" in record and find_split(split, VAL[:1]) and self.root.choose(split) is None
        return split == "auto" or bool(is_part)

    def find(self, record: Mapping[str, Any], kinds: Mapping[str, Kind]) -> _Found:
        """The samples to measure, and the name of what they are."""
        if not record:
            return self._own()
        trained = parse(record["root"], kinds)
        kind, own_kind = record.get("kind", trained.kind), self.root.request.kind
        if kind != own_kind and not {kind, own_kind} <= {"folder", "table"}:
            return self._own()
        if "train_split" not in record:
            return self._by_seed(trained, record)
        if not self.root.is_folder:
            is_same = trained.name == self.root.request.name or record.get("path") == (self.root.path or "")
            return self._recorded(record) if is_same else self._own()
        return self._by_threshold(record) if "held_out" in record else self._by_split(record)

    def _own(self) -> _Found:
        """Val, else test, else everything."""
        name = self.root.choose("auto")
        if name is None and not self.root.is_folder:
            raise unnamed_split(self.root)
        return _Found(self._open(name), name or ALL)

    def _open(self, name: str | None) -> Any:
        return open_labelled(self.root, name, self.class_map)

    def _recorded(self, record: Mapping[str, Any]) -> _Found:
        """The recorded validation split or held-out part of data that is known to be the training's."""
        if "held_out" in record:
            return _Found(self._held_out(self._open(record["train_split"]), record), HELD_OUT, is_recorded=True)
        return _Found(self._open(record["val_split"]), record["val_split"], is_recorded=True)

    def _held_out(self, source: Source, record: Mapping[str, Any]) -> Source:
        rows = held_out_rows(source, record)
        part, rest = source.select(np.flatnonzero(rows)), source.select(np.flatnonzero(~rows))
        if record["ranked_by"] == "index":
            digests = [names_digest(name_hashes(side)) for side in (rest, part)]
            if digests != [record["train"]["names"], record["val"]["names"]]:
                raise UserError(
                    f"{source.title} has changed since the model was trained on it, and the images that were held out are not "
                    f"known: choose by {self._option()}"
                )
        if not len(part):
            raise UserError(f"{source.title} has none of the images that training held out: choose by {self._option()}")
        return part

    def _by_threshold(self, record: Mapping[str, Any]) -> _Found:
        """For a training that held out a part of its images."""
        trained = find_split(record["train_split"], self.root.splits) if record["train_split"] else None
        name = trained or self.root.choose("auto")
        if name == trained:
            source = self._open(name)
            if record.get("path") == self.root.path or is_named_alike(record, name_hashes(source)):
                return _Found(self._held_out(source, record), HELD_OUT, is_recorded=True)
        return self._unlike_training(record)

    def _by_split(self, record: Mapping[str, Any]) -> _Found:
        """For a training with a validation split of its own."""
        name = find_split(record["val_split"], self.root.splits)
        if name is not None:
            source = self._open(name)
            if record.get("path") == self.root.path or is_named_alike(record, name_hashes(source)):
                return _Found(source, name, is_recorded=True)
        return self._unlike_training(record)

    def _unlike_training(self, record: Mapping[str, Any]) -> _Found:
        """The data's own split or all of it. Raises `UserError` where it has names of training images."""
        source, shown, _ = found = self._own()
        path = os.path.join(self.root.path or "", "" if shown == ALL else shown).rstrip(os.sep)
        recorded = record.get("path") or ""
        if "held_out" not in record:
            names = names_digest(name_hashes(source))
            is_validation = names == record["val"]["names"] != record["train"]["names"]
            if is_validation or path == os.path.join(recorded, record["val_split"]):
                return found
        trained = os.path.join(recorded, record["train_split"] or "").rstrip(os.sep)
        inside = os.path.relpath(path, trained).replace(os.sep, "/") if path.startswith(trained + os.sep) else ""
        count = training_images(record, source, inside if recorded else "")
        if recorded and path == trained:
            count = len(source)
        if count:
            raise UserError(
                f"about {count} of the {len(source)} images in {source.title} have names of images that the model was trained on: "
                f"choose what to measure by {self._option()}"
            )
        return found

    def _by_seed(self, trained: Request, record: Mapping[str, Any]) -> _Found:
        """For the record of an earlier version, which has no more than root, seed and fraction."""
        request, path = self.root.request, self.root.path
        if self.root.choose("auto") is not None:
            return self._own()
        if trained.name == request.name or (path is not None and os.path.realpath(trained.name) == path):
            source = self._open(self.root.choose("train"))
            if not isinstance(source, StreamSource):
                ranked_by = "stored name" if source.ranked_by_name else "index"
                part = hold_out(source, record["val_fraction"], record["split_seed"], ranked_by)[1]
                return _Found(part, HELD_OUT, is_recorded=True)
        if self.root.is_folder and _last(trained.name) in (".", "..", _last(request.name), _last(path or "")):
            raise UserError(
                f"whether {request.root} is the folder {trained.root} that the model was trained on is not known: "
                f"choose by {self._option()}, or name the folder as training did"
            )
        return self._own()

    def _option(self) -> str:
        splits = [name for wanted in ("val", "test", "train") if (name := find_split(wanted, self.root.splits))]
        return "--split, e.g. --split all" if self.root.choose("auto") is None else f"--split: {', '.join(splits)}"


def _recorded_labels(root: str | os.PathLike[str], record: Mapping[str, Any], kinds: Mapping[str, Kind]) -> str | None:
    """The table of labels that the model was trained with, where the root is a folder that has it at the recorded place."""
    folder = parse(root, kinds)
    path = os.path.join(folder.name, record.get("labels") or "")
    return os.path.realpath(path) if folder.kind == "folder" and record.get("labels") and os.path.isfile(path) else None


def _last(path: str) -> str:
    return os.path.basename(os.path.normpath(path))
