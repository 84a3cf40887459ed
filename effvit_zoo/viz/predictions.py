"""A picture with what a model takes it for: the best classes and their probabilities on a panel below it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from . import style

MIN_WIDTH, MAX_SIDE = 320, 1600
_TRACK = "#e8ebef"


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
