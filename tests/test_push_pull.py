"""Weights that travel: what is pushed comes back bit for bit, and whatever breaks on the way leaves nothing half done and unsaid."""

import json
import logging
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_server import EXPIRED_TOKEN, READ_TOKEN, TOKEN, environment, git_hash, sha256, use
from huggingface_hub import HfApi
from safetensors.torch import load, save, save_file

import effvit_zoo
from effvit_zoo import hub, push
from effvit_zoo.cli import main
from effvit_zoo.errors import UserError
from effvit_zoo.hub import card, publish
from effvit_zoo.hub import client as hub_client

NAME = "ada/birds"
FAMILIES = {
    "effzoo_vit_pico": {},
    "effzoo_elu_vit_pico": {},
    "effzoo_cosformer_vit_pico": {},
    "effzoo_hydra_vit_pico": {},
    "effzoo_sima_vit_pico": {},
    "effzoo_tosa_vit_pico": {},
    "effzoo_swin_tiny_patch4_window7_224": {
        "embed_dim": 24,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 4, 8),
        "img_size": 64,
    },
    "effzoo_efficientvit_b0": {},
    "effzoo_edgenext_xx_small": {"depths": (2, 2, 2, 2)},
    "effzoo_conv2former_n": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32)},
    "effzoo_swiftformer_xs": {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 48)},
}
"""One model per family and mechanism, in the smallest size there is."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of a run, with three classes and its own preprocessing."""
    torch.manual_seed(0)
    model = timm.create_model("effzoo_vit_pico", num_classes=3)
    return hub.save(
        model,
        tmp_path_factory.mktemp("runs") / "birds" / "best",
        label_names=["tit", "wren", "jay"],
        data_config={"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "crop_pct": 0.9},
        extra={"top1": 61.5, "top5": 100.0, "data": "/home/ada/private/birds"},
    )


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def logits(model, size=None):
    size = size or model.pretrained_cfg["input_size"]
    with torch.inference_mode():
        return model.eval()(torch.randn(2, *size, generator=torch.Generator().manual_seed(0)))


def error_line(argv, capfd):
    """The one line of a failing command."""
    capfd.readouterr()
    assert main([str(part) for part in argv]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1, output.err
    return output.err


def test_no_family_is_forgotten():
    def modules(names):
        return {timm.models.model_entrypoint(name).__module__ for name in names}

    assert modules(FAMILIES) == modules(effvit_zoo.list_models())


CONVOLUTIONAL = ("effzoo_swiftformer_xs", "effzoo_edgenext_xx_small")


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [*((name, torch.contiguous_format) for name in FAMILIES), *((name, torch.channels_last) for name in CONVOLUTIONAL)],
)
def test_every_family_comes_back_bit_for_bit(the_hub, tmp_path, name, memory_format):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **FAMILIES[name])
    size = (3, 64, 64) if model.pretrained_cfg["input_size"][1] > 64 else tuple(model.pretrained_cfg["input_size"])
    data_config = {"input_size": size, "mean": (0.1, 0.2, 0.3), "crop_pct": 0.77}
    labels = ["a", "b", "c", "d"]
    folder = hub.save(
        model.to(memory_format=memory_format), tmp_path / "m", label_names=labels, data_config=data_config
    )
    push(folder, NAME)
    loaded = [
        timm.create_model(f"hf-hub:{NAME}", pretrained=True),
        hub.load(f"hf-hub:{NAME}"),
        hub.load(hub.pull(NAME, tmp_path / "pulled")),
    ]
    expected = logits(model.to(memory_format=torch.contiguous_format), size)
    for other in loaded:
        assert torch.equal(logits(other, size), expected)
        assert tuple(other.pretrained_cfg["input_size"]) == size
        assert tuple(other.pretrained_cfg["mean"]) == data_config["mean"]
        assert other.pretrained_cfg["crop_pct"] == 0.77
        assert hub.label_names(other) == tuple(labels)
    published = the_hub.repos[NAME].files()
    assert set(published) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert published["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "pulled" / "README.md").read_bytes() == published["README.md"]
    assert len(the_hub.repos[NAME].history) == 2  # the Hub's own first commit, and one for all files


def test_other_heads_revisions_and_the_cache(the_hub, trained, tmp_path, monkeypatch):
    push(trained, NAME)
    other = hub.save(
        timm.create_model("effzoo_vit_pico", num_classes=3), tmp_path / "other", label_names=["x", "y", "z"]
    )
    push(other, NAME, revision="second", message="Another model")
    assert hub.label_names(hub.load(f"hf-hub:{NAME}@second")) == ("x", "y", "z")
    first, second = hub.load(trained), hub.load(other)
    assert torch.equal(logits(timm.create_model(f"hf-hub:{NAME}@second", pretrained=True)), logits(second))
    assert torch.equal(logits(timm.create_model(f"hf-hub:{NAME}", pretrained=True)), logits(first))
    commit = the_hub.repos[NAME].branches["second"]
    assert torch.equal(logits(hub.load(f"hf-hub:{NAME}@{commit}")), logits(second))

    five = hub.load(f"hf-hub:{NAME}", num_classes=5, in_chans=1)
    assert five.head.out_features == 5
    assert torch.equal(five.blocks[0].attn.qkv.weight, first.blocks[0].attn.qkv.weight)
    assert hub.label_names(five) is None

    monkeypatch.setattr(hub_client.constants, "HF_HUB_OFFLINE", True)
    seen = len(the_hub.requests)
    assert torch.equal(logits(hub.load(f"hf-hub:{NAME}")), logits(first))
    assert torch.equal(logits(hub.load(f"hf-hub:{NAME}@second")), logits(second))
    assert hub.label_names(hub.load(hub.pull(NAME, tmp_path / "offline"))) == ("tit", "wren", "jay")
    assert torch.equal(logits(timm.create_model(f"hf-hub:{NAME}", pretrained=True)), logits(first))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(trained, NAME)
    with pytest.raises(UserError, match="not in the Hub's cache, and HF_HUB_OFFLINE is set"):
        hub.load("hf-hub:ada/elsewhere")
    assert len(the_hub.requests) == seen


def test_what_is_cached_loads_while_the_hub_is_out_of_order(the_hub, trained):
    push(trained, NAME)
    expected = logits(hub.load(f"hf-hub:{NAME}"))
    for kind in ("reset", 500, 429):
        the_hub.faults.clear()
        the_hub.fail("", kind)
        assert torch.equal(logits(hub.load(f"hf-hub:{NAME}")), expected)


def test_weights_and_config_are_of_one_commit(the_hub, trained, tmp_path, monkeypatch):
    """Somebody pushes between the download of the config and that of the weights."""
    push(trained, NAME)
    other = hub.save(
        timm.create_model("effzoo_vit_pico", num_classes=3), tmp_path / "other", label_names=["x", "y", "z"]
    )
    original = hub_client._download

    def download(repo, name, revision):
        path = original(repo, name, revision)
        if name == "config.json":
            files = {file.name: file.read_bytes() for file in other.iterdir()}
            the_hub.add(NAME, files)
        return path

    monkeypatch.setattr(hub_client, "_download", download)
    loaded = hub.load(f"hf-hub:{NAME}")
    assert hub.label_names(loaded) == ("tit", "wren", "jay")
    assert torch.equal(logits(loaded), logits(hub.load(trained)))


def test_a_second_push_renews_the_card_and_takes_away_what_is_gone(the_hub, trained, tmp_path):
    run = tmp_path / "run"
    folder = hub.save(hub.load(trained), run / "best", extra={"top1": 50.0, "data": "birds"})
    (run / "config.yaml").write_text("model: {name: effzoo_vit_pico}\n")
    (run / "summary.json").write_text("{}")
    (run / "curves.png").write_bytes(b"picture")
    push(run, NAME)
    files = the_hub.repos[NAME].files()
    assert files["training/curves.png"] == b"picture"
    assert "value: 50.0" in files["README.md"].decode()
    the_hub.add(NAME, files | {"README.md": files["README.md"] + b"\nSeen in Kew.\n", "notes.txt": b"hers"})
    hub.save(hub.load(trained), folder, extra={"top1": 75.0, "data": "birds"})
    (run / "curves.png").unlink()
    push(run, NAME)
    files = the_hub.repos[NAME].files()
    card = files["README.md"].decode()
    assert "value: 75.0" in card
    assert "50.0" not in card
    assert card.rstrip().endswith("Seen in Kew.")
    assert card.count("Seen in Kew.") == 1
    assert "training/curves.png" not in files
    assert files["notes.txt"] == b"hers"
    commits = len(the_hub.repos[NAME].history)
    push(run, NAME)
    assert len(the_hub.repos[NAME].history) == commits  # nothing has changed


def test_a_run_travels_with_its_records_but_not_with_what_is_private(the_hub, trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    place = "/home/ada/secret-place/birds"
    record = {"root": place, "path": f"{place}/real", "val_split": "auto", "val": {"images": 3}}
    hub.save(hub.load(trained), run / "best", extra={"top1": 50.0, "data": record})
    config = {
        "hub": {"push": "ada/secret-place"},
        "model": {"name": "local-dir:/home/ada/secret-place/old"},
        "data": {"root": "/home/ada/secret-place/birds"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {"data": "/home/ada/secret-place/birds", "params": 7, "bad_files": 1, "bad_file_names": ["me-naked.jpg"]}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "metrics.csv").write_text("epoch\n1\n")
    before = content(run)
    push(run, NAME)
    assert content(run) == before
    files = the_hub.repos[NAME].files()
    assert yaml.safe_load(files["training/config.yaml"]) == {
        "model": {"name": "local-dir:old"},
        "data": {"root": "birds"},
    }
    record = {"root": "birds", "val_split": "auto", "val": {"images": 3}}
    assert json.loads(files["config.json"])["effvit_zoo"] == {"top1": 50.0, "data": record}
    assert json.loads(files["training/summary.json"]) == {"data": "birds", "params": 7, "bad_files": 1}
    assert not any(b"secret-place" in text or b"me-naked" in text for text in files.values())

    pulled = hub.pull(NAME, tmp_path / "pulled")
    again = "ada/again"
    push(pulled, again)
    assert the_hub.repos[again].files().keys() == files.keys()
    assert the_hub.repos[again].files()["training/summary.json"] == files["training/summary.json"]


def test_commands(the_hub, trained, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = content(trained.parent)
    argv = ["push", str(trained), NAME, "--private", "--revision", "v2", "--license", "mit", "--message", "Two"]
    assert main(argv) == 0
    output = capfd.readouterr()
    assert output.err == ""
    assert output.out.startswith(f"{the_hub.endpoint}/{NAME}/commit/")
    assert output.out.endswith(f"to be used as hf-hub:{NAME}@v2, after import effvit_zoo\n")
    repo = the_hub.repos[NAME]
    assert repo.private
    assert "config.json" not in repo.files("main")
    assert "license: mit" in repo.files("v2")["README.md"].decode()
    assert json.loads(repo.files("v2")["config.json"])["pretrained_cfg"]["license"] == "mit"
    assert content(trained.parent) == before

    assert main(["pull", NAME, "--revision", "v2"]) == 0
    output = capfd.readouterr()
    assert output.out == f"{tmp_path}/birds: to be used as local-dir:{tmp_path}/birds\n"
    assert output.err == ""
    assert torch.equal(logits(hub.load("birds")), logits(hub.load(trained)))
    assert f"{tmp_path}/birds exists already" in error_line(["pull", NAME], capfd)
    assert main(["pull", f"hf-hub:{NAME}@v2", "--output", "deep/down"]) == 0
    assert main(["info", f"hf-hub:{NAME}@v2"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["push", "{trained}", "birds"], "expected USER/NAME"),
        (["push", "{trained}", "a/b/c"], "expected USER/NAME"),
        (["push", "{trained}", "ada/.."], "expected USER/NAME"),
        (["push", "nowhere", NAME], "model folder nowhere is not there"),
        (["push", "{trained}", NAME, "--private", "--public"], "not allowed with"),
        (["push", "{trained}", NAME, "--revision", '"); evil("'], "can't be a branch"),
        (["push", "{trained}", "bob/birds"], "write access to that name"),
        (["pull", "birds"], "expected hf-hub:USER/NAME"),
        (["pull", "ada/none"], "it is not on the Hub, or it is private"),
        (["pull", f"{NAME}@"], "names no revision"),
        (["pull", NAME, "--revision", "v9"], "it has no such revision"),
        (["pull", NAME, "--output", "{trained}"], "exists already"),
        (["predict", "--model", "hf-hub:ada/none", "{trained}/config.json"], "it is not on the Hub"),
    ],
)
def test_mistakes_are_one_line(the_hub, trained, capfd, argv, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    push(trained, NAME)
    assert message in error_line([part.format(trained=trained) for part in argv], capfd)


def test_private_stays_private(the_hub, trained, monkeypatch, tmp_path):
    push(trained, NAME, private=True)
    with pytest.raises(UserError, match="is there already and private"):
        push(trained, NAME, private=False)
    push(trained, NAME)
    assert the_hub.repos[NAME].private
    use(monkeypatch, the_hub.endpoint, tmp_path / "stranger", token=None)
    with pytest.raises(UserError, match="it is not on the Hub, or it is private and needs a token"):
        hub.load(f"hf-hub:{NAME}")


def test_models_that_are_not_whole_are_not_pushed(the_hub, trained, tmp_path):
    model = timm.create_model("effzoo_swiftformer_xs", num_classes=2, **FAMILIES["effzoo_swiftformer_xs"]).eval()
    fused = hub.save(model, tmp_path / "fused")
    save_file(timm.models.reparameterize_model(model).state_dict(), fused / "model.safetensors")
    with pytest.raises(
        UserError, match=r"fused: the weights don't fit .* only a whole model in its training form is pushed"
    ):
        push(fused, NAME)
    pickled = hub.save(model, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model\.safetensors: only models in the safetensors format"):
        push(pickled, NAME)
    cut = hub.save(model, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 1000)
    with pytest.raises(UserError, match="damaged or incomplete"):
        push(cut, NAME)
    assert not the_hub.repos
    assert not the_hub.requests


# Faults. "served": the client's retries lead to success; otherwise the text of the one line.
PUSH_FAULTS = [
    ("a 500 at the upload, once", "PUT", 500, 1, {}, "served"),
    ("a reset at the upload, once", "PUT", "reset", 1, {}, "served"),
    ("rate limited, once", "batch", 429, 1, {"Retry-After": "7"}, "served"),
    ("a lost answer to the commit", "POST .*/commit/", "lost", 1, {}, "served"),
    ("500s at the upload", "PUT", 500, 99, {}, "the Hub is unavailable: try again later (HTTP 500)"),
    ("resets at the upload", "PUT", "reset", 99, {}, "the connection to the Hub broke"),
    ("rate limited", "batch", 429, 99, {"Retry-After": "7"}, "the Hub's rate limit is reached"),
    ("a reset at the commit", "POST .*/commit/", "reset", 1, {}, "the connection to the Hub broke"),
    ("a 500 at the commit", "POST .*/commit/", 500, 1, {}, "the Hub is unavailable"),
    ("a 409 at the commit", "POST .*/commit/", 409, 1, {}, "somebody else changed it"),
    ("a 403 at the preupload", "preupload", 403, 9, {}, "the token may not do this"),
    ("a 404 at the commit", "POST .*/commit/", 404, 9, {}, "there is no such thing"),
    ("a 401 at the commit", "POST .*/commit/", 401, 9, {}, "cannot push"),
    ("the card refused", "validate-yaml", 400, 9, {}, "the Hub refuses it"),
    ("no answer at all", "", "reset", 999, {}, "cannot reach http://127.0.0.1"),
]


@pytest.mark.parametrize("first", [True, False], ids=["new", "known"])
@pytest.mark.parametrize(
    ("pattern", "kind", "times", "headers", "outcome"),
    [row[1:] for row in PUSH_FAULTS],
    ids=[row[0] for row in PUSH_FAULTS],
)
def test_faults_while_pushing(the_hub, trained, tmp_path, capfd, pattern, kind, times, headers, outcome, first):
    if not first:
        push(hub.save(timm.create_model("effzoo_vit_pico", num_classes=2), tmp_path / "old"), NAME)
    before = dict(the_hub.repos[NAME].files()) if not first else None
    local = content(trained.parent)
    the_hub.fail(pattern, kind, times, headers)
    if outcome == "served":
        assert main(["push", str(trained), NAME]) == 0
        the_hub.faults.clear()
        assert torch.equal(logits(hub.load(f"hf-hub:{NAME}")), logits(hub.load(trained)))
        assert len(the_hub.repos[NAME].history) == (2 if first else 3)
    else:
        line = error_line(["push", trained, NAME], capfd)
        assert outcome in line
        assert capfd.readouterr().err == ""
        if not first:
            assert the_hub.repos[NAME].files() == before
            assert "is as it was before" in line or "cannot reach" in line
        elif NAME in the_hub.repos:  # the Hub has a repository now: without a model, and the line says so
            assert set(the_hub.repos[NAME].files()) == {".gitattributes"}
            assert "was created, but holds no model" in line
    assert content(trained.parent) == local
    assert sum(the_hub.waits) < 120


def test_faults_of_the_xet_protocol_are_one_line(the_hub, trained, capfd, monkeypatch):
    """This Hub doesn't speak it, and its library raises errors of its own."""
    monkeypatch.chdir(trained.parent)
    monkeypatch.setattr(hub_client.constants, "HF_HUB_DISABLE_XET", False)
    assert "; the repository was created, but holds no model" in error_line(["push", trained, NAME], capfd)

    def broken(*_, **__):
        raise RuntimeError("no route to the store")

    monkeypatch.setattr(HfApi, "create_commit", broken)
    assert "cannot push to ada/birds: no route to the store; the repos" in error_line(["push", trained, NAME], capfd)
    monkeypatch.setattr(hub_client, "_download", broken)
    assert "cannot get config.json of ada/birds: no route to the store" in error_line(["pull", NAME], capfd)


@pytest.mark.parametrize(
    ("pattern", "kind", "state"),
    [
        ("repos/create", "lost", "may have been created, without a model"),
        ("repos/create", "reset", "may have been created, without a model"),
        ("repos/create", 500, "was not created"),
        ("repos/create", 403, "was not created"),
        ("validate-yaml", 503, "was created, but holds no model"),
    ],
)
def test_faults_while_creating(the_hub, trained, capfd, pattern, kind, state):
    the_hub.fail(pattern, kind)
    assert error_line(["push", trained, NAME], capfd).endswith(f"; the repository {state}\n")
    if NAME in the_hub.repos:
        assert set(the_hub.repos[NAME].files()) == {".gitattributes"}
        assert "created" in state
    the_hub.faults.clear()
    assert main(["push", str(trained), NAME]) == 0


def test_a_new_branch_that_stays_empty_is_named(the_hub, trained, capfd):
    push(trained, NAME)
    the_hub.fail("POST .*/commit/", 500)
    line = error_line(["push", trained, NAME, "--license", "mit", "--revision", "dev"], capfd)
    assert line.endswith("; the repository is as it was before, but for the new branch dev\n")
    assert the_hub.repos[NAME].branches["dev"] == the_hub.repos[NAME].branches["main"]
    line = error_line(["push", trained, "ada/other", "--revision", "dev"], capfd)
    assert line.endswith("; the repository was created, but holds no model in the branch dev\n")


def test_it_is_said_when_the_outcome_is_not_known(the_hub, trained, capfd, monkeypatch):
    """The answer to the commit is lost, and nothing can be asked afterwards."""
    push(trained, NAME)
    push(trained, NAME)
    commits = len(the_hub.repos[NAME].history)
    the_hub.fail("POST .*/commit/", "lost")
    original = publish._arrived

    def arrived(*args):
        the_hub.fail("", 500)
        return original(*args)

    monkeypatch.setattr(publish, "_arrived", arrived)
    line = error_line(["push", trained, NAME, "--license", "mit"], capfd)
    assert "whether the commit went through is unknown" in line
    assert "as it was before" not in line
    assert len(the_hub.repos[NAME].history) == commits + 1


def test_somebody_else_pushes_meanwhile(the_hub, trained, capfd, monkeypatch):
    push(trained, NAME)
    theirs = {"README.md": b"mine!"}
    monkeypatch.setattr(card, "make", lambda *_, **__: the_hub.add(NAME, theirs) and "a card")
    assert "somebody else changed it at the same moment" in error_line(["push", trained, NAME], capfd)
    assert the_hub.repos[NAME].files() == theirs


@pytest.mark.parametrize("command", ["push", "pull"])
@pytest.mark.parametrize(
    ("token", "push_line", "pull_line"),
    [
        (EXPIRED_TOKEN, "the Hub doesn't accept the token, it may have expired", "the Hub doesn't accept the token"),
        (READ_TOKEN, "the token may not do this", None),
        (None, "there is no token: `hf auth login` or the environment variable HF_TOKEN sets one", None),
    ],
    ids=["expired", "read only", "none"],
)
def test_tokens(the_hub, trained, tmp_path, monkeypatch, capfd, command, token, push_line, pull_line):
    push(trained, NAME)
    hub.require_pushable(NAME)
    use(monkeypatch, the_hub.endpoint, tmp_path / "other", token=token)
    with pytest.raises(UserError, match="token"):
        hub.require_pushable(NAME)
    argv = ["push", trained, "ada/new"] if command == "push" else ["pull", NAME, "--output", tmp_path / "pulled"]
    expected = push_line if command == "push" else pull_line
    if expected is None:
        assert main([str(part) for part in argv]) == 0
        return
    line = error_line(argv, capfd)
    assert expected in line
    assert token is None or token not in line
    assert list(the_hub.repos) == [NAME]
    assert not (tmp_path / "pulled").exists()


PULL_FAULTS = [
    ("a 503 for the weights", "GET /stored", 503, 99, "the Hub is unavailable: try again later (HTTP 503)"),
    ("a reset in mid-body, once", "GET /stored", "cut", 1, "served"),
    ("a stalled body, once", "GET /stored", "stall", 1, "served"),
    ("a wrong content, once", "GET /stored", "corrupt", 1, "served"),
    ("rate limited, once", "GET /stored", 429, 1, "served"),
    ("resets in mid-body", "GET /stored", "reset", 99, "the connection to the Hub broke"),
    ("a wrong content", "GET /stored", "corrupt", 99, "arrived twice with another content than the Hub announced"),
    ("a wrong config", "GET .*config.json", "corrupt", 99, "arrived twice with another content"),
    ("500s", "resolve", 500, 99, "the Hub is unavailable"),
    ("403", "resolve", 403, 99, "the token may not do this"),
    ("401", "resolve", 401, 99, "token"),
    ("404", "resolve", 404, 99, "cannot get config.json of ada/birds"),
    ("rate limited", "resolve", 429, 99, "the Hub's rate limit is reached"),
]


@pytest.mark.parametrize(
    ("pattern", "kind", "times", "outcome"), [row[1:] for row in PULL_FAULTS], ids=[row[0] for row in PULL_FAULTS]
)
def test_faults_while_pulling(the_hub, trained, tmp_path, capfd, pattern, kind, times, outcome):
    push(trained, NAME)
    the_hub.fail(pattern, kind, times)
    target = tmp_path / "pulled"
    if outcome == "served":
        assert main(["pull", NAME, "--output", str(target)]) == 0
        assert torch.equal(logits(hub.load(target)), logits(hub.load(trained)))
    else:
        assert outcome in error_line(["pull", NAME, "--output", target], capfd)
        assert not target.exists()
        # neither is there anything in the cache that would load as if it were whole
        the_hub.faults.clear()
        the_hub.fail("", "reset")
        with pytest.raises((UserError, OSError, RuntimeError)):
            hub.load(f"hf-hub:{NAME}")
    assert not [path for path in tmp_path.iterdir() if "pulling" in path.name]
    the_hub.faults.clear()
    assert torch.equal(logits(hub.load(f"hf-hub:{NAME}")), logits(hub.load(trained)))


def test_a_copy_that_rots_in_the_cache_is_found_and_fetched_anew(the_hub, trained, capfd):
    push(trained, NAME)
    hub.load(f"hf-hub:{NAME}")
    path = Path(hub_client.fetch(NAME, ["model.safetensors"]))
    blob = path.resolve()
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    assert not hub_client.is_intact(path)
    assert torch.equal(logits(hub.load(f"hf-hub:{NAME}")), logits(hub.load(trained)))
    assert hub_client.is_intact(path)


def test_a_file_is_hashed_once_and_again_when_it_was_written_to(the_hub, trained, tmp_path, monkeypatch):
    hub_client_hash, hashed = hub_client.content_hash, []
    monkeypatch.setattr(
        hub_client, "content_hash", lambda path, **how: hashed.append(path.name) or hub_client_hash(path, **how)
    )
    push(trained, NAME)
    hub.load(f"hf-hub:{NAME}")
    assert len(hashed) == 2  # config and weights
    hub.load(f"hf-hub:{NAME}")
    assert len(hashed) == 2
    hub.pull(NAME, tmp_path / "pulled")
    assert len(hashed) == 5  # both again, and the card

    blob = Path(hub_client.fetch(NAME, ["model.safetensors"])).resolve()
    times = blob.stat()
    blob.write_bytes(_weights(trained)[:-1] + b"x")
    os.utime(blob, ns=(times.st_atime_ns, times.st_mtime_ns))
    hub.load(f"hf-hub:{NAME}")  # damage that the file system doesn't show is found by whoever verifies
    assert hub_client.fetch(NAME, ["model.safetensors"], verify=True).read_bytes() == _weights(trained)
    shutil.rmtree(tmp_path / "home" / "assets")
    (tmp_path / "home" / "assets").write_text("no folder can be made here")
    assert torch.equal(logits(hub.load(f"hf-hub:{NAME}")), logits(hub.load(trained)))


class Payload:
    """A pickle of this leaves a file behind when it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def forged(length=None, header=None, tail=b"\0" * 64):
    """A safetensors file with any header at all."""
    text = json.dumps(header if header is not None else {}).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + tail


def evil_weights(trace):
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    return {
        "pickle": pickle.dumps(Payload(trace)),
        "huge header": forged(length=2**62),
        "header beyond the end": forged(length=4096),
        "negative shape": forged(header={"head.weight": one | {"shape": [-4]}}),
        "offsets beyond the end": forged(header={"head.weight": one | {"data_offsets": [0, 2**40]}}),
        "offsets of another size": forged(header={"head.weight": one | {"shape": [5]}}),
        "overlapping tensors": forged(header={"head.weight": one, "head.bias": one}),
        "no such type": forged(header={"head.weight": one | {"dtype": "OBJECT"}}),
        "no mapping": forged(header=[1, 2]),
        "a type for text": forged(header={"head.weight": {"dtype": 1, "shape": "x", "data_offsets": {}}}),
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", [*evil_weights(""), "pickle beside it"])
@pytest.mark.parametrize("way", ["load", "pull", "folder"])
def test_malicious_weights_are_refused_and_nothing_runs(the_hub, trained, tmp_path, capfd, kind, way):
    trace = tmp_path / "trace"
    files = {"config.json": (trained / "config.json").read_bytes()}
    if kind == "pickle beside it":
        torch.save({"head.weight": Payload(trace)}, tmp_path / "evil.bin")
        files["pytorch_model.bin"] = (tmp_path / "evil.bin").read_bytes()
    else:
        files["model.safetensors"] = evil_weights(trace)[kind]
    the_hub.add(NAME, files)
    if way == "folder":
        (tmp_path / "folder").mkdir()
        for name, data in files.items():
            (tmp_path / "folder" / name).write_bytes(data)
    argv = {
        "load": ["predict", "--model", f"hf-hub:{NAME}", _photo(tmp_path)],
        "folder": ["predict", "--model", tmp_path / "folder", _photo(tmp_path)],
        "pull": ["pull", NAME, "--output", tmp_path / "pulled"],
    }[way]
    line = error_line(argv, capfd)
    if kind == "pickle beside it":
        assert {"pull": "has no model.safetensors"}.get(way, "asks for posix.mkdir: refused") in line
    else:
        assert "the weights file is damaged or incomplete" in line
    assert not trace.exists()
    assert not (tmp_path / "pulled").exists()
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()  # so the payload would have


def _photo(folder):
    from PIL import Image

    Image.new("RGB", (40, 40), "red").save(folder / "photo.png")
    return folder / "photo.png"


BAD_CONFIGS = [
    ({"architecture": "effzoo_vit_picco"}, "unknown architecture 'effzoo_vit_picco': did you mean 'effzoo_vit_pico'?"),
    ({"architecture": "somebodys_net"}, "unknown architecture 'somebodys_net'"),
    ({"architecture": ["effzoo_vit_pico"]}, "architecture is ['effzoo_vit_pico'], expected a name"),
    ({"num_classes": "3"}, "num_classes is '3', expected a whole number"),
    ({"num_classes": 4, "model_args": {"num_classes": 3}}, "num_classes is 4, in model_args 3"),
    ({"label_names": 3}, "label_names is 3, expected a list or mapping"),
    ({"label_names": {"first": "tit"}}, "label_names is {'first': 'tit'}, expected numbers of classes as its keys"),
    ({"model_args": {"pretrained_strict": False}}, "model_args may not hold 'pretrained_strict'"),
    ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "model_args may not hold 'checkpoint_path'"),
    ({"model_args": {"depht": 3}}, "the model takes no argument 'depht'"),
    ({"model_args": {"mixers": {"evil": [0]}}}, "evil"),
    ({"pretrained_cfg": {"crop_pct": "all"}}, "crop_pct is 'all', expected a number"),
    ({"pretrained_cfg": {"interpolation": 5}}, "interpolation is 5, expected a name"),
    ({"pretrained_cfg": {"classifier": {"a": 1}}}, "classifier is {'a': 1}, expected a name"),
    ({"pretrained_cfg": {"mean": [True, 1, 1]}}, "mean is [True, 1, 1], expected numbers of at least 0"),
    ({"pretrained_cfg": {"hf_hub_filename": "evil.bin"}}, "weights are read from model.safetensors only"),
    (
        {"pretrained_cfg": {"custom_load": "hf", "hf_hub_filename": "e.npz"}},
        "weights are read from model.safetensors only",
    ),
    ({"pretrained_cfg": {"state_dict": {"a": 1}}}, "weights are read from model.safetensors only"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=[str(row[0])[:40] for row in BAD_CONFIGS])
def test_malformed_configs_are_refused(the_hub, trained, tmp_path, capfd, changes, message):
    config = json.loads((trained / "config.json").read_text())
    config.update(changes)
    weights = (trained / "model.safetensors").read_bytes()
    the_hub.add(NAME, {"config.json": json.dumps(config).encode(), "model.safetensors": weights})
    assert message in error_line(["pull", NAME, "--output", tmp_path / "pulled"], capfd)
    assert message in error_line(["predict", "--model", f"hf-hub:{NAME}", _photo(tmp_path)], capfd)
    assert not (tmp_path / "pulled").exists()


def test_keys_of_a_newer_timm_do_not_keep_a_model_from_loading(the_hub, trained, tmp_path, capfd, caplog):
    """Nothing reads them, so they are passed over; those that this timm would stumble over are named."""
    config = json.loads((trained / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Model"}, "a_new_key": 1}
    config["pretrained_cfg"] |= {"crop_shape": "round", "mean": [0, 0, 0]}
    the_hub.add(NAME, {"config.json": json.dumps(config).encode(), "model.safetensors": _weights(trained)})
    expected = logits(hub.load(trained))
    assert main(["pull", NAME, "--output", str(tmp_path / "pulled")]) == 0
    assert [line for line in caplog.messages if "ignores crop_shape of pretrained_cfg" in line]
    for name in (f"hf-hub:{NAME}", tmp_path / "pulled"):
        loaded = hub.load(name)
        assert torch.equal(logits(loaded), expected)
        assert hub.label_names(loaded) == ("tit", "wren", "jay")
        assert loaded.pretrained_cfg["crop_pct"] == 0.9
        assert loaded.pretrained_cfg["mean"] == [0, 0, 0]
        other = hub.load(name, num_classes=5, img_size=None)
        assert torch.equal(other.blocks[3].mlp.fc1.weight, loaded.blocks[3].mlp.fc1.weight)
        assert hub.label_names(hub.load(hub.save(loaded, tmp_path / "again"))) == ("tit", "wren", "jay")


def _weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_weights_of_another_model_do_not_load(the_hub, trained, tmp_path, capfd):
    tensors = load((trained / "model.safetensors").read_bytes())
    del tensors["head.weight"]
    the_hub.add(NAME, {"config.json": (trained / "config.json").read_bytes(), "model.safetensors": save(tensors)})
    line = error_line(["pull", NAME, "--output", tmp_path / "pulled"], capfd)
    assert f"hf-hub:{NAME}: the weights don't fit the model: missing head.weight" in line
    with pytest.raises(UserError, match=r"missing head\.weight"):
        hub.load(f"hf-hub:{NAME}", num_classes=7)


def test_no_token_is_ever_written(the_hub, trained, tmp_path, capfd, caplog, monkeypatch):
    """Pushing, pulling, failing and a config that holds a token: none of it shows in output, logs, files or on the Hub."""
    caplog.set_level(logging.DEBUG)
    run = tmp_path / "run"
    hub.save(hub.load(trained), run / "best", extra={"top1": 1.0, "data": "birds"})
    (run / "config.yaml").write_text("model: {name: effzoo_vit_pico}\n")
    assert main(["push", str(run), NAME]) == 0
    assert main(["pull", NAME, "--output", str(tmp_path / "pulled")]) == 0
    the_hub.fail("PUT", 500, body={"error": f"what is {TOKEN} to me"})
    hub.save(timm.create_model("effzoo_vit_pico", num_classes=2), run / "best")
    assert main(["push", str(run), NAME]) == 2
    the_hub.faults.clear()
    use(monkeypatch, the_hub.endpoint, tmp_path / "home2", token=EXPIRED_TOKEN)
    assert main(["push", str(run), NAME]) == 2
    assert main(["pull", NAME, "--output", str(tmp_path / "pulled2")]) == 2
    output = capfd.readouterr()
    assert "POST" in caplog.text
    everything = [text.encode() for text in (output.out, output.err, caplog.text)]
    everything += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    everything += [
        data for repo in the_hub.repos.values() for files in repo.commits.values() for data in files.values()
    ]
    for token in (TOKEN, EXPIRED_TOKEN):
        assert not [text for text in everything if token.encode() in text]
    assert b"what is hf_*** to me" in output.err.encode()

    use(monkeypatch, the_hub.endpoint, tmp_path / "home3")
    for token in (TOKEN, READ_TOKEN):  # one's own, and any other
        (run / "config.yaml").write_text(f"model: {{name: effzoo_vit_pico, kwargs: {{key: {token}}}}}\n")
        line = error_line(["push", run, "ada/leak"], capfd)
        assert "training/config.yaml holds what looks like a token" in line
        assert token not in line
        assert "ada/leak" not in the_hub.repos


def test_fine_tuning_from_the_hub(the_hub, trained, tmp_path):
    """train.py starts from a pushed model as from any other, with a head for its own classes."""
    from effvit_zoo.tasks import Classification
    from effvit_zoo.training.config import load_config
    from effvit_zoo.training.prepare import build_model

    push(trained, NAME)
    (tmp_path / "c.yaml").write_text(f"model: {{name: 'hf-hub:{NAME}'}}\n")
    model = build_model(load_config(tmp_path / "c.yaml"), Classification(10))
    source = hub.load(trained)
    assert model.num_classes == 10
    assert torch.equal(model.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    tuned = hub.save(model, tmp_path / "tuned", label_names=[str(index) for index in range(10)])
    push(tuned, "ada/tuned")
    assert torch.equal(logits(hub.load("hf-hub:ada/tuned")), logits(model))


def test_registered_names_get_their_weights_checked_too(the_hub, tmp_path, monkeypatch, capfd):
    name = "effzoo_swiftformer_xs"
    model = timm.create_model(name)
    files = {"config.json": b"{}", "model.safetensors": save(dict(model.state_dict()))}
    repo = timm.models.get_pretrained_cfg(name).hf_hub_id
    the_hub.add(repo, files)
    assert torch.equal(logits(effvit_zoo.create_model(name, pretrained=True), (3, 64, 64)), logits(model, (3, 64, 64)))
    assert torch.equal(logits(hub.load(name, pretrained=True), (3, 64, 64)), logits(model, (3, 64, 64)))
    use(monkeypatch, the_hub.endpoint, tmp_path / "other")
    the_hub.fail("GET /stored", "corrupt")
    line = error_line(["predict", "--model", f"{name}.dist_in1k", _photo(tmp_path)], capfd)
    assert f"model.safetensors of {repo} arrived twice with another content than the Hub announced" in line


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_same_repository(the_hub, trained, tmp_path):
    """TimmWrapper and the image-classification pipeline, in a process of their own, agree with timm."""
    pytest.importorskip("transformers")
    push(trained, NAME)
    script = f"""
import effvit_zoo, json, timm, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

image = Image.open({str(_photo(tmp_path))!r})
model = AutoModelForImageClassification.from_pretrained("{NAME}").eval()
pixels = AutoImageProcessor.from_pretrained("{NAME}")(image, return_tensors="pt")["pixel_values"]
ours = timm.create_model("hf-hub:{NAME}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(ours))
with torch.inference_mode():
    theirs, expected = model(pixels).logits, ours(transform(image)[None])
answer = pipeline("image-classification", model="{NAME}")(image)
print(json.dumps([type(model).__name__, float((theirs - expected).abs().max()), answer, expected.softmax(1)[0].tolist()]))
"""
    environ = os.environ | environment(the_hub.endpoint, tmp_path / "transformers")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, check=False)
    assert result.returncode == 0, result.stderr
    kind, difference, answer, expected = json.loads(result.stdout.splitlines()[-1])
    assert kind == "TimmWrapperForImageClassification"
    assert difference == 0.0
    assert {entry["label"] for entry in answer} == {"tit", "wren", "jay"}
    best = ["tit", "wren", "jay"][expected.index(max(expected))]
    assert answer[0]["label"] == best
    assert answer[0]["score"] == pytest.approx(max(expected), abs=1e-6)


def test_hashes_are_those_of_the_hub(tmp_path):
    (tmp_path / "f").write_bytes(b"some text")
    assert hub_client.content_hash(tmp_path / "f") == sha256(b"some text")
    assert hub_client.content_hash(tmp_path / "f", git=True) == git_hash(b"some text")
    # what `git hash-object` prints
    assert git_hash(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_an_unreachable_hub_is_said_at_once(the_hub, trained, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "home")  # the discard port: nobody answers
    start = time.monotonic()
    assert "cannot reach http://127.0.0.1:9 for ada/birds" in error_line(["push", trained, NAME], capfd)
    assert "cannot reach http://127.0.0.1:9 for ada/birds" in error_line(["pull", NAME], capfd)
    assert time.monotonic() - start < 5


def test_nothing_of_the_machine_is_pushed(the_hub, tmp_path):
    """Absolute paths anywhere in what is recorded, also within sentences, are cut to their last part."""
    run = tmp_path / "home-of-ada" / "run"
    model = effvit_zoo.create_model("effzoo_vit_pico", num_classes=2)
    secret = f"{run}/start.pth"
    hub.save(model, run / "best", label_names=["a/b", "/c"], extra={"data": "photos", "note": f"from {secret}, twice"})
    (run / "config.yaml").write_text(f"model: {{name: '{secret}', kwargs: {{note: 'C:\\Users\\ada\\x'}}}}\n")
    (run / "summary.json").write_text(
        json.dumps({"data": str(run), "error": f"cannot open {secret}", "url": "https://a.b/c"})
    )
    (run / "validation.json").write_text(json.dumps([{"model": "best", "data": str(run), "top1": 1.0}]))
    effvit_zoo.push(run, "ada/private")
    files = the_hub.repos["ada/private"].files()
    for name, content in files.items():
        if not name.endswith(".safetensors"):
            assert b"home-of-ada" not in content, name
            assert b"Users" not in content, name
    assert json.loads(files["config.json"])["label_names"] == ["a/b", "/c"]
    assert json.loads(files["config.json"])["effvit_zoo"]["note"] == "from start.pth, twice"
    assert json.loads(files["training/summary.json"])["url"] == "https://a.b/c"


def test_pull_says_where_and_spares_a_checkout(the_hub, trained, tmp_path, monkeypatch, capsys):
    push(trained, NAME)
    capsys.readouterr()
    checkout = tmp_path / "project"
    (checkout / ".git").mkdir(parents=True)
    monkeypatch.chdir(checkout)
    assert main(["pull", NAME]) == 2
    assert "would be in the checkout" in capsys.readouterr().err
    assert [path.name for path in checkout.iterdir()] == [".git"]
    inside = Path(effvit_zoo.__file__).parent / "pulled"
    assert main(["pull", NAME, "--output", str(inside)]) == 2
    assert "inside the package" in capsys.readouterr().err
    assert main(["pull", NAME, "--output", "models/birds"]) == 0
    assert f"{checkout / 'models/birds'}: to be used as" in capsys.readouterr().out
