"""Classes are matched by name: one rule, and what fine-tuning, teachers and validation make of it."""

import json
import unicodedata

import pytest
import timm
import torch
from runs import make_photos, train_small

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.cli import main as effzoo
from effvit_zoo.errors import UserError
from effvit_zoo.hub import class_order, known_names, match_classes
from effvit_zoo.tasks import task_of

PICO = "effzoo_vit_pico"


@pytest.mark.parametrize(
    ("wanted", "known", "kind", "order"),
    [
        (("a", "b"), [("a", "b")], "same", (0, 1)),
        (("a", "b"), [("b", "a")], "permuted", (1, 0)),
        (("c", "a"), [("a", "b", "c")], "subset", (2, 0)),
        (("a", "x"), [("a", "b")], "different", None),
        (("a", "b", "c"), [("a", "b")], "different", None),
        (("a", "b"), [], "unknown", None),
        (("a", "b"), [None], "unknown", None),
        (("a", "b"), [("0", "1")], "unknown", None),
        (("0", "1"), [("a", "b")], "unknown", None),
        (("0", "1"), [("0", "1")], "same", (0, 1)),
        (("crane", "b"), [("crane", "crane", "b")], "different", None),  # which of the two is meant isn't known
        (("tench",), [("n1", "n2"), ("goldfish", "tench")], "subset", (1,)),  # ids first, then words
    ],
)
def test_the_rule(wanted, known, kind, order):
    match = match_classes(wanted, *known)
    assert (match.kind, match.order) == (kind, order)


def test_accents_in_either_unicode_form_are_one_name():
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert match_classes((decomposed, "tea"), ("tea", composed)).order == (1, 0)


def test_other_names_of_the_same_number_are_refused_unless_asked_for():
    with pytest.raises(
        UserError, match=r"doesn't know 2 of the data's 2 classes, the first is 'Hund'.*--classes position"
    ):
        class_order(("Hund", "Katze"), [("cat", "dog")], 2, option="--classes position")
    order, note = class_order(("Hund", "Katze"), [("cat", "dog")], 2, by_position=True, option="")
    assert order == (0, 1)
    assert "by position" in note
    order, note = class_order(("Hund", "Katze"), [], 2, option="")
    assert order == (0, 1)
    assert note.endswith("compared by position (the model has no class names)")


# ImageNet's names


def test_a_number_of_classes_says_nothing():
    torch.manual_seed(0)
    for name in (PICO, "effzoo_vit_tiny"):  # without and with published weights of that size
        model = effvit_zoo.create_model(name, num_classes=1000)
        assert hub.class_names(model)[:2] == ("0", "1")
    assert hub.class_names(effvit_zoo.create_model("effzoo_vit_pico", num_classes=21841))[-1] == "21840"


def test_imagenet_by_the_tag_of_the_weights():
    for name, first in (
        ("effzoo_vit_tiny.fb_in1k", "n01440764"),
        ("swin_tiny_patch4_window7_224.ms_in22k", "n00004475"),
    ):
        cfg = timm.models.get_pretrained_cfg(name).to_dict()
        assert known_names(cfg)[0][0] == first
    cfg = timm.models.get_pretrained_cfg("effzoo_vit_tiny.fb_in1k").to_dict()
    _, words, firsts = known_names(cfg)
    assert (words[0], firsts[0]) == ("tench, Tinca tinca", "tench")
    assert match_classes(("n01443537", "n01440764"), *known_names(cfg)).order == (1, 0)  # folders of a part of ImageNet
    assert match_classes(("goldfish", "tench"), *known_names(cfg)).order == (1, 0)
    assert not known_names({**cfg, "num_classes": 21841})
    assert not known_names({**cfg, "tag": "birds_in1kilo"})


