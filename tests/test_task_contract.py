"""A third task, known to the tests only, does everything that classification does, and not one line of the package is about it."""

import csv
import json

import numpy as np
import pytest
import torch
from brightness import Brightness
from huggingface_hub import ModelCard
from PIL import Image
from runs import make_photos, summary, train_small
from safetensors.torch import load_file

import effvit_zoo
from effvit_zoo.cli import main as effzoo
from effvit_zoo.tasks import TASKS, mean_over_images
from effvit_zoo.training import engine

SETTINGS = ["task.kind=brightness", "train.epochs=3", "train.checkpoint_steps=2", "train.ema_decay=0.5"]


@pytest.fixture(autouse=True)
def brightness(monkeypatch):
    monkeypatch.setitem(TASKS, "brightness", Brightness)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"), {"": {"blue": 20, "red": 20, "green": 20}})


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "brightness"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "brightness", Brightness)
        assert train_small(folder, *SETTINGS, f"data.root={photos}") == 0
    return folder


def test_it_trains_and_reports_its_own_metric_and_no_other(run):
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert {"train_loss", "train_mae", "val_loss", "mae"} <= rows[0].keys()
    assert not {"top1", "train_top1"} & rows[0].keys()
    best = min(rows, key=lambda row: float(row["mae"]))  # lower is better
    assert summary(run)["best_epoch"] == int(best["epoch"])
    assert summary(run)["mae"] == float(best["mae"])
    assert summary(run)["task"] == "brightness"
    page = (run / "report.html").read_text()
    assert "Largest errors" in page
    assert "mean error" in page
    assert "top-1" not in page


def test_it_resumes_after_a_kill_to_the_same_bits(run, photos, tmp_path, monkeypatch):
    class Cut(BaseException):
        """Stands for a kill: nothing in the program may catch it."""

    original = engine.Loop._optimizer_step

    def until(self, batches):
        if self.state.step == 11:
            raise Cut
        return original(self, batches)

    monkeypatch.setattr(engine.Loop, "_optimizer_step", until)
    with pytest.raises(Cut):
        train_small(tmp_path / "cut", *SETTINGS, f"data.root={photos}")
    monkeypatch.setattr(engine.Loop, "_optimizer_step", original)
    assert train_small(tmp_path / "cut", *SETTINGS, f"data.root={photos}", more=["--resume", "auto"]) == 0
    for name in ("best", "last"):
        whole, cut = (load_file(folder / name / "model.safetensors") for folder in (run, tmp_path / "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_it_is_validated_on_what_was_held_out(run, photos, tmp_path, capsys):
    results = tmp_path / "results.json"
    command = ["validate", "--model", str(run), "--data", f"{photos}/", "--workers", "0"]
    assert effzoo([*command, "--results-file", str(results)]) == 0
    row = json.loads(results.read_text())
    assert row["mae"] == pytest.approx(summary(run)["mae"])
    assert row["images"] == summary(run)["val_images"]
    assert "mean error" in capsys.readouterr().out


def test_it_predicts(run, tmp_path, capsys):
    Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(tmp_path / "x.png")
    assert effzoo(["predict", "--model", str(run), str(tmp_path / "x.png"), "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)
    assert entry["image"] == str(tmp_path / "x.png")
    [value] = [item["brightness"] for rows in entry.values() if isinstance(rows, list) for item in rows]
    assert np.isfinite(value)


def test_it_is_pushed_with_its_card_and_comes_back(run, the_hub, tmp_path):
    effvit_zoo.push(run, "ada/light")
    text = the_hub.repos["ada/light"].files()["README.md"].decode()
    card = ModelCard(text).data
    assert card.pipeline_tag == "image-feature-extraction"
    assert {(result.metric_type, result.metric_value) for result in card.eval_results} == {
        ("mae", round(summary(run)["mae"], 3))
    }
    pulled = effvit_zoo.pull("ada/light", tmp_path / "light")
    there = load_file(pulled / "model.safetensors")
    assert all(torch.equal(there[key], value) for key, value in load_file(run / "best/model.safetensors").items())


def test_settings_of_an_unknown_task_are_one_line(photos, tmp_path, capsys):
    assert train_small(tmp_path / "run", f"data.root={photos}", "task.kind=brightnes") == 2
    assert "unknown task 'brightnes': did you mean 'brightness'?" in capsys.readouterr().err
    assert train_small(tmp_path / "run", f"data.root={photos}", "task.kind=brightness", "task.smoothing=0.1") == 2
    assert "task.smoothing" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 5, 6)])
def test_a_loss_is_a_mean_over_images_of_means_over_valid_pixels(shape):
    values = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    valid[2] = False  # an image without a valid pixel counts as 0
    expected = 0.0
    for image, mask in zip(values, valid, strict=True):
        expected += (image[mask].mean().item() if mask.any() else 0.0) / len(values)
    assert mean_over_images(values, valid).item() == pytest.approx(expected)
    halves = [mean_over_images(values[part], valid[part]) for part in (slice(0, 1), slice(1, 4))]
    assert (halves[0] / 4 + 3 * halves[1] / 4).item() == pytest.approx(expected)  # two processes equal one
    assert mean_over_images(values).item() == pytest.approx(values.mean().item())
