"""ToSA's three stages: what each of them trains, going on after a cut in any of them, and what the folder tells afterwards."""

import csv
import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from runs import make_photos
from safetensors.torch import load_file

import effvit_zoo
import train
from effvit_zoo import cli, hub
from effvit_zoo.benchmark import tosa as benchmark
from effvit_zoo.data import Batch, open_splits
from effvit_zoo.errors import run_command
from effvit_zoo.pipelines import tosa as pipeline
from effvit_zoo.training import engine
from tools import tosa_dense_demo as dense_demo

CONFIG = """
pipeline: tosa
model: {name: effzoo_vit_pico, kwargs: {depth: 4, drop_path_rate: 0.1}}
data: {root: PHOTOS, num_workers: 0}
ratios: [1.0, 0.5]
dense: {optim: {lr: 1.0e-3}, train: {epochs: 2, batch_size: 8, trackers: []}}
selectors: {optim: {lr: 1.0e-2, weight_decay: 0.0}, train: {epochs: 2, batch_size: 8, trackers: []}}
finetune: {optim: {lr: 5.0e-4}, train: {epochs: 2, batch_size: 8, trackers: []}, ratios: [0.75, 0.25]}
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    counts = {"train": {"blue": 20, "red": 20}, "val": {"blue": 8, "red": 8}}
    return make_photos(tmp_path_factory.mktemp("photos"), counts)


@pytest.fixture(scope="module")
def config(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tosa.yaml"
    path.write_text(CONFIG.replace("PHOTOS", str(photos)))
    return path


def run(config, output, *more):
    """train.py in this process; returns its exit code."""
    return run_command(lambda: train.main(["--config", str(config), "--output", str(output), *more]))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert run(config, output) == 0
    return output


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_each_stage_trains_its_own_part(whole):
    start, selectors, finetune = (weights(whole / name) for name in ("start", "2-selectors/last", "3-finetune/last"))
    for key, value in start.items():
        is_selector = key.startswith("selectors.")
        assert torch.equal(selectors[key], value) != is_selector, key
        if is_selector:
            assert torch.equal(finetune[key], selectors[key]), key
    changed = [not torch.equal(finetune[key], selectors[key]) for key in start if not key.startswith("selectors.")]
    assert all(changed)
    dense = weights(whole / "1-dense" / "best")
    assert all(torch.equal(dense[key], value) for key, value in weights(whole / "dense").items())


def test_folders_are_loadable_and_tell_what_came_out(whole):
    model = timm.create_model(f"local-dir:{whole / '3-finetune' / 'last'}", pretrained=True)
    assert model.attention_ratio == 0.5
    assert hub.label_names(model) == ("blue", "red")
    assert type(hub.load(str(whole / "dense"))).__name__ == "IsotropicViT"
    summary = json.loads((whole / "summary.json").read_text())
    assert [row["name"] for row in summary["ratios"]] == ["dense", "1", "0.5"]
    dense, full, half = summary["ratios"]
    assert dense["macs"] == full["macs"] > half["macs"]
    assert all(row["ms"] > 0 and 0 <= row["top1"] <= 100 for row in summary["ratios"])
    assert set(summary["stages"]) == {"dense", "selectors", "finetune"}
    assert (whole / "ratios.png").stat().st_size > 5000
    for stage in pipeline.STAGES:
        assert (whole / stage.folder / "curves.png").is_file()


def test_one_report_for_all_stages(whole):
    """The stage that learns no classes shows no accuracy, and the pipeline's own result is that of the model that it hands over."""
    page = (whole / "report.html").read_text()
    parts = [
        "Accuracy against cost",
        "Summary",
        "Stage 1: dense",
        "Stage 2: selectors",
        "Stage 3: finetune",
        "Technical",
    ]
    places = [page.index(f">{part}</h2>") for part in parts]
    assert places == sorted(places)
    rows = dict(re.findall(r"<td>(stage \d, \w+)</td><td>([^<]*)</td>", page))
    assert ["top-1" in said for said in rows.values()] == [True, False, True]
    selectors = page[places[3] : places[4]]
    assert "top-1" not in selectors
    assert "training loss" in selectors
    assert "status" not in page.partition("</header>")[0].partition("<header>")[2]
    with (whole / "3-finetune/metrics.csv").open() as file:
        last = [*csv.DictReader(file)][-1]
    assert json.loads((whole / "summary.json").read_text())["top1"] == float(last["top1"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1-dense", "2-selectors", "3-finetune"])
def test_a_cut_in_any_stage_changes_nothing(config, whole, tmp_path, monkeypatch, stage):
    class Cut(BaseException):
        """Stands for a kill: nothing in the program may catch it."""

    original = engine.Loop._optimizer_step

    def until(self, batches):
        if self.folder.name == stage and self.state.step == 7:
            raise Cut
        return original(self, batches)

    monkeypatch.setattr(engine.Loop, "_optimizer_step", until)
    with pytest.raises(Cut):
        run(config, tmp_path / "cut")
    monkeypatch.setattr(engine.Loop, "_optimizer_step", original)
    assert run(config, tmp_path / "cut", "--resume", "auto") == 0
    for name in ("1-dense/best", "start", "2-selectors/last", "3-finetune/last"):
        expected, found = weights(whole / name), weights(tmp_path / "cut" / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_two_processes_run_all_stages(config, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", train.__file__]
    command += ["--config", str(config), "--output", str(tmp_path / "two")]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    for stage in pipeline.STAGES:
        summary = json.loads((tmp_path / "two" / stage.folder / "summary.json").read_text())
        assert summary["processes"] == 2
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["ratios"]


@pytest.mark.slow
def test_stages_can_be_run_one_by_one(config, whole, tmp_path, capsys):
    assert run(config, tmp_path / "one", "--stage", "finetune") == 2
    assert "run the stages before it" in capsys.readouterr().err
    for stage in pipeline.STAGES:
        assert run(config, tmp_path / "one", "--stage", stage.name) == 0
    expected, found = weights(whole / "3-finetune" / "last"), weights(tmp_path / "one" / "3-finetune" / "last")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_a_trained_vit_needs_no_dense_stage(config, whole, tmp_path, capsys):
    assert (
        run(config, tmp_path / "given", "--set", "dense=null", f"model.name={whole / 'dense'}", "model.kwargs={}") == 0
    )
    assert not (tmp_path / "given" / "1-dense").exists()
    assert all(torch.equal(weights(whole / "dense")[k], v) for k, v in weights(tmp_path / "given" / "dense").items())
    capsys.readouterr()
    assert run(config, tmp_path / "other", "--set", "dense=null", "model.kwargs={}") == 2
    assert "1000 classes" in capsys.readouterr().err


def test_a_tosa_vit_trains_densely_first(config, tmp_path):
    assert run(config, tmp_path / "tosa", "--stage", "dense", "--set", "model.name=effzoo_tosa_vit_pico") == 0
    model = hub.load(str(tmp_path / "tosa" / "1-dense" / "last"))
    assert model.attention_ratio == 1
    assert hub.load(str(tmp_path / "tosa" / "start")).attention_ratio == 0.5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "attention_ratio=1.5"], "attention_ratio"),
        (["--set", "finetune.ratios=[]"], "finetune.ratios"),
        (["--set", "finetune.ratio=0.5"], "finetune.ratio"),
        (["--set", "model.name=effzoo_swiftformer_xs", "model.kwargs={}"], "expected a plain timm VisionTransformer"),
        (["--stage", "fourth"], "fourth"),
        (["--resume", "elsewhere"], "expected auto"),
    ],
)
def test_bad_input_is_one_line(config, tmp_path, capsys, more, message):
    assert run(config, tmp_path / "bad", *more) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_an_output_that_is_taken_or_has_other_settings_is_left_alone(config, whole, capsys):
    before = (whole / "summary.json").read_bytes()
    assert run(config, whole) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert run(config, whole, "--resume", "auto", "--set", "finetune.train.epochs=3") == 2
    assert "finetune.train.epochs" in capsys.readouterr().err
    assert (whole / "summary.json").read_bytes() == before