def test_names_of_another_number_are_told(tmp_path, caplog):
    folder = hub.save(effvit_zoo.create_model(PICO, num_classes=3), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_names": ["a", "b"]}))
    assert hub.class_names(hub.load(folder)) == ("0", "1", "2")
    assert "names 2 classes and the model has 3: the names are not used" in caplog.text


# fine-tuning: rows of the classifier


def tagged(folder, names, **kwargs):
    """A model whose classifier tells its rows apart."""
    model = effvit_zoo.create_model(kwargs.pop("name", PICO), num_classes=len(names), **kwargs)
    classifiers = model.get_classifier()
    for layer in classifiers if isinstance(classifiers, tuple) else (classifiers,):
        torch.nn.init.normal_(layer.weight)
        layer.bias.data = torch.arange(len(names)).float()
    return hub.save(model, folder, label_names=names)


@pytest.mark.parametrize("name", [PICO, "effzoo_swiftformer_pico"])  # one classifier, two of them
@pytest.mark.parametrize(
    ("wanted", "bias", "note"),
    [
        (("ant", "bee", "cat"), [0, 1, 2], "kept, the data has its classes"),
        (("cat", "ant", "bee"), [2, 0, 1], "in the order of the data's classes"),
        (("cat", "bee"), [2, 1], "the rows of the 2 classes of the data, of 3"),
        (("cat", "dog", "bee"), None, "new, the weights' has not 1 of the data's 3 classes, the first is 'dog'"),
        (("0", "1", "2"), None, r"new, the data name no classes (task.classes=position keeps the old one)"),
    ],
)
def test_rows_follow_the_names(name, wanted, bias, note, tmp_path):
    folder = tagged(tmp_path / "start", ("ant", "bee", "cat"), name=name)
    model, said, is_new = hub.load_for_classes(str(folder), len(wanted), wanted, pretrained=True)
    assert said.startswith("classifier: ")
    assert note in said
    assert is_new == (bias is None)
    source = hub.load(folder)
    if bias is None:
        assert model.head.bias.detach().eq(0).all()  # as the family initialises it
        assert model.head.weight.std() < 0.1
    else:
        assert model.head.bias.tolist() == bias
        assert torch.equal(model.head.weight, source.head.weight[bias])
        if name != PICO:
            assert torch.equal(model.head_dist.weight, source.head_dist.weight[bias])
    assert hub.label_names(model) == wanted
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith("head")}
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in rest.items())


def test_by_position_where_it_is_asked_for(tmp_path):
    folder = tagged(tmp_path / "start", ("ant", "bee", "cat"))
    model, said, _ = hub.load_for_classes(str(folder), 2, ("x", "y"), pretrained=True, by_position=True)
    assert model.head.bias.tolist() == [0, 1]
    assert "by position" in said


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"), {"": {"blue": 8, "red": 8}})


def test_the_start_of_a_run_says_what_becomes_of_the_classifier(photos, tmp_path, capsys):
    start = tagged(tmp_path / "start", ("red", "blue"))
    settings = [f"model.name={start}", f"data.root={photos}", "optim.lr=1e-12", "optim.weight_decay=0"]
    assert train_small(tmp_path / "run", *settings) == 0
    assert "classifier: kept, with its rows in the order of the data's classes" in capsys.readouterr().out
    model = hub.load(tmp_path / "run")
    assert hub.label_names(model) == ("blue", "red")
    torch.testing.assert_close(model.head.weight, hub.load(start).head.weight.flip(0), atol=1e-4, rtol=0)


def test_teachers_and_validation_compare_names(photos, tmp_path, capsys):
    other = tagged(tmp_path / "other", ("cat", "dog"))
    assert train_small(tmp_path / "run", f"data.root={photos}", f"distill.teacher={other}") == 2
    assert "the teacher doesn't know 2 of the data's 2 classes" in capsys.readouterr().err
    asked = [f"distill.teacher={other}", "distill.classes=position"]
    assert train_small(tmp_path / "run", f"data.root={photos}", *asked) == 0
    assert "classes of the data and of the teacher are compared by position" in capsys.readouterr().out
    command = ["validate", "--model", str(other), "--data", str(photos), "--workers", "0"]
    assert effzoo(command) == 2
    assert "the model doesn't know 2 of the data's 2 classes" in capsys.readouterr().err
    assert effzoo([*command, "--classes", "position"]) == 0
    assert "compared by position" in capsys.readouterr().err
    nameless = hub.save(effvit_zoo.create_model(PICO, num_classes=2), tmp_path / "nameless")
    assert effzoo([*command[:2], str(nameless), *command[3:]]) == 0
    assert "compared by position (the model has no class names)" in capsys.readouterr().err


# what random weights may not claim


def test_random_weights_claim_nothing(tmp_path):
    for make in (effvit_zoo.create_model, timm.create_model, hub.load):
        folder = hub.save(make("effzoo_vit_tiny"), tmp_path / "random")
        cfg = hub.read_config(folder)["pretrained_cfg"]
        assert not {"tag", "license", "hf_hub_id", "url"} & {key for key, value in cfg.items() if value is not None}
        assert cfg["paper_ids"] == "arXiv:2012.12877"  # of the architecture
        assert task_of(hub.load(folder)).labels is None
