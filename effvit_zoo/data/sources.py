"""Data with random access: images and their targets by index, undecoded until they are loaded."""

from __future__ import annotations

import io
import os
import posixpath
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from .images import BadImage, decode, decoding
from .inventory import LeftOut
from .streams.source import StreamSource


class Source(Protocol):
    """Images with targets, by index. Picklable. Subclass it to inherit the defaults.

    Attributes:
        title: Folder or readable name of the split.
        notes: What the user should know about how the data was read and what was left out, a line each.
    """

    title: str
    notes: tuple[str, ...] = ()

    @property
    def ranked_by_name(self) -> bool:
        """Whether a held-out split ranks images by their relative names. Otherwise it ranks them by index, and the held-out part can
        be found again in unchanged data only."""
        return True

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, Any]:
        """An image, fully decoded, and its target. Raises `BadImage`."""
        ...

    def name(self, index: int) -> str:
        """Path or readable id of an image, for messages and reports."""
        ...

    def relative_name(self, index: int) -> bytes:
        """Name of an image that does not depend on where the data lies, with "/" as separator. Must not open the file."""
        ...

    def select(self, rows: np.ndarray) -> Source:
        """The images of these indices."""
        ...

    def groups(self) -> np.ndarray | None:
        """(N,) integers from 0: a held-out split takes its share of each group, e.g. of each class; None for one group."""
        return None

    def group_name(self, group: int) -> str:
        """Name of a group, the same wherever the data lies."""
        return str(group)

    def image(self, index: int) -> tuple[str, Image.Image] | None:
        """Name and image for a report; None where it can't be read."""
        try:
            return self.name(index), self.load(index)[0]
        except BadImage:
            return None


class Cache(Protocol):
    """Decoded images by row; see cache.py."""

    def get(self, row: int) -> Image.Image | None: ...

    def put(self, row: int, image: Image.Image) -> None: ...


