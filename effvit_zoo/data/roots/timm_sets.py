"""Data sets that timm's `create_dataset` opens: torchvision's, Hugging Face's, TensorFlow's and webdataset's.

Map-style roots (torch, hfds) give an `ImageSource`, streams (hfids, tfds, wds) a `StreamSource`. Deliberate difference from timm
1.0.31 (`timm.data.readers`, Apache-2.0): the columns of a Hugging Face data set are found by their types.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

from ...errors import UserError
from ..inventory import take_inventory
from ..sources import ImageSource
from ..streams.shards import SEQUENCES
from ..streams.source import StreamSource
from ._names import by_index, few, natural_order
from ._request import Request, cache_folder, image_source


def torch_splits(request: Request) -> Sequence[str]:
    return ("train", "val")


def open_torch(request: Request, split: str | None) -> ImageSource:
    root = request.folder or cache_folder()
    dataset = create_dataset(f"torch/{request.name}", root=root, split=split or "", download=request.download)
    if hasattr(dataset, "loader"):  # torchvision's own lays alpha on black, clips greys and drops the EXIF orientation
        dataset.loader = partial(open, mode="rb")
    # ImageNet's words are not unique, its synsets are; INaturalist has neither `classes` nor `targets`
    names = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None) or dataset.all_categories
    targets = np.asarray(dataset.targets if hasattr(dataset, "targets") else [target for target, _ in dataset.index])
    targets = targets if targets.ndim == 1 else targets[:, 0]  # a row of QMNIST begins with the class
    notes = _unread(dataset.root, len(targets)) if isinstance(dataset, ImageFolder) else ()
    return image_source(f"{request.root} {split}", dataset, names, targets, request, notes)


def _unread(folder: str, count: int) -> tuple[str, ...]:
    """Notes on a folder of which another library has read `count` images: fewer formats than this package."""
    inventory = take_inventory(folder)
    notes = inventory.left_out.notes(folder)
    if count < len(inventory.images):
        notes += (f"{count} of the {len(inventory.images)} images in {folder} are read; data.root={folder} reads all",)
    return notes


def hub_splits(request: Request) -> Sequence[str]:
    import datasets

    return datasets.get_dataset_split_names(request.name)


def _hub_keys(request: Request) -> dict[str, Any]:
    """The columns of image and class: the only ones of their type, where they don't have the names that timm expects."""
    import datasets

    features = datasets.load_dataset_builder(request.name, cache_dir=request.folder).info.features or {}
    keys: dict[str, Any] = {}
    for key, usual, kind in (("input_key", "image", datasets.Image), ("target_key", "label", datasets.ClassLabel)):
        columns = [name for name, feature in features.items() if isinstance(feature, kind)]
        if columns and usual not in features:
            if len(columns) > 1:
                raise UserError(
                    f"{request.root} has several columns of {kind.__name__}: {few(columns)}; expected {usual}"
                )
            keys[key] = columns[0]
    return keys


def open_hfds(request: Request, split: str | None) -> ImageSource:
    name = f"hfds/{request.name}"
    reader = create_dataset(name, root=request.folder, split=split or "", **_hub_keys(request)).reader
    labels = np.asarray(reader.dataset.select_columns([reader.label_key]).with_format("numpy")[:][reader.label_key])
    names: Sequence[str] = by_index(reader.class_to_idx)
    if labels.dtype.kind in "OUS" and labels.ndim == 1 and all(isinstance(label, str) for label in labels):
        names = natural_order(labels)
        index = {name: i for i, name in enumerate(names)}
        labels = np.array([index[label] for label in labels])
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(labels) == 0 or labels.min() < 0:
        raise UserError(f"expected one class for each image in {request.root} {split}, column {reader.label_key}")
    names = names or [str(i) for i in range(labels.max() + 1)]
    notes = take_inventory(request.name).left_out.notes(request.name) if os.path.isdir(request.name) else ()
    return image_source(f"{request.root} {split}", reader, names, labels, request, notes)


def tfds_splits(request: Request) -> Sequence[str]:
    import tensorflow_datasets

    return list(tensorflow_datasets.builder(request.name, data_dir=request.folder).info.splits)


def wds_splits(request: Request) -> Sequence[str]:
    return list(_wds_info(request).get("splits", ()))


def _wds_info(request: Request) -> dict[str, Any]:
    folder = Path(request.folder or "")
    if ":" not in str(folder) and not folder.is_dir():  # a colon marks a URL or a pipe, which timm opens
        raise UserError(f"no such folder: {folder}")
    paths = [folder / name for name in ("_info.json", "info.json")]
    return next((json.loads(path.read_text()) for path in paths if path.is_file()), {})


def open_stream(request: Request, split: str | None) -> StreamSource:
    # hfids does not always know the number of images: "train|5000" names it, as in wds
    plain, _, count = (split or "").partition("|") if request.kind == "hfids" else (split or "", "", "")
    dataset = create_dataset(
        f"{request.kind}/{request.name}",
        root=request.folder,
        split=plain,
        is_training=request.training,
        seed=0,  # a feed sets the run's: `StreamSource.set_seed`
        download=request.download,
        num_samples=int(count) if count else None,
        input_img_mode="",  # as stored: `images.decode` converts
        **(_hub_keys(request) if request.kind == "hfids" else {}),
    )
    names: Sequence[str] = by_index(dataset.reader.class_to_idx)
    if not names and request.kind == "wds":
        names = _wds_info(request).get("class_names", ())
    make_sequence = SEQUENCES.get(request.kind)
    sequence = make_sequence(dataset.reader) if make_sequence else None
    said = dataset.reader.num_samples if request.kind == "wds" else int(count or 0)
    if sequence is not None and said not in (0, sequence.num_samples):
        raise UserError(f"{request.root} {split} is said to have {said} images, its shards hold {sequence.num_samples}")
    return StreamSource(f"{request.root} {split}", dataset, names, request.img_mode, sequence)
