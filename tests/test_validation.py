"""Many models into one table, several sizes, and exported files through the same preprocessing."""

import csv
import importlib
import json
from dataclasses import replace

import pytest
import torch
from runs import make_photos

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.cli import main as effzoo
from effvit_zoo.export import TARGETS
from effvit_zoo.export.contract import Opened
from effvit_zoo.export.deployed import load_exported, open_exported


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
    TARGETS["onnx"].export(built.eval(), torch.zeros(1, 3, 32, 32), folder / "model.onnx")
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
def test_files_of_a_fixed_batch_take_any_number(monkeypatch, tmp_path, batch):
    def opened(path, threads):
        def run(images):
            assert images.shape == (batch, 3, 8, 8)
            return images.mean((2, 3))

        return Opened(run, [batch, 3, 8, 8])

    monkeypatch.setitem(TARGETS, "onnx", replace(TARGETS["onnx"], open=opened))
    exported = open_exported(tmp_path / "x.onnx", {})
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


def test_a_size_doesnt_change_the_next_ones_result(model, photos, tmp_path):
    both, alone = tmp_path / "both.json", tmp_path / "alone.json"
    assert validate("--model", model, "--img-size", 64, 32, photos=photos, to=both) == 0
    assert validate("--model", model, "--img-size", 32, photos=photos, to=alone) == 0
    assert json.loads(both.read_text())[1]["loss"] == json.loads(alone.read_text())["loss"]


def test_an_exported_file_keeps_to_its_size(model, photos, capsys):
    pytest.importorskip("onnxruntime")
    assert load_exported(str(model / "model.onnx")).shape == [None, 3, 32, 32]
    assert validate("--model", model / "model.onnx", "--img-size", 64, photos=photos) == 2
    assert "it was exported for 32 x 32 pixels, got 64 x 64" in capsys.readouterr().err
