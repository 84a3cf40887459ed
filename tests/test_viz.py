"""Figures say what they are given, in any amount, and leave nothing behind but one file."""

import csv
import io
import re
from contextlib import contextmanager

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from PIL import Image

from effvit_zoo.viz import fonts, style
from effvit_zoo.viz.curves import curves, single_curves
from effvit_zoo.viz.matrix import confusion_matrix
from effvit_zoo.viz.predictions import MAX_SIDE, MIN_WIDTH, annotate
from effvit_zoo.viz.selection import metric_over_cost

PANELS = [("Top-1, %", "train_top1", "top1", True)]


def epoch_rows(count):
    return [
        {
            "epoch": epoch,
            "lr": 1e-3 / epoch,
            "train_loss": 2 / epoch,
            "val_loss": 2.2 / epoch,
            "train_top1": 60.0 + epoch,
            "top1": 70 - (epoch - 3) ** 2,
            "top5": 95.0,
            "images_per_second": 100.0 * epoch,
        }
        for epoch in range(1, count + 1)
    ]


def texts(draw, tmp_path):
    """The texts of a figure, read from its SVG form."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(tmp_path / "figure.svg")
    return re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "figure.svg").read_text())


def test_curves_name_the_lines_and_the_best_epoch(tmp_path):
    found = texts(lambda path: curves(epoch_rows(5), path, PANELS), tmp_path)
    assert found.count("training") == found.count("validation") == 2
    assert "best 70.00 at epoch 3" in found
    assert "300 training images per second" in found


def test_losses_of_two_kinds_have_axes_of_their_own(tmp_path):
    found = texts(lambda path: curves(epoch_rows(5), path, PANELS, "KL divergence"), tmp_path)
    assert {"Training loss", "KL divergence", "Validation loss"} <= set(found)
    assert found.count("training") == found.count("validation") == 2
    assert len(single_curves(epoch_rows(5), PANELS, "KL divergence")) == 4


@pytest.mark.parametrize("count", [1, 2, 300])
def test_curves_of_any_length(tmp_path, count):
    curves(epoch_rows(count), tmp_path / "curves.png", PANELS)
    assert Image.open(tmp_path / "curves.png").size == (1800, 585)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_curves_from_csv_with_gaps(tmp_path):
    rows = [{**row, "train_top1": "", "val_loss": None} for row in epoch_rows(4)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    text.seek(0)
    found = texts(lambda path: curves(list(csv.DictReader(text)), path, PANELS), tmp_path)
    assert (found.count("training"), found.count("validation")) == (1, 1)
    assert "best 70.00 at epoch 3" in found


def test_curves_of_a_run_that_diverged(tmp_path):
    rows = [{**row, "train_loss": float("nan"), "top1": float("nan")} for row in epoch_rows(3)]
    assert not any(text.startswith("best") for text in texts(lambda path: curves(rows, path, PANELS), tmp_path))
    with pytest.raises(ValueError, match="at least one row"):
        curves([], tmp_path / "none.png")


def test_a_panel_for_each_metric_that_has_values(tmp_path):
    rows = [row | {"abs_rel": 0.5 - row["epoch"] / 10} for row in epoch_rows(3)]
    panels = [*PANELS, ("AbsRel", "", "abs_rel", False), ("mIoU, %", "train_miou", "miou", True)]
    found = texts(lambda path: curves(rows, path, panels), tmp_path)
    assert [text for text in found if text in ("Loss", "Top-1, %", "AbsRel", "mIoU, %", "Learning rate")] == [
        *("Loss", "Top-1, %", "AbsRel", "Learning rate")
    ]
    assert "best 0.20 at epoch 3" in found
    without = [{key: value for key, value in row.items() if "top1" not in key} for row in rows]
    assert "Top-1, %" not in texts(lambda path: curves(without, path, PANELS), tmp_path)


def test_confusion_matrix_says_percentages_counts_and_names(tmp_path):
    counts = np.array([[90, 10, 0], [4, 996, 0], [0, 0, 0]])
    found = texts(lambda path: confusion_matrix(counts, ["cat", "$5 & $6", "unseen"], path), tmp_path)
    assert "1,100 images: 98.73 % right" in found
    for text in ("90", "10", "0.4", "996", "cat", "unseen", "$5 &amp; $6"):
        assert text in found
    assert found.count("4") == 1  # as a count; 0.4 is its percentage


@pytest.mark.parametrize("classes", [1, 12, 20, 21, 300])
def test_confusion_matrix_of_any_size(tmp_path, classes):
    names = [f"name {index}" for index in range(classes)]
    found = texts(lambda path: confusion_matrix(7 * np.eye(classes, dtype=int), names, path), tmp_path)
    assert found.count("100") == (classes if classes <= 20 else 0)
    assert found.count("7") == (classes if classes <= 12 else 0)
    assert found.count("name 0") == 2
    assert sum(text.startswith("name") for text in found) <= 2 * 24


def test_confusion_matrix_refuses_other_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(2, 2\) for 2 names, got \(3, 3\)"):
        confusion_matrix(np.eye(3), ["a", "b"], tmp_path / "m.png")


def test_drawing_changes_no_settings_and_replaces_files_whole(tmp_path, monkeypatch):
    before = dict(matplotlib.rcParams)
    curves(epoch_rows(2), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before
    content = (tmp_path / "curves.png").read_bytes()

    def full_disk(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space"):
        curves(epoch_rows(3), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_names_at_line_ends_do_not_touch():
    ax = Figure().subplots()
    ax.plot([0, 1], [0, 1])
    style.label_ends(ax, [(1, 0.98, "a", "k"), (1, 0.99, "b", "k"), (1, 1.0, "c", "k")], gap=0.1)
    heights = sorted(text.xy[1] for text in ax.texts)
    assert np.all(np.diff(heights) > 0.0999)
    assert heights[-1] <= 1


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (320, 200), (5, 900), (900, 5), (4000, 900), (900, 4000)])
def test_annotated_images_are_of_readable_size(size):
    picture = Image.new("RGB", size, (10, 120, 10))
    result = annotate(picture, ["cat", "dog", "a very long name " * 20], [0.9, 0.09, 0.0001])
    assert MIN_WIDTH <= result.width <= MAX_SIDE
    assert result.height < MAX_SIDE + 300
    middle = result.getpixel((result.width // 2, 0))
    assert middle == (10, 120, 10)


def font_with(signs, path):
    """A font whose only glyphs are filled squares for the signs."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((0, 900)), pen.lineTo((900, 900)), pen.lineTo((900, 0)), pen.closePath()
    square, glyphs = pen.glyph(), [f"sign{number}" for number in range(len(signs))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *glyphs])
    builder.setupCharacterMap({ord(sign): glyph for sign, glyph in zip(signs, glyphs, strict=True)})
    builder.setupGlyf(dict.fromkeys([".notdef", *glyphs], square))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *glyphs], (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def installed(monkeypatch):
    """The list of installed fonts, empty at first."""
    paths = []
    monkeypatch.setattr(fonts, "_found", {})
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [*map(str, paths)])
    return paths