@dataclass(frozen=True, eq=False)
class ImageSource(Source):
    """Images with one class each. Arrays throughout, so that forked loader workers share memory.

    Attributes:
        title: Folder or readable name of the split.
        data: `data[row]` is anything that `images.decode` takes: arrays, torchvision's data sets, timm's readers and `FilePaths`
            all do.
        class_names: Name of each class index.
        targets: (N,) int32, the class index of each image, known without decoding.
        img_mode: "RGB" or "L".
        rows: (N,) int64, row in `data` of each image; None when this is all of it.
        notes: As in `Source`.
        cache: Decoded images by row; None for none.
    """

    title: str
    data: Any
    class_names: tuple[str, ...]
    targets: np.ndarray
    img_mode: str = "RGB"
    rows: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    cache: Cache | None = None

    @property
    def ranked_by_name(self) -> bool:
        return isinstance(self.data, FilePaths)

    def __len__(self) -> int:
        return len(self.targets)

    def target(self, index: int) -> int:
        """Class index of an image, without decoding it."""
        return int(self.targets[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        row = self._row(index)
        image = None if self.cache is None else self.cache.get(row)
        if image is None:
            with decoding(partial(self.name, index)):  # the name of a row of a table is in the table
                image = decode(self.data[row], self.img_mode)
            if self.cache is not None:
                self.cache.put(row, image)
        return image, self.target(index)

    def item(self, index: int) -> Any:
        """An image as `data` has it, without its target."""
        item = self.data[self._row(index)]
        return item[0] if isinstance(item, tuple) else item

    def name(self, index: int) -> str:
        row = self._row(index)
        filename = self.data.filename(row) if hasattr(self.data, "filename") else None
        return os.path.join(self.title, filename) if filename else f"{self.title}[{row}]"

    def relative_name(self, index: int) -> bytes:
        row = self._row(index)
        return self.data.packed(row) if isinstance(self.data, FilePaths | TarFiles) else str(row).encode()

    def select(self, rows: np.ndarray) -> ImageSource:
        return replace(self, targets=self.targets[rows], rows=rows if self.rows is None else self.rows[rows])

    def groups(self) -> np.ndarray:
        return self.targets

    def group_name(self, group: int) -> str:
        return self.class_names[group]

    def with_classes(self, class_names: tuple[str, ...], new_index: np.ndarray) -> ImageSource:
        """The same images with other class indices.

        Args:
            class_names: Name of each new class index.
            new_index: New index of each present class; images of a class with -1 are left out.
        """
        changed = replace(self, targets=new_index[self.targets].astype(np.int32), class_names=class_names)
        return changed.select(np.flatnonzero(changed.targets >= 0)) if (new_index < 0).any() else changed

    def size(self, index: int) -> int:
        """Size of an image file in bytes, of sources of files."""
        return self.data.size(self._row(index))

    def open(self, index: int) -> BinaryIO:
        """An image file, of sources of files."""
        return self.data[self._row(index)]

    def with_notes(self, *notes: str) -> ImageSource:
        """The same images with further notes."""
        return replace(self, notes=(*self.notes, *notes))

    def _row(self, index: int) -> int:
        position = range(len(self))[index]
        return position if self.rows is None else int(self.rows[position])


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

    def size(self, row: int) -> int:
        return os.path.getsize(os.path.join(self.folder, self.filename(row)))

    def __getitem__(self, row: int) -> BinaryIO:
        return open(os.path.join(self.folder, self.filename(row)), "rb")


class TarFiles:
    """Images in a tar, in the tars of a folder, and in tars inside of these. Nothing is unpacked.

    Attributes:
        left_out: The files that are not read.
    """

    def __init__(self, path: str) -> None:
        self.path, self.left_out = path, LeftOut()
        self.samples: list[tuple[str, tarfile.TarInfo | None, tarfile.TarInfo]] = []  # tar, tar inside of it, image
        is_file = os.path.isfile(path)
        for name in [""] if is_file else sorted(name for name in os.listdir(path) if name.endswith(".tar")):
            with tarfile.open(os.path.join(path, name) if name else path) as tar:
                self._add(tar, name, None)

    def _add(self, tar: tarfile.TarFile, name: str, child: tarfile.TarInfo | None) -> None:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is None:
                if not member.isdir():
                    self.left_out.add("not a regular file", os.path.join(name, member.path))
            elif child is None and member.path.lower().endswith(".tar"):
                with tarfile.open(fileobj=file) as inner:
                    self._add(inner, name, member)
            elif not self.left_out.add_file(posixpath.normpath(os.path.join(name, member.path))):
                self.samples.append((name, child, member))

    def __len__(self) -> int:
        return len(self.samples)

    def packed(self, row: int) -> bytes:
        return os.fsencode(posixpath.normpath(self.filename(row).replace(os.sep, "/")))

    def filename(self, row: int) -> str:
        name, _, member = self.samples[row]
        return os.path.join(name, member.path)

    def folder(self, row: int) -> str:
        """Path of an image's folder, in which tars count as folders; "" where it has none."""
        name, child, member = self.samples[row]
        tars = [name.removesuffix(".tar"), posixpath.basename(child.path)[:-4] if child else ""]
        path = posixpath.normpath(posixpath.join(*tars, posixpath.dirname(member.path).lstrip("/")))
        return "" if path == "." else path

    def size(self, row: int) -> int:
        return self.samples[row][2].size

    def read(self, row: int) -> bytes:
        """The bytes of an image file."""
        name, child, member = self.samples[row]
        with tarfile.open(os.path.join(self.path, name) if name else self.path) as tar:
            if child is None:
                return tar.extractfile(member).read()  # type: ignore[union-attr]
            with tarfile.open(fileobj=tar.extractfile(child)) as inner:
                return inner.extractfile(member).read()  # type: ignore[union-attr]

    def __getitem__(self, row: int) -> BinaryIO:
        return io.BytesIO(self.read(row))


AnySource = Source | StreamSource
"""What a split of data can be."""
