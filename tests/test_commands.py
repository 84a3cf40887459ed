"""How commands are found and completed, what stands behind an error's one line, and the train and validate commands' own duties."""

import json
import subprocess
import sys

import pytest
from runs import ROOT, make_photos

import effvit_zoo
import train
from effvit_zoo import hub
from effvit_zoo.cli import COMMANDS, main
from effvit_zoo.commands import completion, predict
from effvit_zoo.commands import train as training
from effvit_zoo.errors import UserError, run_command


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_file_of_its_name(name):
    module = COMMANDS[name].module
    assert module.__file__.endswith(f"commands/{name}.py")
    assert module.HELP[0].islower()
    assert not module.HELP.endswith(".")


@pytest.mark.slow
def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "effvit_zoo", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == f"effvit_zoo {effvit_zoo.__version__}\n"


def test_train_py_is_the_command(capsys):
    assert run_command(lambda: train.main(["--set", "train.epochs"])) == 2
    by_file = capsys.readouterr().err
    assert main(["train", "--set", "train.epochs"]) == 2
    assert capsys.readouterr().err == by_file
    assert "expected section.key=value" in by_file
    with pytest.raises(UserError, match="unrecognized arguments: --epochs"):
        train.main(["--epochs", "3"])


def test_the_help_of_train_lists_all_settings(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ("--resume", "optim.lr", "train.batch_size", "data.root"):
        assert name in text


def test_train_keeps_freed_memory_for_the_process(monkeypatch):
    set_up = []
    monkeypatch.setattr("effvit_zoo.measure.allocator.keep_freed_memory", lambda: set_up.append(True))
    monkeypatch.setattr(training, "_train", lambda args, started: None)
    train.main(["--config", "quickstart"])
    assert set_up == [True]


def failing(argv, capsys):
    assert main(argv) == 2
    return capsys.readouterr().err.splitlines()


def test_a_switch_shows_the_traceback_behind_any_error(monkeypatch, capsys):
    assert len(failing(["info", "test_vitt"], capsys)) == 1
    monkeypatch.setenv("EFFZOO_DEBUG", "0")
    assert len(failing(["info", "test_vitt"], capsys)) == 1
    monkeypatch.setenv("EFFZOO_DEBUG", "1")
    lines = failing(["info", "test_vitt"], capsys)
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: unknown model 'test_vitt'")
    assert len([line for line in lines if line.startswith("error: ")]) == 1


def test_the_switch_shows_a_defect_that_was_dressed_as_a_user_error(monkeypatch, capsys):
    def reader():
        try:
            None.read()
        except AttributeError as error:
            raise UserError(f"cannot open photos: {error}") from None

    assert run_command(reader) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("EFFZOO_DEBUG", "1")
    assert run_command(reader) == 2
    shown = capsys.readouterr().err
    assert "AttributeError: 'NoneType'" in shown
    assert "None.read()" in shown
    assert shown.splitlines()[-1].startswith("error: cannot open photos: ")


# accelerate's environment | whether too few processes were started
LAUNCHES = {
    "plain python": ({}, False),
    "accelerate, CPU, one process": ({"ACCELERATE_USE_CPU": "True"}, False),
    "accelerate, CPU, two processes": ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, True),
    "accelerate over mpirun": ({"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "29500", "PMI_SIZE": "2"}, False),
    "accelerate, GPUs": ({"ACCELERATE_USE_CPU": "False", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}, False),
    "torchrun": ({"MASTER_PORT": "29500", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, False),
}


@pytest.mark.parametrize("kind", LAUNCHES)
def test_a_launch_of_too_few_processes_is_refused(kind):
    environment, refused = LAUNCHES[kind]
    if refused:
        with pytest.raises(UserError, match=r"use `torchrun --nproc_per_node N train\.py"):
            training.require_processes(environment)
    else:
        training.require_processes(environment)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_on_cpus(processes, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command = [*launch, str(ROOT / "train.py"), "--config", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    refused = "error: accelerate launch --cpu started a single process" in done.stderr
    assert done.returncode != 0
    assert refused == (processes == 2)


COMPLETIONS = [
    ("", {"list", "train", "validate", "completion"}),
    ("pre", {"predict"}),
    ("info effzoo_swiftformer_x", {"effzoo_swiftformer_xs"}),
    ("info resnet50_g", {"resnet50_gn"}),
    ("predict --show", {"--show-tokens"}),
    ("predict photo.png --model effzoo_vit_pi", {"effzoo_vit_pico"}),
    ("validate --model effzoo_vit_pico effzoo_swiftformer_x", {"effzoo_swiftformer_xs"}),
    ("list --family swinn", set()),
    ("list --family swift", {"swiftformer"}),
    ("benchmark att", {"attention"}),
    ("benchmark attention --layo", {"--layout"}),
    ("weights l", {"list"}),
    ("train --allow", {"--allow-change"}),
    ("train --config pyproj", {"pyproject.toml"}),
    ("train --config finet", {"finetune"}),
    ("completion z", {"zsh"}),
]


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """What bash offers after each line of `COMPLETIONS`, as sets."""
    script = tmp_path_factory.mktemp("completion") / "effzoo"
    script.write_text(completion.script("bash"))
    calls = "\n".join(f"try {line}{' ' if not line else ''}" + (" ''" if not line else "") for line, _ in COMPLETIONS)
    text = f"""
        source {script}
        complete -p effzoo
        function=$(complete -p effzoo | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        try() {{
            COMP_WORDS=(effzoo "$@") COMP_CWORD=$# COMPREPLY=()
            $function effzoo "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
            echo "${{COMPREPLY[*]}}"
        }}
        {calls}
    """
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True, cwd=ROOT)
    registered, *offered = done.stdout.splitlines()
    assert registered.endswith(" effzoo")
    assert not done.stderr
    return [set(line.split()) for line in offered]


@pytest.mark.parametrize("case", range(len(COMPLETIONS)), ids=lambda case: COMPLETIONS[case][0] or "nothing")
def test_bash_completes(completed, case):
    line, expected = COMPLETIONS[case]
    assert completed[case] >= expected if not line else completed[case] == expected


def test_zsh_gets_the_same_names(capsys):
    assert main(["completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#compdef effzoo")
    assert "effzoo_swiftformer_xs" in text
    assert "--show-tokens" in text


def test_rows_of_any_task_are_printed(capsys):
    rows = [{"image": "a.png", "brightness": 0.5}, {"image": "b.png", "brightness": 0.25}]
    predict._print(rows, None)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        *(["image", "brightness"], ["a.png", "0.50"], ["b.png", "0.25"])
    ]
    assert predict._per_image(rows)[0] == {"image": "a.png", "rows": [{"brightness": 0.5}]}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A model folder, and images of its classes."""
    root = tmp_path_factory.mktemp("measured")
    photos = make_photos(root / "photos", {"": {"blue": 4, "red": 3}})
    model = effvit_zoo.create_model("effzoo_vit_pico", num_classes=2)
    return hub.save(model, root / "model", label_names=["blue", "red"]), photos


def validated(measured, *arguments):
    model, photos = measured
    command = ["validate", "--model", str(model), "--data", str(photos), "--workers", "0"]
    assert main([*command, *map(str, arguments)]) == 0


def test_one_model_is_printed_with_its_sections(measured, capsys):
    validated(measured)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Classes, weakest first"
    assert sorted([line.split()[0] for line in lines if line.split()[:1] in (["blue"], ["red"])]) == ["blue", "red"]
    assert lines[-3].startswith(f"{measured[1]} (all): 7 images, names ")
    assert lines[-2].split()[:2] == ["model", "top-1,"]
    assert lines[-1].split()[0] == str(measured[0])


def test_several_results_are_printed_as_a_summary(measured, capsys, tmp_path):
    validated(measured, "--img-size", 32, 48, "--results-file", tmp_path / "both.json")
    _, head, *lines = capsys.readouterr().out.splitlines()
    for title in ("model", "images", "input", "top-1, %", "95 % interval", "loss", "images/s", "split"):
        assert title in head
    assert len(lines) == 2
    rows = json.loads((tmp_path / "both.json").read_text())
    assert [row["input_size"] for row in rows] == [[3, 32, 32], [3, 48, 48]]
    assert f"{rows[1]['top1']:.2f}" in lines[1]
    low, high = rows[1]["top1_interval"]
    assert low < rows[1]["top1"] < high
    assert f"{low:.1f} to {high:.1f}" in lines[1]
