"""The report of a pipeline: one page for all its stages, from what their run folders hold."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import run_folder
from ..report.run_page import Page, write_report
from ..tasks import DEFAULT, TASKS, Metric, Section
from ..viz.curves import single_curves

if TYPE_CHECKING:
    from .contract import Stage

_ELSEWHERE = ("stages", "ratios")  # of summary.json, what the page shows elsewhere
_LOSS_ALONE = ("epoch", "lr", "train_loss", "images_per_second")


def history(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, one per validated epoch, as text; a linear probe is epoch 0."""
    path = run / run_folder.METRICS
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_pipeline_report(
    folder: Path,
    title: str,
    stages: Sequence[Stage],
    status: str = "",
    command: str = "",
    sections: Sequence[Section] = (),
) -> Path:
    """report.html in the output folder of a pipeline.

    Args:
        folder: Output folder.
        title: What is trained on what.
        stages: The stages that are part of it, done or not.
        status: Why the pipeline is not finished, "" if it is.
        command: Command that continues it.
        sections: What compares its models; the first opens the page.
    """
    summary = {} if status else _summary_of(folder)
    name, metric = _metric(summary)
    headline = f"{metric.title} {metric.show(summary[name])}" if name in summary else "Not all stages are done yet"
    rows, curves = [], []
    for number, stage in enumerate(stages, 1):
        said = _in_words(folder / stage.folder, stage)
        rows.append((f"stage {number}, {stage.name}", said))
        if plots := _plots(folder / stage.folder, stage):
            curves.append(
                (f"Stage {number}: {stage.name}", f"{said}. More of it is in {stage.folder}/report.html.", plots)
            )
    page = Page(
        title=title,
        headline=headline,
        subline="on the validation images, after the last stage" if name in summary else "",
        sections=sections,
        summary=rows,
        technical=[(key.replace("_", " "), value) for key, value in summary.items() if key not in _ELSEWHERE],
        curves=curves,
        status=status,
        command=command,
    )
    return write_report(folder, page)


def _summary_of(run: Path) -> dict[str, Any]:
    """summary.json of a run, empty while it isn't finished."""
    path = run / run_folder.SUMMARY
    return run_folder.read_json(path) if path.is_file() else {}


def _in_words(run: Path, stage: Stage) -> str:
    """Length and result of a stage."""
    epochs, summary = [row for row in history(run) if row["epoch"] != "0"], _summary_of(run)
    if not epochs:
        return "no epoch is finished yet"
    parts = [f"{len(epochs)} {'epoch' if len(epochs) == 1 else 'epochs'}", f"{float(epochs[-1]['seconds']):,.0f} s"]
    if not summary:
        parts.append("not finished")
    parts.append(f"training loss {float(epochs[-1]['train_loss']):.3f}")
    if stage.has_metric and summary:
        name, metric = _metric(summary)
        parts.append(f"{metric.title} {metric.show(float(epochs[-1][name]))} at the end")
    return ", ".join(parts)


def _plots(run: Path, stage: Stage) -> list[bytes]:
    epochs: list[Any] = history(run)
    if not epochs:
        return []
    summary, panels = _summary_of(run), []
    if stage.has_metric:
        name, metric = _metric(summary)
        title = f"{metric.title}{f', {metric.unit}' if metric.unit else ''}"
        panels = [(title, f"train_{name}", name, metric.higher_is_better)]
    else:
        epochs = [{key: row[key] for key in _LOSS_ALONE} for row in epochs]
    return single_curves(epochs, panels, summary.get("training_loss", ""))


def _metric(summary: Mapping[str, Any]) -> tuple[str, Metric]:
    """Name and metric that the task of a run is about."""
    return next(iter(TASKS[summary.get("task", DEFAULT)].metrics.items()))