def test_a_stage_of_a_run_without_stages_is_refused(tmp_path, capsys):
    plain = tmp_path / "plain.yaml"
    plain.write_text("model: {name: effzoo_vit_pico}\n")
    assert run(plain, tmp_path / "out", "--stage", "dense") == 2
    assert "has no stages" in capsys.readouterr().err


def test_benchmark_of_a_run_measures_selectors_and_controls(whole, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    assert cli.main(["benchmark", "tosa", str(whole), "--ratios", "0.5", "--output", str(rows)]) == 0
    printed = capsys.readouterr().out
    assert "overlap 0.5" in printed
    assert "fixed set of tokens" in printed
    found = json.loads(rows.read_text())
    assert {row["selector"] for row in found} >= set(benchmark.CONTROLS)
    assert all(0 <= row[stage] <= 100 for row in found for stage in (pipeline.SELECTORS, pipeline.FINETUNE))
    assert cli.main(["benchmark", "tosa", str(tmp_path)]) == 2
    assert "not the output folder of a finished ToSA training" in capsys.readouterr().err


def test_controls_choose_what_they_say(whole):
    model = hub.load(str(whole / "2-selectors" / "last")).eval()
    image = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fixed = [torch.arange(65.0), torch.arange(65.0)]
    with torch.no_grad():
        entered = benchmark.controlled(model, "fixed set of tokens", fixed).selected_tokens(image)
        for index in entered:
            assert all(set(row.tolist()) == {0, *range(33, 65)} for row in index)
        scores = model.score_pairs(image, stride=1)[0][0]
        (first, *_) = benchmark.controlled(model, "class token's attention before", fixed).selected_tokens(image)
        best = scores[:, :, 0].softmax(-1).mean(1)[:, 1:].topk(32).indices + 1
        assert all(set(a.tolist()) == {0, *b.tolist()} for a, b in zip(first, best, strict=True))
        random = benchmark.controlled(model, "random", fixed).selected_tokens(image)
        assert set(random[0][0].tolist()) != set(random[0][1].tolist())


def test_a_perfect_selector_has_full_overlap_and_no_divergence(whole):
    class Oracle(torch.nn.Module):
        """Knows the next layer's map: it is handed it as the map before."""

        def forward(self, maps):
            return maps.log_softmax(-1)

        def importance(self, maps):
            return effvit_zoo.attention.token_select.token_importance(maps)

    model = hub.load(str(whole / "2-selectors" / "last")).eval()
    model.selector_stride = 1
    pairs = model.score_pairs
    model.score_pairs = lambda x, stride=None: [(after, after) for _, after in pairs(x, stride)]
    model.token_selectors = lambda: [Oracle(), Oracle()]
    batch = Batch(torch.randn(2, 3, 32, 32), torch.zeros(2), torch.arange(2))
    for row in benchmark.selector_quality(model, [batch], [0.5]):
        assert row["overlap 0.5"] == pytest.approx(1)
        assert row["kl"] == pytest.approx(0, abs=1e-5)
        assert row["uniform kl"] > 0


def test_predict_shows_the_tokens(whole, photos, tmp_path, capsys):
    picture = photos / "val" / "red" / "0.png"
    arguments = ["predict", str(picture), "--show-tokens", "--draw", str(tmp_path / "tokens"), "--model"]
    assert cli.main([*arguments, str(whole / "3-finetune" / "last")]) == 0
    assert (tmp_path / "tokens" / "0.tokens.png").stat().st_size > 5000
    assert cli.main([*arguments, str(whole / "dense")]) == 2
    assert "selects tokens" in capsys.readouterr().err


def test_dense_demo_sets_backbones_side_by_side(whole, tmp_path, capsys):
    arguments = ["--run", str(whole), "--output", str(tmp_path / "rows.json"), "--set"]
    rows = dense_demo.main([*arguments, "side=32", "steps=2", "batch_size=2", "val_scenes=3", "ratios=[1.0, 0.5]"])
    assert rows == json.loads((tmp_path / "rows.json").read_text())
    assert [row["ratio"] for row in rows] == [1, 0.5]
    assert rows[0]["macs"] > rows[1]["macs"] > 0
    assert all(0 < row["pixel_accuracy"] <= 100 and row["ms"] > 0 for row in rows)
    assert run_command(lambda: dense_demo.main(["--run", str(tmp_path)])) == 2
    assert "not the output folder of a finished ToSA training" in capsys.readouterr().err


def test_scenes_are_the_same_for_the_same_number(whole):
    config = dense_demo.DemoConfig(side=48)
    source = open_splits("builtin:fashion-mnist-mini", img_mode="L").val
    scenes = dense_demo.Scenes(source, config, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    image, classes = scenes.scene(3)
    assert image.shape == (3, 48, 48)
    assert set(classes.unique().tolist()) <= set(range(11))
    assert 10 in classes
    assert len(classes.unique()) > 1
    assert torch.equal(image, scenes.scene(3)[0])
    assert not torch.equal(image, scenes.scene(4)[0])
