"""Image files as what a network expects: upright, three channels, eight bits.

Training, validation and prediction all decode through `decode` (`open_image` for a file by its name), so that an image means
the same everywhere: EXIF orientation applied, transparency composited on white, 16-bit and float greys scaled rather than
clipped, CMYK and palettes converted, the first frame of an animation. The one error is `BadImage`.
"""

from __future__ import annotations

import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError, one_line
from .file_types import HEAD, IMAGE_SUFFIXES, sniff
from .inventory import take_inventory

MODES = {1: "L", 3: "RGB"}  # Pillow's mode for a network's number of input channels

DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    ArithmeticError,
    EOFError,
    TypeError,
    RuntimeError,
    AssertionError,
    MemoryError,
    struct.error,
    zlib.error,
    tarfile.TarError,
    Image.DecompressionBombError,
)
"""What Pillow, archives and tables raise for damaged data."""


class BadImage(UserError):
    """A file that is not a readable image; `name` and `reason` say which and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read image {name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return type(self), (self.name, self.reason)  # loader workers send their errors through pickle


def decode_reason(error: Exception) -> str:
    """Why data could not be decoded, on one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a known format"
    return getattr(error, "strerror", None) or one_line(error)


@contextmanager
def decoding(name: str | Callable[[], str]) -> Iterator[None]:
    """Turns what decoders raise inside the block into a `BadImage`.

    Args:
        name: Name of the image, or a function that returns it, where finding the name is expensive.
    """
    try:
        yield
    except DECODE_ERRORS as error:
        raise BadImage(name if isinstance(name, str) else name(), decode_reason(error)) from error


def open_image(source: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Reads one image file completely into an upright 8-bit RGB image.

    Args:
        source: Path, or a binary file object positioned at the start of the image.
        name: Name for error messages; default the path.

    Raises:
        BadImage: The file is missing, empty, damaged, implausibly large, or not an image.
    """
    with decoding(name or str(source if isinstance(source, (str, Path)) else getattr(source, "name", "<bytes>"))):
        return _read(source)


def decode(item: Any, mode: str = "RGB") -> Image.Image:
    """An upright 8-bit image from an open file (which is closed), a PIL image, a uint8 array (H, W) or (H, W, 3), or a tuple that
    starts with one of them. Raises any of `DECODE_ERRORS`.

    Args:
        item: The image.
        mode: "RGB" or "L".
    """
    item = item[0] if isinstance(item, tuple) else item
    if hasattr(item, "read"):
        with item as file:
            image = _read(file)
    else:
        image = to_rgb(item if isinstance(item, Image.Image) else Image.fromarray(item))
    return image if image.mode == mode else image.convert(mode)


def _read(source: str | Path | BinaryIO) -> Image.Image:
    try:
        opened = Image.open(source)
    except Image.UnidentifiedImageError as error:
        if kind := sniff(_head(source)):
            raise ValueError(kind) from error
        raise
    with opened as image:
        image.load()
        return to_rgb(image)


def _head(source: str | Path | BinaryIO) -> bytes:
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            return file.read(HEAD)
    source.seek(0)
    return source.read(HEAD)


def find_images(paths: Sequence[str | Path], note: Callable[[str], object] | None = None) -> Iterator[Path]:
    """Files as given, and every image (by extension, any case) below the folders, sorted; hidden files are skipped.

    Args:
        paths: Files and folders.
        note: Called with a line that says what was left out of a folder.

    Raises:
        BadImage: A path does not exist, or a folder contains no image.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise BadImage(str(path), "there is no such file")
        if not path.is_dir():
            yield path
            continue
        inventory = take_inventory(str(path))
        notes = inventory.left_out.notes(str(path))
        if not inventory.images:
            raise BadImage(str(path), "; ".join([f"the folder contains no image ({' '.join(IMAGE_SUFFIXES)})", *notes]))
        for line in notes if note else ():
            note(line)
        yield from sorted(path / name for name in inventory.images)


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; a damaged EXIF block is ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except DECODE_ERRORS:
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as an upright 8-bit RGB image."""
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # detached from the file, which closes on return
    if image.mode.startswith(("I", "F")):
        return _scaled_grey(image).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        if image.mode in ("RGBa", "La"):  # premultiplied: Pillow converts each only to its plain form
            image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits, (H, W), to 8: Pillow's own conversion clips at 255 and would give a white image."""
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F":
        scale = 255.0 if pixels.max(initial=0) <= 1 else 1.0
    else:
        scale = 255 / max(65535, pixels.max(initial=0))  # "I" is how 16-bit PNG files arrive in older Pillow
    return Image.fromarray((pixels * scale).round().clip(0, 255).astype(np.uint8))
