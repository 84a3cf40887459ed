"""`effzoo convert`: official files become folders with the official answers; no bad file runs code, costs data or passes."""

import argparse
import collections
import contextlib
import datetime
import os
import pathlib
import pickle
import random
import sys

import numpy as np
import pytest
import timm
import torch
from reference import Golden, images, relative_error
from runs import make_photos, train_small
from safetensors import SafetensorError
from safetensors.torch import save_file

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.cli import main
from effvit_zoo.errors import UserError
from effvit_zoo.hub.convert import convert

NAME = "effzoo_swiftformer_xs"
PICO = "effzoo_vit_pico"


def command(file, output, model=NAME):
    return main(["convert", str(file), "--model", model, "--output", str(output)])


def small_state_dict(name=PICO, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).state_dict()


class Payload:
    """Unpickled with trust, it leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


# what is good


@pytest.mark.parametrize("nesting", ["model", "state_dict", "model_ema", "ema", None])
@torch.no_grad()
def test_official_answers(nesting, tmp_path, capsys):
    golden = Golden("swiftformer_s")
    weights = {f"module.{key}": tensor for key, tensor in golden.state_dict().items()}
    if nesting is None:
        file = tmp_path / "official.safetensors"
        save_file(weights, file)
    else:
        file = tmp_path / "official.pth"
        others = {"model": {}} if "ema" in (nesting or "") else {}
        torch.save({**others, nesting: weights, "epoch": 299, "args": argparse.Namespace(lr=1e-3)}, file)
    assert command(file, tmp_path / "out", "effzoo_swiftformer_s.dist_in1k") == 0
    assert "1000 classes" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert relative_error(model(images(224, 224)), golden.arrays["logits"]) < 1e-5
    assert model.pretrained_cfg["crop_pct"] == 0.95
    assert hub.read_config(tmp_path / "out")["effvit_zoo"] == {"converted_from": file.name}


def test_classes_are_those_of_the_checkpoint(tmp_path):
    golden = Golden("conv2former_n")
    weights = golden.state_dict()
    weights["pred.weight"], weights["pred.bias"] = torch.randn(11, 1280), torch.randn(11)
    torch.save(weights, tmp_path / "official.bin")
    folder = convert(tmp_path / "official.bin", "effzoo_conv2former_n", tmp_path / "out")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.num_classes == 11
    assert torch.equal(model.head.fc.weight, weights["pred.weight"])
    assert torch.equal(model.stem[0].weight, weights["downsample_layers.0.0.weight"])


def test_averaged_weights_and_other_types(tmp_path):
    raw, averaged = small_state_dict(), {key: tensor.half() for key, tensor in small_state_dict().items()}
    averaged["norm.weight"] = torch.full_like(averaged["norm.weight"], 2.0)
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, tmp_path / "last.pth.tar")
    model = hub.load(convert(tmp_path / "last.pth.tar", PICO, tmp_path / "out"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.norm.weight, torch.full_like(model.norm.weight, 2.0))


def test_tensors_that_share_memory(tmp_path):
    weights = small_state_dict()
    pool = torch.cat([tensor.flatten() for tensor in weights.values()])
    offset = 0
    for key, tensor in weights.items():
        weights[key] = pool[offset : offset + tensor.numel()].view(tensor.shape)
        offset += tensor.numel()
    torch.save(weights, tmp_path / "shared.pth")
    model = hub.load(convert(tmp_path / "shared.pth", PICO, tmp_path / "out"))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


# what is bad: (what is written instead of a checkpoint, words of the complaint)


def _missing(weights):
    del weights["norm.weight"], weights["norm.bias"]
    return weights


def _misshapen(weights):
    return {**weights, "norm.weight": torch.ones(3)}


def _integers(weights):
    return {**weights, "norm.weight": weights["norm.weight"].long()}


BAD_WEIGHTS = {
    "missing": (_missing, "missing norm.weight and 1 more"),
    "unexpected": (lambda w: {**w, "extra.bias": torch.ones(1)}, "unexpected extra.bias"),
    "misshapen": (_misshapen, r"norm.weight \(is \(3,\), expected \(\d+,\)\)"),
    "integers": (_integers, r"norm.weight \(is torch.int64\)"),
    "headless": (lambda w: {k: v for k, v in w.items() if not k.startswith("head.")}, "missing head.weight"),
    "not square": (lambda w: small_state_dict(img_size=(48, 32)), r"of another shape pos_embed \(is \(1, 97, 64\)"),
    "other model": (lambda w: small_state_dict("effzoo_conv2former_n"), "does not hold the weights of effzoo_vit_pico"),
    "empty dict": (lambda w: {}, "holds no weights but an empty dict"),
    "list": (lambda w: list(w.values()), "holds no weights but a list"),
    "no tensors": (lambda w: {"model": {"epoch": 3}}, "epoch is a int, expected a tensor"),
    "number as key": (lambda w: {**w, 3: torch.ones(1)}, "unexpected 3"),
    "meta": (lambda w: {k: v.to("meta") for k, v in w.items()}, "without data"),
}


@pytest.mark.parametrize(("change", "words"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_weights_that_do_not_fit(change, words, tmp_path):
    torch.save(change(small_state_dict()), tmp_path / "bad.pth")
    with pytest.raises(UserError, match=words):
        convert(tmp_path / "bad.pth", PICO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _saved(tmp_path, legacy=False):
    torch.save(small_state_dict(), tmp_path / "good.pth", _use_new_zipfile_serialization=not legacy)
    return (tmp_path / "good.pth").read_bytes()


def _safetensors(tmp_path):
    save_file(small_state_dict(), tmp_path / "good.safetensors")
    return (tmp_path / "good.safetensors").read_bytes()


def _mark(tmp_path):
    return tmp_path / "the payload was here"


def _with_payload(tmp_path, **how):
    torch.save({"model": small_state_dict(), "x": Payload(_mark(tmp_path))}, tmp_path / "evil", **how)
    return (tmp_path / "evil").read_bytes()


BAD_FILES = {
    "empty.pth": (lambda t: b"", "is empty"),
    "text.pth": (lambda t: b"<html>404: not found</html>", "damaged, incomplete or no checkpoint"),
    "truncated.pth": (lambda t: _saved(t)[:-1000], "damaged, incomplete or no checkpoint"),
    "truncated_legacy.pt": (lambda t: _saved(t, legacy=True)[:-1000], "damaged, incomplete or no checkpoint"),
    "truncated_early.pt": (lambda t: _saved(t, legacy=True)[:100], "damaged, incomplete or no checkpoint"),
    "empty.safetensors": (lambda t: b"", "is empty"),
    "truncated.safetensors": (lambda t: _safetensors(t)[:-1000], "damaged, incomplete or no checkpoint"),
    "truncated_header.safetensors": (lambda t: _safetensors(t)[:100], "damaged, incomplete or no checkpoint"),
    "pickle.safetensors": (_saved, "damaged, incomplete or no checkpoint"),
    "safetensors.bin": (_safetensors, "damaged, incomplete or no checkpoint"),
    "payload.pth": (_with_payload, "asks for posix.mkdir; nothing was run"),
    "payload_legacy.pth": (
        lambda t: _with_payload(t, _use_new_zipfile_serialization=False),
        "asks for posix.mkdir; nothing was run",
    ),
    "payload.bin": (lambda t: pickle.dumps(Payload(_mark(t)), protocol=2), "asks for posix.mkdir; nothing was run"),
    "payload_4.bin": (lambda t: pickle.dumps({"model": Payload(_mark(t))}, protocol=4), "damaged, incomplete or no"),
    "weights.txt": (lambda t: b"1 2 3", "unknown kind of checkpoint '.txt'"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_unreadable_files(name, tmp_path, capsys):
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content(tmp_path))
    assert command(tmp_path / name, tmp_path / "out", PICO) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert words.replace("posix", os.name) in line
    assert not (tmp_path / "out").exists()
    assert not _mark(tmp_path).exists()

    # the way around this command: nothing is run there either
    with pytest.raises((RuntimeError, LookupError, EOFError, SafetensorError, pickle.UnpicklingError)):
        timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / name)})
    assert not _mark(tmp_path).exists()


def test_the_payload_would_have_worked(tmp_path):
    pickle.loads(pickle.dumps(Payload(_mark(tmp_path))))
    assert _mark(tmp_path).exists()


@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_is_reported_or_harmless(tmp_path):
    """Single bytes of the pickle changed: whatever comes out of the parser, the command ends with its own error or with a folder."""
    torch.save(small_state_dict(), tmp_path / "good.pth", _use_new_zipfile_serialization=False)
    good = (tmp_path / "good.pth").read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        bad = bytearray(good)
        bad[draw.randrange(4000)] = draw.randrange(256)
        (tmp_path / "bad.pth").write_bytes(bad)
        with contextlib.suppress(UserError):
            convert(tmp_path / "bad.pth", PICO, tmp_path / "out")


def test_files_that_are_not_there(tmp_path, capsys):
    assert command(tmp_path / "none.pth", tmp_path / "out") == 2
    assert "none.pth is not there" in capsys.readouterr().err
    (tmp_path / "folder.pth").mkdir()
    assert command(tmp_path / "folder.pth", tmp_path / "out") == 2
    assert "is not a file" in capsys.readouterr().err


def test_names_that_are_no_models(tmp_path, capsys):
    torch.save(small_state_dict(), tmp_path / "good.pth")
    assert command(tmp_path / "good.pth", tmp_path / "out", "effzoo_swiftformer_xxs") == 2
    assert "did you mean 'effzoo_swiftformer_xs'?" in capsys.readouterr().err
    hub.save(timm.create_model(PICO), tmp_path / "folder")
    assert command(tmp_path / "good.pth", tmp_path / "out", f"local-dir:{tmp_path / 'folder'}") == 2
    assert "expected the name of a model" in capsys.readouterr().err


def test_outputs_that_hold_something_else(tmp_path, capsys):
    torch.save(small_state_dict(), tmp_path / "good.pth")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    assert command(tmp_path / "good.pth", tmp_path / "thesis", PICO) == 2
    assert "is not a model folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    assert command(tmp_path / "good.pth", tmp_path / "good.pth", PICO) == 2
    assert command(tmp_path / "good.pth", tmp_path, PICO) == 2
    assert (tmp_path / "good.pth").exists()


def test_an_old_folder_survives_a_bad_checkpoint(tmp_path):
    torch.save(small_state_dict(), tmp_path / "good.pth")
    folder = convert(tmp_path / "good.pth", PICO, tmp_path / "out")
    (folder / "README.md").write_text("card")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "bad.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:-1000])
    with pytest.raises(UserError):
        convert(tmp_path / "bad.pth", PICO, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    convert(tmp_path / "good.pth", PICO, folder)
    assert (folder / "README.md").read_text() == "card"

    # a checkpoint inside the folder that would be replaced
    weights = folder / "model.safetensors"
    with pytest.raises(UserError, match="lies in the output folder itself"):
        convert(weights, PICO, folder)
    assert weights.read_bytes() == before["model.safetensors"]


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path, capsys):
    torch.save(small_state_dict(), tmp_path / "secret.pth")
    (tmp_path / "secret.pth").chmod(0)
    assert command(tmp_path / "secret.pth", tmp_path / "out", PICO) == 2
    assert "Permission denied" in capsys.readouterr().err


# from other trainings: keys, prefixes, sizes, what lies beside the weights


def same(folder, state):
    got = hub.load(folder).state_dict()
    return got.keys() == state.keys() and all(torch.equal(got[key], value) for key, value in state.items())


def behind(prefix, state):
    return {prefix + key: value for key, value in state.items()}


PLACES = {
    "lightning": lambda w: {"state_dict": behind("model.", w) | {"criterion.pos_weight": torch.ones(3)}, "epoch": 3},
    "compiled": lambda w: behind("_orig_mod.", w),
    "compiled in parallel in lightning": lambda w: {"state_dict": behind("model.module._orig_mod.", w)},
    "backbone": lambda w: {"net": behind("backbone.", w)},
    "tutorial": lambda w: {
        "model_state_dict": w,
        "optimizer_state_dict": {"state": {0: {"exp_avg": w["norm.weight"]}}},
    },
    "twice": lambda w: {"model": {"state_dict": w}, "epoch": 1},
    "averaged": lambda w: {"model": {k: v + 1 for k, v in w.items()}, "model_ema": {"module": w, "decay": 0.9}},
    "numbers beside": lambda w: {**w, "epoch": 3, "best": np.float64(0.5)},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("suffix", [".ckpt", ".pth"])
def test_weights_under_any_key(place, suffix, tmp_path):
    state = small_state_dict(num_classes=3)
    torch.save(PLACES[place](state), tmp_path / f"a{suffix}")
    assert same(convert(tmp_path / f"a{suffix}", PICO, tmp_path / "out"), state)


@pytest.mark.parametrize("inside", [lambda w: w, lambda w: {"state_dict": w}])
def test_several_models_in_one_file(inside, tmp_path, capsys):
    state = small_state_dict(num_classes=3)
    other = {key: value + 1 for key, value in state.items()}
    torch.save({"student": inside(state), "teacher": inside(other)}, tmp_path / "dino.pth")
    assert command(tmp_path / "dino.pth", tmp_path / "out", PICO) == 2
    said = capsys.readouterr().err
    assert "2 models" in said
    assert "student" in said
    assert "teacher" in said
    assert (
        main(
            [
                "convert",
                str(tmp_path / "dino.pth"),
                "--model",
                PICO,
                "--output",
                str(tmp_path / "out"),
                "--key",
                "teacher",
            ]
        )
        == 0
    )
    assert same(tmp_path / "out", other)
    with pytest.raises(UserError, match="unknown key of the checkpoint 'teach'"):
        convert(tmp_path / "dino.pth", PICO, tmp_path / "out", key="teach")


def test_data_beside_the_weights_is_read_and_code_is_not(tmp_path):
    state = small_state_dict(num_classes=3)
    beside = {
        "best": np.float32(81.2),
        "history": np.arange(3.0),
        "dtype": np.dtype("int8"),
        "rng": np.random.get_state(),
        "args": argparse.Namespace(path=pathlib.Path("runs/x")),
        "counts": collections.Counter("abc"),
        "when": datetime.datetime(2026, 1, 1),
    }
    torch.save({"model": state, **beside}, tmp_path / "good.pth")
    assert same(convert(tmp_path / "good.pth", PICO, tmp_path / "out"), state)
    torch.save({"model": state, "list": np.array([Payload(_mark(tmp_path))], dtype=object)}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="nothing was run"):
        convert(tmp_path / "bad.pth", PICO, tmp_path / "out")
    assert not _mark(tmp_path).exists()


def test_sizes_follow_from_the_weights(tmp_path):
    state = small_state_dict(num_classes=3, in_chans=1, img_size=48)
    torch.save(state, tmp_path / "a.pth")
    folder = convert(tmp_path / "a.pth", PICO, tmp_path / "out")
    assert same(folder, state)
    model = hub.load(folder)
    assert tuple(model.pretrained_cfg["input_size"]) == (1, 48, 48)
    assert len(model.pretrained_cfg["mean"]) == 1
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 1, 48, 48)).shape == (1, 3)
    windows = small_state_dict("effzoo_swin_tiny_patch4_window7_224", window_size=4, num_classes=2)
    torch.save(windows, tmp_path / "b.pth")
    with pytest.raises(UserError, match="window_size=N"):
        convert(tmp_path / "b.pth", "effzoo_swin_tiny_patch4_window7_224", tmp_path / "swin")
    convert(tmp_path / "b.pth", "effzoo_swin_tiny_patch4_window7_224", tmp_path / "swin", kwargs={"window_size": 4})


def test_what_a_file_says_of_its_classes_and_architecture(tmp_path, capsys):
    state = small_state_dict(num_classes=2)
    torch.save({"state_dict": state, "arch": PICO, "class_to_idx": {"red": 1, "blue": 0}}, tmp_path / "a.pth")
    model = hub.load(tmp_path / "a.pth")
    assert hub.label_names(model) == ("blue", "red")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert hub.label_names(hub.load(convert(tmp_path / "a.pth", PICO, tmp_path / "out"))) == ("blue", "red")
    assert hub.load(tmp_path / "a.pth", num_classes=5).num_classes == 5
    assert hub.load(tmp_path / "a.pth", in_chans=1).patch_embed.proj[0].weight.shape[1] == 1
    assert effvit_zoo.create_model(str(tmp_path / "a.pth")).num_classes == 2

    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"doesn't say its architecture: name it by model\.architecture=NAME"):
        hub.load(tmp_path / "b.pth")
    assert hub.load(tmp_path / "b.pth", architecture=PICO).num_classes == 2
    with pytest.raises(UserError, match="does not hold the weights of effzoo_swiftformer_pico"):
        hub.load(tmp_path / "b.pth", architecture="effzoo_swiftformer_pico")
    assert hub.resolve_name(tmp_path / "out" / "model.safetensors") == hub.resolve_name(tmp_path / "out")


def test_training_starts_from_a_file(tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", {"": {"blue": 8, "red": 8}})
    state = small_state_dict(num_classes=5)
    torch.save({"model": behind("module.", state)}, tmp_path / "a.ckpt")
    settings = [f"data.root={photos}", f"model.name={tmp_path / 'a.ckpt'}", "optim.lr=1e-12", "optim.weight_decay=0"]
    assert train_small(tmp_path / "run", *settings) == 2
    assert "model.architecture=NAME" in capsys.readouterr().err
    assert train_small(tmp_path / "run", *settings, f"model.architecture={PICO}") == 0
    assert "classifier: new, the weights name no classes" in capsys.readouterr().out
    got = hub.load(tmp_path / "run").state_dict()
    torch.testing.assert_close(got["blocks.2.mlp.fc1.weight"], state["blocks.2.mlp.fc1.weight"], atol=1e-5, rtol=0)
    assert not (hub.read_config(tmp_path / "run")["pretrained_cfg"].get("license"))


def test_a_number_without_a_tag_claims_no_published_weights(tmp_path):
    state = small_state_dict("effzoo_vit_tiny")
    torch.save(state, tmp_path / "a.pth")
    own = hub.load(convert(tmp_path / "a.pth", "effzoo_vit_tiny", tmp_path / "own"))
    assert hub.class_names(own)[0] == "0"
    official = hub.load(convert(tmp_path / "a.pth", "effzoo_vit_tiny.fb_in1k", tmp_path / "official"))
    assert hub.class_names(official)[0] == "tench, Tinca tinca"
