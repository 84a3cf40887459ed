"""Many models into one table, several sizes, and exported files through the same preprocessing."""

import csv
import importlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from runs import make_photos

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.cli import main as effzoo
from effvit_zoo.data import BadImage, Batch, ImageSource, open_splits
from effvit_zoo.data.record import name_hashes, names_digest
from effvit_zoo.export import TARGETS
from effvit_zoo.export._graph import make_graph
from effvit_zoo.export.contract import Opened
from effvit_zoo.export.deployed import config_of, open_exported
from effvit_zoo.tasks import TASKS


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"), {"": {"blue": 7, "green": 5, "red": 5}})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with labels in another order than the data's, and its ONNX file beside the weights."""
    folder = tmp_path_factory.mktemp("model") / "best"
    torch.manual_seed(0)
    built = effvit_zoo.create_model("effzoo_vit_pico", num_classes=3)
    hub.save(built, folder, label_names=["red", "blue", "green"], data_config={"mean": (0.4, 0.5, 0.6)})
    pytest.importorskip("onnxscript")
    TARGETS["onnx"].convert(make_graph(built, (3, 32, 32))).save(folder / "model.onnx", {})
    return folder


def validate(*arguments, photos, to=None):
    arguments = ["validate", *map(str, arguments), "--data", str(photos), "--workers", "0", "--batch-size", "5"]
    return effzoo([*arguments, "--results-file", str(to)] if to else arguments)


def test_an_onnx_file_gives_the_models_own_results(model, photos, tmp_path):
    pytest.importorskip("onnxruntime")
    results = tmp_path / "results.csv"
    assert validate("--model", model, model / "model.onnx", photos=photos, to=results) == 0
    with results.open() as file:
        eager, exported = csv.DictReader(file)
    assert exported["top1"] == eager["top1"]
    assert float(exported["loss"]) == pytest.approx(float(eager["loss"]), rel=1e-5)
    assert (exported["input_size"], exported["params"]) == ("3x32x32", "")


def test_an_openvino_file_gives_the_models_own_results(model, photos, tmp_path):
    openvino = pytest.importorskip("openvino")
    openvino.save_model(openvino.convert_model(str(model / "model.onnx")), tmp_path / "m.xml", compress_to_fp16=False)
    results = tmp_path / "results.json"
    assert validate("--model", model, tmp_path / "m.xml", "--like", model, photos=photos, to=results) == 0
    eager, exported = json.loads(results.read_text())
    assert exported["tables"] == eager["tables"]
    assert exported["loss"] == pytest.approx(eager["loss"], rel=1e-3)  # half precision, where the processor has it


@pytest.mark.parametrize("batch", [1, 4])
def test_files_of_a_fixed_batch_take_any_number(monkeypatch, model, tmp_path, batch):
    def opened(path, threads):
        def run(images):
            assert images.shape == (batch, 3, 8, 8)
            return [images.mean((2, 3))]

        return Opened(run, [batch, 3, 8, 8])

    monkeypatch.setitem(TARGETS, "onnx", replace(TARGETS["onnx"], open=opened, read=lambda path: None))
    (tmp_path / "x.onnx").touch()
    exported = open_exported(tmp_path / "x.onnx", like=str(model))
    images = torch.randn(6, 3, 8, 8)
    torch.testing.assert_close(exported(images), images.mean((2, 3)))
    assert exported.num_classes == 3


@pytest.mark.parametrize(
    ("suffix", "module", "extra"),
    [(".onnx", "onnxruntime", "onnx"), (".xml", "openvino", "openvino"), (".pte", "executorch.runtime", "executorch")],
)
def test_a_missing_runtime_is_one_line(monkeypatch, capsys, model, photos, tmp_path, suffix, module, extra):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"")
    own = importlib.import_module

    def missing(name, *args):
        if name == module:
            raise ImportError(name)
        return own(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert validate("--model", path, "--like", model, photos=photos) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert f'{module} is not installed: pip install "effvit_zoo[{extra}]"' in errors[0]


def test_sizes_and_models_in_one_table(model, photos, tmp_path, capsys):
    other = hub.save(effvit_zoo.create_model("effzoo_swiftformer_xs", num_classes=3), tmp_path / "other")
    results = tmp_path / "results.csv"
    code = validate("--model", model, tmp_path / "none", other, "--img-size", 32, 64, photos=photos, to=results)
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["input_size"]) for row in rows] == [
        (str(folder), size) for folder in (model, other) for size in ("3x32x32", "3x64x64")
    ]
    assert code == 2  # one of the three wasn't there, and the others are in the table all the same
    assert (
        capsys.readouterr().err.splitlines()[-1].endswith(f"1 of 3 models could not be measured: {tmp_path / 'none'}")
    )


