"""From a trained model and a folder of pictures to a fine-tuned one: freezing, layer-wise rates, weights, stopping early, the report."""

import csv
import dataclasses
import html
import json
import re

import numpy as np
import pytest
import timm
import torch
from hub_server import READ_TOKEN
from PIL import Image
from runs import ROOT, make_photos, start, summary, train_small
from safetensors.torch import load_file

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.data import Batch
from effvit_zoo.data.plan import BatchPlan
from effvit_zoo.errors import UserError
from effvit_zoo.report.run_page import Page, write_report
from effvit_zoo.tasks import Classification, Picture, Section, Table
from effvit_zoo.tasks._balance import balanced_weights
from effvit_zoo.tasks._scores import macro_f1, per_class, wilson_interval
from effvit_zoo.tasks.classification import ClassificationConfig
from effvit_zoo.training import engine
from effvit_zoo.training.config import OptimConfig, load_config
from effvit_zoo.training.optim import make_optimizer, make_scheduler
from effvit_zoo.training.prepare import prepare


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"), {"": {"blue": 24, "red": 12, "green": 12}})


def test_the_recipe_in_one_command(photos, tmp_path, capsys):
    """configs/finetune.yaml on a folder without splits: another head, everything promised in the run folder."""
    before = tmp_path / "before"
    pretrained = effvit_zoo.create_model("effzoo_edgenext_xx_small", num_classes=7)
    hub.save(pretrained, before)
    output = tmp_path / "run"
    settings = [
        f"data.root={photos}",
        f"model.name={before}",
        "data.img_size=32",
        "train.epochs=2",
        "optim.warmup_epochs=0",
    ]
    assert train_small(output, *settings, config=ROOT / "configs/finetune.yaml") == 0
    said = capsys.readouterr().out
    assert "classes are unequal: 'blue' 22 training images, 'green' 11; task.class_weights=true" in said
    for name in ("best", "last"):
        model = timm.create_model(f"local-dir:{output / name}", pretrained=True)
        assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]
        assert model.pretrained_cfg["input_size"] == [3, 32, 32] or model.pretrained_cfg["input_size"] == (3, 32, 32)
        assert model.num_classes == 3
    page = (output / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') >= 2
    assert not re.search(r'(src|href)="(?!data:)', page)  # no other file is needed
    for word in ("recall, %", "precision, %", "F1, %", "blue", "classes are unequal", "Most confident mistakes"):
        assert word in page
    places = [
        page.index(f">{part}</h2>") for part in ("Examples", "Summary", "Curves", "Confusion matrix", "Technical")
    ]
    assert places == sorted(places)
    for word in (
        "95 % interval",
        "always naming the largest class, blue",
        "macro-F1",
        "hflip",
        "3 x cross covariance attention",
    ):
        assert word in page
    assert "top-5" not in page  # of three classes
    assert summary(output)["epochs_run"] == 2


def test_frozen_epochs_move_nothing_but_the_head(photos, tmp_path):
    start = tmp_path / "start"
    hub.save(effvit_zoo.create_model("effzoo_swiftformer_xs", num_classes=3), start)
    settings = [f"data.root={photos}", f"model.name={start}", "data.img_size=32", "train.batch_size=24"]
    assert train_small(tmp_path / "frozen", *settings, "train.epochs=1", "train.freeze_epochs=1") == 0
    assert train_small(tmp_path / "thawed", *settings, "train.epochs=2", "train.freeze_epochs=1") == 0
    first, frozen, thawed = (
        load_file(folder / "model.safetensors")
        for folder in (start, tmp_path / "frozen/last", tmp_path / "thawed/last")
    )
    moved = {key for key in first if not torch.equal(first[key], frozen[key])}
    assert moved == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}  # BatchNorm's statistics neither
    trained = {key for key in first if first[key].is_floating_point() and not torch.equal(first[key], thawed[key])}
    assert "stem.0.weight" in trained or any(key.startswith("stem") for key in trained)
    assert any("running_mean" in key for key in trained)


