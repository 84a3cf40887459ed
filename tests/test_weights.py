"""`effzoo weights`: the list agrees with the registry, and the check finds whatever isn't on the Hub as the configs say."""

import csv
import json

import pytest
import timm
from hub_server import sha256, use
from safetensors.torch import save
from test_push_pull import error_line

from effvit_zoo import hub
from effvit_zoo.cli import main
from effvit_zoo.hub import client as hub_client
from effvit_zoo.hub import index as published

TAG = "effzoo_swiftformer_xs.dist_in1k"
REPO = "timm/swiftformer_xs.dist_in1k"


@pytest.fixture(scope="module")
def weights():
    return save(
        {key: value.contiguous() for key, value in timm.create_model("effzoo_swiftformer_xs").state_dict().items()}
    )


def card(licence):
    return f"---\nlicense: {licence}\n---\n".encode()


def test_list_is_the_registry_with_its_sources(capsys):
    rows = published.published()
    assert [row["weights"] for row in rows] == timm.list_models("effzoo_*", pretrained=True)
    for row in rows:
        cfg = timm.models.get_pretrained_cfg(row["weights"])
        assert row["license"] == cfg.license
        assert row["from"] == (cfg.hf_hub_id or cfg.url)
        assert (row["top1"] is None) == (row["top1_source"] is None)
        assert row["top1"] is None or 65 < row["top1"] < 90
        assert row["top1_source"] in (None, "timm", "authors")
    one = next(row for row in rows if row["weights"] == TAG)
    model = timm.create_model("effzoo_swiftformer_xs")
    assert one["bytes"] == sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert one["top1"] == 75.6


def test_accuracies_are_of_weights_that_exist():
    with published.ACCURACIES.open(encoding="utf-8") as file:
        named = [row["weights"] for row in csv.DictReader(file)]
    assert len(named) == len(set(named))
    assert set(named) <= set(timm.list_models("effzoo_*", pretrained=True))


def test_list_command(capsys):
    assert main(["weights", "list", "swiftformer_xs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["weights", "top-1,", "%", "measured", "by", "licence", "MB", "from"]
    assert lines[1].split() == [TAG, "75.60", "timm", "apache-2.0", "13.9", REPO]
    assert main(["weights", "list", "*.usi_in1k", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["weights"] for row in rows] == ["effzoo_edgenext_base.usi_in1k", "effzoo_edgenext_small.usi_in1k"]
    assert main(["weights", "list", "effzoo_swiftfromer_s.dist_in1k"]) == 2
    assert "did you mean 'effzoo_swiftformer_s.dist_in1k'?" in capsys.readouterr().err
    assert main(["weights", "lost"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_check_of_what_is_as_it_should_be(the_hub, weights, capsys):
    the_hub.add(REPO, {"README.md": card("apache-2.0"), "config.json": b"{}", "model.safetensors": weights})
    assert main(["weights", "check", TAG, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    stored = timm.models.get_pretrained_cfg(TAG).hf_hub_id
    assert row == {
        "weights": TAG,
        "from": stored,
        "file": "model.safetensors",
        "bytes": len(weights),
        "sha256": sha256(weights),
        "license": "apache-2.0",
        "cached": None,
        "problems": [],
    }
    assert main(["weights", "check", TAG]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-3:] == ["apache-2.0", "-", "ok"]


def test_check_looks_at_the_copy_in_the_cache(the_hub, weights):
    files = {"README.md": card("apache-2.0"), "model.safetensors": weights}
    the_hub.add(REPO, files)
    path = hub_client.fetch(REPO, ["model.safetensors"])
    assert [row["cached"] for row in published.check(TAG)] == ["intact"]
    the_hub.add(REPO, files | {"model.safetensors": weights[:-1] + b"x"})
    assert [row["cached"] for row in published.check(TAG)] == ["another version"]
    path.resolve().write_bytes(weights[:-2] + b"yy")
    [row] = published.check(TAG)
    assert row["cached"] == "damaged"
    assert row["problems"] == ["the copy in the cache is damaged"]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (None, "it is not on the Hub"),
        ({"README.md": card("apache-2.0")}, "has no model.safetensors or pytorch_model.bin"),
        (
            {"README.md": card("cc-by-nc-4.0"), "model.safetensors": True},
            "licence is cc-by-nc-4.0, expected apache-2.0",
        ),
        ({"model.safetensors": True}, "licence is not stated, expected apache-2.0"),
        ({"README.md": card("apache-2.0"), "model.safetensors": b"half"}, "has 0.0 MB, expected about 13.9"),
    ],
)
def test_check_finds(the_hub, weights, capsys, files, problem):
    if files is not None:
        the_hub.add(REPO, {name: weights if data is True else data for name, data in files.items()})
    assert main(["weights", "check", "swiftformer_xs"]) == 2
    output = capsys.readouterr()
    assert problem in output.out
    assert output.err == f"error: 1 of 1 published weights are not as they should be: {TAG}\n"


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (500, "the Hub is unavailable"),
        (429, "the Hub's rate limit is reached"),
        ("reset", "the connection to the Hub"),
    ],
)
def test_a_fault_is_one_row_and_the_rest_is_checked(the_hub, weights, status, problem):
    the_hub.add(REPO, {"README.md": card("apache-2.0"), "model.safetensors": weights})
    the_hub.fail("swiftformer_s", status)
    rows = {row["weights"]: row["problems"] for row in published.check("effzoo_swiftformer_*s.*")}
    assert rows[TAG] == []
    assert problem in rows["effzoo_swiftformer_s.dist_in1k"][0]


def test_other_addresses_are_asked_too(the_hub, monkeypatch):
    """Weights that are no repository on the Hub but a file somewhere, e.g. a release on GitHub."""
    the_hub.add("bob/files", {"config.json": b"x" * 30_000_000})
    name = "effzoo_edgenext_small.in1k"
    cfg = timm.models.get_pretrained_cfg(name)
    monkeypatch.setattr(published, "_matching", lambda _: [(name, cfg)])
    for path, problems in {"config.json": [], "gone.pth": ["answers HTTP 404"]}.items():
        cfg.url = f"{the_hub.endpoint}/bob/files/resolve/main/{path}"
        [row] = published.check()
        assert row["problems"] == problems
        assert row["bytes"] == (None if problems else 30_000_000)


def test_without_a_network_it_is_one_line(the_hub, monkeypatch, tmp_path, capfd):
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    assert "cannot reach http://127.0.0.1:9 for the check of published weights" in error_line(
        ["weights", "check"], capfd
    )
    monkeypatch.setattr(hub_client.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in error_line(["weights", "check"], capfd)


def test_every_tag_is_checked_once_per_place(the_hub):
    places = [row["from"] for row in published.published("effzoo_*vit_tiny*")]
    asked = [row["from"] for row in published.check("effzoo_*vit_tiny*")]
    assert asked == ["timm/deit_tiny_patch16_224.fb_in1k"]
    assert places == asked * 2  # two models share it
    assert hub.resolve_name(TAG) == TAG
