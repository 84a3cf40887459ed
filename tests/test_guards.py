"""A run that meets NaN, SIGTERM, a dead loader, a full disk or the same file twice ends well, and goes on to the same weights."""

import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image
from runs import make_photos, start, summary, train_small
from safetensors.torch import load_file

from effvit_zoo.data import Duplicates, duplicates, open_splits
from effvit_zoo.tasks import Classification
from effvit_zoo.training import checkpoint, engine


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    counts = {"blue": 24, "red": 24}
    return make_photos(tmp_path_factory.mktemp("photos"), {"train": counts, "val": {"blue": 6, "red": 6}})


def make_bad(monkeypatch, bad_steps, poison_statistics=False):
    """Makes the loss NaN at these optimizer steps, and BatchNorm's statistics too."""
    calls = {"step": 0}
    original = Classification.loss

    def loss(self, model, batch):
        result, metrics = original(self, model, batch)
        calls["step"] += 1
        if calls["step"] - 1 in bad_steps:
            if poison_statistics:  # as a forward pass over infinite activations does
                for name, buffer in model.named_buffers():
                    if "running" in name:
                        buffer.data = torch.full_like(buffer, float("nan"))
            result = result * float("nan")
        return result, metrics

    monkeypatch.setattr(Classification, "loss", loss)


def test_a_bad_step_changes_nothing(photos, tmp_path, monkeypatch, capsys):
    make_bad(monkeypatch, {1}, poison_statistics=True)
    settings = [f"data.root={photos}", "model.name=effzoo_swiftformer_xs", "data.img_size=32", "train.batch_size=16"]
    weights = []
    original = engine.Loop._optimizer_step

    def watched(self, batches):
        result = original(self, batches)
        weights.append({key: value.clone() for key, value in self.model.state_dict().items()})
        return result

    monkeypatch.setattr(engine.Loop, "_optimizer_step", watched)
    assert train_small(tmp_path / "run", *settings, "train.ema_decay=0.9") == 0
    assert "skipped step 2: its loss or gradient is not finite" in "".join(capsys.readouterr())
    before, after, last = weights
    for key, value in before.items():
        if value.is_floating_point():
            assert torch.equal(value, after[key]), key
    assert not torch.equal(before["head.weight"], last["head.weight"])
    assert all(torch.isfinite(value).all() for value in last.values())
    assert summary(tmp_path / "run")["skipped_steps"] == 1


def test_too_many_bad_steps_end_the_run_with_the_batch_kept(photos, tmp_path, monkeypatch, capsys):
    make_bad(monkeypatch, range(2, 100))
    output = tmp_path / "run"
    assert train_small(output, f"data.root={photos}", "train.max_bad_steps=3", "train.epochs=2") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "not finite in 3 steps in a row, the last is step 5" in errors[0]
    kept = load_file(output / "bad_step_00000005_process_0.safetensors")
    assert kept["image.0"].shape == (8, 3, 32, 32)
    assert kept["target.0"].shape == kept["index.0"].shape == (8,)


def test_good_steps_in_between_reset_the_count(photos, tmp_path, monkeypatch):
    make_bad(monkeypatch, {0, 1, 3, 4})
    assert train_small(tmp_path / "run", f"data.root={photos}", "train.max_bad_steps=3") == 0
    assert summary(tmp_path / "run")["skipped_steps"] == 4


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_that_goes_on_exactly(photos, tmp_path, monkeypatch, capsys):
    settings = [f"data.root={photos}", "train.epochs=2", "train.ema_decay=0.9"]
    assert train_small(tmp_path / "whole", *settings) == 0
    original = engine.Loop._optimizer_step

    for name, step in (("middle", 9), ("end_of_epoch", 6)):
        output = tmp_path / name

        def terminated(self, batches, step=step):
            result = original(self, batches)
            if self.state.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)  # handlers run between bytecodes
                self.stop_now = self.sigterm.received
            return result

        monkeypatch.setattr(engine.Loop, "_optimizer_step", terminated)
        with pytest.raises(SystemExit) as leaving:
            train_small(output, *settings)
        assert leaving.value.code == 0
        assert f"SIGTERM: stopped after step {step}" in "".join(capsys.readouterr())
        page = (output / "report.html").read_text()
        assert f"Interrupted by a signal to stop after {step // 9} of 2 epochs, step {step} of 12" in page
        assert f"effzoo train --resume {output}" in page
        assert ("top-1" in page) == (step == 9)  # no epoch had been measured before
        monkeypatch.setattr(engine.Loop, "_optimizer_step", original)
        assert (output / "checkpoints" / f"step-{step:08d}").is_dir()
        assert train_small(output, *settings, more=["--resume", "auto"]) == 0
        assert "Interrupted" not in (output / "report.html").read_text()
        for part in ("best", "last"):
            whole, resumed = (load_file(folder / part / "model.safetensors") for folder in (tmp_path / "whole", output))
            assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_second_sigterm_ends_the_process_at_once():
    code = (
        "import os, signal\nfrom effvit_zoo.training.guards import SigtermWatch\n"
        "with SigtermWatch() as watch:\n    os.kill(os.getpid(), signal.SIGTERM)\n    assert watch.received\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('survived')\n"
    )
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM
    assert "survived" not in done.stdout


