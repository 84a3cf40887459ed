"""effzoo export: files that are proven, one record in all of them, a folder that a stranger can use, and nothing left of what failed."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import make_photos

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.cli import main
from effvit_zoo.data import open_image, validation_transform
from effvit_zoo.errors import UserError
from effvit_zoo.export import TARGETS, preprocessing
from effvit_zoo.export._graph import Graph, _Function
from effvit_zoo.export._record import weights_sha256
from effvit_zoo.export.contract import Converted, as_texts, from_texts
from effvit_zoo.export.deployed import record_in
from effvit_zoo.export.folder import export_model
from effvit_zoo.export.parity import _judge, compared

HERE = [name for name, target in TARGETS.items() if target.installed]
RUN_HERE = [name for name in HERE if not TARGETS[name].elsewhere]
MODELS = {"vit": ("effzoo_vit_pico", {"depth": 2}), "efficientvit": ("effzoo_efficientvit_b0", {})}
SIZE = {"vit": None, "efficientvit": 64}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"), {"": {"blue": 8, "red": 8}})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders whose outputs depend on the image: a classifier that training starts from zeros says nothing."""
    made = {}
    for kind, (name, kwargs) in MODELS.items():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=2, **kwargs)
        torch.nn.init.normal_(model.get_classifier().weight, std=0.05)
        if kind == "efficientvit":
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = None  # the images' own statistics
            with torch.no_grad():
                model.train()(torch.randn(16, 3, 64, 64))
        made[kind] = hub.save(model.eval(), tmp_path_factory.mktemp(kind) / "best", label_names=["blue", "red"])
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("target", HERE)
def test_a_file_is_proven_recorded_and_used_by_itself(target, kind, folders, photos, tmp_path):
    options = {"data": str(photos), "images": 16, "img_size": SIZE[kind]}
    record = effvit_zoo.export(folders[kind], [target], tmp_path / "out", **options)
    (name,) = record["files"]
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert written["weights_sha256"] == hub.publish.client.content_hash(folders[kind] / "model.safetensors")
    kept = {key: value for key, value in written["files"][name].items() if key != "bytes"}
    alone = {key: value for key, value in written.items() if key != "files"} | {"file": kept}
    assert record_in(tmp_path / "out" / name) == alone
    if TARGETS[target].elsewhere:
        assert kept["rank"] <= 5
        assert "reciprocal" not in kept["operations"]
        return
    proof = kept["agreement"]
    assert proof["images"] == 16
    assert proof["largest_error"] <= 1e-4
    assert proof["same_class"] == 100
    assert proof["metrics"] == proof["model"]
    assert proof["batches"] == ([8, 1, 2, 3] if TARGETS[target].any_batch else [1])
    stranger = tmp_path / "elsewhere"
    (tmp_path / "out").rename(stranger)  # no config.json is near it
    model = effvit_zoo.open_exported(stranger / name)
    found = effvit_zoo.predict(model, sorted(photos.rglob("*.png"))[:2])
    size = {} if SIZE[kind] is None else {"img_size": SIZE[kind]}
    expected = effvit_zoo.predict(_sized(folders[kind], size), sorted(photos.rglob("*.png"))[:2])
    for ours, theirs in zip(found, expected, strict=True):
        assert [row["label"] for row in ours.rows] == [row["label"] for row in theirs.rows]
        assert ours.rows[0]["probability"] == pytest.approx(theirs.rows[0]["probability"], abs=1e-4)
    _follow_readme(stranger, name, min(photos.rglob("*.png")), expected)


def _sized(folder, size):
    model = hub.load(folder).eval()
    if size:
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size["img_size"], size["img_size"])}
    return model


