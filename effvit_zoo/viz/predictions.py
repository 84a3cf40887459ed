"""Images with text: one with a panel of labelled bars below it, or many in a grid with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..run_folder import replacing
from . import style

MIN_WIDTH, MAX_SIDE = 320, 1600
_TRACK = "#e8ebef"
GRID_COLUMNS, GRID_CELL = 6, 180
"""Images per row of a grid; side of its cells in pixels."""


def annotate(image: Image.Image, labels: Sequence[str], probabilities: Sequence[float]) -> Image.Image:
    """Puts a panel with a bar per label below an RGB image.

    The result is as wide as the image, within 320 to 1600 pixels: smaller images are enlarged, larger ones reduced, and one
    too narrow for text is centred on white, so that the panel is readable at any size.

    Args:
        image: Upright RGB image.
        labels: Texts of the bars, the first in bold.
        probabilities: Lengths of the bars, 0 to 1.
    """
    image = _fitted(image)
    width = image.width
    size = round(min(26, max(13, width / 32)))  # type size in pixels; the panel's measures follow from it
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
    result = Image.new("RGB", (width, image.height + panel.height), style.PAPER)
    result.paste(image, (0, 0))
    result.paste(panel, (0, image.height))
    return result


def captioned_grid(images: Sequence[Image.Image], captions: Sequence[tuple[str, str]], path: str | Path) -> None:
    """Writes a PNG of small images in rows, each with two lines of text below it, the first in bold.

    Args:
        images: RGB images of any size.
        captions: The two lines of each.
        path: The file to write.

    Raises:
        ValueError: There are no images.
    """
    if not images:
        raise ValueError("no images to draw: expected at least one")
    size, gap = 13, 12
    columns = min(GRID_COLUMNS, len(images))
    cell_height = GRID_CELL + 2 * round(1.5 * size) + gap
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (gap + columns * (GRID_CELL + gap), gap + rows * cell_height), style.PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + place % columns * (GRID_CELL + gap), gap + place // columns * cell_height
        factor = min(GRID_CELL / image.width, GRID_CELL / image.height)
        side = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        resample = Image.Resampling.NEAREST if factor > 2 else Image.Resampling.LANCZOS
        thumbnail = image.convert("RGB").resize(side, resample)
        sheet.paste(thumbnail, (x + (GRID_CELL - side[0]) // 2, y + (GRID_CELL - side[1]) // 2))
        for line, text in enumerate(caption):
            text_font = style.font(size, bold=line == 0)
            text_y = y + GRID_CELL + 4 + line * round(1.4 * size)
            draw.text((x, text_y), _cut(draw, text, text_font, GRID_CELL), font=text_font, fill=style.INK)
    with replacing(Path(path)) as writing:
        sheet.save(writing, format="PNG")


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
    """The longest start of a text that fits into `room` pixels."""
    text = " ".join(text.split())
    length = len(text)
    while length > 1 and draw.textlength(style.shorten(text, length), font=font) > room:  # type: ignore[arg-type]
        length -= 1
    return style.shorten(text, length)