def test_a_frozen_run_resumes_to_the_same_bits(photos, tmp_path, monkeypatch):
    settings = [
        f"data.root={photos}",
        "train.epochs=2",
        "train.freeze_epochs=1",
        "train.checkpoint_steps=2",
        "optim.layer_decay=0.7",
    ]
    assert train_small(tmp_path / "whole", *settings) == 0

    class Cut(BaseException):
        pass

    original = engine.Loop._optimizer_step

    def until(self, batches):
        if self.state.step == 3:
            raise Cut
        return original(self, batches)

    monkeypatch.setattr(engine.Loop, "_optimizer_step", until)
    with pytest.raises(Cut):
        train_small(tmp_path / "cut", *settings)
    monkeypatch.undo()
    assert train_small(tmp_path / "cut", *settings, more=["--resume", "auto"]) == 0
    whole, cut = (load_file(tmp_path / name / "last/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_lower_layers_learn_more_slowly():
    model = effvit_zoo.create_model("effzoo_vit_pico", num_classes=3)
    optimizer = make_optimizer(model, OptimConfig(lr=1.0, layer_decay=0.5))
    make_scheduler(optimizer, OptimConfig(lr=1.0, schedule="constant"), 1, 10).step_update(0)
    rates = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[names[id(parameter)]] = group["lr"]
    assert rates["head.weight"] == 1.0
    for lower, upper in zip(range(5), range(1, 6), strict=True):
        assert rates[f"blocks.{lower}.mlp.fc1.weight"] == pytest.approx(0.5 * rates[f"blocks.{upper}.mlp.fc1.weight"])
    assert rates["patch_embed.proj.0.weight"] < rates["blocks.0.mlp.fc1.weight"]


def test_early_stopping(photos, tmp_path, monkeypatch):
    tops = iter([50.0, 60.0, 60.0, 55.0, 90.0])
    original = engine.evaluate

    def scripted(*args, **kwargs):
        result = original(*args, **kwargs)
        return dataclasses.replace(result, metrics={**result.metrics, "top1": next(tops)})

    monkeypatch.setattr(engine, "evaluate", scripted)
    assert train_small(tmp_path / "run", f"data.root={photos}", "train.epochs=5", "train.patience=2") == 0
    assert summary(tmp_path / "run")["epochs_run"] == 4  # 60 % in epoch 2, then two without a better one
    assert summary(tmp_path / "run")["best_epoch"] == 2


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_class_weights_equal_repeated_images(loss):
    """Weighing a class twice is having its images twice."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).double()
    image, target = torch.randn(6, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 1, 1])
    weights = balanced_weights(np.bincount(target))
    torch.testing.assert_close(weights, torch.tensor([0.75, 1.5]))
    config = ClassificationConfig(loss=loss)
    weighted, _ = Classification(2, config, class_weights=weights).loss(model, Batch(image, target, torch.arange(6)))
    rows = [0, 1, 2, 3, 4, 5, 4, 5]
    repeated, _ = Classification(2, config).loss(model, Batch(image[rows], target[rows], torch.arange(8)))
    torch.testing.assert_close(weighted, repeated, check_dtype=False)
    assert balanced_weights(np.array([2, 0, 1])).tolist() == [0.75, 1.0, 1.5]


def test_per_class_figures():
    rows = per_class([[0, 0, 8], [0, 1, 2], [1, 0, 1], [1, 1, 3], [3, 0, 1]])
    assert rows[0] == {
        "images": 10,
        "recall": 80.0,
        "precision": 80.0,
        "f1": 80.0,
        "taken_for": 1,
        "taken_for_images": 2,
    }
    assert rows[1]["f1"] == pytest.approx(2 * 75 * 60 / 135)
    assert 2 not in rows  # no image
    assert (rows[3]["recall"], rows[3]["precision"], rows[3]["f1"], rows[3]["taken_for"]) == (0.0, None, 0.0, 0)


def test_the_surest_mistakes_are_kept(photos, tmp_path):
    """Against a plain loop over the validation images with the saved model."""
    output = tmp_path / "run"
    hardly = [
        "model.name=effzoo_swiftformer_pico",
        "optim.name=sgd",
        "optim.lr=1e-9",
    ]  # its head does not start at zero
    assert train_small(output, f"data.root={photos}", "data.val_fraction=0.4", *hardly) == 0
    feed = prepare(load_config(output / "config.yaml"), 1).feed
    model = timm.create_model(f"local-dir:{output / 'best'}", pretrained=True).eval()
    expected = []
    with torch.no_grad():
        for batch in feed.val_batches(0):
            shares, predicted = model(batch.image).softmax(1).max(1)
            for share, index, true, guess in zip(shares, batch.index, batch.target, predicted, strict=True):
                if true != guess:
                    expected.append((share.item(), index.item(), true.item(), guess.item()))
    expected.sort(reverse=True)
    state = (output / "checkpoints").glob("*/state.json")
    got = json.loads(next(state).read_text())["best"]["details"]["mistakes"]
    assert len(got) == min(len(expected), 24) > 0
    assert [row[1:] for row in got] == [list(row[1:]) for row in expected[:24]]
    page = (output / "report.html").read_text()
    for _, index, *_ in got:
        assert feed.val_image(int(index))[0] in page


def test_scores_of_all_classes():
    """By hand: F1 of 2/3, 0 and, for the class that is only predicted, 0; Wilson's interval as in his formula for 5 and 0 of 10."""
    assert macro_f1([[0, 0, 1], [0, 2, 1], [1, 0, 0], [1, 2, 3]]) == pytest.approx(200 / 3 / 3)
    assert wilson_interval(0.5, 10) == pytest.approx((0.236590, 0.763410), abs=1e-5)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.277533), abs=1e-5)


def test_a_page_keeps_any_name(tmp_path):
    """HTML's own signs, links, right-to-left text and names that are not UTF-8."""
    image = Image.new("RGB", (4, 4))
    names = ['<script>"a&b"', "a b#c?d'e.png", "قطة", "\udce9.png"]
    pictures = [Picture(image, name, f"is {name}", name) for name in names]
    table = Table(("class", "images"), [[name, 3] for name in names])
    write_report(tmp_path, Page("t", "h", sections=[Section("Examples", pictures=pictures, table=table)]))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    text = html.unescape(page)
    for name in names[:3]:
        assert text.count(name) >= 4
    assert "?.png" in page


