"""Image files as what a network expects: upright, three channels, eight bits.

Training, validation and prediction all decode through `decode` (`open_image` for a file by its name), so that an image means
the same everywhere: EXIF orientation applied, transparency composited on white, greys of 16 and 32 bits scaled rather than
clipped, CMYK and palettes converted, the first frame of an animation. A file is what its content says, whatever its suffix. Damaged
metadata is ignored, damaged or missing pixels are not: a file that is cut off is refused. The one error is `BadImage`.
"""

from __future__ import annotations

import os
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from PIL.TiffImagePlugin import SAMPLEFORMAT

from ..errors import UserError, one_line
from .file_types import HEAD, IMAGE_SUFFIXES, sniff
from .inventory import take_inventory

MODES = {1: "L", 3: "RGB"}  # Pillow's mode for a network's number of input channels

PROGRAMS = ("EPS", "WMF")  # formats that Pillow leaves to other programs
WHITE = {"I": (255, 65535), "F": (1, 255, 65535)}
"""Pillow's mode -> values that can mean white; an image's is the smallest that none of its pixels exceeds, else its largest pixel. The
modes of 16 bits have 65535."""

# Pillow refuses a PNG for 1 MiB of text or colour profile, which programs that make or retouch pictures do write.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 64 * 2**20)
PngImagePlugin.MAX_TEXT_MEMORY = max(PngImagePlugin.MAX_TEXT_MEMORY, 128 * 2**20)
# Its warnings don't say which file they are about. Process-wide, because readers are threads and `catch_warnings` isn't made for them.
warnings.filterwarnings("ignore", module=r"PIL\.")

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


def open_image(source: str | Path | BinaryIO, name: str | None = None, mode: str = "RGB") -> Image.Image:
    """Reads one image file completely into an upright 8-bit image.

    Args:
        source: Path, or a binary file object positioned at the start of the image.
        name: Name for error messages; default the path.
        mode: "RGB" or "L".

    Raises:
        BadImage: The file is missing, empty, damaged, implausibly large, or not an image.
    """
    with decoding(name or str(source if isinstance(source, (str, Path)) else getattr(source, "name", "<bytes>"))):
        return decode(open(source, "rb") if isinstance(source, (str, Path)) else source, mode)


def decode(item: Any, mode: str = "RGB") -> Image.Image:
    """An upright 8-bit image from an open file (which is closed), a PIL image, an array, or a tuple that starts with one of them.
    Raises any of `DECODE_ERRORS`.

    Args:
        item: The image; arrays as `from_array` takes them.
        mode: "RGB" or "L".
    """
    item = item[0] if isinstance(item, tuple) else item
    if hasattr(item, "read"):
        with item as file:
            image = _read(file)
    else:
        image = to_rgb(item if isinstance(item, Image.Image) else from_array(item))
    return image if image.mode == mode else image.convert(mode)


def _read(file: BinaryIO) -> Image.Image:
    try:
        opened = Image.open(file)
    except Image.UnidentifiedImageError:
        if file.seek(0, os.SEEK_END) == 0:
            raise ValueError("the file is empty") from None
        file.seek(0)
        if kind := sniff(file.read(HEAD)):
            raise ValueError(kind) from None
        raise
    with opened as image:
        if image.format in PROGRAMS:
            raise ValueError(f"{image.format} files are drawings, expected pixels, e.g. PNG")
        image.load()
        return to_rgb(image)


def from_array(pixels: np.ndarray) -> Image.Image:
    """An array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) as an image: of uint8, of uint16 from 0 to 65535, or of floats from 0 to 1.
    Raises `ValueError`."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if not pixels.size or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ValueError(f"expected an array (H, W), (H, W, 3) or (H, W, 4), got {pixels.shape}")
    if pixels.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(pixels))
    kind, scale = pixels.dtype.kind, 255 / 65535
    if kind == "f":
        scale = 255.0
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(f"expected floats from 0 to 1, got {pixels.min():.4g} to {pixels.max():.4g}")
    elif kind == "b":
        scale = 255.0
    elif pixels.dtype != np.uint16:
        raise ValueError(f"expected an array of uint8, uint16 or floats, got {pixels.dtype}")
    return Image.fromarray((pixels.astype(np.float64) * scale).round().astype(np.uint8))


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
        if note is not None:
            for line in notes:
                note(line)
        yield from sorted(path / name for name in inventory.images)


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; a damaged EXIF block is ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except DECODE_ERRORS:
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as an upright 8-bit RGB image. Raises `ValueError` for grey values whose meaning isn't known."""
    is_unsigned = getattr(image, "tag_v2", {}).get(SAMPLEFORMAT) == (1,)  # Pillow's 32-bit mode is signed
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # detached from the file, which closes on return
    if image.mode.startswith(("I", "F")):
        return _scaled_grey(image, is_unsigned).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        if image.mode in ("RGBa", "La"):  # premultiplied: Pillow converts each only to its plain form
            image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _scaled_grey(image: Image.Image, is_unsigned: bool) -> Image.Image:
    """Greys of more than 8 bits, (H, W), to 8: Pillow's own conversion clips at 255 and would give a white image."""
    stored = np.asarray(image)
    pixels = (stored.view(np.uint32) if is_unsigned and stored.dtype == np.int32 else stored).astype(np.float64)
    is_number = np.isfinite(pixels)
    lowest, top = pixels.min(initial=0, where=is_number), pixels.max(initial=0, where=is_number)
    if lowest < 0:
        raise ValueError(f"its greys go from {lowest:.4g} to {top:.4g}: expected none below 0, which is black")
    white = next((value for value in WHITE.get(image.mode, (65535,)) if top <= value), top)
    grey = np.nan_to_num(pixels, posinf=white, neginf=0) * (255 / white)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[stored == transparent] = 255
    return Image.fromarray(grey.round().astype(np.uint8))
