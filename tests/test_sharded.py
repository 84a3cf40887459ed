"""FSDP2: two processes that hold half of the weights each train, save whole models and go on from their checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import make_photos, summary

from effvit_zoo import hub

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
