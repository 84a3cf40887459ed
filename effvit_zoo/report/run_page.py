"""summary.json and report.html of a run: picture of the result, summary, curves, the task's other sections, technical rows."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .. import run_folder
from ..measure.host import environment
from ..tasks import Section
from .rows import shown

THUMBNAIL = 320
"""Longest side in pixels of the images in a page."""


@dataclass(frozen=True)
class Page:
    """Content of a report.

    Attributes:
        title: What was trained on what.
        headline: The result in some words.
        subline: What the result is of, "" for nothing.
        sections: Parts of the page; the first, the picture of the result, stands at the top.
        summary: Name -> value, what a reader wants to know.
        technical: Name -> value, what is needed to trace the run.
        curves: (title, text, PNG files as bytes) of training curves.
        notes: Lines on the data and the run.
        status: Why this is not a finished run, "" for one that is.
        command: Command that continues an unfinished run, "" for none.
    """

    title: str
    headline: str
    subline: str = ""
    sections: Sequence[Section] = ()
    summary: Sequence[tuple[str, Any]] = ()
    technical: Sequence[tuple[str, Any]] = ()
    curves: Sequence[tuple[str, str, Sequence[bytes]]] = field(default=())
    notes: Sequence[str] = ()
    status: str = ""
    command: str = ""


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """summary.json, with the environment added."""
    run_folder.write_json(folder / run_folder.SUMMARY, summary | environment())


def write_report(folder: Path, page: Page) -> Path:
    """report.html, one page that needs no other file.

    Args:
        folder: Run folder, with the figures of the sections.
        page: Content.

    Returns:
        Path of the page.
    """

    def plot(name: str) -> Markup:
        title = Path(name).stem.replace("_", " ")
        return Markup('<img class="plot" alt="{}" src="{}">').format(title, _embedded((folder / name).read_bytes()))

    pages = Environment(
        loader=PackageLoader("effvit_zoo", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pages.filters |= {"shown": _fact, "embedded": _embedded, "thumbnail": _thumbnail, "plot": plot}
    text = pages.get_template("run_page.html.j2").render(page=page)
    # names of files that are not UTF-8 come as surrogates, which no page may have
    run_folder.write_text(folder / run_folder.REPORT, text.encode(errors="replace").decode())
    return folder / run_folder.REPORT


def _fact(value: Any) -> str:
    return ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, Mapping) else shown(value)


def _embedded(png: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(png).decode('ascii')}"


def _thumbnail(image: Image.Image) -> str:
    """A small copy as a data URL; small images are enlarged by a whole factor, so that their pixels stay sharp."""
    image = image.convert("RGB")
    factor = THUMBNAIL // max(image.size)
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    kind = "png" if factor > 1 else "jpeg"
    image.save(data, kind, quality=85)
    return _embedded(data.getvalue(), kind)