def copy_exported(model, folder):
    for path in model.glob("model.onnx*"):  # weights are a file of their own
        shutil.copy(path, folder)


def trained_on(photos, folder, seed=0, **options):
    """A model folder that says it was trained on `photos`."""
    record = open_splits(photos, val_fraction=0.4, split_seed=seed).record
    model = effvit_zoo.create_model("effzoo_vit_pico", num_classes=3, **options)
    return hub.save(model, folder, label_names=["blue", "green", "red"], extra={"data": record})


def test_all_are_measured_on_what_one_of_them_held_out(model, photos, tmp_path, capsys):
    """A model of other data, one for grey images and an exported file have nothing else to be compared on."""
    pytest.importorskip("onnxruntime")
    run = tmp_path / "run"
    trained = trained_on(photos, run / "best")
    copy_exported(model, run)
    others = [effvit_zoo.create_model("effzoo_vit_pico", num_classes=3, in_chans=channels) for channels in (3, 1)]
    for number, other in enumerate(others):
        hub.save(other, tmp_path / f"other{number}", label_names=["red", "green", "blue"])
    models = [tmp_path / "other0", trained, tmp_path / "other1", run / "model.onnx"]
    held_out = open_splits(photos, val_fraction=0.4).val
    for split in ("auto", "val"):
        assert validate("--model", *models, "--split", split, photos=photos, to=tmp_path / "all.json") == 0
        rows = json.loads((tmp_path / "all.json").read_text())
        assert {(row["split"], row["images"]) for row in rows} == {("held-out part", len(held_out))}
        assert {row["fingerprint"] for row in rows} == {names_digest(name_hashes(held_out))}
    first, head, *lines = capsys.readouterr().out.splitlines()[-6:]
    assert f"{photos} (held-out part): {len(held_out)} images, names {rows[0]['fingerprint'][:8]}" in first
    assert all(title in head for title in ("top-1, %", "95 % interval", "macro-F1, %", "params, M", "images", "split"))
    assert "top-5" not in head  # of three classes
    assert all("held-out part" in line and rows[0]["fingerprint"][:8] in line for line in lines)


def test_an_exported_file_alone_is_measured_on_what_its_run_held_out(model, photos, tmp_path):
    pytest.importorskip("onnxruntime")
    trained = trained_on(photos, tmp_path / "run" / "best")
    for path in (trained / "model.onnx", trained.parent / "export" / "model.onnx"):
        path.parent.mkdir(exist_ok=True)
        copy_exported(model, path.parent)
        assert json.loads(results(path, photos=photos, folder=tmp_path))["split"] == "held-out part"
    # a model that supplies the preprocessing doesn't change what the file was trained on
    assert config_of(path, "effzoo_vit_pico")["effvit_zoo"]["data"]["split_seed"] == 0


def results(*arguments, photos, folder):
    assert validate("--model", *arguments, photos=photos, to=folder / "r.json") == 0
    return (folder / "r.json").read_text()


def test_models_that_held_out_different_images_are_not_compared(photos, tmp_path, capsys):
    one, other = trained_on(photos, tmp_path / "one"), trained_on(photos, tmp_path / "other", seed=3)
    assert validate("--model", one, other, photos=photos, to=tmp_path / "r.json") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"can't be measured on the same images: for {one} " in line
    assert f"for {other} " in line
    assert "--split all" in line
    assert not (tmp_path / "r.json").exists()
    assert validate("--model", one, other, "--split", "all", photos=photos, to=tmp_path / "r.json") == 0
    assert {(row["split"], row["images"]) for row in json.loads((tmp_path / "r.json").read_text())} == {("all", 17)}


