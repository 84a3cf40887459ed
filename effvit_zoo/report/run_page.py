"""summary.json and report.html of a run folder: the page shows the summary, the curves and the sections of the task."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .. import run_folder
from ..measure.host import environment
from ..tasks import Section
from .rows import shown

_HIDDEN = {"bad_files", "bad_file_names", "skipped_steps", "threads"}


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """summary.json, with the environment added."""
    run_folder.write_json(folder / run_folder.SUMMARY, summary | environment())


def write_report(
    folder: Path, summary: dict[str, Any], headline: str, sections: Sequence[Section], notes: Sequence[str] = ()
) -> Path:
    """report.html, one page that needs no other file.

    Args:
        folder: Run folder, with curves.png and the figures of the sections.
        summary: As in summary.json, in the order to be shown; lists of names and what is in the notes are left out.
        headline: The result in a sentence, without its full stop.
        sections: The task's.
        notes: Lines on the data and the run.

    Returns:
        Path of the page.
    """

    def embedded(name: str) -> Markup:
        data = base64.b64encode((folder / name).read_bytes()).decode("ascii")
        title = Path(name).stem.replace("_", " ")
        return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(title, data)

    pages = Environment(
        loader=PackageLoader("effvit_zoo", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pages.filters |= {"shown": shown, "embedded": embedded}
    text = pages.get_template("run_page.html.j2").render(
        title=f"{summary['model']} on {summary['data']}",
        headline=headline,
        notes=notes,
        facts=[(name.replace("_", " "), value) for name, value in summary.items() if name not in _HIDDEN],
        sections=sections,
    )
    run_folder.write_text(folder / run_folder.REPORT, text)
    return folder / run_folder.REPORT
