"""`effzoo train photos/`: what it stands for, what it refuses, and the commands that it prints at its end."""

import json
import shlex

import pytest
from runs import SMALL, make_photos, summary

from effvit_zoo.commands import main
from effvit_zoo.training import run as training


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What the command asks the training for; nothing is trained."""
    calls = []

    def train(config, settings, output, resume, allow_change, name=None, seconds_before=0):
        calls.append((config.stem, dict(setting.split("=", 1) for setting in settings), name))
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/config.yaml").write_text("data: {root: photos}\n")
        return tmp_path / "run"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "train", train)
    return calls


def test_images_alone_are_enough(asked, tmp_path):
    (tmp_path / "my photos").mkdir()
    assert main(["train", "my photos/"]) == 0
    assert (
        main(["train", "my photos", "--model", "mobilenetv4_conv_small", "--minutes", "2.5", "--set", "train.seed=1"])
        == 0
    )
    assert main(["train"]) == 0
    root = json.dumps("my photos")
    assert asked == [
        ("finetune", {"data.root": json.dumps("my photos/")}, "my photos"),
        (
            "finetune",
            {"data.root": root, "model.name": '"mobilenetv4_conv_small"', "train.minutes": "2.5", "train.seed": "1"},
            "my photos",
        ),
        ("quickstart", {}, None),
    ]


def test_a_folder_wins_over_a_config_or_a_model_of_its_name(asked, tmp_path):
    for name in ("quickstart", "effzoo_vit_pico"):
        (tmp_path / name).mkdir()
        assert main(["train", name]) == 0
    assert [name for _, _, name in asked] == ["quickstart", "effzoo_vit_pico"]


@pytest.mark.parametrize(
    ("images", "name"),
    [("photos.csv", "photos"), ("builtin:fashion-mnist-mini", "fashion-mnist-mini"), ("hfds/ada/cats", "cats")],
)
def test_other_data_gives_the_run_its_name(asked, tmp_path, images, name):
    (tmp_path / "photos.csv").touch()
    assert main(["train", images]) == 0
    assert asked[0][2] == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["quickstart"],
            "quickstart is a config, and there is no such folder of images: effzoo train --config quickstart",
        ),
        (
            ["effzoo_vit_pico"],
            "effzoo_vit_pico is a model, expected a folder of images: effzoo train IMAGES --model effzoo_vit_pico",
        ),
        (["my.yaml"], "my.yaml is a config, expected a folder of images: effzoo train --config my.yaml"),
        (["photos", "--set", "data.root=other"], "IMAGES is photos and --set has data.root too"),
        (["--model", "a", "--set", "model.name=b"], "--model is a and --set has model.name too"),
        (["--minutes", "5", "--config", "tosa/quickstart"], "has several stages, expected train.minutes of one"),
    ],
)
def test_what_is_meant_otherwise_is_said_in_one_line(asked, capsys, arguments, message):
    assert main(["train", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not asked


@pytest.mark.parametrize(
    ("minutes", "message"),
    [("0", "got 0, expected"), ("-3", "got -3, expected"), ("soon", "got 'soon', expected")],
)
def test_minutes_that_are_no_time(tmp_path, monkeypatch, capsys, minutes, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"--minutes={minutes}"]) == 2
    assert f"config key train.minutes: {message}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_next_commands_can_be_pasted(tmp_path, monkeypatch, capsys):
    """In a folder of its own, whose name needs quotes; a second run takes the next free name."""
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "my photos", {"": {"blue": 20, "red": 20}})
    more = ["--set", *SMALL, "model.pretrained=false", "data.img_size=32", "optim.warmup_epochs=0"]
    command = ["train", "my photos/", "--minutes", "3", *(text for text in more if not text.startswith("model.name"))]
    assert main([*command, "--model", "effzoo_vit_pico"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert summary(tmp_path / "runs/my photos")["epochs"] == 1  # train.epochs is the largest number
    following = [shlex.split(line) for line in said[said.index("next:") + 1 :]]
    assert [words[:2] for words in following] == [
        ["effzoo", name] for name in ("validate", "predict", "export", "push")
    ]
    for words in following[:-1]:
        assert main(words[1:]) == 0
    assert len(list((tmp_path / "runs/my photos/drawn").rglob("*.png"))) == 40
    assert main([*command, "--model", "effzoo_vit_pico"]) == 0
    assert (tmp_path / "runs/my photos-2/best").is_dir()