def test_a_row_of_fewer_images_is_refused(monkeypatch, photos, tmp_path, capsys):
    """As where a file is lost between two models."""
    model, lost = trained_on(photos, tmp_path / "one"), []

    def losing(self, index, load=ImageSource.load):
        lost.append(index)
        if len(lost) == 25:
            raise BadImage("0.png", "gone")
        return load(self, index)

    monkeypatch.setattr(ImageSource, "load", losing)
    assert validate("--model", model, "--img-size", 32, 48, "--split", "all", photos=photos) == 2
    assert "not measured on the same images: 17 (0 unreadable)" in capsys.readouterr().err.splitlines()[-1]


def test_random_weights_are_told(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pico = "effzoo_vit_pico"
    assert validate("--model", pico, photos=make_numbered(tmp_path), to=tmp_path / "r.json") == 0
    assert f"{pico} has random weights: none are published" in capsys.readouterr().err
    assert json.loads((tmp_path / "r.json").read_text())["weights"] == "random"
    assert (
        json.loads(results(trained_on(photos, tmp_path / "own"), photos=photos, folder=tmp_path))["weights"]
        == "trained"
    )


def make_numbered(root):
    """Photos in folders called like the classes of a model without names."""
    for number, label in enumerate(("blue", "red")):
        make_photos(root / "made", {"": {label: 2}})
        (root / "made" / label).rename(root / "made" / str(number))
    return root / "made"


@pytest.mark.parametrize("command", [["validate", "--model"], ["predict", "photo.png", "--model"], ["info"]])
def test_a_folder_called_like_a_registered_model_is_refused(command, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("photo.png")
    trained_on(photos, tmp_path / "resnet18" / "best")
    assert effzoo([*command, "resnet18"]) == 2
    line = capsys.readouterr().err
    assert "resnet18 is a registered model" in line
    assert f"{tmp_path / 'resnet18'} is a model folder: write ./resnet18" in line
    if command == ["info"]:
        assert effzoo([*command, "./resnet18"]) == 0


def test_outputs_that_are_not_numbers_are_no_result(photos, tmp_path, capsys):
    model = effvit_zoo.create_model("effzoo_vit_pico", num_classes=3)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    hub.save(model, tmp_path / "broken", label_names=["blue", "green", "red"])
    assert validate("--model", tmp_path / "broken", photos=photos) == 2
    assert effzoo(["predict", "--model", str(tmp_path / "broken"), str(photos / "red" / "0.png")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert [("not numbers" in line or "not a number" in line) for line in errors] == [True, True]


def test_counting_needs_no_float64_on_the_device():
    """Which Apple's GPUs don't have."""
    evaluator = TASKS["classification"](3).evaluator(torch.device("mps"))
    evaluator.update(torch.eye(3), Batch(torch.zeros(3, 3, 8, 8), torch.tensor([0, 1, 0]), torch.arange(3)))
    assert evaluator.result(evaluator.totals(), evaluator.rows()).metrics["top1"] == pytest.approx(200 / 3)


def test_thousands_of_classes_have_a_short_table_and_no_picture(tmp_path):
    count = 5000
    cells = [[number, (number + 1) % count, 1] for number in range(count)]
    task = TASKS["classification"](count)
    sections = task.sections({"cells": cells, "mistakes": []}, lambda index: None, tmp_path)
    assert not [*tmp_path.iterdir()]
    [table] = [section for section in sections if section.table]
    assert (table.title, len(table.table.rows)) == ("Classes, weakest first: 200 of 5,000", 200)


def test_a_size_doesnt_change_the_next_ones_result(model, photos, tmp_path):
    both, alone = tmp_path / "both.json", tmp_path / "alone.json"
    assert validate("--model", model, "--img-size", 64, 32, photos=photos, to=both) == 0
    assert validate("--model", model, "--img-size", 32, photos=photos, to=alone) == 0
    assert json.loads(both.read_text())[1]["loss"] == json.loads(alone.read_text())["loss"]


def test_an_exported_file_keeps_to_its_size(model, photos, capsys):
    pytest.importorskip("onnxruntime")
    assert open_exported(model / "model.onnx").shape == [None, 3, 32, 32]
    assert validate("--model", model / "model.onnx", "--img-size", 64, photos=photos) == 2
    assert "it was exported for 32 x 32 pixels, got 64 x 64" in capsys.readouterr().err
