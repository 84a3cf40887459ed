"""Folders of class folders, and tars of them.

Deliberate differences from timm 1.0.31 (`timm.data.readers`, Apache-2.0), whose class order and leaf-folder names are kept:
hidden and system files are skipped, and more file types are read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import UserError
from ..images import IMAGE_SUFFIXES
from ..sources import FilePaths, ImageSource, TarFiles
from ._names import SPLITS, by_index, few, find_split, natural_order
from ._request import Request, image_source

_SYSTEM_FOLDERS = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information"})


def splits(request: Request) -> Sequence[str]:
    """Children of the root that can be splits: tars and folders of folders. A class named "train" is neither."""
    entries = [] if os.path.isfile(request.root) else _entries(request.root)
    tars = [entry.name for entry in entries if entry.name.endswith(".tar")]
    folders = [entry for entry in entries if entry.is_dir()]
    found = tars + [entry.name for entry in folders if any(inner.is_dir() for inner in _entries(entry.path))]
    if find_split("train", found):  # images without class folders next to it: a mistake in val, often intended in test
        found += [entry.name for entry in folders if entry.name not in found and find_split("val", [entry.name])]
    return found


def open_split(request: Request, split: str | None) -> ImageSource:
    path = Path(request.root, split or "")
    entries = [] if path.is_file() else _entries(str(path))
    if path.is_file() or (any(e.name.endswith(".tar") for e in entries) and not any(e.is_dir() for e in entries)):
        return _open_tar(path, request)
    paths, empty = _scan(str(path))
    folders = {relative.rpartition("/")[0] for relative in paths}
    if split is None and all(find_split(folder, sum(SPLITS, ())) for folder in folders):
        loose, where = len(paths), ", ".join(str(path / folder) for folder in sorted(folders))
    else:
        loose, where = sum("/" not in relative for relative in paths), str(path)
    if paths and loose:
        raise UserError(f"found {loose} images directly in {where}; put each class in a folder of its own")
    if not paths:
        raise UserError(f"no images in {path}: expected a folder for each class, with {' '.join(IMAGE_SUFFIXES)}")
    if empty:
        raise UserError(f"class folders without images in {path}: {few(empty)}")
    labels = [relative.split("/")[-2] for relative in paths]  # the innermost folder, as in timm
    names = natural_order(labels)
    index = {name: i for i, name in enumerate(names)}
    return image_source(str(path), FilePaths(str(path), paths), names, [index[label] for label in labels], request)


def _open_tar(path: Path, request: Request) -> ImageSource:
    if path.is_file() and path.suffix != ".tar":
        raise UserError(f"expected a folder or a .tar, got {path}")
    try:
        tar = TarFiles(str(path))
    except ValueError as error:
        raise UserError(f"no images in {path}") from error
    targets = tar.reader.targets
    source = image_source(str(path), tar, by_index(tar.reader.class_name_to_idx), targets, request)
    # timm's order is the file system's where files of several tars have the same name
    rows = sorted((target, tar.filename(row), row) for row, target in enumerate(targets.tolist()))
    return source.select(np.array([row for _, name, row in rows if not _is_junk(os.path.basename(name))]))


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _SYSTEM_FOLDERS


def _entries(folder: str) -> list[os.DirEntry[str]]:
    if not os.path.isdir(folder):
        raise UserError(f"no such folder: {folder}")
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not _is_junk(entry.name)), key=lambda entry: entry.name)


def _scan(folder: str) -> tuple[list[str], list[str]]:
    """Relative paths of the images below `folder`, and of the innermost folders without images; both sorted."""
    paths: list[str] = []
    empty: list[str] = []
    seen = {os.path.realpath(folder)}  # each real folder is read once: links may form cycles

    def is_new(path: str) -> bool:
        known = len(seen)
        seen.add(os.path.realpath(path))
        return len(seen) > known

    def fail(error: OSError) -> None:
        raise error

    for where, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = [name for name in sorted(folders) if not _is_junk(name) and is_new(os.path.join(where, name))]
        prefix = "" if where == folder else os.path.relpath(where, folder).replace(os.sep, "/") + "/"
        images = [n for n in names if os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES and not _is_junk(n)]
        paths += [prefix + name for name in images]
        if prefix and not images and not folders:
            empty.append(prefix.rstrip("/"))
    return sorted(paths), sorted(empty)
