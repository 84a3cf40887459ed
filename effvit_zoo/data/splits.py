"""Where images come from: one root string opens an embedded set, a folder, a tar or whatever timm's `create_dataset` reads.

A root is one of
  builtin:fashion-mnist-mini       10,000 + 2,000 images that ship with the package (assets/README.md)
  builtin:fashion-mnist[@FOLDER]   all 60,000 + 10,000: from FOLDER, else $EFFVIT_ZOO_DATA, else Debian's package, else torchvision
  FOLDER                           one folder a class, or train and val folders of such; tars may stand for folders
  FILE.tar                         a tar of class folders
  torch/NAME[@FOLDER]  hfds/NAME[@CACHE]  hfids/NAME[@CACHE]  tfds/NAME[@FOLDER]  wds/FOLDER     with timm's meaning
Map-style roots give an `ImageSource`, streaming ones (hfids, tfds, wds) a `StreamSource`; both give untransformed PIL images.

Deliberate differences from timm 1.0.31 (`timm.data.readers`, Apache-2.0), whose class order and leaf-folder names are kept:
hidden and system files are left out, more file types are read, an undecodable image is a `BadImage` and not silently another
sample, pictures become RGB by `effvit_zoo.images`, and the columns of a Hugging Face data set are found by their types.
"""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torchvision.datasets import FashionMNIST

from ..errors import UserError, unknown_choice
from .images import IMAGE_SUFFIXES, BadImage, open_image, to_rgb
from .streams.shards import SEQUENCES, ShardSequence

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"  # Debian's package dataset-fashion-mnist
TILE, TILES_PER_ROW = 28, 100  # the embedded mosaic: pixels a tile's side, tiles a row
MINI_IMAGES_PER_CLASS = {"train": 1000, "test": 200}  # in the mosaic's order: train before test, class by class
_SYSTEM_FOLDERS = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information"})
_SPLIT_SYNONYMS = (("train", "training"), ("val", "validation", "valid", "eval", "evaluation"), ("test", "testing"))


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Images with a class each, by index. Picklable; arrays throughout, so that forked loader workers share them.

    Attributes:
        title: Folder or readable name of the split.
        data: `data[row]` is a uint8 array (H, W) or (H, W, 3), a PIL image, an open file, or a tuple that starts with one:
            arrays, torchvision's data sets, timm's readers and `FilePaths` all are of this kind.
        class_names: Name of each class index.
        targets: (N,) int32, the class index of each image, known without decoding.
        img_mode: "RGB" or "L".
        rows: (N,) int64, where in `data` each image is; None when this is all of it.
    """

    title: str
    data: Any
    class_names: tuple[str, ...]
    targets: np.ndarray
    img_mode: str = "RGB"
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def target(self, index: int) -> int:
        """Class index of an image, without decoding it."""
        return int(self.targets[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        """An image, fully decoded, and its class index. Raises `BadImage`."""
        row, target = self._row(index), self.target(index)
        try:
            return _picture(self.data[row], self.img_mode), target
        except Exception as error:  # tars, arrow tables and torchvision have their own for damaged data
            raise BadImage(self.name(index), _reason(error)) from error

    def name(self, index: int) -> str:
        """Path or readable id of an image, for messages and reports."""
        row = self._row(index)
        filename = self.data.filename(row) if hasattr(self.data, "filename") else None
        return os.path.join(self.title, filename) if filename else f"{self.title}[{row}]"

    def select(self, keep: np.ndarray) -> ImageSource:
        """The images of these indices."""
        return replace(self, targets=self.targets[keep], rows=keep if self.rows is None else self.rows[keep])

    def _row(self, index: int) -> int:
        position = range(len(self))[index]
        return position if self.rows is None else int(self.rows[position])

    def _split_key(self, index: int) -> bytes:
        # what a random split hangs on must not depend on where the data set lies, nor cost a read
        return self.data.packed(self._row(index)) if isinstance(self.data, FilePaths) else str(index).encode()


class FilePaths:
    """Files below a folder. One block of bytes: a list of a million strings would be copied into each forked worker."""

    def __init__(self, folder: str, relative: Sequence[str]) -> None:
        encoded = [os.fsencode(path) for path in relative]
        self.folder = folder
        self.ends = np.cumsum([len(path) for path in encoded])
        self.block = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def packed(self, row: int) -> bytes:
        return self.block[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes()

    def filename(self, row: int) -> str:
        return os.fsdecode(self.packed(row))

    def __getitem__(self, row: int) -> Any:
        return open(os.path.join(self.folder, self.filename(row)), "rb")


class TarFiles:
    """timm's tar reader, with names that say which tar an image is in."""

    def __init__(self, path: str) -> None:
        self.reader = ReaderImageInTar(path, cache_tarfiles=False)  # an open tar can be neither shared nor pickled

    def filename(self, row: int) -> str:
        member, tar, _ = self.reader.samples[row]
        return os.path.join(tar or "", member.path)

    def __getitem__(self, row: int) -> Any:
        return self.reader[row]


