"""Model folders: what is saved is what timm loads, a cut save leaves a whole folder, and each failure is one line."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.data import record_of
from effvit_zoo.errors import UserError

NAME = "test_vit"  # timm's own test model: 0.37 M parameters, fixed input size


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with every parameter drawn anew, so that none is at a value that initialisation would give too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """A folder with a model of three classes."""
    return hub.save(randomised(timm.create_model(NAME, num_classes=3)), tmp_path / "model", label_names=("a", "b", "c"))


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        (NAME, {"num_classes": 3, "in_chans": 1, "img_size": 96}),
        ("test_convnext", {"num_classes": 7}),
        ("effzoo_swiftformer_xs", {"num_classes": 2}),
        ("effzoo_vit_pico", {"num_classes": 4, "img_size": 28, "in_chans": 1}),
    ],
)
def test_timm_loads_what_save_writes_bit_for_bit(tmp_path, name, kwargs, memory_format):
    model = randomised(timm.create_model(name, **kwargs)).to(memory_format=memory_format)
    labels = [f"class {index}" for index in range(kwargs["num_classes"])]
    size = (kwargs.get("in_chans", 3), *(2 * [kwargs.get("img_size", 64)]))
    written = hub.save(
        model,
        tmp_path / "m",
        label_names=labels,
        data_config={"input_size": size, "crop_pct": 0.77},
        extra={"top1": 12.5},
    )
    assert sorted(path.name for path in written.iterdir()) == ["config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{written}", pretrained=True).eval()
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(loaded(image), model.to(memory_format=torch.contiguous_format)(image))
    assert loaded.num_classes == kwargs["num_classes"]
    assert loaded.in_chans == size[0]
    assert tuple(loaded.pretrained_cfg["input_size"]) == size
    assert loaded.pretrained_cfg["crop_pct"] == 0.77
    assert hub.label_names(loaded) == tuple(labels)
    assert hub.read_config(written)["effvit_zoo"] == {"top1": 12.5}
    assert hub.load(written).effvit_zoo_record == {"top1": 12.5}


def test_labels_and_preprocessing_survive_a_second_save(folder, tmp_path):
    edit_config(folder, label_descriptions={"a": "ape"})
    again = hub.save(hub.load(folder), tmp_path / "again")
    assert hub.label_names(hub.load(again)) == ("a", "b", "c")
    assert hub.load(again).pretrained_cfg["label_descriptions"] == {"a": "ape"}
    renamed = hub.save(hub.load(folder), tmp_path / "renamed", label_names=("x", "y", "z"))
    assert hub.label_names(hub.load(renamed)) == ("x", "y", "z")
    assert "label_descriptions" not in hub.load(renamed).pretrained_cfg


def test_labels_of_another_head_are_not_the_models(folder):
    assert hub.label_names(hub.load(folder, num_classes=5)) is None
    assert hub.label_names({"label_names": {"1": "b", "0": "a"}, "num_classes": 2}) == ("a", "b")
    assert hub.label_names(timm.create_model(NAME)) is None


def test_load_adapts_head_and_channels_and_keeps_the_rest(folder):
    source, adapted = hub.load(folder), hub.load(folder, num_classes=5, in_chans=1)
    assert torch.equal(source.blocks[0].attn.qkv.weight, adapted.blocks[0].attn.qkv.weight)
    assert adapted.head.out_features == 5
    assert torch.allclose(adapted.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True))


def test_names_folders_and_runs_resolve(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "run" / "best")
    best = f"local-dir:{tmp_path / 'run' / 'best'}"
    assert hub.resolve_name(tmp_path / "run") == hub.resolve_name(f"local-dir:{tmp_path}/run") == best
    monkeypatch.chdir(tmp_path)
    assert hub.resolve_name("run/best") == hub.resolve_name("./run") == best
    assert hub.resolve_name(f"{NAME}.r160_in1k") == f"{NAME}.r160_in1k"
    assert not hub.brings_weights(NAME)
    assert hub.brings_weights("run")
    assert hub.brings_weights("hf-hub:someone/something")


def test_plain_names_have_random_weights_unless_asked_for():
    torch.manual_seed(0)
    first = hub.load(NAME)
    torch.manual_seed(0)
    assert torch.equal(first.head.weight, hub.load(NAME, pretrained=False).head.weight)


def test_fused_model_is_refused_and_the_previous_folder_stays(tmp_path):
    model = randomised(timm.create_model("effzoo_swiftformer_xs", num_classes=2))
    folder = hub.save(model, tmp_path / "m")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="not in its training form"):
        hub.save(timm.models.reparameterize_model(model), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"label_names": ["a", "b"]}, "got 2 label_names for a model of 3 classes"),
        ({"label_names": "abc"}, "sequence of names"),
        ({"extra": {"top1": torch.ones(1)}}, "JSON"),
        ({"extra": {"loss": float("nan")}}, "JSON"),
        ({"data_config": {"input_size": (3, 64, 64)}}, "64"),  # the model takes 160 pixels only
    ],
)
def test_save_refuses_what_could_not_be_loaded_again(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        hub.save(timm.create_model(NAME, num_classes=3, dynamic_img_size=False), tmp_path / "m", **kwargs)
    assert not list(tmp_path.iterdir())


def test_save_does_not_overwrite_other_peoples_folders(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(ValueError, match="not a model folder"):
        hub.save(timm.create_model(NAME), tmp_path)
    with pytest.raises(ValueError, match=r"timm\.create_model"):
        hub.save(nn.Linear(1, 1), tmp_path / "m")
    assert (tmp_path / "thesis.tex").read_text() == "words"


def test_save_keeps_what_lies_beside_the_weights_and_clears_a_cut_save(folder):
    (folder / "README.md").write_text("card")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("graph")
    cut = folder.with_name(f".{folder.name}.writing")
    cut.mkdir()
    (cut / "model.safetensors").write_text("half")
    hub.save(hub.load(folder), folder)
    assert (folder / "README.md").read_text() == "card"
    assert (folder / "onnx" / "model.onnx").read_text() == "graph"
    assert not cut.exists()


def test_a_full_disk_leaves_the_previous_folder(folder):
    resource = pytest.importorskip("resource")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = randomised(hub.load(folder), seed=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors"):
            hub.save(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    hub.save(model, folder)
    assert torch.equal(hub.load(folder).head.weight, model.head.weight)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.slow
def test_kills_at_any_moment_leave_a_whole_folder(folder):
    """A process saves without pause and is killed without warning, again and again."""
    script = (
        "import sys; from effvit_zoo import hub; model = hub.load(sys.argv[1]); print('saving', flush=True)\n"
        "while True: hub.save(model, sys.argv[1])"
    )
    expected = hub.load(folder).state_dict()
    for delay in (0.2, 0.31, 0.43):
        writer = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
        try:
            assert writer.stdout.readline() == "saving\n"
            time.sleep(delay)
        finally:
            writer.kill()
            writer.wait()
            writer.stdout.close()
        loaded = hub.load(folder)
        assert hub.label_names(loaded) == ("a", "b", "c")
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, expected[key])


@pytest.mark.parametrize("inside_run", [False, True])
def test_a_crash_between_the_two_renames_is_recovered(tmp_path, monkeypatch, inside_run):
    folder = tmp_path / "run" / ("best" if inside_run else "model")
    hub.save(randomised(timm.create_model(NAME, num_classes=3)), folder, label_names=("a", "b", "c"))
    (folder / "README.md").write_text("card")
    place = folder.parent if inside_run else folder
    old, new = hub.load(folder), randomised(hub.load(folder), seed=1)
    rename = Path.rename

    def crash(self, target):
        if self.name.endswith(".writing"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        hub.save(new, folder)
    monkeypatch.undo()
    assert not folder.exists()
    assert torch.equal(hub.load(place).head.weight, old.head.weight)
    with pytest.raises(ValueError, match="JSON"):  # a save that fails later puts the old one back too
        hub.save(new, folder, extra={"loss": float("nan")})
    assert torch.equal(hub.load(place).head.weight, old.head.weight)
    hub.save(new, folder)
    assert torch.equal(hub.load(place).head.weight, new.head.weight)
    assert (folder / "README.md").read_text() == "card"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.skipif(os.name != "posix", reason="other systems have no umask")
def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    previous = os.umask(0o027)
    try:
        folder = hub.save(timm.create_model(NAME, num_classes=3), tmp_path / "m")
    finally:
        os.umask(previous)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
    assert folder.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_vitt", "unknown model 'test_vitt': did you mean 'test_vit"),
        ("effzoo_swiftformer_xxs", "did you mean 'effzoo_swiftformer_"),
        ("test_vit.r160", "unknown weights tag of test_vit 'r160': did you mean 'r160_in1k'?"),
        ("./nowhere", "model folder nowhere is not there"),
        ("local-dir:nowhere", "model folder nowhere is not there"),
        ("someone/model", "write hf-hub:someone/model"),
        ("hfhub:someone/model", "did you mean 'hf-hub:'?"),
        ("hf-hub:not a name", "expected hf-hub:USER/NAME"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UserError) as raised:
        hub.load(name)
    assert message in str(raised.value)


def test_unreachable_hub_fails_fast_and_in_one_line(monkeypatch, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody answers
    start = time.monotonic()
    for name in ("hf-hub:someone/no-such-model", NAME):
        with pytest.raises(UserError, match=r"cannot reach http://127\.0\.0\.1:9 for (someone|timm)/"):
            hub.load(name, pretrained=True)
    assert time.monotonic() - start < 5
    assert not capfd.readouterr().err


def weights_without_head(tensors):
    del tensors["head.weight"], tensors["head.bias"]


def weights_of_another_width(tensors):
    tensors["norm.weight"] = torch.ones(7)


def extra_weights(tensors):
    tensors["gate"] = torch.ones(1)


@pytest.mark.parametrize("num_classes", [None, 3, 5])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weights_without_head, "don't fit the model: missing head.weight and 1 more"),
        (weights_of_another_width, "of another shape norm.weight (is [7], expected [64])"),
        (extra_weights, "unexpected gate"),
        (lambda tensors: tensors.clear(), "missing "),
    ],
)
def test_weights_that_do_not_fit(folder, change, message, num_classes):
    """Whatever head is asked for: with another one timm itself would load the rest and say nothing."""
    edit_weights(folder, change)
    with pytest.raises(UserError) as raised:
        hub.load(folder, num_classes=num_classes)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [0, 4, 1000, 500_000])
def test_truncated_weights(folder, size):
    os.truncate(folder / "model.safetensors", size)
    with pytest.raises(UserError, match="damaged or incomplete"):
        hub.load(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_missing_and_unsafe_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="No suitable checkpoints"):
        hub.load(folder)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(time.sleep))
    with pytest.raises(UserError, match="weights_only"):
        hub.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a mapping, got list"),
        ("{}", "names no architecture"),
        ('{"architecture": 5}', "architecture is 5, expected a name"),
        ('{"architecture": "test_vitt"}', "unknown architecture 'test_vitt': did you mean 'test_vit"),
        ('{"architecture": "test_vit", "num_classes": "ten"}', "num_classes is 'ten', expected a whole number"),
        ('{"architecture": "test_vit", "num_classes": true}', "num_classes is True, expected a whole number"),
        ('{"architecture": "test_vit", "pretrained_cfg": []}', "pretrained_cfg is [], expected a mapping"),
        ('{"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 8]}}', "input_size is [3, 8], expected 3"),
        ('{"architecture": "test_vit", "pretrained_cfg": {"mean": "grey"}}', "mean is 'grey', expected numbers"),
        (
            '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"deepness": 3}}',
            "takes no argument 'deepness'",
        ),
        ('{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"embed_dim": 63}}', "cannot load"),
    ],
)
def test_malformed_configs(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError) as raised:
        hub.load(folder)
    assert message in str(raised.value)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(UserError, match=r"not a model folder: it has no config\.json"):
        hub.load(tmp_path)
    with pytest.raises(UserError, match="is a file, not a folder"):
        hub.load(folder / "config.json")
    with pytest.raises(UserError, match="takes no argument 'depht'"):
        hub.load(folder, depht=2)
    with pytest.raises(UserError, match="expected a model folder"):
        hub.read_config(NAME)


def _with_extra(folder, extra):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"effvit_zoo": extra}))


_PART = {"images": 3, "names": "ab", "sketch": "0123456789abcdef"}
_RECORD = {"root": "photos", "train_split": None, "val_split": None, "train": _PART, "val": _PART}


@pytest.mark.parametrize(
    "extra", [None, {"data": None, "task": None}, {"data": "photos", "seed": None}, {"data": _RECORD}]
)
def test_null_is_as_if_it_were_not_there(extra, tmp_path):
    folder = hub.save(effvit_zoo.create_model("effzoo_vit_pico", num_classes=2), tmp_path / "model")
    _with_extra(folder, extra)
    config = hub.read_config(folder)
    assert None not in (config.get("effvit_zoo") or {}).values()
    assert hub.load(folder).effvit_zoo_record == config.get("effvit_zoo", {})


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"task": 3}, "task in 'effvit_zoo' is 3, expected a text"),
        ({"data": "photos", "seed": "one"}, "seed in 'effvit_zoo' is 'one', expected a whole number"),
        ({"data": "photos", "val_fraction": 7}, "val_fraction in 'effvit_zoo' is 7, expected a share"),
        ({"data": ["photos"]}, "data in 'effvit_zoo'"),
        ({"data": {**_RECORD, "root": 3}}, "root in 'effvit_zoo' is 3"),
        ({"data": {**_RECORD, "train": 3}}, "train in 'effvit_zoo' is 3"),
        ({"data": {**_RECORD, "val": {**_PART, "sketch": "zz"}}}, "sketch in 'effvit_zoo' is 'zz'"),
        ({"data": {**_RECORD, "held_out": {"": 5}}}, "is 5, expected 16 hexadecimal digits"),
    ],
)
def test_a_record_of_the_wrong_kind_is_one_line(extra, words, tmp_path):
    folder = hub.save(effvit_zoo.create_model("effzoo_vit_pico", num_classes=2), tmp_path / "model")
    _with_extra(folder, extra)
    with pytest.raises(UserError, match=re.escape(words)):
        hub.read_config(folder)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({**_RECORD, "held_out": {}}, "lacks ranked_by, val_fraction, split_seed"),
        ({"root": "photos", "train_split": None, "train": {}}, "lacks val_split, val, train.images"),
        ({"root": "photos"}, "lacks val_fraction, split_seed"),
    ],
)
def test_a_record_with_gaps_is_one_line(data, words):
    with pytest.raises(UserError, match=words):
        record_of({"data": data})


def test_layers_that_share_weights(tmp_path):
    model = effvit_zoo.create_model("effzoo_vit_pico", num_classes=2)
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    again = hub.load(hub.save(model, tmp_path / "tied"))
    assert torch.equal(again.blocks[1].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(x), model.eval()(x))
