"""tools/train_nano.py on a handful of images: one row per model and seed, which is never trained again."""

import csv
import importlib.util
import json

import pytest
from runs import ROOT, make_photos

from effvit_zoo.errors import UserError


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_nano", ROOT / "tools" / "train_nano.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def finished(tool, tmp_path):
    """A run folder that only lacks its row; the best epoch is not the last."""
    folder = tmp_path / "runs" / "effzoo_vit_nano64-3"
    folder.mkdir(parents=True)
    facts = {
        "params": 1,
        "macs": 2,
        "epochs": 2,
        "threads": 1,
        "seconds": 3.4,
        "processor": "a CPU",
        "git_commit": "c0ffee",
    }
    (folder / "summary.json").write_text(json.dumps({"top1": 90.0, **facts}))
    (folder / "metrics.csv").write_text("epoch,top1\n0,90.0\n1,89.123\n")
    return [
        "effzoo_vit_nano64",
        "--seeds",
        "3",
        "--output",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "nano.csv"),
    ]


def test_a_row_is_of_the_last_epoch_and_written_once(tool, finished, tmp_path):
    tool.main(finished)
    written = (tmp_path / "nano.csv").read_text()
    [row] = csv.DictReader(written.splitlines())
    assert tuple(row) == tool.COLUMNS
    assert (row["model"], row["seed"], row["top1"], row["seconds"]) == ("effzoo_vit_nano64", "3", "89.12", "3")
    assert row["command"].startswith("effzoo train --config nano --output ")
    (tmp_path / "runs" / "effzoo_vit_nano64-3" / "summary.json").unlink()  # would be trained if it had no row
    tool.main(finished)
    assert (tmp_path / "nano.csv").read_text() == written


def test_bad_input(tool, finished, tmp_path):
    with pytest.raises(UserError, match="unknown model 'effzoo_vit_nano': did you mean 'effzoo_vit_nano64'"):
        tool.main(["effzoo_vit_nano"])
    (tmp_path / "nano.csv").write_text("model,top1\neffzoo_vit_nano64,90\n")
    with pytest.raises(UserError, match=r"expected the columns model, seed, .*got model, top1"):
        tool.main(finished)
    assert (tmp_path / "nano.csv").read_text() == "model,top1\neffzoo_vit_nano64,90\n"


@pytest.mark.slow
def test_trains(tool, tmp_path):
    photos = make_photos(tmp_path / "photos", {"train": {"blue": 8, "red": 8}, "val": {"blue": 2, "red": 2}})
    arguments = [
        "effzoo_swiftformer_nano64",
        "--output",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "nano.csv"),
    ]
    settings = [
        f"data.root={photos}",
        "data.num_workers=0",
        "train.epochs=1",
        "train.batch_size=8",
        "train.trackers=[]",
    ]
    tool.main([*arguments, "--set", *settings])
    [row] = csv.DictReader((tmp_path / "nano.csv").read_text().splitlines())
    assert 0 <= float(row["top1"]) <= 100
    assert int(row["params"]) > 700_000
    with pytest.raises(UserError, match="ended with exit code 2"):
        tool.main([*arguments, "--seeds", "1", "--set", "optim.no_such=1"])
