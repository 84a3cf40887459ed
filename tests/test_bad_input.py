"""Kinds of bad input to train.py, validate.py and the benchmarks: each is one line on stderr and exit code 2, and leaves no run folder."""

import json

import pytest
import torch
from PIL import Image
from runs import SMALL, make_photos

import effvit_zoo
import train
from effvit_zoo import hub
from effvit_zoo.cli import main as effzoo
from effvit_zoo.errors import run_command

CONFIGS = {
    "broken.yaml": "model: {name: [unclosed\n",
    "list.yaml": "- model\n- data\n",
    "twice.yaml": "model: {name: effzoo_vit_pico}\nmodel: {name: effzoo_vit_tiny}\n",
    "nameless.yaml": "data: {root: photos}\n",
    "section.yaml": "model: effzoo_vit_pico\n",
}

# what is set, or the arguments | what the line says; {name} stands for a file or folder that `places` makes
TRAINING = {
    "config is no YAML": (["--config", "{broken.yaml}"], "is not valid YAML"),
    "config is a list": (["--config", "{list.yaml}"], "expected sections with keys, got list"),
    "config has a key twice": (["--config", "{twice.yaml}"], "key 'model' is given twice"),
    "config names no model": (["--config", "{nameless.yaml}"], "config key model is required"),
    "section is a value": (["--config", "{section.yaml}"], "config section model: expected keys"),
    "config is a picture": (["--config", "{picture.png}"], "is not valid YAML"),
    "setting without a value": (["train.epochs"], "expected section.key=value"),
    "unknown section": (["trian.epochs=3"], "unknown config key 'trian': did you mean 'train'?"),
    "unknown key": (["optim.learning_rate=1"], "unknown config key 'optim.learning_rate'"),
    "words for a number": (["train.epochs=many"], "config key train.epochs: got 'many', expected int"),
    "a number for a switch": (["task.class_weights=3"], "config key task.class_weights: got 3, expected true, false or null"),
    "no epochs": (["train.epochs=0"], "train.epochs: got 0, expected int >= 1"),
    "negative batch": (["train.batch_size=-4"], "train.batch_size: got -4, expected int >= 1"),
    "negative rate": (["optim.lr=-1"], "optim.lr: got -1, expected float > 0"),
    "negative patience": (["train.patience=-1"], "train.patience: got -1, expected int >= 0"),
    "too much smoothing": (["task.smoothing=1.5"], "task.smoothing: got 1.5, expected float in [0, 1)"),
    "layer decay above 1": (["optim.layer_decay=1.5"], "optim.layer_decay: got 1.5, expected float in (0, 1]"),
    "a probability of 2": (["augment.hflip=2"], "augment.hflip: got 2, expected float in [0, 1]"),
    "no share for validation": (["data.val_fraction=0"], "data.val_fraction: got 0, expected float in (0, 1)"),
    "crop the wrong way round": (["augment.scale=[1.0, 0.1]"], "scale: got [1.0, 0.1], expected 0 < low <= high <= 1"),
    "unknown precision": (["train.precision=int8"], "expected one of no, bf16, fp16"),
    "unknown clip mode": (["optim.clip_mode=hard"], "expected one of norm, value, agc"),
    "two ways to accumulate": (["train.global_batch=64", "train.grad_accum=2"], "expected one of them"),
    "global batch that doesn't divide": (["train.global_batch=9"], "multiple of train.batch_size x processes = 8 x 1 = 8"),
    "no upload there": (["hub.push=not a repo"], "expected USER/NAME"),
    "tracker not installed": (["train.trackers=[clearml]"], "tracker clearml needs another package: pip install clearml"),
    "unknown model": (["model.name=effzoo_swiftfromer_s"], "unknown model 'effzoo_swiftfromer_s': did you mean"),
    "folder without a model": (["model.name={empty}"], "is not a model folder"),
    "damaged weights": (["model.name={damaged}"], "the weights file is damaged"),
    "no such argument of the model": (["model.kwargs.widht=3"], "the model takes no argument 'widht'"),
    "four channels": (["model.kwargs.in_chans=4"], "in_chans is 4, expected 3 (RGB) or 1 (grey)"),
    "size that doesn't fit": (["data.img_size=30"], "can't take images of 30 x 30 pixels"),
    "size of nothing": (["data.img_size=0"], "data.img_size: got 0, expected int >= 1"),
    "no such data": (["data.root={nowhere}"], "no such folder"),
    "data without images": (["data.root={empty}"], "no images in"),
    "loose images": (["data.root={loose}"], "put each class in a folder of its own"),
    "one class": (["data.root={one}"], "only one class"),
    "empty class": (["data.root={hollow}"], "class folders without images"),
    "classes differ": (["data.root={differ}"], "have different classes"),
    "one image a class": (["data.root={single}"], "has a single image"),
    "no such split": (["data.root={photos}", "data.val_split=holdout"], "no split 'holdout'"),
    "every image is damaged": (["data.root={rotten}"], "no readable image"),
    "unknown embedded set": (["data.root=builtin:mnist"], "unknown embedded data set"),
    "data is a text": (["data.root={words.txt}"], "expected a folder or a .tar"),
    "stream of unknown format": (["data.root=wds/{nowhere}"], "no such folder"),
    "unknown teacher": (["distill.teacher=resnet5000"], "unknown model 'resnet5000'"),
    "teacher of other classes": (["distill.teacher={seven}"], "the teacher knows 7 classes without their names"),
    "token without a second classifier": (["distill.teacher={two}", "distill.kind=token"], "has no classifier for the teacher"),
    "share of the teacher above 1": (["distill.alpha=2"], "distill.alpha: got 2, expected float in [0, 1]"),
    "resume from nothing": (["--resume", "{empty}"], "is not a run folder"),
    "output is a file": (["--output", "{words.txt}"], "is a file, expected a folder or nothing"),
    "unknown option": (["--epochs", "3"], "unrecognized arguments"),
}  # fmt: skip