class StreamSource:
    """A streaming data set of (PIL image, class index).

    Attributes:
        class_names: Name of each class index.
        sequence: Its samples by place, each once per epoch; None where timm shares out whole shards over processes and loader
            workers: in tfds, and in remote tars without an _info.json.
        num_samples: Images in the whole split, None when unknown.
    """

    def __init__(
        self,
        title: str,
        dataset: Any,
        class_names: Iterable[str],
        img_mode: str = "RGB",
        sequence: ShardSequence | None = None,
    ) -> None:
        self.title, self.dataset, self.img_mode, self.sequence = title, dataset, img_mode, sequence
        self.class_names = tuple(class_names)
        self.num_samples: int | None = (sequence or dataset.reader).num_samples or None
        self.new_index: np.ndarray | None = None  # class index in the data -> in `class_names`, -1 is left out
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass that epoch's shuffle; call it in the main process."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def samples_per_process(self, num_workers: int, batch_size: int) -> int:
        """Samples that timm gives this process in an epoch where it does the sharing, 0 when unknown. Call it before the first pass.

        In training, timm fills up the share of each of `num_workers` loader workers to whole batches of `batch_size`.
        """
        self.dataset.set_loader_cfg(num_workers=num_workers)
        self.dataset.reader.batch_size = batch_size
        return len(self.dataset)

    def read(self, low: int, high: int, skip: int = 0) -> Iterator[tuple[Image.Image | BadImage | None, int]]:
        """What is at the places [low, high) of this epoch's sequence, without the first `skip`: images and class indices.

        In the place of an unreadable image is what is wrong with it, in that of one whose class is left out None, -1. Without a
        `sequence` the places are those that timm gives to this worker, whatever `low` and `high` are.
        """
        if self.sequence is not None:
            items = self.sequence.read(self.epoch, low, high, skip)
        else:
            items = itertools.islice(self.dataset, skip, None)
        for place, (item, target) in enumerate(items, low + skip):
            if isinstance(item, BadImage):
                yield item, -1
                continue
            target = int(target if self.new_index is None or target < 0 else self.new_index[target])
            if target < 0:
                yield None, -1
                continue
            try:
                yield _picture(item, self.img_mode), target
            except Exception as error:  # as in ImageSource.load
                yield BadImage(f"{self.title}[{place}]", _reason(error)), target

    def __iter__(self) -> Iterator[tuple[Image.Image | BadImage, int]]:
        """All images of the epoch and their class indices; in the place of an unreadable image, what is wrong with it."""
        for item, target in self.read(0, self.num_samples or 0):
            if item is not None:
                yield item, target


Source = ImageSource | StreamSource


@dataclass(frozen=True)
class DataSplits:
    """What a run trains and validates on; both sides have the same classes in the same order."""

    train: Source
    val: Source
    class_names: tuple[str, ...]


def _picture(item: Any, img_mode: str) -> Image.Image:
    item = item[0] if isinstance(item, tuple) else item
    if hasattr(item, "read"):
        with item as file:
            image = open_image(file)
    else:
        image = to_rgb(item if isinstance(item, Image.Image) else Image.fromarray(item))
    return image if image.mode == img_mode else image.convert(img_mode)


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, BadImage) else getattr(error, "strerror", None) or _one_line(error)


# Kinds of roots


