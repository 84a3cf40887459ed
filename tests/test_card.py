"""Model cards: they say what was recorded and nothing else, the Hub's own reader understands them, and their script runs."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from hub_server import environment
from huggingface_hub import ModelCard
from PIL import Image
from runs import make_photos

from effvit_zoo import hub, push
from effvit_zoo.cli import main
from effvit_zoo.evaluation.prediction import predict
from effvit_zoo.hub import card
from effvit_zoo.tasks import card_facts

NAME = "ada/birds"


@pytest.fixture
def run(tmp_path):
    """A run folder as train.py leaves it, with numbers that appear nowhere else."""
    torch.manual_seed(0)
    folder = tmp_path / "runs" / "birds"
    hub.save(
        timm.create_model("effzoo_hydra_vit_pico", num_classes=3),
        folder / "best",
        label_names=["tit", "wren | troglodyte", "jay"],
        extra={"top1": 61.2345, "top5": 98.7654, "epoch": 4, "data": "photos/birds", "seed": 3},
    )
    config = {
        "model": {"name": "effzoo_hydra_vit_pico", "pretrained": False},
        "data": {"root": "photos/birds", "img_size": 32},
        "optim": {"name": "lamb", "lr": 0.00123},
        "train": {"epochs": 17, "seed": 3},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    summary = {
        "model": "effzoo_hydra_vit_pico",
        "data": "photos/birds",
        "top1": 61.2345,
        "top5": 98.7654,
        "val_images": 4321,
        "images_per_second": 765.4,
        "seconds": 987.6,
        "params": 227523,
        "macs": 13912064,
        "processes": 2,
        "device": "cpu",
        "processor": "Abacus 9000",
        "versions": {"python": "3.11.2", "torch": "2.14.1"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    for name in ("curves.png", "confusion_matrix.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def made(folder, records=None, **options):
    """The card of a folder with some records beside its config."""
    files = {"config.json": (folder / "config.json").read_bytes()}
    files |= {f"training/{name}": text.encode() for name, text in (records or {}).items()}
    return card.make(files, NAME, card_facts(json.loads(files["config.json"])), **options)


def pushed_card(the_hub, name=NAME):
    return the_hub.repos[name].files()["README.md"].decode()


def test_what_was_recorded_is_said(the_hub, run):
    row = {"model": str(run), "data": "/home/ada/elsewhere", "split": "test", "images": 1234, "input_size": [3, 32, 32]}
    larger = row | {"input_size": [3, 64, 64], "top1": 47.5, "top5": 81.25}
    other = row | {"model": str(run / "last"), "top1": 33.5}
    same = row | {"data": "/home/ada/photos/birds/", "split": "held-out part", "top1": 61.23451, "top5": 98.76541}
    fewer = {"images": 77, "top1": 44.5, "top5": 80.25}  # another folder of the name, by chance with the same accuracy
    (run / "validation.json").write_text(json.dumps([same, row | fewer, row | fewer | {"images": 1234}, larger, other]))
    push(run, NAME, license="cc-by-4.0")
    text = pushed_card(the_hub)
    read = ModelCard(text).data
    assert read.to_dict()["library_name"] == "timm"
    assert read.pipeline_tag == "image-classification"
    assert {"image-classification", "timm", "transformers", "effvit_zoo"} <= set(read.tags)
    assert read.license == "cc-by-4.0"
    assert read.base_model is None
    found = {(r.dataset_name, r.dataset_split, r.metric_name): r.metric_value for r in read.eval_results}
    assert found == {
        ("birds", "validation", "Top-1 accuracy, %"): 61.234,
        ("elsewhere", "test", "Top-1 accuracy, %"): 44.5,
    }
    assert "(elsewhere, test, 77 images)" in text
    for said in (
        *("61.23", "0.23 M", "0.014 G", "4,321", "988 s on 2 x Abacus 9000", "765 training images per second"),
        *("torch 2.14.1", "lr: 0.00123", "effzoo pull ada/birds && cd birds\n"),
        "torchrun --no-python --nproc_per_node 2 effzoo train --config training/config.yaml --set data.root=FOLDER\n",
        "Top-1 accuracy, % (elsewhere, test, 1,234 images) | 44.50",
        "Top-1 accuracy, % (elsewhere, test, 1,234 images, at 64 x 64) | 47.50",
        *("![Confusion matrix](training/confusion_matrix.png)", "(training/curves.png)", "3 x 32 x 32"),
        *("https://arxiv.org/abs/2209.07484", "tit, wren \\| troglodyte, jay", "import effvit_zoo  # registers"),
    ):
        assert said in text
    assert "33.5" not in text  # of last/, which was not pushed
    files = the_hub.repos[NAME].files()
    for target in re.findall(r"\]\((training/[^)]+)\)", text):
        assert target in files
    settings = re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1)
    assert yaml.safe_load(settings) == yaml.safe_load(files["training/config.yaml"])


@pytest.mark.parametrize(("classes", "names"), [(6, {"top1", "macro_f1"}), (7, {"top1", "macro_f1", "top5"})])
def test_top5_is_said_where_it_says_something(run, classes, names):
    config = json.loads((run / "best" / "config.json").read_text()) | {"num_classes": classes}
    assert set(card_facts(config).metrics) == names
    config["effvit_zoo"] |= {"macro_f1": 60.125}
    text = card.make({"config.json": json.dumps(config).encode()}, NAME, card_facts(config))
    assert ("98.77" in text) == ("top5" in names)
    assert "Macro-F1, % (birds, validation) | 60.1" in text


def test_what_was_not_recorded_is_not_said(the_hub, run, tmp_path):
    """A folder without a run: no metrics, no recipe, no licence that nobody stated."""
    lone = tmp_path / "lone"
    shutil.copytree(run / "best", lone)
    config = json.loads((lone / "config.json").read_text())
    config["effvit_zoo"] = {}
    (lone / "config.json").write_text(json.dumps(config))
    push(lone, NAME)
    text = pushed_card(the_hub)
    read = ModelCard(text).data
    assert read.eval_results is None
    assert read.license is None
    assert "No licence of the weights was stated." in text
    for absent in ("## Training", "Top-1", "MACs", "Parameters", "![", "seconds"):
        assert absent not in text
    assert "None" not in text.replace("[None]", "")  # which stands in the script


def test_records_that_are_none_are_passed_over(run):
    """Whatever stands in the files of somebody else's run, a card is made."""
    plain = made(run / "best")
    for content in (
        [],
        {},
        {"top1": "high", "params": None, "macs": "few", "versions": 3, "processes": "2", "seconds": {}},
        5,
    ):
        records = {name: json.dumps(content) for name in ("summary.json", "validation.json")}
        assert made(run / "best", records) == plain


