"""Folders of class folders, and tars of them.

A split is train/ or val/ with class folders in it. Where there is no train/, class folders beside val/ or test/ are the training split.
Where two readings of a tree are possible it is refused, and every file that is not used is counted.

Deliberate differences from timm 1.0.31 (`timm.data.readers`, Apache-2.0), whose class order and leaf-folder names are kept:
hidden and system files are skipped, more file types are read, class names are in Unicode's composed form (NFC).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from ...errors import UserError
from ..file_types import IMAGE_SUFFIXES, is_hidden
from ..inventory import entries, take_inventory
from ..sources import FilePaths, ImageSource, TarFiles
from ._names import SPLITS, TEST, VAL, composed, few, find_split, natural_order
from ._request import Request, image_source


def splits(request: Request) -> Sequence[str]:
    """Children of the root that can be splits: tars and folders of folders. A class named "train" is neither."""
    found = [] if os.path.isfile(request.name) else _visible(request.name)
    tars = [entry.name for entry in found if entry.name.endswith(".tar")]
    folders = [entry for entry in found if entry.is_dir()]
    names = tars + [entry.name for entry in folders if any(inner.is_dir() for inner in _visible(entry.path))]
    if find_split("train", names):  # images without class folders next to it: a mistake in val, often intended in test
        names += [entry.name for entry in folders if entry.name not in names and find_split("val", [entry.name])]
    return names


def open_split(request: Request, split: str | None) -> ImageSource:
    path = Path(request.name, split or "")
    found = [] if path.is_file() else _visible(str(path))
    if path.is_file() or (any(e.name.endswith(".tar") for e in found) and not any(e.is_dir() for e in found)):
        return _open_tar(path, request)
    own = [name for name in splits(request) if _is_split(name, VAL, TEST)] if split is None else []
    inventory = take_inventory(str(path), own)
    paths, notes = inventory.images, inventory.left_out.notes(str(path))
    if own and not paths:
        raise UserError(f"no training images in {path}: found {few(own)}, expected train/ or class folders beside it")
    if own:
        notes += (f"{path} has no train/: its class folders are the training images, {few(own)} is not",)
    if not paths:
        expected = f"expected a folder for each class, with {' '.join(IMAGE_SUFFIXES)}"
        raise UserError("; ".join([f"no images in {path}: {expected}", *notes]))
    if split is None:
        _require_no_loose_split(path, paths)
    labels, layout_notes = label_by_folder(str(path), [relative.rpartition("/")[0] for relative in paths])
    if inventory.empty:
        raise UserError("; ".join([f"class folders without images in {path}: {few(inventory.empty)}", *notes]))
    return _labelled(str(path), FilePaths(str(path), paths), labels, request, (*layout_notes, *notes))


def unused(request: Request, used: Collection[str], class_names: Collection[str]) -> list[str]:
    """Notes on what lies beside the splits that are used. Raises `UserError` where it has names of their classes."""
    beside = [entry for entry in _visible(request.name) if entry.is_dir() and entry.name not in used]
    classes = [entry.name for entry in beside if composed(entry.name) in class_names]
    if classes:
        raise UserError(
            f"{request.root} has the classes {few(classes)} in {few(used)} and beside it: expected them in one place, "
            f"or data.root={os.path.join(request.root, next(iter(used)))}"
        )
    counts = {entry.name: len(take_inventory(entry.path).images) for entry in beside}
    names = [f"{name}/ with {count} images" for name, count in counts.items() if count]
    loose = sum(os.path.splitext(e.name)[1].lower() in IMAGE_SUFFIXES for e in _visible(request.name) if e.is_file())
    names += [f"{loose} images directly in it"] * bool(loose)
    names += [e.name for e in _visible(request.name) if e.name.endswith(".tar") and e.name not in used]
    return [f"left out of {request.root}, which is read by its {few(used)}: {few(names)}"] if names else []


def label_by_folder(where: str, folders: Sequence[str]) -> tuple[list[str], list[str]]:
    """The class of each image, from the relative path of its folder: the innermost one, as in timm; and what to say about it.

    Raises:
        UserError: Images without a folder, images beside folders of images, or one class below several folders.
    """
    names = {folder: composed(folder) for folder in set(folders)}
    if "" in names:
        raise UserError(f"found {folders.count('')} images directly in {where}; put each class in a folder of its own")
    for folder in sorted(names):
        parts = folder.split("/")
        outer = next((known for i in range(1, len(parts)) if (known := "/".join(parts[:i])) in names), None)
        if outer:
            raise UserError(
                f"{where} has images in {outer} and in {folder}, which lies in it: whether {parts[-1]} is a class is not known; "
                "move the images of each class into one folder, or name the classes in a table (data.labels)"
            )
    places = defaultdict(set)
    for name in names.values():
        places[name.rpartition("/")[2]].add(name)
    if several := {label: sorted(found) for label, found in sorted(places.items()) if len(found) > 1}:
        label, found = next(iter(several.items()))
        raise UserError(_several(where, label, found))
    notes = []
    if nested := sorted(name for name in names.values() if "/" in name):
        notes.append(
            f"{where} has nested folders, of which the innermost are the classes: "
            f"{few(name.rpartition('/')[2] for name in nested)} (e.g. {nested[0]})"
        )
    if len(set(names.values())) < len(names):
        twice = sorted(name for name in set(names.values()) if list(names.values()).count(name) > 1)
        notes.append(f"{where} has {few(twice)} in several Unicode forms that look alike: each is one class")
    return [names[folder].rpartition("/")[2] for folder in folders], notes


def _several(where: str, label: str, found: Sequence[str]) -> str:
    outer = sorted({name.split("/")[-2] if "/" in name else "." for name in found})
    if all(_is_split(name, *SPLITS) for name in outer):
        inner = "/".join([where, *found[0].split("/")[:-2]])
        return f"{where} has the splits {few(outer)} deeper inside: expected the folder that holds them, {inner}"
    return (
        f"{where} has {label} in several folders ({few(found)}): whether the classes are {label} or {few(outer)} is not known; "
        "move the images of each class into one folder, or name the classes in a table (data.labels)"
    )


def _require_no_loose_split(path: Path, paths: Iterable[str]) -> None:
    """Raises `UserError` where images lie directly in folders of an undivided root that have the name of a split."""
    folders = {relative.rpartition("/")[0] for relative in paths}
    if all(_is_split(folder, *SPLITS) for folder in folders):
        loose, where = len(list(paths)), ", ".join(str(path / folder) for folder in sorted(folders))
        raise UserError(f"found {loose} images directly in {where}; put each class in a folder of its own")
    if suspects := sorted(folder for folder in folders if _is_split(folder, VAL, TEST)):
        raise UserError(
            f"{path} has {few(suspects)} with images but without class folders, beside other class folders: whether it is a split "
            "or a class is not known; move it out of the folder, or rename it if it is a class"
        )


def _is_split(name: str, *groups: Sequence[str]) -> bool:
    return any(find_split(name, group) for group in groups)


def _labelled(
    title: str, data: FilePaths | TarFiles, labels: Sequence[str], request: Request, notes: Iterable[str]
) -> ImageSource:
    names = natural_order(labels)
    index = {name: i for i, name in enumerate(names)}
    return image_source(title, data, names, [index[label] for label in labels], request, notes)


def _open_tar(path: Path, request: Request) -> ImageSource:
    if path.is_file() and path.suffix != ".tar":
        raise UserError(f"expected a folder or a .tar, got {path}")
    tar = TarFiles(str(path))
    notes = tar.left_out.notes(str(path))
    if not len(tar):
        raise UserError("; ".join([f"no images in {path}", *notes]))
    labels, layout_notes = label_by_folder(str(path), [tar.folder(row) for row in range(len(tar))])
    source = _labelled(str(path), tar, labels, request, (*layout_notes, *notes))
    return source.select(np.array(sorted(range(len(tar)), key=lambda row: (source.target(row), tar.filename(row)))))


def _visible(folder: str) -> list[os.DirEntry[str]]:
    return [entry for entry in entries(folder) if not is_hidden(entry.name)]
