"""The `effzoo` command: what it prints, and that every mistake is one line and exit code 2."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.cli import COMMANDS, main
from effvit_zoo.errors import UserError
from effvit_zoo.measure import cost
from effvit_zoo.viz import fonts

NAME = "test_vit"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that says "red" or "blue": only the first pixels of its patches reach its head."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=3, img_size=32)
    path = tmp_path_factory.mktemp("models") / "run" / "best"
    return hub.save(
        model,
        path,
        label_names=["red", "blue", "green"],
        data_config={"input_size": (3, 32, 32)},
        extra={"top1": 61.5, "epoch": 3},
    )


@pytest.fixture
def photos(tmp_path):
    """Five images in two folders, and a file that is no image."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "more/a.png", "more/c.bmp", "more/d.webp"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n")
    return tmp_path / "photos"


def error_line(argv, capsys):
    """The one line that a failing command prints."""
    assert main(argv) == 2
    output = capsys.readouterr()
    assert not output.out
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


def printed(argv, capsys):
    assert main(argv) == 0
    output = capsys.readouterr()
    assert not output.err
    return output.out


def test_help_and_version(capsys):
    for argv in ([], ["--help"]):
        text = printed(argv, capsys)
        assert all(f"  {name} " in text for name in COMMANDS)
    assert printed(["--version"], capsys) == f"effvit_zoo {effvit_zoo.__version__}\n"
    for name in COMMANDS:
        assert f"usage: effzoo {name}" in printed([name, "--help"], capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lst"], "unknown command 'lst': did you mean 'list'?"),
        (["list", "--familly", "swin"], "--familly"),
        (["list", "--family", "swiftforme"], "unknown family 'swiftforme': did you mean 'swiftformer'?"),
        (
            ["list", "--max-params", "ten"],
            "--max-params: expected a number from 0 to 10000 (million parameters), got 'ten'",
        ),
        (["list", "--max-params", "nan"], "expected a number from 0 to 10000 (million parameters), got 'nan'"),
        (["list", "--max-params", "5e6"], "(million parameters), got '5e6'"),
        (["list", "--min-top1", "0.8"], "--min-top1: expected a number from 1 to 100 (percent), got '0.8'"),
        (["list", "--sort", "accuracy"], "unknown COLUMN 'accuracy': known: model, top1, params, macs, input, ms"),
        (["list", "--sort", "ms"], "the milliseconds are measured with --time only"),
        (["list", "--min-top", "80", "--family", "vit"], "unknown family 'vit'"),
        (["list", "--max-params", "1", "--min-top1", "85"], "none of the 67 models matches"),
        (["benchmark", "tosa", "--model", "nonsense"], "unknown model 'nonsense'"),
        (["benchmark", "tosa", "--runtimes", "onx"], "unknown runtime 'onx': did you mean 'onnx'?"),
        (["benchmark", "speed"], "unknown WHAT 'speed': known: models, attention, backbones, tosa"),
        (["benchmark", "models", NAME, "resnet5000"], "unknown model 'resnet5000'"),
        (["benchmark", "models", NAME, "--batch", "0"], "expected a whole number of at least 1, got '0'"),
        (["completion", "fish"], "unknown shell 'fish': did you mean 'zsh'?"),
        (["list", "swiftfromer_xs"], "unknown model 'swiftfromer_xs': did you mean"),
        (["list", "swiftformer", "--max-params", "0"], "models matches"),
        (["list", "--json", "--csv"], "not allowed with"),
        (["info"], "required: MODEL"),
        (["info", "test_vitt"], "did you mean 'test_vit"),
        (["info", "./nowhere"], "model folder nowhere is not there"),
        (["predict", "x.png"], "required: --model"),
        (["predict", "--model", NAME], "required: IMAGE"),
        (["predict", "--model", NAME, "x.png", "--topk", "0"], "expected a whole number of at least 1, got '0'"),
        (["predict", "--model", NAME, "x.png", "--batch-size", "many"], "got 'many'"),
        (["predict", "--model", NAME, "x.png", "--device", "gpu"], "device 'gpu' can't be used"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert message in error_line(argv, capsys)


@pytest.mark.slow
def test_module_and_exit_code_in_a_process_of_its_own():
    command = "import sys; from effvit_zoo.cli import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", command, "info", "no_such_net"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: unknown model 'no_such_net'")
    assert result.stderr.count("\n") == 1


def test_list_agrees_with_the_registry(capsys):
    rows = json.loads(printed(["list", "swiftformer", "--json"], capsys))
    assert [row["model"] for row in rows] == effvit_zoo.list_models("*swiftformer*")
    row = rows[-1]
    assert row["params"] == sum(p.numel() for p in timm.create_model(row["model"]).parameters())
    assert row["family"] == "swiftformer"
    assert row["input_size"] == [3, 224, 224]


def test_list_filters(capsys):
    rows = list(csv.DictReader(io.StringIO(printed(["list", "swiftformer", "--csv"], capsys))))
    assert [row["model"] for row in rows] == effvit_zoo.list_models("*swiftformer*")
    small = json.loads(printed(["list", "swiftformer", "--max-params", "6.5", "--max-macs", "1.01", "--json"], capsys))
    assert [row["model"] for row in small] == [
        row["model"] for row in rows if int(row["params"]) <= 6.5e6 and int(row["macs"]) <= 1.01e9
    ]
    family = json.loads(printed(["list", "--family", "swiftformer", "--json"], capsys))
    assert family
    assert {row["family"] for row in family} == {"swiftformer"}
    patterns = json.loads(printed(["list", "effzoo_*", "swift", "*r_s", "--json"], capsys))
    assert [row["model"] for row in patterns] == ["effzoo_swiftformer_s"]
    trained = json.loads(printed(["list", "swiftformer", "--pretrained", "--json"], capsys))
    assert all(row["weights"] for row in trained)
    good = json.loads(printed(["list", "--max-params", "10", "--min-top1", "79", "--sort", "top1", "--json"], capsys))
    assert [row["model"] for row in good][:1] == ["effzoo_edgenext_small"]
    assert [row["top1"] for row in good] == sorted((row["top1"] for row in good), reverse=True)
    assert min(row["top1"] for row in good) >= 79
    assert max(row["params"] for row in good) <= 10e6


def test_the_best_come_first_and_the_unknown_last(capsys):
    by_top1 = [row["top1"] for row in json.loads(printed(["list", "--sort", "top1", "--json"], capsys))]
    known = [value for value in by_top1 if value is not None]
    assert by_top1 == sorted(known, reverse=True) + [None] * (len(by_top1) - len(known))
    for column, key in (("params", "params"), ("macs", "macs"), ("input", "input_size"), ("model", "model")):
        values = [row[key] for row in json.loads(printed(["list", "--sort", column, "--json"], capsys))]
        assert values == sorted(values)


def test_list_measures_times_here(capsys):
    assert main(["list", "vit_pico", "edgenext_xx_small"]) == 2  # both filters must match
    assert "none of the 67 models" in capsys.readouterr().err
    [row] = json.loads(printed(["list", "effzoo_vit_pico", "--time", "--sort", "ms", "--json"], capsys))
    assert 0 < row["milliseconds"] < 5000
    head, line = printed(["list", "effzoo_vit_pico", "--time"], capsys).splitlines()
    assert head.split()[-2:] == ["ms", "weights"]
    assert line.split()[-1] == "none"


def test_any_model_is_timed(folder, capsys, tmp_path):
    names = ["effzoo_vit_pico", NAME, str(folder.parent)]
    argv = ["benchmark", "models", *names, "--img-size", "32", "--batch-sizes", "1", "2", "--repeats", "2"]
    text = printed([*argv, "--output", str(tmp_path / "rows.json")], capsys)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["model"], row["batch"]) for row in rows] == [(name, batch) for batch in (1, 2) for name in names]
    assert all(row["input_size"] == [3, 32, 32] and row["milliseconds"] > 0 for row in rows)
    assert rows[4]["images_per_second"] == pytest.approx(2000 / rows[4]["milliseconds"])
    assert rows[1]["params"] == 365096  # position embeddings of the smaller image
    assert all(name in text for name in names)
    assert "can't take images of shape 1 x 3 x 30 x 30: " in error_line(
        ["benchmark", "models", names[0], "--img-size", "30"], capsys
    )