@pytest.mark.parametrize(
    ("model", "noted", "base", "licence"),
    [
        ({"name": "hf-hub:bob/owls@v1"}, {}, "bob/owls", "apache-2.0"),
        ({"name": "local-dir:/home/ada/old"}, {}, None, "apache-2.0"),
        ({"name": "effzoo_vit_tiny", "pretrained": True}, {}, "timm/deit_tiny_patch16_224.fb_in1k", "apache-2.0"),
        ({"name": "effzoo_vit_tiny", "pretrained": False}, {}, None, None),
        ({}, {"converted_from": "deit.pth"}, None, "apache-2.0"),
    ],
)
def test_licence_and_base_model_follow_where_the_weights_come_from(run, model, noted, base, licence, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run / "best", folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "apache-2.0"
    config["effvit_zoo"] = noted
    (folder / "config.json").write_text(json.dumps(config))
    read = ModelCard(made(folder, {"config.yaml": yaml.safe_dump({"model": model} if model else {})})).data
    assert read.base_model == base
    assert read.license == licence


def test_known_data_sets_have_their_name_on_the_hub(run, tmp_path):
    config = json.loads((run / "best" / "config.json").read_text())
    for root, kind in {
        "builtin:fashion-mnist": "zalando-datasets/fashion_mnist",
        "builtin:fashion-mnist-mini": "zalando-datasets/fashion_mnist",
        "hfds/bob/eggs": "bob/eggs",
    }.items():
        for record, split in (
            (root, "validation"),
            ({"root": root, "val_split": "holdout", "val": {"images": 7}}, "holdout"),
        ):
            config["effvit_zoo"]["data"] = record
            (run / "best" / "config.json").write_text(json.dumps(config))
            read = ModelCard(made(run / "best")).data
            assert read.datasets == [kind]
            assert read.eval_results[0].dataset_type == kind
            assert read.eval_results[0].dataset_split == split


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("---\nlicense: mit\n---\n\n# Mine\n\nText.\n", "# Mine\n\nText."),
        ("# Mine", "# Mine"),
        ("---\nlicense: mit\n---\n", ""),
        (f"---\na: b\n---\n# Made\n\n{card.OWN_WORDS}\n\nMine.\n", "Mine."),
        ("", ""),
    ],
)
def test_own_words_are_kept_word_for_word(run, text, kept):
    assert card.own_words(text) == kept
    text = made(run / "best", own_words=kept)
    assert card.own_words(text) == kept
    assert text.count(card.OWN_WORDS) == 1


def script_in(text):
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert script.startswith("import effvit_zoo  # registers")
    return script


def lines_of(folder, photo):
    """What the script should print."""
    [expected] = predict(hub.load(folder), [photo])
    return [f"{100 * row['probability']:.1f} %  {row['label']}" for row in expected.rows]


