"""An image with a panel of labelled bars below it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from . import style
from .fonts import clean, draw_text, text_width

MIN_WIDTH, MAX_SIDE = 320, 1600
_TRACK = "#e8ebef"


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
        bold = index == 0
        share = f"{100 * probability:.1f} %" if probability >= 0.0005 else "< 0.1 %"
        share_width = text_width(share, size, bold)
        draw_text(draw, (width - pad - share_width, y), share, size, style.INK, bold)
        draw_text(draw, (pad, y), _cut(label, size, bold, width - 3 * pad - share_width), size, style.INK, bold)
        bar_y, bar_height, full = y + round(size * 1.35), max(3, size // 4), width - 2 * pad
        draw.rectangle((pad, bar_y, pad + full, bar_y + bar_height), fill=_TRACK)
        if (length := round(full * probability)) > 0:
            colour = style.BLUE if index == 0 else style.QUIET
            draw.rectangle((pad, bar_y, pad + length, bar_y + bar_height), fill=colour)
    result = Image.new("RGB", (width, image.height + panel.height), style.PAPER)
    result.paste(image, (0, 0))
    result.paste(panel, (0, image.height))
    return result


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


def _cut(text: str, size: int, bold: bool, room: float) -> str:
    """The longest start of a text, in one line, that fits into `room` pixels."""
    text = clean(text)
    length = len(text)
    while length > 1 and text_width(style.shorten(text, length), size, bold) > room:
        length -= 1
    return style.shorten(text, length)
