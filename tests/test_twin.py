"""Models of ours that are timm's: what is pushed of them is loaded by plain timm and transformers, with the same logits."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from hub_server import environment
from PIL import Image
from reference import calibrate_batch_norm, images, randomise, relative_error

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.cli import main as effzoo
from effvit_zoo.hub.twin import proven_twin, twin_of

NAMES = ["ant", "bee", "cat"]


def drawn(name, size, **kwargs):
    """A model of ours with random weights and statistics."""
    model = randomise(effvit_zoo.create_model(name, num_classes=3, **kwargs))
    calibrate_batch_norm(model, images(size, size))
    return model.eval()


@pytest.fixture(scope="module")
def edgenext(tmp_path_factory):
    model = drawn("effzoo_edgenext_xx_small", 64)
    data_config = {"input_size": (3, 64, 64), "crop_pct": 1.0}
    return hub.save(model, tmp_path_factory.mktemp("edgenext") / "model", label_names=NAMES, data_config=data_config)


def test_every_name_that_timm_has_without_the_prefix():
    assert twin_of("effzoo_edgenext_small") == "edgenext_small"
    assert twin_of("effzoo_vit_small") == "deit_small_patch16_224"
    for name in (
        "effzoo_vit_pico",
        "effzoo_swiftformer_pico",
        "effzoo_conv2former_n",
        "effzoo_sima_vit_tiny",
        "resnet18",
    ):
        assert twin_of(name) is None


@pytest.mark.parametrize(
    ("name", "timms", "kwargs"),
    [
        ("effzoo_efficientvit_b0", "efficientvit_b0", {}),
        ("effzoo_swiftformer_xs", "swiftformer_xs", {}),
        ("effzoo_swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4}),
        ("effzoo_vit_tiny", "deit_tiny_patch16_224", {"img_size": 64}),
        ("effzoo_vit_tiny", None, {"img_size": 64, "mixers": {"sima": [3]}}),  # another attention: not timm's
    ],
)
def test_twins_are_proven_by_their_logits(name, timms, kwargs, tmp_path):
    model = drawn(name, 64, **kwargs)
    folder = hub.save(model, tmp_path / "model", data_config={"input_size": (3, 64, 64)})
    assert proven_twin(hub.load(folder), hub.read_config(folder)) == timms


def test_other_logits_are_no_twin(edgenext, monkeypatch):
    model = hub.load(edgenext)
    monkeypatch.setattr(model, "forward_head", lambda x: type(model).forward_head(model, x) + 1e-3)
    assert proven_twin(model, hub.read_config(edgenext)) is None


def test_what_is_pushed_is_timms_and_ours(the_hub, edgenext, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    effvit_zoo.push(edgenext, "ada/edge")
    files = the_hub.repos["ada/edge"].files()
    config = json.loads(files["config.json"])
    assert config["architecture"] == "edgenext_xx_small"
    assert config["effvit_zoo_architecture"] == "effzoo_edgenext_xx_small"
    assert hub.read_config(edgenext)["architecture"] == "effzoo_edgenext_xx_small"
    assert "import effvit_zoo" not in files["README.md"].decode()
    x = images(64, 64)
    with torch.no_grad():
        expected = hub.load(edgenext).eval()(x)
        for make in (effvit_zoo.create_model, hub.load):
            ours = make("hf-hub:ada/edge")
            assert type(ours).__module__ == "effvit_zoo.models.edgenext"
            assert torch.equal(ours.eval()(x), expected)
            assert hub.class_names(ours) == tuple(NAMES)
        timms = timm.create_model("hf-hub:ada/edge", pretrained=True)
        assert type(timms).__module__ == "timm.models.edgenext"
        assert relative_error(timms.eval()(x), expected) < 1e-5
    folder = effvit_zoo.pull("ada/edge")
    assert type(hub.load(folder)).__module__ == "effvit_zoo.models.edgenext"
    effvit_zoo.push(folder, "ada/again")
    assert json.loads(the_hub.repos["ada/again"].files()["config.json"])["architecture"] == "edgenext_xx_small"


def test_what_only_this_package_knows_says_so_first(the_hub, tmp_path):
    folder = hub.save(effvit_zoo.create_model("effzoo_vit_pico", num_classes=3), tmp_path / "pico", label_names=NAMES)
    effvit_zoo.push(folder, "ada/pico")
    files = the_hub.repos["ada/pico"].files()
    assert json.loads(files["config.json"])["architecture"] == "effzoo_vit_pico"
    body = files["README.md"].decode().partition("\n---\n")[2].strip()
    assert body.startswith("```bash\npip install effvit_zoo\n```\n\n```python\nimport effvit_zoo")


STRANGER = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "effvit_zoo":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import timm, torch
from PIL import Image
from transformers import pipeline
model = timm.create_model("hf-hub:ada/edge", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    by_timm = model(transform(Image.open("photo.png").convert("RGB"))[None]).softmax(1)[0].tolist()
rows = pipeline("image-classification", model="ada/edge")("photo.png")
names = model.pretrained_cfg["label_names"]
print(json.dumps([dict(zip(names, by_timm)), {row["label"]: row["score"] for row in rows}]))
"""


@pytest.mark.slow  # it imports torch, timm and transformers in a process of its own
def test_strangers_get_the_answers_of_predict(the_hub, edgenext, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    effvit_zoo.push(edgenext, "ada/edge")
    capsys.readouterr()
    assert effzoo(["predict", "photo.png", "--model", str(edgenext), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)[0]["classes"]
    expected = {row["label"]: row["probability"] for row in rows}
    env = {**os.environ, **environment(the_hub.endpoint, tmp_path / "stranger")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    for answer in json.loads(done.stdout.splitlines()[-1]):
        assert answer == pytest.approx(expected, abs=1e-5)