VALIDATING = {
    "unknown model": (["--model", "effzoo_nothing"], "unknown model 'effzoo_nothing'"),
    "results in a format of no one": (["--model", "{two}", "--results-file", "{out}/results.xlsx"], "ends in .csv or .json"),
    "no batch": (["--model", "{two}", "--batch-size", "0"], "--batch-size: expected a whole number of at least 1, got '0'"),
    "negative size": (["--model", "{two}", "--img-size", "-3"], "--img-size: expected a whole number of at least 1, got '-3'"),
    "size that doesn't fit": (["--model", "{two}", "--img-size", "30"], "can't take images of 30 pixels"),
    "size below the smallest": (["--model", "{conv}", "--img-size", "8"], "needs images of at least 32 x 32 pixels, got 8 x 8"),
    "crop of nothing": (["--model", "{two}", "--crop-pct", "0"], "--crop-pct must lie in (0, 1]"),
    "more classes than the model": (["--model", "{two}", "--data", "builtin:fashion-mnist-mini"], "knows 2 classes, the data has 10"),
    "classes that the model doesn't know": (["--model", "{animals}"], "the model doesn't know 1 of the data's 2 classes"),
    "no exported file there": (["--model", "{out}/none.onnx"], "there is no file"),
    "damaged exported file": (["--model", "{cut.onnx}", "--like", "{two}"], "cannot open"),
    "damaged exported file alone": (["--model", "{cut.onnx}"], "cannot open"),
    "model without a classifier": (["--model", "{headless}"], "has no classifier to predict with"),
}  # fmt: skip


