"""Fashion-MNIST: the subset that ships with the package, and the full set from a folder, Debian's package or torchvision."""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import FashionMNIST

from ...errors import UserError, one_line, unknown_choice
from ..sources import ImageSource
from ._request import Request, cache_folder, image_source

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"  # Debian's package dataset-fashion-mnist
TILE, TILES_PER_ROW = 28, 100  # the embedded mosaic: side of a tile in pixels, tiles per row
MINI_IMAGES_PER_CLASS = {"train": 1000, "test": 200}  # in the mosaic's order: train before test, class by class


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in an idx file (MNIST's format), gzipped or not. Raises `UserError` for any other file."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read()
        dims = data[3]
        shape = tuple(int(n) for n in np.frombuffer(data, ">u4", count=dims, offset=4))
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"cannot read {path} as an idx file: {one_line(error)}") from error


def read_fashion_mnist(folder: str, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Images (N, 28, 28) and labels (N,) of the "train" or "test" idx files in `folder`, None if they are not there."""
    stem = {"train": "train", "test": "t10k"}[split]
    for place in (Path(folder), Path(folder, "fashion-mnist"), Path(folder, "FashionMNIST", "raw")):
        for suffix in (".gz", ""):
            paths = [place / f"{stem}-{part}-ubyte{suffix}" for part in ("images-idx3", "labels-idx1")]
            if all(path.is_file() for path in paths):
                return read_idx(paths[0]), read_idx(paths[1])
    return None


def _full(request: Request, split: str) -> tuple[np.ndarray, np.ndarray]:
    for folder in [request.folder] if request.folder else [os.environ.get("EFFVIT_ZOO_DATA"), DEBIAN_FOLDER]:
        if folder and (found := read_fashion_mnist(folder, split)):
            return found
    if request.folder:
        raise UserError(f"{request.folder} does not hold Fashion-MNIST's files, e.g. train-images-idx3-ubyte.gz")
    try:
        dataset = FashionMNIST(cache_folder(), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            "Fashion-MNIST was not found: set EFFVIT_ZOO_DATA to (or write builtin:fashion-mnist@) a folder with its idx "
            f"files, install Debian's package dataset-fashion-mnist, or go online for torchvision ({one_line(error)})"
        ) from error
    return dataset.data.numpy(), dataset.targets.numpy()


def _mini(request: Request, split: str) -> tuple[np.ndarray, np.ndarray]:
    with files("effvit_zoo").joinpath("assets", "fashion_mnist_mini.png").open("rb") as file:
        mosaic = np.asarray(Image.open(file))
    tiles = mosaic.reshape(-1, TILE, TILES_PER_ROW, TILE).swapaxes(1, 2).reshape(-1, TILE, TILE)  # (12000, 28, 28)
    labels = np.repeat(np.arange(10), MINI_IMAGES_PER_CLASS[split])
    return (tiles[: len(labels)] if split == "train" else tiles[-len(labels) :]), labels


_BUILTIN = {"fashion-mnist-mini": _mini, "fashion-mnist": _full}


def splits(request: Request) -> Sequence[str]:
    if request.name not in _BUILTIN:
        raise unknown_choice("embedded data set", request.name, tuple(_BUILTIN))
    return ("train", "test")


def open_split(request: Request, split: str | None) -> ImageSource:
    images, labels = _BUILTIN[request.name](request, split or "train")
    return image_source(f"{request.name} {split}", images, FashionMNIST.classes, labels, request)