def test_list_as_text(capsys, tmp_path):
    text = printed(["list", "effzoo_swiftformer_xs"], capsys)
    assert [line.split()[0] for line in text.splitlines()] == ["model", "effzoo_swiftformer_xs"]
    assert printed(["list", "effzoo_swiftformer_xs", "--output", str(tmp_path / "a" / "list.txt")], capsys) == ""
    assert (tmp_path / "a" / "list.txt").read_text() == text


def test_macs_follow_the_definition():
    """A convolution of k x k x Cin x Cout over H x W outputs, matrix products, and attention's two."""
    assert cost.count_macs(cost.skeleton(NAME)) == cost.count_macs(timm.create_model(NAME))
    model = timm.create_model(NAME, num_classes=10, img_size=64).train()
    tokens, dim, hidden, depth = 4 * 4 + 1, 64, 192, len(model.blocks)
    attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    expected = 16 * dim * 3 * 16 * 16 + depth * (attention + 2 * tokens * dim * hidden) + 10 * dim
    assert cost.count_macs(model) == expected
    assert all(module.training for module in model.modules())


def test_info_of_a_name_and_of_a_run_folder(folder, capsys):
    facts = json.loads(printed(["info", NAME, "--json"], capsys))
    assert (facts["input_size"], facts["num_classes"], facts["params"]) == ([3, 160, 160], 1000, 371240)
    assert facts["weights"][0]["tag"] == "r160_in1k"
    assert "measured" not in facts
    facts = json.loads(printed(["info", str(folder.parent), "--json"], capsys))
    assert facts["architecture"] == NAME
    assert facts["labels"] == ["red", "blue", "green"]
    assert facts["measured"] == {"top1": 61.5, "epoch": 3}
    text = printed(["info", str(folder.parent)], capsys)
    assert "red, blue, green" in text
    assert "top1: 61.5" in text