BENCHMARKING = {
    "unknown backbone": (["backbones", "--models", "nothing"], "unknown model 'nothing'"),
    "no thread": (["backbones", "--threads", "0"], "--threads: expected a whole number of at least 1, got '0'"),
    "image below the smallest": (["backbones", "--models", "edgenext_small", "--img-size", "8"], "can't take images of 8 x 8 pixels"),
    "image below a patch": (["backbones", "--models", "swin_tiny_patch4_window7_224", "--img-size", "2"], "of 2 pixels"),
    "no call": (["tosa", "--repeats", "0"], "--repeats: expected a whole number of at least 1, got '0'"),
    "no token": (["attention", "--tokens", "196", "0"], "--tokens: expected a whole number of at least 1, got '0'"),
    "not a ViT": (["tosa", "--model", "effzoo_swiftformer_pico"], "the model takes no argument 'img_size'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Files and folders by the names in the tables."""
    root = tmp_path_factory.mktemp("places")
    pair = {"blue": 12, "red": 12}
    for name, text in CONFIGS.items():
        (root / name).write_text(text)
    (root / "words.txt").write_text("no images")
    (root / "cut.onnx").write_bytes(b"not a graph")
    Image.new("RGB", (8, 8)).save(root / "picture.png")
    for name in ("empty", "hollow/blue", "out"):
        (root / name).mkdir(parents=True)
    make_photos(root / "photos", {"train": pair, "val": {"blue": 2, "red": 2}})
    make_photos(root / "one", {"": {"blue": 4}})
    make_photos(root / "hollow", {"": {"red": 4, "green": 4}})
    make_photos(root / "single", {"": {"red": 1, "green": 1}})
    make_photos(root / "differ", {"train": pair, "val": {"blue": 2, "green": 2}})
    make_photos(root / "rotten", {"train": {"blue": 4, "red": 4}, "val": {"blue": 2, "red": 2}})
    make_photos(root / "loose", {"": {"blue": 2}})
    for path in (root / "loose/blue").iterdir():
        path.rename(root / "loose" / path.name)
    (root / "loose/blue").rmdir()
    for path in (root / "rotten").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])

    def model(name, classes, labels=None, architecture="effzoo_vit_pico"):
        torch.manual_seed(0)
        built = effvit_zoo.create_model(architecture, num_classes=classes)
        return hub.save(built, root / name, label_names=labels)

    model("two", 2)
    model("conv", 2, architecture="effzoo_edgenext_xx_small")
    model("seven", 7)
    model("headless", 0)
    model("animals", 3, ["blue", "cat", "dog"])
    damaged = model("damaged", 2) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    json.loads((root / "two/config.json").read_text())
    return root


def filled(arguments, places):
    names = sorted((path.name for path in places.iterdir()), key=len, reverse=True)
    for name in (*names, "nowhere"):
        arguments = [text.replace(f"{{{name}}}", str(places / name)) for text in arguments]
    return arguments


def check_one_line(code, capsys, message):
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]


def test_there_are_forty():
    assert len(TRAINING) + len(VALIDATING) >= 40


@pytest.mark.parametrize("kind", TRAINING)
def test_training(kind, places, tmp_path, capsys):
    arguments, message = TRAINING[kind]
    arguments = filled(arguments, places)
    output = tmp_path / "run"
    config = tmp_path / "small.yaml"
    config.write_text("model: {name: effzoo_vit_pico}\n")
    command = ["--config", str(config)]
    if "--resume" not in arguments and "--output" not in arguments:
        command += ["--output", str(output)]
    settings = [] if arguments[0] == "--config" else [*SMALL, f"data.root={places / 'photos'}"]
    if arguments[0].startswith("--"):
        command += arguments
    else:
        settings += arguments
    code = run_command(lambda: train.main([*command, *(["--set", *settings] if settings else [])]))
    check_one_line(code, capsys, message)
    assert not (output / "summary.json").exists()


@pytest.mark.parametrize("kind", VALIDATING)
def test_validating(kind, places, capsys):
    arguments, message = VALIDATING[kind]
    arguments = filled(arguments, places)
    if "--data" not in arguments:
        arguments += ["--data", str(places / "photos")]
    check_one_line(effzoo(["validate", *arguments, "--workers", "0"]), capsys, message)


@pytest.mark.parametrize("kind", BENCHMARKING)
def test_benchmarking(kind, capsys):
    arguments, message = BENCHMARKING[kind]
    check_one_line(effzoo(["benchmark", *arguments]), capsys, message)
