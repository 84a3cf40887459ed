"""FSDP2: two processes that hold half of the weights each train, save whole models and go on from their checkpoint."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from runs import make_photos, summary

from effvit_zoo import hub
from effvit_zoo.data import Batch
from effvit_zoo.evaluation.loop import _lockstep, evaluate
from effvit_zoo.tasks import Classification

SCRIPT = Path(__file__).with_name("train_sharded.py")


def launch(port, *arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={port}",
        str(SCRIPT),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_two_processes_with_shards(tmp_path):
    photos = make_photos(tmp_path / "photos", {".": {"blue": 24, "red": 24}})
    config = tmp_path / "small.yaml"
    config.write_text("model: {name: effzoo_vit_pico}\n")
    settings = [
        f"data.root={photos}",
        "data.img_size=32",
        "data.num_workers=0",
        "train.batch_size=8",
        "train.trackers=[]",
    ]
    run = tmp_path / "run"
    done = launch(29671, "--config", config, "--output", run, "--set", *settings, "train.epochs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(run)["top1"] > 90  # red from blue
    model = hub.load(str(run / "last"))
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    resumed = launch(
        29672,
        "--config",
        config,
        "--output",
        run,
        "--resume",
        "auto",
        "--allow-change",
        "train.epochs",
        "--set",
        *settings,
        "train.epochs=3",
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert len((run / "metrics.csv").read_text().splitlines()) == 4  # the header and three epochs


@pytest.mark.slow
def test_a_process_with_no_readable_image_keeps_in_step(tmp_path):
    counts = {"blue": 8, "red": 8}
    photos = make_photos(tmp_path / "photos", {"train": counts, "val": {"blue": 3, "red": 3}})
    for path in (photos / "val/red").iterdir():  # the second process' share
        path.write_bytes(path.read_bytes()[:60])
    settings = [
        f"data.root={photos}",
        "data.img_size=32",
        "data.num_workers=0",
        "train.batch_size=4",
        "train.epochs=1",
        "train.trackers=[]",
    ]
    config = tmp_path / "small.yaml"
    config.write_text("model: {name: effzoo_vit_pico}\n")
    done = launch(29673, "--config", config, "--output", tmp_path / "run", "--set", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(tmp_path / "run")["bad_files"] == 3


def test_processes_take_the_same_number_of_steps():
    """This process has a batch, one without a readable image and no third one; the other has three images and ends then."""
    states = iter([[1, 3, 8, 8], [1, 3, 8, 8], [1, 3, 8, 8], [0, 0, 0, 0]])
    two = SimpleNamespace(device="cpu", gather=lambda own: torch.cat([own, torch.tensor([next(states)])]))
    full = Batch(torch.ones(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    nothing = torch.empty(0)
    damaged = Batch(nothing, nothing, nothing, (("a.png", "truncated"),))
    reported = []
    seen = list(_lockstep([full, damaged], two, reported.extend))
    assert [tuple(batch.image.shape) for batch in seen] == [(2, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8)]
    assert [len(batch) for batch in seen] == [2, 0, 0]
    assert reported == [("a.png", "truncated")]


def test_images_that_only_keep_step_do_not_count():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    accelerator = Accelerator()
    batch = Batch(torch.ones(2, 3, 2, 2), torch.tensor([0, 1]), torch.arange(2))
    nothing = torch.zeros(0, dtype=torch.int64)
    filler = Batch(torch.zeros(1, 3, 2, 2), nothing, nothing)
    results = [
        evaluate(model, batches, Classification(2).evaluator(accelerator.device), accelerator, lambda bad: None)
        for batches in ([batch], [batch, filler])
    ]
    assert results[0].images == results[1].images == 2
    assert results[0].metrics == results[1].metrics
    assert results[0].details == results[1].details
