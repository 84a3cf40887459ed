"""The files of a run folder that people and scripts read: metrics.csv, curves.png, confusion_matrix.png, summary.json, report.html."""

from __future__ import annotations

import base64
import csv
import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.feed import Feed
from ..evaluation.loop import per_class
from ..measure.host import environment as environment
from ..training.checkpoint import RunState
from ..viz.curves import confusion_matrix, curves
from ..viz.predictions import mistakes_grid

COLUMNS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_top1",
    "val_loss",
    "top1",
    "top5",
    "images_per_second",
    "seconds",
)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by a complete new one, or leaves it as it was."""
    writing = path.with_name(path.name + ".writing")
    writing.write_text(text, encoding="utf-8")
    os.replace(writing, path)


def write_metrics(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """metrics.csv: a row per finished epoch (losses are means, accuracies percent, lr the rate of the epoch's last step)."""
    writing = folder / "metrics.csv.writing"
    with writing.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(history)
    os.replace(writing, folder / "metrics.csv")


def write_figures(
    folder: Path, history: Sequence[dict[str, Any]], confusion: np.ndarray, class_names: Sequence[str]
) -> None:
    """curves.png over the epochs, and confusion_matrix.png of the best one (counts, rows are true classes)."""
    curves(list(history), folder / "curves.png")
    confusion_matrix(confusion, list(class_names), folder / "confusion_matrix.png")


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """summary.json, with where it was computed added."""
    write_atomically(folder / "summary.json", json.dumps(summary | environment(), indent=2, ensure_ascii=False) + "\n")


def write_report(folder: Path, summary: dict[str, Any], state: RunState, feed: Feed, notes: Sequence[str] = ()) -> Path:
    """report.html: what the run came to, on one page that needs no other file. Writes mistakes.png too, if there are pictures.

    Args:
        folder: Run folder; curves.png and confusion_matrix.png are there.
        summary: As in summary.json.
        state: Epochs and the best one's counts and mistakes.
        feed: Class names, and the pictures of the mistakes.
        notes: Lines on the data.
    """
    names = feed.class_names
    pictures, captions = [], []
    for share, index, true, predicted in state.best.get("mistakes", ()):
        found = feed.val_picture(int(index))
        if found is not None:
            pictures.append(found[1])
            captions.append((names[int(true)], names[int(predicted)], share))
    if pictures:
        mistakes_grid(pictures, captions, folder / "mistakes.png")
    text = _PAGE.format(
        title=html.escape(f"{summary['model']} on {summary['data']}"),
        top1=summary["top1"],
        epoch=summary["best_epoch"],
        facts=_table(
            [],
            [
                [name.replace("_", " "), "" if summary.get(name) is None else _shown(summary[name])]
                for name in REPORTED
                if name in summary
            ],
        ),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in [*notes, *_bad_file_notes(state)]),
        curves=_embedded(folder / "curves.png"),
        confusion=_embedded(folder / "confusion_matrix.png"),
        mistakes=_embedded(folder / "mistakes.png")
        if pictures
        else "<p>None, or the pictures are not at hand (streams are read once).</p>",
        classes=_class_table(np.array(state.best["confusion"]), names),
    )
    write_atomically(folder / "report.html", text)
    return folder / "report.html"


def _bad_file_notes(state: RunState) -> list[str]:
    notes = [f"unreadable: {name}: {reason}" for name, reason in sorted(state.bad_files.items())]
    if state.skipped_steps:
        notes.append(f"{state.skipped_steps} steps were skipped, because their loss was not finite")
    return notes


def _class_table(confusion: np.ndarray, names: Sequence[str]) -> str:
    """Per class: count, recall, precision, F1 and what it is most taken for; the weakest F1 first."""
    rows = []
    for index, (name, row) in enumerate(zip(names, per_class(confusion), strict=True)):
        wrong = confusion[index].copy()
        wrong[index] = 0
        taken = f"{names[int(wrong.argmax())]} ({int(wrong.max())})" if wrong.any() else ""
        rows.append((row["f1"] or 0.0, [name, row["images"], row["recall"], row["precision"], row["f1"], taken]))
    rows.sort(key=lambda pair: pair[0])
    head = ["class", "images", "recall, %", "precision, %", "F1, %", "most taken for"]
    return _table(head, [[_shown(cell) for cell in cells] for _, cells in rows])


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table>{line(head, 'th') if head else ''}{body}</table>"


def _embedded(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(path.stem.replace("_", " "))}" src="data:image/png;base64,{data}">'


REPORTED = (
    "model",
    "data",
    "num_classes",
    "train_images",
    "val_images",
    "input_size",
    "top1",
    "top5",
    "val_loss",
    "best_epoch",
    "epochs_run",
    "epochs",
    "steps",
    "params",
    "macs",
    "images_per_second",
    "seconds",
    "device",
    "processes",
    "seed",
)
"""Keys of summary.json on the page, in its order."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #22272e; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
img {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid #d9dde2; text-align: left; }}
td + td {{ font-variant-numeric: tabular-nums; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p><b>{top1:.2f} %</b> top-1 on the validation images, at epoch {epoch}. The model is in <code>best/</code> beside this file.</p>
<ul>{notes}</ul>
{facts}
<h2>Curves</h2>
{curves}
<h2>Classes, the weakest first</h2>
{classes}
<h2>Confusion matrix</h2>
{confusion}
<h2>Worst mistakes</h2>
<p>The wrong answers that the model was surest of: often a wrong label, or two things in one picture.</p>
{mistakes}
</body>
</html>
"""