def test_predict_is_what_the_model_says(folder, photos, capsys):
    rows = json.loads(printed(["predict", "--model", str(folder), str(photos / "more"), "--json"], capsys))
    assert [row["image"] for row in rows] == [str(photos / "more" / name) for name in ("a.png", "c.bmp", "d.webp")]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        expected = model(transform(Image.open(photos / "more" / "a.png"))[None]).softmax(1)[0]
    classes = rows[0]["classes"]
    assert [entry["index"] for entry in classes] == expected.argsort(descending=True).tolist()
    assert [entry["label"] for entry in classes] == [("red", "blue", "green")[entry["index"]] for entry in classes]
    assert [entry["probability"] for entry in classes] == pytest.approx(expected.sort(descending=True).values.tolist())


def test_predict_skips_what_it_cannot_read(folder, photos, capsys):
    argv = ["predict", "--model", str(folder), str(photos), str(photos / "gone.png"), "--csv", "--topk", "1"]
    assert main([*argv, "--batch-size", "2"]) == 0
    output = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(output.out)))
    assert len(rows) == 5
    assert {row["rank"] for row in rows} == {"1"}
    skipped = output.err.splitlines()
    assert len(skipped) == 2
    assert "gone.png: there is no such file" in skipped[0]
    assert "broken.png: " in skipped[1]


