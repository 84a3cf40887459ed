"""Pictures with what a model takes them for: one with its best classes on a panel below it, or many in a grid of mistakes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from . import style

MIN_WIDTH, MAX_SIDE = 320, 1600
_TRACK = "#e8ebef"
GRID_COLUMNS, GRID_CELL = 6, 180  # pictures a row, pixels a picture's side


def annotate(image: Image.Image, labels: Sequence[str], probabilities: Sequence[float]) -> Image.Image:
    """Puts a panel with a bar per class below an RGB picture.

    The result is as wide as the picture, within 320 to 1600 pixels: smaller pictures are enlarged and larger ones reduced,
    and a picture too narrow for text is laid on white, so that the panel can be read whatever the size.

    Args:
        image: Upright RGB picture.
        labels: Class names, best first.
        probabilities: One per label, 0 to 1.
    """
    picture = _fitted(image)
    width = picture.width
    size = round(min(26, max(13, width / 32)))  # pixels of the type; the panel's measures follow from it
    pad, row = size, round(size * 2.3)
    panel = Image.new("RGB", (width, 2 * pad + row * len(labels) - size // 2), style.PAPER)
    draw = ImageDraw.Draw(panel)
    for index, (label, probability) in enumerate(zip(labels, probabilities, strict=True)):
        y = pad + index * row
        text_font = style.font(size, bold=index == 0)
        share = f"{100 * probability:.1f} %" if probability >= 0.0005 else "< 0.1 %"
        share_width = draw.textlength(share, font=text_font)
        draw.text((width - pad, y), share, font=text_font, fill=style.INK, anchor="ra")
        room = width - 3 * pad - share_width
        draw.text((pad, y), _cut(draw, label, text_font, room), font=text_font, fill=style.INK)
        bar_y, bar_height, full = y + round(size * 1.35), max(3, size // 4), width - 2 * pad
        draw.rectangle((pad, bar_y, pad + full, bar_y + bar_height), fill=_TRACK)
        if (length := round(full * probability)) > 0:
            colour = style.BLUE if index == 0 else style.QUIET
            draw.rectangle((pad, bar_y, pad + length, bar_y + bar_height), fill=colour)
    result = Image.new("RGB", (width, picture.height + panel.height), style.PAPER)
    result.paste(picture, (0, 0))
    result.paste(panel, (0, picture.height))
    return result


def mistakes_grid(
    pictures: Sequence[Image.Image], captions: Sequence[tuple[str, str, float]], path: str | Path
) -> None:
    """Writes a PNG of small pictures in rows, each with its true class, and below it what it was taken for and how surely.

    Args:
        pictures: RGB pictures of any size.
        captions: (true class, predicted class, probability from 0 to 1) of each.
        path: The file to write; it appears complete or not at all.

    Raises:
        ValueError: There are no pictures.
    """
    if not pictures:
        raise ValueError("no mistakes to draw: expected at least one picture")
    size, gap = 13, 12
    columns = min(GRID_COLUMNS, len(pictures))
    cell_height = GRID_CELL + 2 * round(1.5 * size) + gap
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (gap + columns * (GRID_CELL + gap), gap + rows * cell_height), style.PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (picture, (true, predicted, share)) in enumerate(zip(pictures, captions, strict=True)):
        x, y = gap + place % columns * (GRID_CELL + gap), gap + place // columns * cell_height
        factor = min(GRID_CELL / picture.width, GRID_CELL / picture.height)
        side = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        resample = Image.Resampling.NEAREST if factor > 2 else Image.Resampling.LANCZOS
        thumbnail = picture.convert("RGB").resize(side, resample)
        sheet.paste(thumbnail, (x + (GRID_CELL - side[0]) // 2, y + (GRID_CELL - side[1]) // 2))
        lines = ((f"is {true}", style.font(size, bold=True)), (f"{100 * share:.0f} % {predicted}", style.font(size)))
        for line, (text, text_font) in enumerate(lines):
            place_y = y + GRID_CELL + 4 + line * round(1.4 * size)
            draw.text((x, place_y), _cut(draw, text, text_font, GRID_CELL), font=text_font, fill=style.INK)
    path = Path(path)
    writing = path.with_name(f".{path.name}.writing")
    try:
        sheet.save(writing, format="PNG")
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)


def _fitted(image: Image.Image) -> Image.Image:
    """Enlarged by a whole factor or reduced, keeping its shape, and at least `MIN_WIDTH` wide."""
    if image.width < MIN_WIDTH:
        factor = max(1, min(-(-MIN_WIDTH // image.width), MAX_SIDE // max(image.size)))
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    elif max(image.size) > MAX_SIDE:
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    if image.width >= MIN_WIDTH:
        return image
    wide = Image.new("RGB", (MIN_WIDTH, image.height), style.PAPER)
    wide.paste(image, ((MIN_WIDTH - image.width) // 2, 0))
    return wide


def _cut(draw: ImageDraw.ImageDraw, text: str, font: object, room: float) -> str:
    """As much of a text as there is room for."""
    text = " ".join(text.split())
    length = len(text)
    while length > 1 and draw.textlength(style.shorten(text, length), font=font) > room:  # type: ignore[arg-type]
        length -= 1
    return style.shorten(text, length)