def test_repeated_augmentation():
    plan = BatchPlan(20, 6, num_processes=2, seed=1, repeats=3)
    keys = [key for process in range(2) for batch in plan.batches(process, 0, plan.steps_per_epoch) for key in batch]
    assert len(set(keys)) == len(keys) == 20
    counts = np.bincount([key.image for key in keys], minlength=20)
    assert sorted(counts.tolist()) == [0] * 13 + [2] + [3] * 6  # 20 places, three for each of the first images
    for step in range(plan.steps_per_epoch):
        together = [key for process in range(2) for batch in plan.batches(process, step, step + 1) for key in batch]
        assert len({key.image for key in together}) <= -(-len(together) // 3) + 1  # copies stand side by side


def test_the_same_images_per_step_on_any_number_of_processes(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {name: effzoo_vit_pico}\noptim: {lr: 1.0e-3, lr_base_batch: 256}\ntrain: {batch_size: 32, global_batch: 512}\n"
    )
    config = load_config(path)
    for processes, accumulated in ((1, 16), (2, 8), (16, 1)):
        shared = config.resolve_for_processes(processes)
        assert (shared.train.grad_accum, shared.optim.lr) == (accumulated, 2e-3)
    with pytest.raises(ValueError, match=r"multiple of train\.batch_size x processes = 32 x 3 = 96"):
        config.resolve_for_processes(3)


def test_warmup_before_the_schedule():
    parameter = torch.nn.Parameter(torch.zeros(1))
    config = OptimConfig(lr=1.0, warmup_epochs=2, warmup_lr=0.0, min_lr=0.0, warmup_prefix=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = make_scheduler(optimizer, config, 12, 10)
    rates = []
    for step in range(121):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[10] == pytest.approx(0.5)
    assert rates[20] == pytest.approx(1.0)
    assert rates[70] == pytest.approx(0.5)  # half of the cosine, which takes the 10 epochs after the warm-up
    assert rates[120] == pytest.approx(0.0)


def test_options_that_change_only_how_it_is_computed(photos, tmp_path):
    settings = [f"data.root={photos}", "train.epochs=1"]
    plain = ["train.deterministic=true"]
    assert train_small(tmp_path / "plain", *settings) == 0
    assert train_small(tmp_path / "other", *settings, "train.grad_checkpointing=true", *plain) == 0
    assert not torch.are_deterministic_algorithms_enabled() or torch.use_deterministic_algorithms(False) is None
    one, other = (load_file(tmp_path / name / "last/model.safetensors") for name in ("plain", "other"))
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=1e-5)
    assert (
        train_small(tmp_path / "bf16", *settings, "train.precision=bf16", "optim.clip_grad=0.1", "optim.clip_mode=agc")
        == 0
    )
    assert np.isfinite(summary(tmp_path / "bf16")["val_loss"])


def test_upload_at_the_end_and_at_every_better_epoch(photos, tmp_path, the_hub, capsys):
    output, settings = tmp_path / "run", [f"data.root={photos}", "hub.push=ada/birds", "hub.push_best=false"]
    assert train_small(output, *settings, "hub.push_every_best=true", "train.epochs=3") == 0
    said = capsys.readouterr()
    uploads = [line for line in (said.out + said.err).splitlines() if "uploaded: http" in line]
    best = max_so_far = 0
    for row in csv.DictReader((output / "metrics.csv").open()):
        if float(row["top1"]) > max_so_far:
            best, max_so_far = best + 1, float(row["top1"])
    assert len(uploads) == best + 1
    there = hub.load("hf-hub:ada/birds", pretrained=True).state_dict()
    assert all(torch.equal(there[key], value) for key, value in load_file(output / "last/model.safetensors").items())


def test_what_cannot_be_uploaded_is_said_before_training(photos, tmp_path, the_hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert train_small(tmp_path / "run", f"data.root={photos}", "hub.push=ada/birds") == 2
    assert "read only" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_upload_that_fails_in_between_does_not_end_the_run(photos, tmp_path, the_hub, monkeypatch, capsys):
    def fail(*args):
        raise UserError("the Hub sleeps")

    monkeypatch.setattr(hub, "push", fail)
    settings = [f"data.root={photos}", "hub.push=ada/birds", "hub.push_every_best=true", "train.epochs=2"]
    assert train_small(tmp_path / "run", *settings) == 2  # the last upload is what the run was asked for
    said = capsys.readouterr()
    assert "not uploaded, training continues: the Hub sleeps" in said.out + said.err
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_compiled_training(photos, tmp_path):
    before = hub.save(effvit_zoo.create_model("effzoo_vit_pico", num_classes=5), tmp_path / "before")
    process = start(
        "--config", ROOT / "configs/finetune.yaml", "--output", tmp_path / "run", "--set", f"data.root={photos}",
        f"model.name={before}", "train.compile=true", "train.epochs=2", "optim.warmup_epochs=0", "data.num_workers=0",
    )  # fmt: skip
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
