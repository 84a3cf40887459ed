"""Runs that begin with a linear probe: what they leave, exact resume, two processes, when there is none, and fixed BatchNorms."""

import csv
import dataclasses
import json
import re
import sys

import pytest
import torch
from runs import ROOT, make_photos, summary, train_small
from safetensors.torch import load_file
from test_training import start

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.errors import UserError
from effvit_zoo.tasks import _linear_probe
from effvit_zoo.tasks._linear_probe import LinearProbe
from effvit_zoo.tasks.classification import Classification
from effvit_zoo.training import engine
from effvit_zoo.training.config import load_config, load_run
from effvit_zoo.training.freezing import fixed_norms

SETTINGS = ["data.img_size=32", "train.epochs=2", "optim.layer_decay=0.8", "train.checkpoint_steps=2"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"), {"": {"blue": 20, "red": 12, "green": 12}})


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A model folder with statistics of its BatchNorms and other classes."""
    torch.manual_seed(0)
    model = effvit_zoo.create_model("effzoo_swiftformer_pico", num_classes=5)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 32, 32))
    return hub.save(model.eval(), tmp_path_factory.mktemp("before") / "model", label_names=list("vwxyz"))


def weights(run, name="last"):
    return load_file(run / name / "model.safetensors")


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def rows(run):
    return list(csv.DictReader((run / "metrics.csv").open()))


@pytest.fixture(scope="module")
def whole(photos, before, tmp_path_factory):
    """An uninterrupted run, with averaged weights."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train_small(folder, f"data.root={photos}", f"model.name={before}", *SETTINGS, "train.ema_decay=0.9") == 0
    return folder


def test_the_probe_is_the_first_result(whole, before):
    first, *others = rows(whole)
    assert (first["epoch"], first["step"], first["train_loss"], first["lr"]) == ("0", "0", "", "")
    assert [row["epoch"] for row in others] == ["1", "2"]
    facts = summary(whole)
    assert facts["probe_top1"] == float(first["top1"])
    assert facts["epochs_run"] == 2
    assert facts["gain_interval"][0] <= facts["gain"] <= facts["gain_interval"][1]
    best = max(float(row["top1"]) for row in rows(whole))
    assert facts["top1"] == best
    model = hub.load(whole / "probe")
    assert hub.label_names(model) == ("blue", "green", "red")
    backbone = {key: value for key, value in load_file(before / "model.safetensors").items() if "head" not in key}
    assert equal(backbone, weights(whole, "probe"))  # nothing but the classifier is new
    page = (whole / "report.html").read_text()
    assert "linear probe" in page
    assert "against the probe top-1" in page
    assert not (whole / "features.safetensors").exists()


def test_what_is_said(photos, before, tmp_path, capsys):
    assert train_small(tmp_path / "run", f"data.root={photos}", f"model.name={before}", "data.img_size=32") == 0
    said = capsys.readouterr().out
    assert "classifier: new, the weights' has not 3 of the data's 3 classes" in said
    assert f"linear probe: top-1 {summary(tmp_path / 'run')['probe_top1']:.2f} %" in said
    assert "cross-validated loss" in said
    assert "on 40 images)" in said
    assert "fine-tuning: top-1 " in said
    assert "best/ is the " in said


class Cut(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


@pytest.mark.parametrize(
    "moment",
    [
        "solving",
        "last epoch",
        *(pytest.param(moment, marks=pytest.mark.slow) for moment in ("features", "first epoch")),
    ],
)
def test_resume_is_exact_wherever_it_was_cut(photos, before, whole, tmp_path, monkeypatch, moment):
    output = tmp_path / "cut"
    settings = [f"data.root={photos}", f"model.name={before}", *SETTINGS, "train.ema_decay=0.9"]
    step, original = {"first epoch": 1, "last epoch": 9}.get(moment), engine.Loop._optimizer_step

    def cut(*args, **kwargs):
        raise Cut

    def until(self, batches):
        return cut() if self.state.step == step else original(self, batches)

    if step is None:
        monkeypatch.setattr(LinearProbe, "features" if moment == "features" else "solve", cut)
    else:
        monkeypatch.setattr(engine.Loop, "_optimizer_step", until)
    with pytest.raises(Cut):
        train_small(output, *settings)
    monkeypatch.undo()
    if moment == "solving":
        assert (output / "features.safetensors").is_file()
    if moment != "features":
        monkeypatch.setattr(LinearProbe, "features", cut)  # they are not computed again
    assert train_small(output, *settings, more=["--resume", "auto"]) == 0
    for name in ("probe", "best", "last"):
        assert equal(weights(whole, name), weights(output, name))
    measured = [
        [{key: row[key] for key in row if key not in ("seconds", "images_per_second")} for row in rows(run)]
        for run in (whole, output)
    ]
    assert measured[0] == measured[1]


def test_features_of_other_images_are_not_taken(photos, before, tmp_path, monkeypatch):
    settings = [f"model.name={before}", *SETTINGS]

    def cut(*args):
        raise Cut

    monkeypatch.setattr(LinearProbe, "solve", cut)
    with pytest.raises(Cut):
        train_small(tmp_path / "run", f"data.root={photos}", *settings)
    (tmp_path / "run/features.safetensors").rename(tmp_path / "kept")
    for change in (["augment.hflip=0"], ["data.img_size=64"], ["data.split_seed=1"], ["task.smoothing=0.1"]):
        (tmp_path / "run/features.safetensors").write_bytes((tmp_path / "kept").read_bytes())
        monkeypatch.setattr(LinearProbe, "features", cut)
        with pytest.raises(Cut):
            train_small(tmp_path / "run", f"data.root={photos}", *settings, *change, more=["--resume", "auto"])


def test_the_better_of_both_is_kept(photos, before, tmp_path, monkeypatch, capsys):
    tops = iter([80.0, 70.0, 75.0])
    original = engine.evaluate

    def scripted(*args, **kwargs):
        result = original(*args, **kwargs)
        return dataclasses.replace(result, metrics={**result.metrics, "top1": next(tops)})

    monkeypatch.setattr(engine, "evaluate", scripted)
    run = tmp_path / "run"
    assert train_small(run, f"data.root={photos}", f"model.name={before}", *SETTINGS) == 0
    assert equal(weights(run, "best"), weights(run, "probe"))
    assert not equal(weights(run, "last"), weights(run, "probe"))
    assert (summary(run)["best_epoch"], summary(run)["top1"]) == (0, 80.0)
    said = capsys.readouterr().out
    assert "top-1 80.00 % (linear probe)" in said
    assert "fine-tuning: top-1 75.00 % at epoch 2" in said
    assert "best/ is the linear probe" in said
    assert "by the linear probe" in (run / "report.html").read_text()


def test_a_classifier_that_fits_is_kept_unless_a_probe_is_asked_for(photos, before, whole, tmp_path, capsys):
    settings = [f"data.root={photos}", f"model.name={whole}", "data.img_size=32", "optim.lr=1e-9"]
    settings += ["optim.warmup_lr=1e-9"]
    assert train_small(tmp_path / "kept", *settings) == 0
    assert not (tmp_path / "kept/probe").exists()
    assert rows(tmp_path / "kept")[0]["epoch"] == "1"
    assert "linear probe" not in capsys.readouterr().out
    assert train_small(tmp_path / "asked", *settings, "train.head_init=probe") == 0
    assert "the outputs' layer of the weights gives way to a linear probe" in capsys.readouterr().out
    assert (tmp_path / "asked/probe").exists()
    other = [f"data.root={photos}", f"model.name={before}", "data.img_size=32", "train.head_init=random"]
    assert train_small(tmp_path / "random", *other) == 0
    assert not (tmp_path / "random/probe").exists()


def test_where_there_can_be_no_probe(photos, before, tmp_path, monkeypatch, capsys):
    settings = [f"data.root={photos}", f"model.name={before}", "data.img_size=32"]

    def refuse(self, batch):
        raise UserError("its features hold values that are infinite or not a number")

    with monkeypatch.context() as patch:
        patch.setattr(LinearProbe, "features", refuse)
        assert train_small(tmp_path / "a", *settings) == 0
        said = capsys.readouterr().out
        assert "no linear probe, so the new outputs start from random weights: its features hold values" in said
        assert train_small(tmp_path / "b", *settings, "train.head_init=probe") == 2
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if line.startswith("error")] == [
            "error: train.head_init is probe: its features hold values that are infinite or not a number"
        ]
    monkeypatch.setattr(Classification, "head_solver", lambda self, model: LinearProbe(torch.nn.Flatten(), 3, False))
    assert train_small(tmp_path / "c", *settings, "train.head_init=probe") == 2
    assert "train.head_init is probe: Flatten has no classifier" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_one_image_of_a_class_and_none_to_validate_it(before, tmp_path):
    photos = make_photos(tmp_path / "photos", {"": {"blue": 8, "red": 8, "green": 1}})
    run = tmp_path / "run"
    assert train_small(run, f"data.root={photos}", f"model.name={before}", "data.img_size=32") == 0
    assert rows(run)[0]["epoch"] == "0"
    assert hub.load(run / "probe").num_classes == 3


def test_a_stated_sample_of_many_images(photos, before, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_linear_probe, "MOST_IMAGES", 15)
    assert train_small(tmp_path / "run", f"data.root={photos}", f"model.name={before}", "data.img_size=32") == 0
    assert re.search(r"on 1[45] images of 40\)", capsys.readouterr().out)


def norms(run, name="last"):
    return {key: value for key, value in weights(run, name).items() if key.endswith(("running_mean", "running_var"))}


def test_batchnorms_keep_trained_statistics(photos, before, whole, tmp_path):
    trained = load_file(before / "model.safetensors")
    assert norms(whole)
    assert all(torch.equal(value, trained[key]) for key, value in norms(whole).items())
    assert not torch.equal(weights(whole)["norm.weight"], trained["norm.weight"])  # they learn all the same
    settings = [f"data.root={photos}", f"model.name={before}", "data.img_size=32", "train.batchnorm=train"]
    assert train_small(tmp_path / "run", *settings) == 0
    assert not equal(norms(tmp_path / "run"), trained)


def test_which_batchnorms_are_fixed(before, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"model: {{name: {before}}}\n")
    model = hub.load(before)
    everything = len(fixed_norms(model, load_config(path, ["train.batchnorm=fixed", "train.batch_size=512"])))
    assert everything > 10
    assert len(fixed_norms(model, load_config(path, ["train.batch_size=127"]))) == everything
    assert not fixed_norms(model, load_config(path, ["train.batch_size=128"]))
    fresh = effvit_zoo.create_model("effzoo_swiftformer_pico")
    assert not fixed_norms(fresh, load_config(path, ["train.batchnorm=fixed"]))  # they have no statistics yet


def test_a_run_of_an_earlier_version_goes_on_as_it_began(whole, tmp_path):
    lines = (whole / "config.yaml").read_text().splitlines(keepends=True)
    earlier = [line for line in lines if "head_init" not in line and "batchnorm" not in line]
    assert len(earlier) == len(lines) - 2
    (tmp_path / "config.yaml").write_text("".join(earlier))
    train = load_run(tmp_path).train
    assert (train.head_init, train.batchnorm) == ("random", "train")
    assert load_run(whole).train.head_init is None


@pytest.mark.slow
def test_two_processes_equal_one(photos, before, tmp_path):
    settings = [
        f"data.root={photos}", f"model.name={before}", "data.img_size=32", "data.num_workers=0", "train.epochs=3",
        "optim.name=sgd", "optim.lr=0.01", "train.trackers=[]", "data.on_bad_file=raise",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    config = ROOT / "configs/finetune.yaml"
    runs = {
        "one": start("--config", config, "--output", tmp_path / "one", "--set", *settings, "train.batch_size=10"),
        "two": start(
            "--config", config, "--output", tmp_path / "two", "--set", *settings, "train.batch_size=5", launch=launch
        ),
    }
    for process in runs.values():
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    for name in ("probe", "last"):
        one, two = (weights(tmp_path / run, name) for run in runs)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)
    states = [json.loads((tmp_path / run / "summary.json").read_text()) for run in runs]
    assert states[0]["probe_top1"] == states[1]["probe_top1"]
    assert states[1]["processes"] == 2