NAMES = ["猫", "$5_note$ 50%", "\\alpha", "d\u00e9j\u00e0 vu", "👩\u200d🚒", "two\nlines", "\udce9", "قطة"]


@pytest.mark.filterwarnings("error")
def test_names_without_a_font_are_numbers(installed, tmp_path, caplog):
    assert fonts.drawable(NAMES) == ["0", *NAMES[1:4], "4", "two lines", "\ufffd", "قطة"]
    found = texts(lambda path: confusion_matrix(np.eye(8, dtype=int), NAMES, path), tmp_path)
    assert {"0", "$5_note$ 50%", "\\alpha", "4", "two lines"} <= set(found)
    assert not caplog.records


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_by_any_installed_font_that_has_them(installed, tmp_path, caplog):
    font_with("猫犬", tmp_path / "squares.ttf")
    installed.append(tmp_path / "squares.ttf")
    assert fonts.drawable(["猫", "a 犬", "นก"]) == ["猫", "a 犬", "2"]
    confusion_matrix(np.eye(3, dtype=int), ["猫", "a 犬", "นก"], tmp_path / "matrix.png")
    assert not caplog.records
    picture = Image.new("RGB", (400, 10), (10, 120, 10))
    drawn = np.asarray(annotate(picture, ["猫"], [0.0]))[10:, :200]
    size = 13
    ink = (drawn < 60).all(axis=2)
    assert ink.sum() > 0.7 * (0.9 * size) ** 2  # the square of the font, where boxes would be hollow


def test_any_metric_over_cost(tmp_path):
    points = [
        {"macs": macs, "ms": ms, "ratio": ratio, "miou": 40 + 9 * ratio}
        for macs, ms, ratio in ((2e8, 5.0, 0.5), (4e8, 4.0, 0.9))
    ]
    dense = {"macs": 5e8, "ms": 3.0, "miou": 50.0}
    options = {"key": "miou", "label": "mIoU, %", "subtitle": "on this host", "controls": {"random": points[:1]}}
    found = texts(lambda path: metric_over_cost("ToSA", points, dense, path, **options), tmp_path)
    assert found.count("r = 0.5") == found.count("r = 0.9") == 2  # over computation and over time
    for text in ("time per image, ms", "attention ratio", "on this host", "random", "dense"):
        assert text in found
    assert sum(text.startswith("mIoU, % (axis from ") for text in found) == 3
    axes = []
    drawn = style.figure

    @contextmanager
    def kept(*args):
        with drawn(*args) as fig:
            yield fig
            axes.extend(fig.axes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "figure", kept)
        metric_over_cost("ToSA", points, dense | {"miou": 4.0}, tmp_path / "zero.png", key="miou", label="mIoU, %")
    assert [ax.get_xlim()[0] for ax in axes] == [ax.get_ylim()[0] for ax in axes] == [0, 0]
    assert all(line.get_linestyle() == "None" for ax in axes for line in ax.lines)  # nothing between measured points


def test_bars_are_as_long_as_their_probabilities():
    def blue(probability):
        pixels = np.asarray(annotate(Image.new("RGB", (400, 10)), [""], [probability]))
        return (pixels == np.array([0x2F, 0x6D, 0xB0])).all(-1).sum(1).max()

    assert blue(0.0) == 0
    assert blue(0.8) == pytest.approx(2 * blue(0.4), abs=2)
