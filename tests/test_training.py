"""Whole runs of train.py on small folders of images: files, exact resume, several processes, unreadable files, bad input."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import make_photos
from safetensors.torch import load_file

import train
from effvit_zoo.cli import main as effzoo
from effvit_zoo.errors import run_command
from effvit_zoo.training import engine

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["model.name=effzoo_vit_pico", "train.batch_size=8", "data.num_workers=0", "optim.lr=1e-3", "train.trackers=[]"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    counts = {"train": {"blue": 24, "red": 24}, "val": {"blue": 8, "red": 8}}
    return make_photos(tmp_path_factory.mktemp("photos"), counts)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("model: {name: effzoo_vit_pico}\n")
    return path


def run(config, output, *settings, more=()):
    """train.py in this process; returns its exit code."""
    arguments = ["--config", str(config), "--output", str(output), *more, "--set", *SMALL, *settings]
    return run_command(lambda: train.main(arguments))


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_what_was_promised(photos, config, tmp_path, capsys):
    output = tmp_path / "run"
    settings = [
        f"data.root={photos}",
        "train.epochs=4",
        "train.ema_decay=0.9",
        "augment.mixup=0.2",
        "task.smoothing=0.1",
    ]
    assert run(config, output, *settings, "train.trackers=[tensorboard]") == 0
    summary = json.loads((output / "summary.json").read_text())
    assert {
        "model",
        "top1",
        "top5",
        "images_per_second",
        "params",
        "macs",
        "seconds",
        "git_commit",
        "versions",
    } <= summary.keys()
    assert summary["top1"] >= 90
    assert [int(row["epoch"]) for row in rows(output)] == [1, 2, 3, 4]
    assert max(float(row["top1"]) for row in rows(output)) == summary["top1"]
    for name in ("config.yaml", "curves.png", "confusion_matrix.png", "last/config.json", "last/model.safetensors"):
        assert (output / name).stat().st_size > 0
    assert list(output.glob("**/events.out.tfevents*"))

    model = timm.create_model(f"local-dir:{output / 'best'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["blue", "red"]
    results = tmp_path / "results.json"
    code = effzoo(
        ["validate", "--model", str(output), "--data", str(photos), "--results-file", str(results), "--workers", "0"]
    )
    assert code == 0
    assert json.loads(results.read_text())["top1"] == summary["top1"]


@pytest.mark.parametrize("cut", [2, 7, 12])
def test_resume_is_exact_wherever_a_run_was_cut(photos, config, tmp_path, monkeypatch, cut):
    settings = [
        f"data.root={photos}",
        "train.epochs=3",
        "train.checkpoint_steps=2",
        "train.ema_decay=0.9",
        "model.kwargs.drop_path_rate=0.2",
    ]
    assert run(config, tmp_path / "whole", *settings) == 0

    class Cut(BaseException):
        """Stands for a kill: nothing in the program may catch it."""

    original = engine.Loop._optimizer_step

    def until(self, batches):
        if self.state.step == cut:
            raise Cut
        return original(self, batches)

    monkeypatch.setattr(engine.Loop, "_optimizer_step", until)
    with pytest.raises(Cut):
        run(config, tmp_path / "cut", *settings)
    monkeypatch.setattr(engine.Loop, "_optimizer_step", original)
    assert run(config, tmp_path / "cut", *settings, more=["--resume", "auto"]) == 0
    for name in ("best", "last"):
        whole, resumed = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "cut"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    kept = [key for key in rows(tmp_path / "whole")[0] if key not in ("seconds", "images_per_second")]
    whole, resumed = ([[row[key] for key in kept] for row in rows(tmp_path / name)] for name in ("whole", "cut"))
    assert whole == resumed


def test_gradient_accumulation_equals_the_larger_batch(photos, config, tmp_path):
    settings = [f"data.root={photos}", "train.epochs=1", "optim.name=sgd"]
    assert run(config, tmp_path / "large", *settings, "train.batch_size=10") == 0
    assert run(config, tmp_path / "parts", *settings, "train.batch_size=5", "train.grad_accum=2") == 0
    large, parts = (load_file(tmp_path / name / "last/model.safetensors") for name in ("large", "parts"))
    for key in large:
        torch.testing.assert_close(parts[key], large[key], rtol=1e-5, atol=1e-6)


def test_unreadable_files_are_named_once_and_counted(photos, config, tmp_path, capsys):
    root = tmp_path / "photos"
    for label in ("blue", "red"):
        (root / label).mkdir(parents=True)
        for path in (photos / "train" / label).iterdir():
            (root / label / path.name).write_bytes(path.read_bytes())
    jpeg = root / "red" / "cut.jpg"
    Image.effect_noise((64, 64), 80).save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:700])
    (root / "red" / "empty.png").touch()
    (root / "blue" / "words.png").write_text("no picture")
    assert run(config, tmp_path / "run", f"data.root={root}", "train.epochs=2") == 0
    said = "".join(capsys.readouterr())
    for name in ("cut.jpg", "empty.png", "words.png"):
        assert said.count(f"{name}:") == 1
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["bad_files"] == 3
    results = tmp_path / "results.json"  # on the same images that the run held out
    command = ["validate", "--model", str(tmp_path / "run"), "--data", str(root), "--results-file", str(results)]
    assert effzoo([*command, "--workers", "0"]) == 0
    assert json.loads(results.read_text())["top1"] == summary["top1"]
    capsys.readouterr()
    assert run(config, tmp_path / "strict", f"data.root={root}", "data.on_bad_file=raise") == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]) == 1


def test_grey_images_and_odd_mixing(photos, config, tmp_path):
    settings = [
        f"data.root={photos}",
        "train.epochs=1",
        "train.batch_size=7",
        "augment.cutmix=1.0",
        "model.kwargs.in_chans=1",
    ]
    assert run(config, tmp_path / "run", *settings) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["input_size"] == [1, 32, 32]
    assert effzoo(["validate", "--model", str(tmp_path / "run"), "--data", str(photos), "--workers", "0"]) == 0


def test_a_taken_folder_is_left_alone(photos, config, tmp_path, capsys):
    output = tmp_path / "run"
    assert run(config, output, f"data.root={photos}", "train.epochs=1") == 0
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert run(config, output, f"data.root={photos}", "train.epochs=1") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert run(config, output, f"data.root={photos}", "train.epochs=1", "optim.lr=0.5", more=["--resume", "auto"]) == 2
    assert "started with other settings of optim.lr" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        (
            ["model.name=effzoo_swiftformer_xl"],
            [],
            "unknown model 'effzoo_swiftformer_xl': did you mean 'effzoo_swiftformer_",
        ),
        (["train.epoch=3"], [], "unknown config key 'train.epoch': did you mean 'train.epochs'?"),
        (["data.root=EMPTY"], [], "EMPTY"),
        (["data.root=nowhere"], [], "nowhere"),
        (["optim.name=adamx"], [], "unknown optimizer 'adamx'"),
        (["optim.schedule=cosinus"], [], "config key optim.schedule: got 'cosinus', expected one of cosine, tanh"),
        (
            ["train.trackers=[tensorbored]"],
            [],
            "config key train.trackers: got 'tensorbored', expected one of tensorboard, wandb",
        ),
        (["model.kwargs.depht=3"], [], "depht"),
        (["optim.name=sgd", "optim.betas=[0.9, 0.99]"], [], "optim.betas is [0.9, 0.99], expected null with sgd"),
        (
            ["model.kwargs.pretrained_cfg_overlay={mean: [0.5, 0.5]}"],
            [],
            "mean is [0.5, 0.5], expected one number or three",
        ),
        (
            ["model.kwargs.pretrained_cfg_overlay={interpolation: cubic}"],
            [],
            "interpolation is 'cubic', expected one of nearest",
        ),
        (["optim.betas=[0.9]"], [], "optim.betas is [0.9], expected 2 numbers with adamw"),
        (["optim.name=sgd", "optim.eps=1e-6"], [], "optim.eps is 1e-06, expected null: sgd has none"),
        (["model.kwargs.num_classes=7"], [], "model.kwargs.num_classes is 7, the data has 2 classes"),
        (["model.kwargs.in_chans=[3]"], [], "model.kwargs.in_chans is [3], expected 3 (RGB) or 1 (grey)"),
        (["model.kwargs.features_only=true"], [], "model.kwargs.features_only is not a setting of the network"),
        ([], ["--resume", "EMPTY"], "is not a run folder: it has no config.yaml"),
        ([], ["--resume", "nowhere"], "is not a run folder: there is no such folder"),
        ([], ["--config", "nowhere.yaml"], "config file 'nowhere.yaml' does not exist"),
        ([], ["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_bad_input_is_one_line(photos, config, tmp_path, capsys, settings, more, message):
    empty = tmp_path / "EMPTY"
    empty.mkdir()
    settings = [f"data.root={photos}", *(text.replace("EMPTY", str(empty)) for text in settings)]
    more = [text.replace("EMPTY", str(empty)) for text in more]
    arguments = ["--config", str(config), *more, "--set", *SMALL, *settings]
    if "--resume" not in more:
        arguments += ["--output", str(tmp_path / "run")]
    assert run_command(lambda: train.main(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def start(*arguments, launch=()):
    """train.py in a process of its own, in the repository, with one thread so that two may run side by side."""
    command = [*(launch or [sys.executable]), str(ROOT / "train.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    settings = [
        "--set",
        "model.name=effzoo_swiftformer_xs",
        "data.img_size=32",
        "train.epochs=2",
        "train.checkpoint_steps=10",
        "augment.mixup=0.2",
    ]
    whole = start("--output", tmp_path / "whole", *settings)
    killed = start("--output", tmp_path / "killed", *settings)
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed/checkpoints/step-00000020").exists():
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed/summary.json").exists()
    resumed = start("--resume", tmp_path / "killed")
    for process in (whole, resumed):
        output = process.communicate()[0]
        assert process.returncode == 0, output
    a, b = ((tmp_path / name / "last/model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert a == b


@pytest.mark.slow
def test_two_processes_equal_one(photos, tmp_path):
    settings = [
        *SMALL,
        f"data.root={photos}",
        "train.epochs=10",  # of 5 steps
        "optim.name=sgd",
        "optim.lr=0.05",
        "augment.scale=[0.5,1.0]",
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    runs = {
        "one": start("--output", tmp_path / "one", "--set", *settings, "train.batch_size=10"),
        "two": start("--output", tmp_path / "two", "--set", *settings, "train.batch_size=5", launch=launch),
    }
    for process in runs.values():
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    one, two = (
        np.array([[float(row[key]) for key in ("train_loss", "val_loss")] for row in rows(tmp_path / name)])
        for name in runs
    )
    np.testing.assert_allclose(two, one, rtol=1e-4)
    weights = [load_file(tmp_path / name / "last/model.safetensors") for name in runs]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "two/summary.json").read_text())["processes"] == 2
