"""What `effzoo` says without torch: the generated files are the registry and the schema, and quick commands import nothing heavy."""

import json
import subprocess
import sys

import pytest
import timm
from runs import ROOT
from timm.models import get_arch_pretrained_cfgs, model_entrypoint

import effvit_zoo
from effvit_zoo.commands import _index, config, info

HEAVY = {"torch", "timm", "transformers", "matplotlib", "pydantic", "jinja2", "huggingface_hub", "numpy"}
QUICK = [
    *(
        ["--help"],
        ["--version"],
        ["list"],
        ["list", "--json"],
        ["info", "effzoo_vit_pico"],
        ["config"],
        ["config", "optim"],
    ),
    *(["completion", "bash"], ["train", "--help"], ["benchmark", "--help"], ["lst"], ["list", "--familly", "swin"]),
    *(["info", "effzoo_vit_pixo"], ["list", "--sort", "colour"]),
]
ONE_OF_EACH_FAMILY = ["edgenext_xx_small", "swiftformer_xs", "efficientvit_b0", "vit_pico"]


def test_the_index_has_the_names_and_weights_of_the_registry():
    """If this fails: python tools/index.py models"""
    known = _index.models()
    assert [*known] == timm.list_models("effzoo_*")
    for name, facts in known.items():
        assert facts["family"] == model_entrypoint(name).__module__.rpartition(".")[2]
        assert [entry["tag"] for entry in facts.get("weights", [])] == [
            cfg.tag for cfg in get_arch_pretrained_cfgs(name).values() if cfg.has_weights
        ]


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_the_index_has_the_facts(name):
    assert _index.models()[f"effzoo_{name}"] == json.loads(json.dumps(info.model_facts(f"effzoo_{name}")))


@pytest.mark.slow
def test_the_index_has_all_facts():
    """If this fails: python tools/index.py models"""
    assert _index.models() == json.loads(
        json.dumps({name: info.model_facts(name) for name in effvit_zoo.list_models()})
    )


def test_the_index_has_the_settings():
    """If this fails: python tools/index.py settings schema"""
    assert _index.settings() == config.run_settings()


def test_timms_names_are_read_from_its_files():
    assert _index.timm_names() == sorted(set(timm.list_models()) - set(_index.models()))


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT)


def test_quick_commands_import_nothing_heavy():
    code = f"""
import contextlib, io, sys
sys.argv = ["effzoo"]
from effvit_zoo.cli import main
for argv in {QUICK!r}:
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(argv)
    print(code, *sorted(set(sys.modules) & {HEAVY!r}))
"""
    done = python("-c", code)
    assert done.stdout.split("\n")[:-1] == ["0"] * 10 + ["2"] * 4
    assert done.stderr.count("\n") == 4


def test_the_package_as_a_module_imports_nothing_heavy():
    done = python("-X", "importtime", "-m", "effvit_zoo", "list", "swiftformer_s")
    assert done.stdout.splitlines()[-1].startswith("effzoo_swiftformer_s ")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "effvit_zoo.commands" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize(
    ("argv", "started", "expected"),
    [
        (["/venv/bin/effzoo", "list"], ["python", "/venv/bin/effzoo", "list"], True),
        (["-m", "list"], ["python", "-u", "-m", "effvit_zoo", "list"], True),
        (["-m", "train"], ["python", "-m", "my_package.train"], False),
        (["tools/effzoo.py"], ["python", "tools/effzoo.py"], False),
        (["train.py"], ["python", "train.py"], False),
        (["-c"], ["python", "-c", "import effvit_zoo"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
    ],
)
def test_only_the_command_line_imports_no_models(argv, started, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", started)
    assert effvit_zoo._is_command_line() == expected


@pytest.mark.slow
def test_a_command_that_needs_models_has_them():
    python("-c", "import sys; sys.argv = ['effzoo']; from effvit_zoo import hub; hub.resolve_name('effzoo_vit_pico')")
