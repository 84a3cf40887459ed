"""Fonts for text in any script: DejaVu Sans, which matplotlib ships, and an installed font for each sign that it lacks.

Text that no font here has would come out as boxes; the figures show the number of such a name instead, see `drawable`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont, features

_SHIPPED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
REGULAR, BOLD = str(_SHIPPED / "DejaVuSans.ttf"), str(_SHIPPED / "DejaVuSans-Bold.ttf")
_NO_SIGNS = (
    "lastresort",
    "blank",
    "colr",
)  # in the names of fonts that draw boxes, nothing, or colours that are left out here
_SHAPED = ((0x0590, 0x0E00), (0x0F00, 0x10A0), (0x1780, 0x1880), (0xFB1D, 0xFDFF), (0xFE70, 0xFEFF))
"""Ranges of scripts whose letters depend on their neighbours or run from right to left: Hebrew to Sinhala, Tibetan, Burmese, Khmer."""
_HAS_RAQM = features.check("raqm")
_CAN_SHAPE = _HAS_RAQM and matplotlib.__version_info__ >= (3, 11)
_DIRECTION = "ltr" if _HAS_RAQM else None  # of a line; words in it may run the other way

_found: dict[str, str | None] = {}
"""Sign that DejaVu Sans lacks -> file of an installed font that has it, None where there is none. Filled by `_search`."""


def clean(text: str) -> str:
    """One line without signs that are not seen: line breaks, control characters, selectors of an emoji's form."""
    shaped = any(_is_shaped(sign) for sign in text)  # there, joiners change the letters beside them
    kept = []
    for sign in text:
        kind = unicodedata.category(sign)
        if kind in ("Cc", "Cs"):
            kept.append(" " if kind == "Cc" else "\ufffd")
        elif not ("\ufe00" <= sign <= "\ufe0f" or (kind == "Cf" and not shaped)):
            kept.append(sign)
    return " ".join("".join(kept).split())


def is_drawable(text: str) -> bool:
    """Whether the fonts of this machine have all signs of a text."""
    text = clean(text)
    if not text or (not _CAN_SHAPE and any(map(_is_shaped, text))):
        return False
    _search(text)
    return all(_found.get(sign, REGULAR) for sign in text)


def undrawable(names: Sequence[str]) -> list[int]:
    """Numbers of the names that the fonts of this machine can't draw."""
    _search("".join(map(clean, names)))  # one pass over the fonts for all of them
    return [number for number, name in enumerate(names) if not is_drawable(name)]


def drawable(names: Sequence[str]) -> list[str]:
    """Names for a figure, each in one line; a name that can't be drawn is replaced by its number in the sequence."""
    missing = {*undrawable(names)}
    return [str(number) if number in missing else clean(name) for number, name in enumerate(names)]


def families(texts: Iterable[str]) -> list[str]:
    """Font families with which matplotlib draws all the texts that are drawable."""
    _search("".join(map(clean, texts)))
    chosen = dict.fromkeys(path for path in _found.values() if path)
    loaded = {entry.fname for entry in fontManager.ttflist}
    for path in chosen:
        if path not in loaded:  # matplotlib's list of fonts may be older than the font
            fontManager.addfont(path)
    return ["DejaVu Sans", *dict.fromkeys(FT2Font(path).family_name for path in chosen)]


def draw_text(
    draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, size: int, fill: str, bold: bool = False
) -> None:
    """Draws a line of text, whose upper left corner is `xy`, on an image; `size` in pixels."""
    x, y = xy
    for part, font in _runs(text, size, bold):  # by their baseline: fonts differ in height
        draw.text((x, y + 0.93 * size), part, fill, font, anchor="ls", direction=_DIRECTION)
        x += font.getlength(part)


def text_width(text: str, size: int, bold: bool = False) -> float:
    """Pixels that `draw_text` needs."""
    return sum(font.getlength(part) for part, font in _runs(text, size, bold))


def _runs(text: str, size: int, bold: bool) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """A text in parts of one font each; in one part where a font has all of it, so that its order and its letters are right."""
    _search(text)
    chain = [BOLD, REGULAR] if bold else [REGULAR]
    chain += dict.fromkeys(path for sign in text if (path := _found.get(sign)))
    whole = next((path for path in chain if _has_all(path, text)), None)
    if whole:
        return [(text, _font(whole, size))]
    parts = groupby(text, lambda sign: next((path for path in chain if _has_all(path, sign)), REGULAR))
    return [("".join(signs), _font(path, size)) for path, signs in parts]


@cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@cache
def _opened(path: str) -> FT2Font:
    return FT2Font(path)


def _has_all(path: str, text: str) -> bool:
    return all(_opened(path).get_char_index(ord(sign)) for sign in text if unicodedata.category(sign) != "Cf")


def _is_shaped(sign: str) -> bool:
    return any(first <= ord(sign) < end for first, end in _SHAPED)


def _search(text: str) -> None:
    """Looks up signs not looked up yet, in one pass over the installed fonts: one that has many of them comes before one that has few."""
    wanted = {sign for sign in set(text) - _found.keys() if not _has_all(REGULAR, sign)}
    if not wanted:
        return
    holders: dict[str, tuple[set[str], bool, bool]] = {}
    for path in sorted(findSystemFonts()):
        try:
            font = FT2Font(path)
        except (RuntimeError, OSError):  # not a font that matplotlib reads
            continue
        name = f"{Path(path).stem} {font.family_name}".lower()
        has = {sign for sign in wanted if font.get_char_index(ord(sign))}
        if has and font.scalable and not any(word in name for word in _NO_SIGNS):
            holders[path] = has, font.style_name in ("Regular", "Book", "Roman", "Normal"), "sans" in name
    while wanted and holders:
        best = max(holders, key=lambda path: (len(holders[path][0] & wanted), *holders[path][1:]))
        if not (has := holders.pop(best)[0] & wanted):
            break
        _found.update(dict.fromkeys(has, best))
        wanted -= has
    _found.update(dict.fromkeys(wanted))