@dataclass(frozen=True)
class _Request:
    root: str
    kind: str
    name: str
    folder: str | None
    img_mode: str
    download: bool
    seed: int
    training: bool = False


class _Kind(NamedTuple):
    splits: Callable[[_Request], Sequence[str]]  # names that exist, empty when unknown or when the root is one split
    open: Callable[[_Request, str | None], Source]  # the split of that name, None is all there is
    modules: tuple[str, ...] = ()  # what must be importable,
    package: str = ""  # and what to `pip install` for it
    free_form: bool = True  # split names have a grammar of their own, e.g. "train[:10%]" or "train-{0..9}.tar"


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in an idx file (MNIST's format), gzipped or not. Raises `UserError` when it is not one."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read()
        dims = data[3]
        shape = tuple(int(n) for n in np.frombuffer(data, ">u4", count=dims, offset=4))
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"cannot read {path} as an idx file: {_one_line(error)}") from error


def read_fashion_mnist(folder: str, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Images (N, 28, 28) and labels (N,) of the "train" or "test" idx files in `folder`, None if they are not there."""
    stem = {"train": "train", "test": "t10k"}[split]
    for place in (Path(folder), Path(folder, "fashion-mnist"), Path(folder, "FashionMNIST", "raw")):
        for suffix in (".gz", ""):
            paths = [place / f"{stem}-{part}-ubyte{suffix}" for part in ("images-idx3", "labels-idx1")]
            if all(path.is_file() for path in paths):
                return read_idx(paths[0]), read_idx(paths[1])
    return None


def _cache_folder() -> str:
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "effvit_zoo"))


def _fashion_mnist(request: _Request, split: str) -> tuple[np.ndarray, np.ndarray]:
    for folder in [request.folder] if request.folder else [os.environ.get("EFFVIT_ZOO_DATA"), DEBIAN_FOLDER]:
        if folder and (found := read_fashion_mnist(folder, split)):
            return found
    if request.folder:
        raise UserError(f"{request.folder} does not hold Fashion-MNIST's files, e.g. train-images-idx3-ubyte.gz")
    try:
        dataset = FashionMNIST(_cache_folder(), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            "Fashion-MNIST was not found: set EFFVIT_ZOO_DATA to (or write builtin:fashion-mnist@) a folder with its idx "
            f"files, install Debian's package dataset-fashion-mnist, or go online for torchvision ({_one_line(error)})"
        ) from error
    return dataset.data.numpy(), dataset.targets.numpy()


def _fashion_mnist_mini(request: _Request, split: str) -> tuple[np.ndarray, np.ndarray]:
    with files("effvit_zoo").joinpath("assets", "fashion_mnist_mini.png").open("rb") as file:
        mosaic = np.asarray(Image.open(file))
    tiles = mosaic.reshape(-1, TILE, TILES_PER_ROW, TILE).swapaxes(1, 2).reshape(-1, TILE, TILE)  # (12000, 28, 28)
    labels = np.repeat(np.arange(10), MINI_IMAGES_PER_CLASS[split])
    return (tiles[: len(labels)] if split == "train" else tiles[-len(labels) :]), labels


_BUILTIN = {"fashion-mnist-mini": _fashion_mnist_mini, "fashion-mnist": _fashion_mnist}


def _builtin_splits(request: _Request) -> Sequence[str]:
    if request.name not in _BUILTIN:
        raise unknown_choice("embedded data set", request.name, tuple(_BUILTIN))
    return ("train", "test")


def _open_builtin(request: _Request, split: str | None) -> ImageSource:
    images, labels = _BUILTIN[request.name](request, split or "train")
    return _source(f"{request.name} {split}", images, FashionMNIST.classes, labels, request)


def _folder_splits(request: _Request) -> Sequence[str]:
    """Children of the root that can be splits: tars and folders of folders. A class that is called train is neither."""
    entries = [] if os.path.isfile(request.root) else _entries(request.root)
    tars = [entry.name for entry in entries if entry.name.endswith(".tar")]
    folders = [entry for entry in entries if entry.is_dir()]
    splits = tars + [entry.name for entry in folders if any(inner.is_dir() for inner in _entries(entry.path))]
    if _find_split("train", splits):  # images without classes beside it: a mistake in val, often meant in test
        splits += [entry.name for entry in folders if entry.name not in splits and _find_split("val", [entry.name])]
    return splits


def _open_folder(request: _Request, split: str | None) -> ImageSource:
    path = Path(request.root, split or "")
    entries = [] if path.is_file() else _entries(str(path))
    if path.is_file() or (any(e.name.endswith(".tar") for e in entries) and not any(e.is_dir() for e in entries)):
        return _open_tar(path, request)
    paths, empty = _scan(str(path))
    folders = {relative.rpartition("/")[0] for relative in paths}
    if split is None and all(_find_split(folder, sum(_SPLIT_SYNONYMS, ())) for folder in folders):
        loose, where = len(paths), ", ".join(str(path / folder) for folder in sorted(folders))
    else:
        loose, where = sum("/" not in relative for relative in paths), str(path)
    if paths and loose:
        raise UserError(f"found {loose} images directly in {where}; put each class in a folder of its own")
    if not paths:
        raise UserError(f"no images in {path}: expected a folder for each class, with {' '.join(IMAGE_SUFFIXES)}")
    if empty:
        raise UserError(f"class folders without images in {path}: {_few(empty)}")
    labels = [relative.split("/")[-2] for relative in paths]  # the innermost folder, as in timm
    names = _natural_order(labels)
    index = {name: i for i, name in enumerate(names)}
    return _source(str(path), FilePaths(str(path), paths), names, [index[label] for label in labels], request)


def _open_tar(path: Path, request: _Request) -> ImageSource:
    if path.is_file() and path.suffix != ".tar":
        raise UserError(f"expected a folder or a .tar, got {path}")
    try:
        tar = TarFiles(str(path))
    except ValueError as error:
        raise UserError(f"no images in {path}") from error
    targets = tar.reader.targets
    source = _source(str(path), tar, _by_index(tar.reader.class_name_to_idx), targets, request)
    # timm's order is that of the file system, where files of several tars have the same name
    rows = sorted((target, tar.filename(row), row) for row, target in enumerate(targets.tolist()))
    return source.select(np.array([row for _, name, row in rows if not _is_junk(os.path.basename(name))]))


def _open_torch(request: _Request, split: str | None) -> ImageSource:
    root = request.folder or _cache_folder()
    dataset = create_dataset(f"torch/{request.name}", root=root, split=split or "", download=request.download)
    # ImageNet's words are not unique, its synsets are; INaturalist has neither `classes` nor `targets`
    names = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None) or dataset.all_categories
    targets = np.asarray(dataset.targets if hasattr(dataset, "targets") else [target for target, _ in dataset.index])
    targets = targets if targets.ndim == 1 else targets[:, 0]  # a row of QMNIST has the class first
    return _source(f"{request.root} {split}", dataset, names, targets, request)


def _hub_splits(request: _Request) -> Sequence[str]:
    import datasets

    return datasets.get_dataset_split_names(request.name)


def _hub_keys(request: _Request) -> dict[str, Any]:
    """The columns of image and class: the only ones of their type, where they have not the names that timm expects."""
    import datasets

    features = datasets.load_dataset_builder(request.name, cache_dir=request.folder).info.features or {}
    keys: dict[str, Any] = {}
    for key, usual, kind in (("input_key", "image", datasets.Image), ("target_key", "label", datasets.ClassLabel)):
        columns = [name for name, feature in features.items() if isinstance(feature, kind)]
        if columns and usual not in features:
            if len(columns) > 1:
                raise UserError(
                    f"{request.root} has several columns of {kind.__name__}: {_few(columns)}; expected {usual}"
                )
            keys[key] = columns[0]
    return keys


def _open_hfds(request: _Request, split: str | None) -> ImageSource:
    name = f"hfds/{request.name}"
    reader = create_dataset(name, root=request.folder, split=split or "", **_hub_keys(request)).reader
    labels = np.asarray(reader.dataset.select_columns([reader.label_key]).with_format("numpy")[:][reader.label_key])
    names: Sequence[str] = _by_index(reader.class_to_idx)
    if labels.dtype.kind in "OUS" and labels.ndim == 1 and all(isinstance(label, str) for label in labels):
        names = _natural_order(labels)
        index = {name: i for i, name in enumerate(names)}
        labels = np.array([index[label] for label in labels])
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(labels) == 0 or labels.min() < 0:
        raise UserError(f"expected one class for each image in {request.root} {split}, column {reader.label_key}")
    names = names or [str(i) for i in range(labels.max() + 1)]
    return _source(f"{request.root} {split}", reader, names, labels, request)


def _tfds_splits(request: _Request) -> Sequence[str]:
    import tensorflow_datasets

    return list(tensorflow_datasets.builder(request.name, data_dir=request.folder).info.splits)


def _wds_info(request: _Request) -> dict[str, Any]:
    folder = Path(request.folder or "")
    if ":" not in str(folder) and not folder.is_dir():  # what has a colon is a URL or a pipe, which timm opens
        raise UserError(f"no such folder: {folder}")
    paths = [folder / name for name in ("_info.json", "info.json")]
    return next((json.loads(path.read_text()) for path in paths if path.is_file()), {})


def _open_stream(request: _Request, split: str | None) -> StreamSource:
    # hfids cannot always tell how many there are: "train|5000" says so, in the way of wds
    plain, _, count = (split or "").partition("|") if request.kind == "hfids" else (split or "", "", "")
    dataset = create_dataset(
        f"{request.kind}/{request.name}",
        root=request.folder,
        split=plain,
        is_training=request.training,
        seed=request.seed,
        download=request.download,
        num_samples=int(count) if count else None,
        input_img_mode="",  # as stored: effvit_zoo.images converts
        **(_hub_keys(request) if request.kind == "hfids" else {}),
    )
    names: Sequence[str] = _by_index(dataset.reader.class_to_idx)
    if not names and request.kind == "wds":
        names = _wds_info(request).get("class_names", ())
    make_sequence = SEQUENCES.get(request.kind)
    sequence = make_sequence(dataset.reader) if make_sequence else None
    said = dataset.reader.num_samples if request.kind == "wds" else int(count or 0)
    if sequence is not None and said not in (0, sequence.num_samples):
        raise UserError(f"{request.root} {split} is said to have {said} images, its shards hold {sequence.num_samples}")
    return StreamSource(f"{request.root} {split}", dataset, names, request.img_mode, sequence)


_KINDS = {
    "folder": _Kind(_folder_splits, _open_folder, free_form=False),
    "builtin": _Kind(_builtin_splits, _open_builtin, free_form=False),
    "torch": _Kind(lambda request: ("train", "val"), _open_torch),
    "hfds": _Kind(_hub_splits, _open_hfds, ("datasets",), "datasets"),
    "hfids": _Kind(_hub_splits, _open_stream, ("datasets",), "datasets"),
    "tfds": _Kind(_tfds_splits, _open_stream, ("tensorflow", "tensorflow_datasets"), "tensorflow tensorflow-datasets"),
    "wds": _Kind(
        lambda request: list(_wds_info(request).get("splits", ())), _open_stream, ("webdataset",), "webdataset"
    ),
}


# Names, classes and files


def _source(title: str, data: Any, class_names: Iterable[str], targets: Any, request: _Request) -> ImageSource:
    return ImageSource(title, data, tuple(class_names), np.asarray(targets, dtype=np.int32), request.img_mode)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _natural_order(names: Iterable[str]) -> list[str]:
    # as timm: numbers as numbers, case ignored; then by the name itself, where that leaves two equal
    def key(name: str) -> tuple[list[int | str], str]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name

    return sorted(set(names), key=key)


def _by_index(class_to_idx: Mapping[str, int]) -> tuple[str, ...]:
    """Names in the order of their indices. Several may share an index, which then goes by the first."""
    names: dict[int, str] = {}
    for name, index in class_to_idx.items():
        names.setdefault(index, name)
    if sorted(names) != list(range(len(names))):
        raise UserError(f"class indices must be 0 to n-1 without gaps, got {_few(map(str, sorted(names)))}")
    return tuple(names[index] for index in range(len(names)))


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _SYSTEM_FOLDERS


def _entries(folder: str) -> list[os.DirEntry[str]]:
    if not os.path.isdir(folder):
        raise UserError(f"no such folder: {folder}")
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not _is_junk(entry.name)), key=lambda entry: entry.name)


def _scan(folder: str) -> tuple[list[str], list[str]]:
    """Relative paths of the images below `folder`, and of the innermost folders that have none; both sorted."""
    paths: list[str] = []
    empty: list[str] = []
    seen = {os.path.realpath(folder)}  # each real folder is read once: links may go round in circles

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


def _find_split(wanted: str, names: Iterable[str]) -> str | None:
    """The one among `names` that is `wanted` or a synonym of it, whatever its case, with or without .tar."""
    by_stem = {name.casefold().removesuffix(".tar"): name for name in names}
    wanted = wanted.casefold().removesuffix(".tar")
    synonyms = next((group for group in _SPLIT_SYNONYMS if wanted in group), ())
    return next((by_stem[name] for name in (wanted, *synonyms) if name in by_stem), None)


def _choose_split(request: _Request, wanted: str, names: Sequence[str]) -> str | None:
    """What to open for `wanted`; None where the root is not divided. "auto" is val, else test."""
    if wanted == "auto":
        return _find_split("val", names) or _find_split("test", names)
    found = _find_split(wanted, names)
    if found or (request.kind == "folder" and _find_split(wanted, ("train", "val"))):
        return found
    if not _KINDS[request.kind].free_form:
        raise UserError(f"no split {wanted!r} in {request.root}: found {_few(names) or 'none'}")
    return wanted


def _relabel(source: Source, class_to_idx: Mapping[str, int]) -> Source:
    """`source` with these class indices; classes that are not among them are left out, as timm does.

    Where the data has numbers in place of names, or says nothing, number n gets the nth name.
    """
    names, old = _by_index(class_to_idx), source.class_names
    nameless = old == tuple(str(i) for i in range(len(old))) and len(old) <= len(names)
    if nameless and not any(name in class_to_idx for name in old):
        new_index = np.arange(len(names), dtype=np.int32)
    else:
        new_index = np.array([class_to_idx.get(name, -1) for name in old], dtype=np.int32)
    if (new_index < 0).all():
        raise UserError(f"no class of {source.title} ({_few(old)}) is in the class map ({_few(names)})")
    if isinstance(source, StreamSource):
        source.class_names, source.new_index = names, new_index
        return source
    relabelled = replace(source, targets=new_index[source.targets], class_names=names)
    return relabelled.select(np.flatnonzero(relabelled.targets >= 0))


def _hold_out(source: ImageSource, fraction: float, seed: int) -> tuple[ImageSource, ImageSource]:
    """Splits off `fraction` of each class: at least one image, never all.

    Ranked by a hash of seed and relative path, an image's side depends neither on the order of the file system nor on a
    random generator's version, and adding images moves few of the others.
    """
    hashes = (blake2b(source._split_key(i), digest_size=8, key=str(seed).encode()) for i in range(len(source)))
    ranks = np.frombuffer(b"".join(each.digest() for each in hashes), dtype=">u8")
    in_val = np.zeros(len(source), dtype=bool)
    for members in np.split(np.lexsort((ranks, source.targets)), np.cumsum(np.bincount(source.targets))[:-1]):
        in_val[members[: min(max(round(len(members) * fraction), 1), len(members) - 1)]] = True
    if not in_val.any():
        raise UserError(f"every class of {source.title} has a single image: none can be held out for validation")
    return source.select(np.flatnonzero(~in_val)), source.select(np.flatnonzero(in_val))


# The front door


@contextmanager
def _user_errors(root: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each client library has its own; what the user can mend is the root or the split
        raise UserError(f"cannot open {root}: {_one_line(error)}") from error


def _parse(root: str | os.PathLike[str], img_mode: str, download: bool, seed: int) -> _Request:
    text = os.path.expanduser(os.fspath(root))
    kind, _, name = text.partition(":" if text.startswith("builtin:") else "/")
    kind, folder = kind.lower(), None
    if kind not in _KINDS or kind in ("folder", text):
        kind, name = "folder", text
    elif kind == "wds":
        folder = os.path.expanduser(name)
    else:
        name, _, folder = name.partition("@")
        folder = os.path.expanduser(folder) or None
    if img_mode not in ("RGB", "L"):
        raise UserError(f"expected img_mode RGB or L, got {img_mode!r}")
    if any(importlib.util.find_spec(module) is None for module in _KINDS[kind].modules):
        raise UserError(f"{text} needs another package: pip install {_KINDS[kind].package}")
    return _Request(text, kind, name, folder, img_mode, download, seed)


def _open(request: _Request, split: str | None, class_map: Mapping[str, int] | str | None) -> Source:
    with _user_errors(request.root):
        source = _KINDS[request.kind].open(request, split)
        if class_map is not None:
            source = _relabel(source, load_class_map(class_map, request.root if request.kind == "folder" else ""))
    if not source.class_names:
        raise UserError(f"{request.root} does not name its classes: give a class_map, e.g. a .txt with one name a line")
    return source


def open_splits(
    root: str | os.PathLike[str],
    *,
    train_split: str = "train",
    val_split: str | None = "auto",
    val_fraction: float = 0.1,
    seed: int = 0,
    class_map: Mapping[str, int] | str | None = None,
    download: bool = False,
    img_mode: str = "RGB",
) -> DataSplits:
    """Opens what a run trains and validates on; decodes nothing.

    Args:
        root: See the head of this file.
        train_split: Name of the training split, a synonym will do. Where timm reads, its grammar holds, e.g. "train[:10%]"
            for hfds and "train-{000..009}.tar|12345" for shards of 12345 images without an _info.json.
        val_split: Name of the validation split. "auto" takes val (or validation, valid, eval), else test, else holds out
            part of the training images; None always does the last.
        val_fraction: Share of each class to hold out. A class of two images or more is on both sides.
        seed: Decides which images are held out, and the order of streams.
        class_map: Class name -> index, or a .txt with one name a line; classes that it does not name are left out.
        download: Lets torchvision, datasets and tfds fetch what is missing. Of several processes, one should open first.
        img_mode: "RGB" or "L".

    Raises:
        UserError: One line that says what is missing, empty or contradictory.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"expected val_fraction between 0 and 1, both excluded, got {val_fraction}")
    request = _parse(root, img_mode, download, seed)
    with _user_errors(request.root):
        names = _KINDS[request.kind].splits(request)
    train_name = _choose_split(request, train_split, names)
    val_name = None if val_split is None else _choose_split(request, val_split, names)
    train = _open(replace(request, training=True), train_name, class_map)
    if len(train.class_names) < 2:
        raise UserError(f"only one class in {train.title}: {train.class_names[0]}; expected at least two")
    val: Source
    if val_name is not None:
        val = _open(request, val_name, class_map)
    elif isinstance(train, ImageSource):
        train, val = _hold_out(train, val_fraction, seed)
    else:
        raise UserError(f"nothing can be held out of a stream: name a val_split of {request.root}")
    if train.class_names != val.class_names:
        pairs = (("train", train.class_names, val.class_names), ("val", val.class_names, train.class_names))
        only = [f"only in {side}: {_few(missing)}" for side, a, b in pairs if (missing := [n for n in a if n not in b])]
        raise UserError(f"train and val of {request.root} have different classes; {'; '.join(only)}")
    return DataSplits(train, val, train.class_names)


def open_source(
    root: str | os.PathLike[str],
    split: str = "auto",
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    class_map: Mapping[str, int] | str | None = None,
    download: bool = False,
    img_mode: str = "RGB",
) -> Source:
    """Opens one split, to validate on or to look at; raises and takes what `open_splits` does.

    Args:
        split: A split's name. "auto" is val, else test, else, in an undivided folder, all of it; there "train" and "val"
            are the parts that `open_splits` makes with the same seed and fraction.
    """
    request = _parse(root, img_mode, download, seed)
    with _user_errors(request.root):
        names = _KINDS[request.kind].splits(request)
    chosen = _choose_split(request, split, names)
    if chosen is None and request.kind != "folder":
        raise UserError(f"name a split of {request.root}: {_few(names) or 'it does not say which it has'}")
    if chosen is None and split != "auto":
        splits = open_splits(
            root, val_split=None, val_fraction=val_fraction, seed=seed, class_map=class_map, img_mode=img_mode
        )
        return splits.train if _find_split(split, ("train",)) else splits.val
    return _open(request, chosen, class_map)