def _follow_readme(folder, name, photo, expected):
    """Runs the README's Python snippet as a stranger would: in the folder, without this package."""
    section = (folder / "README.md").read_text().partition(f"## {name}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    Image.open(photo).save(folder / "photo.jpg", format="PNG")
    guard = "import sys\nsys.modules['effvit_zoo'] = sys.modules['timm'] = None\n"
    done = subprocess.run([sys.executable, "-c", guard + code], cwd=folder, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    rows = [line.split(" %  ") for line in done.stdout.splitlines() if " %  " in line]
    best = expected[0].rows[0]
    assert rows[0][1] == best["label"]
    assert float(rows[0][0]) == pytest.approx(100 * best["probability"], abs=0.1)


@pytest.mark.slow
def test_validate_pixels_halves_and_push_take_the_files(folders, photos, tmp_path, the_hub, capsys):
    model = tmp_path / "model"
    hub.save(hub.load(folders["vit"]), model)
    command = ["export", str(model), "--to", "onnx", "--data", str(photos), "--images", "16"]
    assert main([*command, "--input", "pixels"]) == 0
    assert main([*command, "--precision", "fp16"]) == 0
    assert {path.name for path in (model / "export").iterdir()} == {
        *("model.onnx", "model.fp16.onnx", "export.json", "labels.txt", "README.md", "preprocessing.py")
    }
    files = [str(model), *(str(model / "export" / name) for name in ("model.onnx", "model.fp16.onnx"))]
    table = tmp_path / "rows.json"
    data = ["--data", str(photos), "--workers", "0", "--results-file", str(table)]
    assert main(["validate", "--model", *files, *data]) == 0
    torch_row, pixels, halves = json.loads(table.read_text())
    assert torch_row["top1"] == pixels["top1"] == halves["top1"]
    assert pixels["loss"] == pytest.approx(torch_row["loss"], rel=1e-5)
    assert main(["predict", "--model", files[1], str(photos), "--json", "--output", str(tmp_path / "p.json")]) == 0
    assert main(["push", str(model), "ada/birds"]) == 0
    assert {"export/model.onnx", "export/export.json"} <= {*the_hub.repos["ada/birds"].files()}
    other = hub.load(model)
    with torch.no_grad():
        other.head.bias += 1
    hub.save(other, model)
    capsys.readouterr()
    assert main(["push", str(model), "ada/birds"]) == 2
    assert "files of other weights" in capsys.readouterr().err
    assert main(command) == 2
    assert "weights_sha256 differs" in capsys.readouterr().err


def _broken(function):
    """A converter to torch's format that alters the outputs."""
    own = TARGETS["torch"]

    class Altered(_Function):
        def forward(self, images):
            return tuple(function(output) for output in super().forward(images))

    def convert(graph: Graph) -> Converted:
        module = Altered(graph.module.model, graph.module.outputs).eval()
        return own.convert(replace(graph, module=module))

    return replace(own, convert=convert)


@pytest.mark.slow
def test_a_file_that_is_wrong_is_not_left_behind_and_the_others_are(folders, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TARGETS, "torch", _broken(lambda logits: logits.roll(1, dims=1)))
    command = ["export", str(folders["vit"]), "--data", str(photos), "--images", "8", "--output", str(tmp_path / "out")]
    assert main([*command, "--to", "torch"]) == 2
    assert re.search(
        r"^error: torch: it differs from the model by .*, allowed are 1e-04$", capsys.readouterr().err, re.M
    )
    assert [*tmp_path.iterdir()] == []
    assert main([*command, "--to", "torch", "onnx"]) == 2
    assert "1 of 2 targets failed: torch" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("model")} == {"model.onnx"}


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="unknown target 'onx': did you mean 'onnx'"):
        export_model("effzoo_vit_pico", ["onx"])
    with pytest.raises(UserError, match="unknown precision 'int3'"):
        export_model("effzoo_vit_pico", ["onnx"], precision="int3")
    with pytest.raises(UserError, match="expected a model made by timm or effvit_zoo, got Identity"):
        export_model(torch.nn.Identity(), ["onnx"], tmp_path / "out")
    with pytest.raises(UserError, match=r"outputs for 4 images of embedded images are the same .*: has it weights\?"):
        export_model("effzoo_vit_pico", ["torch"], images=4)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file, expected a folder"):
        export_model("effzoo_vit_pico", ["onnx"], tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_target_lacks_is_said_before_anything_is_converted(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "onnx", replace(TARGETS["onnx"], packages=("onnxruntime", "nosuch")))
    with pytest.raises(UserError, match=r'onnx: nosuch is not installed: pip install "effvit_zoo\[onnx\]"'):
        export_model(folders["vit"], ["onnx"], tmp_path / "out", images=4)
    with pytest.raises(UserError, match="openvino: it has no bf16, expected fp32 or fp16"):
        export_model(folders["vit"], ["openvino"], tmp_path / "out", images=4, precision="bf16")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("size", "crop"),
    [((96, 96), "center"), ((64, 96), "center"), ((96, 96), "squash"), ((96, 64), "border"), ((300, 300), "center")],
)
def test_preprocessing_code_prepares_images_as_predict_does(size, crop, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (211, 150, 4)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[..., :3]).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(tmp_path / "grey.png")
    steps = {"input_size": (3, *size), "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": crop}
    steps |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    for path in tmp_path.iterdir():
        expected = validation_transform(steps)(open_image(path)).numpy()
        np.testing.assert_allclose(preprocessing.read_image(path, {"preprocessing": steps})[0], expected, atol=1e-6)


def test_comparison_sees_what_a_common_offset_would_hide():
    rng = np.random.default_rng(0)
    expected = rng.normal(0, 1, (20, 5)).astype(np.float32) + 1000 * np.arange(5, dtype=np.float32)
    same = compared(expected, expected, None)
    assert (same["largest_error"], same["cosine"]) == (0, pytest.approx(1))
    other = expected[::-1]  # the outputs of other images: without centring they would look alike
    found = compared(other, expected, None)
    assert found["largest_error"] > 0.5
    assert found["cosine"] < 0.5
    logits = rng.normal(0, 1, (20, 5))
    logits[0, :2] = logits[0].max() + 1  # a tie
    swapped = logits.copy()
    swapped[1] = np.roll(swapped[1], 1)
    assert compared(logits, logits, 1)["decided"] == 19
    assert compared(swapped, logits, 1)["same_class"] == pytest.approx(100 * 18 / 19)
    for bad, precision in (
        (swapped, "fp32"),
        (swapped, "fp16"),
        (np.full_like(logits, np.nan), "fp16"),
        (logits[:, :4], "fp32"),
    ):
        result = compared(bad, logits, 1)
        with pytest.raises(UserError):
            _judge(result, [result], precision, [])
    good = compared(logits, logits, 1)
    _judge(good, [good], "fp32", [])
    with pytest.raises(UserError, match="answers instead of refusing another size"):
        _judge(good, [good], "fp32", ["another size"])


def test_records_survive_formats_of_texts():
    record = {
        "effvit_zoo": "1.0",
        "architecture": "123",
        "license": None,
        "labels": ["a", "é"],
        "file": {"batch": [1, 2]},
    }
    texts = as_texts(record)
    assert texts["architecture"] == '"123"'
    assert from_texts(texts | {"strange": "x"}) == record
    assert from_texts({"strange": "x"}) is None


def test_the_hash_of_the_weights_is_the_saved_files(tmp_path):
    model = timm.create_model("effzoo_vit_pico", depth=1).to(memory_format=torch.channels_last)
    hub.save(model, tmp_path / "model")
    digest = hub.publish.client.content_hash(tmp_path / "model" / "model.safetensors")
    assert weights_sha256(model) == digest
    assert Path(tmp_path / "model").is_dir()
