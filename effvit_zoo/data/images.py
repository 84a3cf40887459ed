"""Picture files as what a network expects: upright, three channels, eight bits.

One function, `open_image`, and the one error it raises. Training, validation and prediction all read through it, so that
a picture means the same everywhere: EXIF orientation applied, transparency laid on white, 16-bit and float greys scaled
rather than clipped, CMYK and palettes converted. Of an animation the first frame is read.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError

MODES = {1: "L", 3: "RGB"}  # Pillow's mode for a network's number of input channels
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")

# What Pillow's decoders raise on damaged files, besides OSError (of which UnidentifiedImageError is one).
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BadImage(UserError):
    """A file that is no readable picture; `name` and `reason` say which and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read image {name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return type(self), (self.name, self.reason)  # data loader workers send their errors through pickle


def open_image(source: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Reads one picture completely into an upright 8-bit RGB image.

    Args:
        source: Path, or a binary file object positioned at the start of the picture.
        name: What to call it in an error; default the path.

    Raises:
        BadImage: The file is missing, empty, damaged, too large to be sane, or no picture.
    """
    name = name or str(source if isinstance(source, (str, Path)) else getattr(source, "name", "<bytes>"))
    try:
        with Image.open(source) as image:
            image.load()
            return to_rgb(image)
    except Image.UnidentifiedImageError:
        raise BadImage(name, "not a picture in a known format") from None
    except _DECODE_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadImage(name, " ".join(reason.split())) from error


def find_images(paths: Sequence[str | Path], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Iterator[Path]:
    """Files as given, and every picture (by suffix, any case) below the folders, sorted; hidden files are left out.

    Raises:
        BadImage: A path does not exist, or a folder holds no picture.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise BadImage(str(path), "there is no such file")
        if not path.is_dir():
            yield path
            continue
        found = sorted(
            p
            for p in path.rglob("*")
            if p.suffix.lower() in suffixes and not any(part.startswith(".") for part in p.relative_to(path).parts)
        )
        if not found:
            raise BadImage(str(path), f"the folder holds no picture ({' '.join(suffixes)})")
        yield from found


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; a damaged EXIF block says nothing about the pixels and is passed over."""
    try:
        return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS:
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture of any mode as an upright 8-bit RGB image."""
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
    """Greys of more than 8 bits, (H, W), to 8: Pillow's own conversion clips at 255 and would give a white picture."""
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F":
        scale = 255.0 if pixels.max(initial=0) <= 1 else 1.0
    else:
        scale = 255 / max(65535, pixels.max(initial=0))  # "I" is how 16-bit PNG files arrive in older Pillow
    return Image.fromarray((pixels * scale).round().clip(0, 255).astype(np.uint8))
