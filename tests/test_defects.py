"""Faults that were there once, tried through the command line: validation on training images, figures that nobody measured."""

import csv
import json
import os
import shutil

import pytest
from runs import make_photos, start, summary, train_small

from effvit_zoo.cli import main as effzoo


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on an undivided folder, started with a relative path."""
    base = tmp_path_factory.mktemp("held_out")
    make_photos(base / "photos", {"": {"blue": 30, "red": 30}})
    before = os.getcwd()
    os.chdir(base)
    try:
        assert train_small(base / "run", "data.root=photos", "data.val_fraction=0.2") == 0
    finally:
        os.chdir(before)
    return base


def validated(model, data, tmp_path, monkeypatch, cwd):
    monkeypatch.chdir(cwd)
    results = tmp_path / "rows.json"
    command = ["validate", "--model", str(model), "--data", str(data), "--workers", "0", "--results-file", str(results)]
    code = effzoo(command)
    rows = json.loads(results.read_text()) if code == 0 else []
    return code, rows[0] if isinstance(rows, list) and rows else rows


@pytest.mark.parametrize("spelling", ["photos", "photos/", "./photos", "ABSOLUTE", "LINK", "ELSEWHERE", "MOVED"])
def test_a_path_spelt_otherwise_is_not_validated_on_training_images(trained, tmp_path, monkeypatch, spelling):
    cwd, data = trained, spelling
    if spelling == "ABSOLUTE":
        data = trained / "photos"
    elif spelling == "LINK":
        (tmp_path / "link").symlink_to(trained / "photos")
        data = tmp_path / "link"
    elif spelling == "ELSEWHERE":
        cwd, data = tmp_path, os.path.relpath(trained / "photos", tmp_path)
    elif spelling == "MOVED":
        shutil.copytree(trained / "photos", tmp_path / "pictures")
        data = tmp_path / "pictures"
    code, row = validated(trained / "run", data, tmp_path, monkeypatch, cwd)
    assert code == 0
    assert row["images"] == summary(trained / "run")["val_images"] == 12
    assert row["top1"] == summary(trained / "run")["top1"]
    assert row["split"] == "held-out part"


def test_after_push_and_pull_the_held_out_part_is_still_found(trained, tmp_path, monkeypatch, the_hub):
    assert effzoo(["push", str(trained / "run"), "ada/colours"]) == 0
    monkeypatch.chdir(tmp_path)
    assert effzoo(["pull", "ada/colours"]) == 0
    code, row = validated(tmp_path / "colours", trained / "photos", tmp_path, monkeypatch, tmp_path)
    assert (code, row["images"]) == (0, 12)
    assert str(trained) not in (tmp_path / "colours" / "config.json").read_text()


def test_images_added_since_never_bring_training_images_in(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "photos", tmp_path / "grown")
    held_out = {}
    for spelling in ("photos", tmp_path / "grown"):
        _, row = validated(trained / "run", spelling, tmp_path, monkeypatch, trained)
        held_out[str(spelling)] = row["images"]
        if spelling == "photos":
            for label in ("blue", "red"):
                for number in range(40):
                    source = tmp_path / "grown" / label / f"{number % 30}.png"
                    shutil.copy(source, tmp_path / "grown" / label / f"new{number}.png")
    assert held_out["photos"] == 12
    assert 12 <= held_out[str(tmp_path / "grown")] < 12 + 80


def test_other_data_is_measured_whole_and_the_row_says_so(trained, tmp_path, monkeypatch):
    make_photos(tmp_path / "raw", {"": {"blue": 5, "red": 4}})
    for label in ("blue", "red"):
        (tmp_path / "other" / label).mkdir(parents=True)
        for path in (tmp_path / "raw" / label).iterdir():
            path.rename(tmp_path / "other" / label / f"other-{path.name}")
    code, row = validated(trained / "run", tmp_path / "other", tmp_path, monkeypatch, tmp_path)
    assert (code, row["images"], row["split"]) == (0, 9, "all")


def test_what_cannot_be_decided_is_refused_with_the_option_named(tmp_path, monkeypatch, capsys):
    make_photos(tmp_path / "photos", {"train": {"blue": 12, "red": 12}, "val": {"blue": 4, "red": 4}})
    assert train_small(tmp_path / "run", f"data.root={tmp_path / 'photos'}") == 0
    code, row = validated(tmp_path / "run", tmp_path / "photos", tmp_path, monkeypatch, tmp_path)
    assert (code, row["images"]) == (0, 8)
    capsys.readouterr()
    shutil.copytree(tmp_path / "photos" / "train", tmp_path / "flat")
    for path in (tmp_path / "flat").rglob("*.png"):
        path.rename(path.with_name(f"t{path.name}"))
    for path in (tmp_path / "photos" / "train").rglob("*.png"):
        path.rename(path.with_name(f"t{path.name}"))
    assert train_small(tmp_path / "again", f"data.root={tmp_path / 'photos'}") == 0
    code, _ = validated(tmp_path / "again", tmp_path / "flat", tmp_path, monkeypatch, tmp_path)
    assert code == 2
    assert "--split" in capsys.readouterr().err.splitlines()[-1]


def test_the_split_that_training_named_is_the_one_that_is_measured(tmp_path, monkeypatch):
    counts = {"train": {"blue": 12, "red": 12}, "val": {"blue": 4, "red": 4}, "test": {"blue": 3, "red": 3}}
    make_photos(tmp_path / "photos", counts)
    assert train_small(tmp_path / "run", f"data.root={tmp_path / 'photos'}", "data.val_split=test") == 0
    code, row = validated(tmp_path / "run", tmp_path / "photos", tmp_path, monkeypatch, tmp_path)
    assert (code, row["images"]) == (0, 6)


@pytest.mark.slow
def test_a_stage_that_measures_no_accuracy_in_training_shows_none(tmp_path, capfd):
    make_photos(tmp_path / "photos", {"train": {"blue": 16, "red": 16}, "val": {"blue": 6, "red": 6}})
    stage = "{optim: {lr: 1.0e-3}, train: {epochs: 1, batch_size: 8, trackers: []}}"
    config = tmp_path / "tosa.yaml"
    config.write_text(
        "pipeline: tosa\nmodel: {name: effzoo_vit_pico, kwargs: {depth: 4}}\n"
        f"data: {{root: {tmp_path / 'photos'}, num_workers: 0}}\nratios: [1.0, 0.5]\n"
        f"dense: {stage}\nselectors: {stage}\nfinetune: {stage}\n"
    )
    process = start("--config", config, "--output", tmp_path / "run")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    [row] = csv.DictReader((tmp_path / "run/2-selectors/metrics.csv").open())
    assert "train_top1" not in row
    assert float(row["top1"]) > 0  # validation does measure it
    lines = [line for line in said.splitlines() if "train loss" in line]
    assert len(lines) == 3
    assert "top-1" not in lines[1].partition("|")[0]


def test_a_validation_of_a_run_is_in_its_card(trained, tmp_path, monkeypatch, the_hub):
    """The card reads the file that `validate` writes, in the form in which it writes it."""
    shutil.copytree(trained / "run", tmp_path / "run")
    make_photos(tmp_path / "other", {"": {"blue": 3, "red": 4}})
    for path in (tmp_path / "other").rglob("*.png"):
        path.rename(path.with_name(f"x{path.name}"))
    code, row = validated(tmp_path / "run", tmp_path / "other", tmp_path, monkeypatch, tmp_path)
    assert code == 0
    assert effzoo(["push", str(tmp_path / "run"), "ada/colours"]) == 0
    card = the_hub.repos["ada/colours"].files()["README.md"].decode()
    assert f"other, all, 7 images) | {row['top1']:.2f}" in card


@pytest.mark.parametrize("debug", ["", "1"])
def test_a_traceback_can_be_seen_behind_a_one_line_error(debug, monkeypatch, capsys):
    monkeypatch.setenv("EFFZOO_DEBUG", debug)
    assert effzoo(["info", "no_such_net"]) == 2
    shown = capsys.readouterr().err
    assert ("Traceback" in shown) == (debug == "1")
    assert shown.splitlines()[-1].startswith("error: unknown model 'no_such_net'")


def test_a_defect_of_ours_is_not_dressed_as_a_user_error(tmp_path, monkeypatch):
    """A TypeError in a reader keeps its traceback instead of becoming "cannot open photos"."""
    from effvit_zoo.data import open_splits
    from effvit_zoo.data.roots import folder

    make_photos(tmp_path / "photos", {"": {"blue": 3, "red": 3}})

    def broken(*args):
        raise TypeError("a defect")

    monkeypatch.setattr(folder, "label_by_folder", broken)
    with pytest.raises(TypeError, match="a defect"):
        open_splits(tmp_path / "photos")