@pytest.mark.slow
def test_the_usage_block_runs_as_a_script_and_predicts(the_hub, run, tmp_path):
    """Cut out of the card on the Hub and run in a process of its own, with nothing but a photograph beside it."""
    Image.new("RGB", (50, 40), (200, 30, 90)).save(tmp_path / "photo.jpg")
    push(run, NAME)
    result = subprocess.run(
        [sys.executable, "-c", script_in(pushed_card(the_hub))],
        cwd=tmp_path,
        env=os.environ | environment(the_hub.endpoint, tmp_path / "user", token=None),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == lines_of(run, tmp_path / "photo.jpg")


@pytest.mark.parametrize("kind", ["grey", "branch, without labels"])
def test_usage_blocks_of_other_kinds_run_too(the_hub, tmp_path, kind, monkeypatch, capsys):
    Image.new("RGB", (50, 40), (200, 30, 90)).save(tmp_path / "photo.jpg")
    if kind == "grey":
        model, labels, revision = timm.create_model("effzoo_vit_pico", num_classes=7, in_chans=1), list("abcdefg"), None
    else:
        model, labels, revision = timm.create_model("effzoo_vit_pico", num_classes=2), None, "dev"
    folder = hub.save(model, tmp_path / "model", label_names=labels)
    push(folder, NAME, revision=revision)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(script_in(the_hub.repos[NAME].files(revision or "main")["README.md"].decode()), {})
    assert capsys.readouterr().out.splitlines() == lines_of(folder, tmp_path / "photo.jpg")


@pytest.mark.parametrize("channels", [3, 1])
def test_the_usage_block_prepares_images_as_predict_does(the_hub, tmp_path, channels, monkeypatch, capsys):
    """Transparent, turned by EXIF, of 16 and of 32 bits: what `convert("RGB")` alone gets wrong."""
    torch.manual_seed(0)
    model = timm.create_model("effzoo_vit_pico", num_classes=7, in_chans=channels)
    torch.nn.init.normal_(model.head.weight)  # it starts at zero, and every image would be all classes alike
    folder = hub.save(model, tmp_path / "model", label_names=list("abcdefg"))
    push(folder, NAME)
    script = script_in(the_hub.repos[NAME].files()["README.md"].decode())
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    colours, greys = rng.integers(0, 255, (40, 60, 4), np.uint8), rng.integers(0, 50_000, (40, 60))
    turned = Image.Exif()
    turned[0x0112] = 6
    images = {
        "transparent": (Image.fromarray(colours), {"format": "PNG"}),
        "turned": (Image.fromarray(colours[..., :3]), {"format": "JPEG", "exif": turned}),
        "turned and transparent": (Image.fromarray(colours), {"format": "PNG", "exif": turned}),
        "palette": (Image.fromarray(colours[..., :3]).quantize(16), {"format": "PNG", "transparency": 3}),
        "16 bits": (Image.fromarray(greys.astype(np.uint16)), {"format": "PNG"}),
        "32 bits, dark": (Image.fromarray((greys // 500).astype(np.int32)), {"format": "TIFF"}),
        "32 bits": (Image.fromarray(greys.astype(np.int32) * 9), {"format": "TIFF"}),
        "floats": (Image.fromarray((greys / 60_000).astype(np.float32)), {"format": "TIFF"}),
        "CMYK": (Image.fromarray(colours[..., :3]).convert("CMYK"), {"format": "JPEG"}),
    }
    for kind, (image, options) in images.items():
        image.save("photo.jpg", **options)
        capsys.readouterr()
        exec(script, {})
        assert (kind, *capsys.readouterr().out.splitlines()) == (kind, *lines_of(folder, tmp_path / "photo.jpg"))


def test_the_command_in_the_card_runs(the_hub, run, tmp_path, capsys, monkeypatch):
    push(run, NAME)
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    command = re.search(r"`effzoo (predict [^`]+)`", pushed_card(the_hub)).group(1)
    assert main(command.split()) == 0
    assert "jay" in capsys.readouterr().out


def test_the_training_command_in_the_card_runs(the_hub, run, tmp_path, monkeypatch):
    """What a reader types: pull, then train with the recorded settings on a folder of their own."""
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"processes": 1}))
    push(run, NAME)
    make_photos(tmp_path / "photos", {"train": {"blue": 8, "red": 8}, "val": {"blue": 2, "red": 2}})
    monkeypatch.chdir(tmp_path)
    pull, train = re.search(
        r"```bash\n(effzoo pull .*) && cd birds\n(effzoo train .*)\n", pushed_card(the_hub)
    ).groups()
    assert main(pull.split()[1:]) == 0
    monkeypatch.chdir("birds")
    arguments = train.replace("FOLDER", "../photos").split()[1:]
    shorter = ["train.epochs=1", "train.trackers=[]", "train.batch_size=8", "data.num_workers=0"]
    assert main([*arguments, *shorter, "--output", "run"]) == 0
    assert json.loads((tmp_path / "birds/run/summary.json").read_text())["val_images"] == 4