def test_predict_with_nothing_to_read(folder, photos, capsys):
    assert main(["predict", "--model", str(folder), str(photos / "broken.png")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("skipped: cannot read image ")
    assert lines[1:] == ["error: none of the 1 images could be read"]
    assert main(["predict", "--model", str(folder), "gone.png"]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == ["error: there is no image to predict"]


def test_predict_says_once_where_no_font_has_a_name(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fonts, "findSystemFonts", list)
    monkeypatch.setattr(fonts, "_found", {})
    model = effvit_zoo.create_model("effzoo_vit_pico", num_classes=2)
    hub.save(model, tmp_path / "model", label_names=("猫", "dog"))
    argv = ["predict", "--model", str(tmp_path / "model"), str(photos / "a.png"), "--draw", str(tmp_path / "drawn")]
    assert main([*argv, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("note: no installed font can draw 1 of the 2 class names") == 1
    assert "0 is 猫" in printed.err
    assert "猫" in printed.out


def test_predict_draws_every_image_once(folder, photos, tmp_path, capsys):
    drawn = tmp_path / "drawn"
    argv = ["predict", "--model", str(folder), str(photos / "more"), str(photos / "a.png"), "--draw", str(drawn)]
    assert main(argv) == 0
    names = sorted(path.name for path in drawn.iterdir())
    assert names == ["a-2.png", "a.png", "c.png", "d.png"]
    assert all(Image.open(drawn / name).width >= 320 for name in names)
    assert "is a file, expected a folder" in error_line([*argv[:-1], str(photos / "a.png")], capsys_cleared(capsys))


def capsys_cleared(capsys):
    capsys.readouterr()
    return capsys


def test_a_file_named_twice_is_predicted_once(folder, photos, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    rows = json.loads(
        printed(["predict", "--model", str(folder), "a.png", "./a.png", "more", "more/c.bmp", "--json"], capsys)
    )
    assert [row["image"] for row in rows] == ["a.png", "more/a.png", "more/c.bmp", "more/d.webp"]
    assert all(len(row["classes"]) == 3 for row in rows)


def test_drawing_beside_the_images_does_not_overwrite_them(folder, photos, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    before = (photos / "a.png").read_bytes()
    printed(["predict", "--model", str(folder), "a.png", "b.jpg", "--draw", "."], capsys)
    assert (photos / "a.png").read_bytes() == before
    assert Image.open(photos / "a-2.png").width >= 320
    assert Image.open(photos / "b.png").width >= 320


def test_names_that_no_terminal_shows(folder, tmp_path, capsys):
    """Not UTF-8, of two lines, with an escape sequence, in brackets."""
    names = [b"caf\xe9.png", b"two\nlines.png", b"\x1b[31mred.png", b"[bold]:cat:.png", "\u732b.png".encode()]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            Image.new("RGB", (8, 8)).save(file, format="PNG")
    text = printed(
        ["predict", "--model", str(folder), str(tmp_path), "--topk", "1", "--draw", str(tmp_path / "drawn")], capsys
    )
    assert len(text.splitlines()) == 6
    for shown in ("caf\\udce9.png", "two\\nlines.png", "\\x1b[31mred.png", "[bold]:cat:.png", "\u732b.png"):
        assert shown in text
    shutil.rmtree(tmp_path / "drawn")
    target = tmp_path / "out.json"
    printed(["predict", "--model", str(folder), str(tmp_path), "--json", "--output", str(target)], capsys)
    found = [os.fsencode(os.path.basename(row["image"])) for row in json.loads(target.read_text())]
    assert sorted(found) == sorted(names)


def test_predict_in_python_takes_images_of_every_kind(folder, photos):
    path = photos / "more" / "a.png"
    image = Image.open(path).convert("RGB")
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    sixteen = (pixels.astype(np.uint16) * 257, pixels / 255)
    given = [path, str(path), image, pixels, tensor, tensor.float() / 255, *sixteen, np.stack([pixels, pixels])]
    found = effvit_zoo.predict(str(folder), given, topk=2)
    assert [one.image for one in found] == [path, path, *[None] * 8]
    assert all(len(one.rows) == 2 and one.rows == found[0].rows for one in found)
    assert found[0].rows[0]["label"] in ("red", "blue", "green")
    [alone] = effvit_zoo.predict(hub.load(folder), image, topk=2)
    assert alone.rows == found[0].rows
    assert [one.image.name for one in effvit_zoo.predict(str(folder), photos / "more")] == ["a.png", "c.bmp", "d.webp"]
    skipped = []
    wrong = [
        torch.randn(3, 8, 8),
        np.zeros((8, 8, 2), np.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        photos / "none.png",
    ]
    assert effvit_zoo.predict(str(folder), wrong, on_bad=skipped.append) == []
    assert "there is no such file" in str(skipped[0])
    for error, said in zip(skipped[1:], ("floats from 0 to 1", r"got (8, 8, 2)", r"got (8, 8, 3)"), strict=True):
        assert said in str(error)
    with pytest.raises(UserError, match="expected images"):
        effvit_zoo.predict(str(folder), 3)


def test_predict_in_grey_and_without_labels(tmp_path, photos, capsys):
    folder = hub.save(timm.create_model(NAME, num_classes=4, in_chans=1, img_size=32), tmp_path / "grey")
    rows = json.loads(printed(["predict", "--model", str(folder), str(photos / "a.png"), "--json"], capsys))
    assert sorted(entry["label"] for entry in rows[0]["classes"]) == ["0", "1", "2", "3"]


def test_imagenet_names_for_a_head_of_its_size(tmp_path, photos, capsys):
    folder = hub.save(timm.create_model(NAME), tmp_path / "imagenet")
    rows = json.loads(printed(["predict", "--model", str(folder), str(photos / "a.png"), "--json"], capsys))
    names = timm.data.ImageNetInfo("imagenet-1k").label_descriptions()
    assert all(entry["label"] == names[entry["index"]] for entry in rows[0]["classes"])


def test_models_without_a_classifier_cannot_predict(tmp_path, photos, capsys):
    folder = hub.save(timm.create_model(NAME, num_classes=0), tmp_path / "headless")
    line = error_line(["predict", "--model", str(folder), str(photos / "a.png")], capsys)
    assert "no classifier to predict with" in line
