"""Images as the exported files in this folder take them, with numpy and Pillow alone; the settings are those of export.json.

The same as effvit_zoo's: EXIF orientation applied, transparency on white, greys of 16 bits scaled, resized and cropped by Pillow.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

FILTERS = {name.lower(): filter for name, filter in Image.Resampling.__members__.items()}


def settings() -> dict[str, Any]:
    """The content of the export.json beside this file."""
    return json.loads(Path(__file__).with_name("export.json").read_text(encoding="utf-8"))


def read_image(path: str | Path, record: dict[str, Any] | None = None) -> np.ndarray:
    """An image file as normalised float32 (1, C, H, W)."""
    record = record or settings()
    mean, std = (np.array(record["preprocessing"][key], dtype=np.float32) for key in ("mean", "std"))
    scaled = read_pixels(path, record).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(0, 3, 1, 2))


def read_pixels(path: str | Path, record: dict[str, Any] | None = None) -> np.ndarray:
    """An image file as uint8 (1, H, W, C)."""
    steps = (record or settings())["preprocessing"]
    channels, height, width = steps["input_size"]
    image = _fit(_upright(path).convert("RGB" if channels == 3 else "L"), height, width, steps)
    return np.asarray(image, dtype=np.uint8).reshape(1, height, width, channels)


def show(logits: np.ndarray, topk: int = 5) -> None:
    """Prints the most probable classes of the first image, or the shape of what is no row of logits."""
    if logits.ndim != 2:
        print(f"output of shape {logits.shape}")
        return
    names = Path(__file__).with_name("labels.txt").read_text(encoding="utf-8").splitlines()
    odds = np.exp(logits[0] - logits[0].max())
    for index in np.argsort(-odds, kind="stable")[:topk]:
        print(f"{100 * odds[index] / odds.sum():5.1f} %  {names[index]}")


def _upright(path: str | Path) -> Image.Image:
    with Image.open(path) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}.get(image.mode, image.mode)).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits; white is the smallest usual value that no pixel exceeds."""
    grey = np.asarray(image).astype(np.float64)
    usual = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    white = next((value for value in usual if grey.max() <= value), grey.max())
    return Image.fromarray((grey * (255 / white)).round().astype(np.uint8)).convert("RGB")


def _fit(image: Image.Image, height: int, width: int, steps: dict[str, Any]) -> Image.Image:
    """Resizes and crops. "center" keeps the proportions and cuts what is too long, "border" fills what is too short with the mean colour,
    "squash" keeps neither."""
    tall, wide = (math.floor(side / steps["crop_pct"]) for side in (height, width))
    mode, filter = steps["crop_mode"], FILTERS[steps["interpolation"]]
    if mode == "squash":
        size = (wide, tall)
    elif mode != "border" and tall == wide:  # Pillow's sizes are (width, height)
        short, long = sorted(image.size)
        other = int(wide * long / short)
        size = (wide, other) if image.width <= image.height else (other, wide)
    else:
        ratio = (max if mode == "border" else min)(image.height / tall, image.width / wide)
        size = (round(image.width / ratio), round(image.height / ratio))
    if image.size != size:
        image = image.resize(size, filter)
    fill = tuple(round(255 * value) if mode == "border" else 0 for value in steps["mean"])
    return _crop(image, height, width, fill if len(fill) > 1 else fill[0])


def _crop(image: Image.Image, height: int, width: int, fill: Any) -> Image.Image:
    """The middle of an image, which is padded first where it is too small."""
    missing = max(0, width - image.width), max(0, height - image.height)
    if any(missing):
        size = image.width + missing[0], image.height + missing[1]
        padded = Image.new(image.mode, size, fill)
        padded.paste(image, (missing[0] // 2, missing[1] // 2))
        image = padded
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
