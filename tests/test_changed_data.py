"""A run that is resumed over other images than it was started with stops and says what changed, or is allowed to."""

import shutil

import pytest
import yaml
from runs import make_photos, summary, train_small

from effvit_zoo.data import changes, listing, open_splits, read_listing, write_listing
from effvit_zoo.training.config import load_run


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A folder of photos, and a run of one epoch on it."""
    place = tmp_path_factory.mktemp("started")
    make_photos(place / "photos", {"train": {"blue": 20, "red": 20}, "val": {"blue": 4, "red": 4}})
    assert train_small(place / "run", f"data.root={place / 'photos'}", "data.check_duplicates=false") == 0
    return place


def resume(place, capsys, *more, epochs=2):
    settings = [f"data.root={place / 'photos'}", "data.check_duplicates=false", f"train.epochs={epochs}"]
    more = ["--resume", str(place / "run"), "--allow-change", "train.epochs", *more]
    code = train_small(place / "run", *settings, more=more)
    return code, capsys.readouterr().err.strip().splitlines()[-1]


def test_changed_images_are_refused_by_name_or_allowed(started, tmp_path, capsys, monkeypatch):
    place = shutil.copytree(started, tmp_path / "place")
    root = place / "photos"
    monkeypatch.setattr("effvit_zoo.training.run.strict.changed_keys", lambda a, b: [])  # another root: the copy's
    make_photos(root, {"train": {"blue": 32}}, seed=0)
    (root / "train/red/3.png").unlink()
    (root / "val/red/0.png").rename(root / "val/blue/moved.png")
    code, line = resume(place, capsys)
    assert code == 2
    assert f"the images of {root} have changed since {place / 'run'} was started: 12 train images added" in line
    for part in ("(e.g. blue/20.png)", "1 train images removed (e.g. red/3.png)", "--allow-change data.files"):
        assert part in line
    code, _ = resume(place, capsys, "data.files")
    assert code == 0
    assert summary(place / "run")["steps"] == 2 * -(-51 // 8)  # each epoch anew with the new number of steps
    assert summary(place / "run")["train_images"] == 51
    assert changes(read_listing(place / "run/data.json.gz"), listing(open_splits(root))) == []


def test_other_classes_are_refused_always(started, tmp_path, capsys, monkeypatch):
    place = shutil.copytree(started, tmp_path / "place")
    monkeypatch.setattr("effvit_zoo.training.run.strict.changed_keys", lambda a, b: [])
    for split in ("train", "val"):
        (place / f"photos/{split}/blue").rename(place / f"photos/{split}/green")
    code, line = resume(place, capsys, "data.files")
    assert code == 2
    assert "was started with other classes of" in line
    assert "(blue, green): start a new run" in line


def test_unchanged_images_resume(started, capsys):
    assert resume(started, capsys)[0] == 0
    assert resume(started, capsys, epochs=3)[0] == 0


def test_a_file_in_another_class_is_told_as_one_change(tmp_path):
    root = make_photos(tmp_path / "photos", {"": {"blue": 12, "red": 12}})
    before = listing(open_splits(root, val_fraction=0.01))
    write_listing(tmp_path / "data", before)
    old = {"train": {"red/unique.png": "red", "red/2.png": "red"}, "val": {}}
    new = {"train": {"blue/unique.png": "blue", "red/2.png": "red"}, "val": {}}
    assert changes(old, new) == ["1 train images in another class (e.g. red/unique.png: red -> blue)"]
    relabelled = {"train": {"red/unique.png": "red", "red/2.png": "blue"}, "val": {}}
    assert changes(old, relabelled) == ["1 train images in another class (e.g. red/2.png: red -> blue)"]
    assert read_listing(tmp_path / "data") == before
    stream = {"train": {"a stream of 8 images": ""}, "val": {}}
    assert changes(stream, {"train": {"a stream of 9 images": ""}, "val": {}})[0].startswith("1 train images added")


def test_a_run_folder_of_a_version_without_split_seed_keeps_its_split(tmp_path):
    config = {"model": {"name": "effzoo_vit_pico"}, "train": {"seed": 5}, "data": {"root": "photos"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert load_run(tmp_path).data.split_seed == 5
    assert load_run(tmp_path, ["data.split_seed=2"]).data.split_seed == 2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"data": {"split_seed": 1}}))
    assert load_run(tmp_path).data.split_seed == 1