def test_a_dead_loader_worker_is_one_line(photos, tmp_path, monkeypatch, capsys):
    class Dying:
        def __iter__(self):
            raise RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. ")
            yield

    original = engine.Loop.__init__

    def init(self, task, objective, model, feed, *args):
        object.__setattr__(feed, "train_batches", lambda *_: Dying())
        original(self, task, objective, model, feed, *args)

    monkeypatch.setattr(engine.Loop, "__init__", init)
    assert train_small(tmp_path / "run", f"data.root={photos}") == 2
    errors = capsys.readouterr().err.splitlines()
    assert "a loader worker died (DataLoader worker (pid 77) is killed by signal: Killed.)" in errors[-1]
    assert "data.num_workers" in errors[-1]


@pytest.mark.parametrize("failing", ["save_state", "rename"])
def test_a_full_disk_keeps_the_last_good_checkpoint(photos, tmp_path, monkeypatch, capsys, failing):
    settings = [f"data.root={photos}", "train.epochs=2", "train.checkpoint_steps=2"]
    assert train_small(tmp_path / "whole", *settings) == 0
    original = checkpoint._write

    def full(run, accelerator, ema, state, keep):
        if state.step < 8:
            return original(run, accelerator, ema, state, keep)
        if failing == "save_state":
            (run / "checkpoints/writing").mkdir()
            (run / "checkpoints/writing/half").write_bytes(b"0" * 100)
            raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    output = tmp_path / "run"
    assert train_small(output, *settings) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "cannot write a checkpoint of step 8" in errors[0]
    assert "the last good one is step-00000006" in errors[0]
    assert not (output / "checkpoints/writing").exists()
    monkeypatch.undo()
    assert train_small(output, *settings, more=["--resume", "auto"]) == 0
    whole, resumed = (load_file(tmp_path / name / "last/model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_files_in_both_splits_are_told(photos, tmp_path, capsys):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    shutil.copy(root / "train/red/3.png", root / "val/blue/copy.png")
    splits = open_splits(root)
    copies = str(root / "val/blue/copy.png"), str(root / "train/red/3.png")
    assert duplicates(splits.train, splits.val).shared == [copies]
    assert duplicates(splits.train, splits.val).contradictions == [tuple(sorted(copies))]  # blue and red
    assert train_small(tmp_path / "run", f"data.root={root}") == 0
    assert "warning: 1 of 13 validation files are training files too" in capsys.readouterr().out
    assert "copy.png" in (tmp_path / "run/report.html").read_text()
    assert train_small(tmp_path / "quiet", f"data.root={root}", "data.check_duplicates=false") == 0
    assert "training files too" not in capsys.readouterr().out
    plain = open_splits("builtin:fashion-mnist-mini")
    assert duplicates(plain.train, plain.val).shared == []


def test_duplicates_need_equal_content_not_equal_size(tmp_path):
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            pixels = np.random.default_rng(hash((split, label)) % 1000).integers(0, 255, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / label / "0.bmp")  # all of one size
    splits = open_splits(tmp_path)
    assert duplicates(splits.train, splits.val) == Duplicates()


@pytest.mark.slow
def test_sigterm_to_a_real_run(tmp_path):
    settings = ["--set", "train.epochs=2", "data.img_size=28", "train.trackers=[]"]
    run = start("--output", tmp_path / "run", *settings)
    deadline = time.monotonic() + 200
    while not (tmp_path / "run/config.yaml").exists():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(5)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 0, said
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_that_is_really_full(photos, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine doesn't let us mount")
    settings = ["--set", f"data.root={photos}", "model.name=effzoo_vit_pico", "train.epochs=3", "train.batch_size=8"]
    settings += ["data.num_workers=0", "train.trackers=[]", "train.checkpoint_steps=2", "train.ema_decay=0.9"]
    try:
        whole = start("--output", tmp_path / "whole", *settings)
        assert whole.wait(timeout=200) == 0
        needed = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
        checkpoint_size = sum(
            path.stat().st_size
            for path in next((tmp_path / "whole/checkpoints").glob("step-*")).rglob("*")
            if path.is_file()
        )
        room = needed - checkpoint_size // 2  # two checkpoints fit, the third doesn't
        subprocess.run(["mount", "-o", f"remount,size={room}", str(disk)], check=True)
        run = start("--output", disk / "run", *settings)
        said = run.communicate(timeout=200)[0]
        assert run.returncode == 2, said
        assert len([line for line in said.splitlines() if line.startswith("error:")]) == 1
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        resumed = start("--resume", disk / "run")
        said = resumed.communicate(timeout=200)[0]
        assert resumed.returncode == 0, said
        a, b = (load_file(folder / "last/model.safetensors") for folder in (tmp_path / "whole", disk / "run"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # weights that were compared are still mapped
