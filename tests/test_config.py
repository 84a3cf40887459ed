"""The strict config loader: what is written is what runs, and every error is one line that names its place."""

import argparse
import dataclasses
import json
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field
from runs import ROOT

from effvit_zoo import config as strict
from effvit_zoo import tasks
from effvit_zoo.commands import config as command
from effvit_zoo.errors import UserError
from effvit_zoo.tasks.classification import ClassificationConfig
from effvit_zoo.tasks.contract import Augment
from effvit_zoo.training.config import CONFIGS, ModelConfig, RunConfig, find_config, load_config


@strict.section
class Brightness:
    """A kind of task that only this file knows."""

    kind: Literal["brightness"] = "brightness"
    """Kind."""
    gamma: Annotated[float, Field(gt=0)] = 2.2
    """Exponent."""


@pytest.fixture
def brightness(monkeypatch):
    monkeypatch.setitem(
        tasks.TASKS, "brightness", type("BrightnessTask", (), {"Config": Brightness, "Augment": Augment})
    )


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_values_arrive_with_their_types(written):
    path = written("model: {name: resnet18}\noptim: {lr: 1e-3, betas: [0.9, 0.95]}\ndata: {img_size: [32, 48]}\n")
    config = load_config(path, ["train.epochs=3", "train.ema_decay=0.99", "model.kwargs.drop_path_rate=1e-1"])
    assert config.optim.lr == 1e-3
    assert config.optim.betas == (0.9, 0.95)
    assert config.data.img_size == (32, 48)
    assert (config.train.epochs, config.train.ema_decay) == (3, 0.99)
    assert config.model.kwargs == {"drop_path_rate": 0.1}
    assert type(config.model.kwargs["drop_path_rate"]) is float


@pytest.mark.parametrize(
    "typed", ["3", "1e3", "007", "2024-01-01", "on", "no", "0x1F", "1_000", "1.50", "12:30", "text"]
)
def test_text_settings_keep_what_was_typed(written, typed):
    text = f"model: {{name: {typed}}}\ndata: {{root: {typed}}}\ndistill: {{teacher: {typed}}}\n"
    for config in (load_config(written(text)), load_config(written("model: {name: a}"), [f"model.name={typed}"])):
        assert config.model.name == typed
        assert type(config.model.name) is str
        assert load_config(written(strict.dump(config))) == config
    assert load_config(written(text)).distill.teacher == typed


def test_null_is_null_for_optional_text(written):
    config = load_config(written("model: {name: a}\naugment: {auto_augment: rand-m9}"), ["augment.auto_augment=null"])
    assert config.augment.auto_augment is None


def test_liberties(written):
    """An int is a float, text in a plain mapping may hold a float or come as a number, and `no` is a choice."""
    config = load_config(
        written("model: {name: a}\noptim: {lr: 1}\ntrain: {precision: no, deterministic: on, epochs: 0x10}")
    )
    assert (config.optim.lr, type(config.optim.lr)) == (1.0, float)
    assert (config.train.precision, config.train.deterministic, config.train.epochs) == ("no", True, 16)
    content = {
        "model": {"name": 18},
        "optim": {"lr": "1e-3"},
        "train": {"precision": False},
        "augment": {"sizes": [32, 64]},
    }
    config = strict.parse(RunConfig, content)
    assert (config.model.name, config.optim.lr, config.train.precision, config.augment.sizes) == (
        "18",
        1e-3,
        "no",
        (32, 64),
    )


def test_free_values_and_keys(written):
    config = load_config(
        written("model:\n  name: a\n  kwargs: {a: [1, on, 'x', 1e-2], on: {b: 3}, n: null, d: 2024-01-01}\n")
    )
    assert config.model.kwargs == {"a": [1, True, "x", 0.01], "on": {"b": 3}, "n": None, "d": "2024-01-01"}
    assert load_config(written(strict.dump(config))) == config


def test_values_given_in_code_stay_what_they_are():
    config = RunConfig(model=ModelConfig(name="a", kwargs={"depths": (1, 2)}), task=ClassificationConfig(loss="bce"))
    assert config.model.kwargs == {"depths": (1, 2)}
    assert config.task.loss == "bce"
    with pytest.raises(ValueError, match="smoothing"):
        dataclasses.replace(config.task, smoothing=1)


def test_merge_keys(written):
    text = "model: {name: a}\noptim: &base {lr: 0.1}\ndistill: {teacher_kwargs: {<<: *base, x: 1}}"
    assert load_config(written(text)).distill.teacher_kwargs == {"lr": 0.1, "x": 1}


def test_dump_and_parse_are_inverse(written, tmp_path):
    path = written("model: {name: a, kwargs: {b: [1, 2], c: '1e3'}}\naugment: {scale: [0.5, 1]}\n")
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(strict.dump(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert strict.parse(RunConfig, strict.as_dict(config)) == config
    assert yaml.safe_load(strict.dump(config))["task"]["kind"] == "classification"


def test_what_was_read_can_be_dumped_by_yaml(written):
    assert yaml.safe_load(yaml.safe_dump(strict.read_yaml(written("a: {b: 3, c: on}")))) == {"a": {"b": 3, "c": True}}


def test_changed_keys_are_dotted():
    before = strict.parse(RunConfig, {"model": {"name": "a"}})
    after = strict.parse(
        RunConfig, {"model": {"name": "a", "kwargs": {"x": 1}}, "train": {"seed": 1}, "augment": {"hflip": 0}}
    )
    assert strict.changed_keys(before, after) == ["augment.hflip", "model.kwargs", "model.kwargs.x", "train.seed"]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("model: {name: a}\ntrain: {epoch: 3}", [], "unknown config key 'train.epoch': did you mean 'train.epochs'?"),
        ("model: {name: a}\ntrian: {epochs: 3}", [], "unknown config key 'trian': did you mean 'train'?"),
        ("modle: {name: a}", [], "unknown config key 'modle': did you mean 'model'?"),
        ("model: {name: a}\ntask: {hflip: 0}", [], "unknown config key 'task.hflip': did you mean 'augment.hflip'?"),
        (
            "model: {name: a}",
            ["train.smoothing=0.1"],
            "unknown config key 'train.smoothing': did you mean 'task.smoothing'?",
        ),
        ("model: {name: a}", ["task.smooth=1"], "unknown config key 'task.smooth': did you mean 'task.smoothing'?"),
        (
            "model: {name: a}",
            ["augment.hflop=1"],
            "unknown config key 'augment.hflop': did you mean 'augment.hflip'?",
        ),
        (
            "model: {name: a}",
            ["task.kind=classifcation"],
            "unknown task 'classifcation': did you mean 'classification'?",
        ),
        ("model: {name: a}", ["task=classification"], "config section task: expected keys, got 'classification'"),
        ("model: {name: a}", ["train.epochs=many"], "config key train.epochs: got 'many', expected int"),
        ("model: {name: a}", ["train.epochs=true"], "config key train.epochs: got True, expected int"),
        ("model: {name: a}", ["train.epochs=3.0"], "config key train.epochs: got 3.0, expected int"),
        ("model: {name: a}", ["train.epochs='3'"], "config key train.epochs: got '3', expected int"),
        ("model: {name: a}", ["train.epochs=null"], "config key train.epochs: got None, expected int"),
        ("model: {name: a}", ["train.epochs=0"], "config key train.epochs: got 0, expected int >= 1"),
        (
            "model: {name: a}",
            ["train.deterministic=1"],
            "config key train.deterministic: got 1, expected true or false",
        ),
        ("model: {name: a}", ["optim.lr=true"], "config key optim.lr: got True, expected float > 0"),
        ("model: {name: a}", ["optim.lr=.nan"], "config key optim.lr: got nan, expected float > 0"),
        ("model: {name: a}", ["optim.lr=inf"], "config key optim.lr: got 'inf', expected float > 0"),
        (
            "model: {name: a}",
            ["optim.layer_decay=2"],
            "config key optim.layer_decay: got 2, expected float in (0, 1] or null",
        ),
        ("model: {name: a}", ["optim.betas=[0.9, x]"], "config key optim.betas: got 'x', expected float"),
        (
            "model: {name: a}",
            ["data.img_size=0"],
            "config key data.img_size: got 0, expected int >= 1, [int >= 1, int >= 1]",
        ),
        (
            "model: {name: a}",
            ["data.img_size=[8, 8, 8]"],
            "config key data.img_size: got [8, 8, 8], expected int >= 1, [",
        ),
        ("model: {name: a}", ["augment.sizes=[32, 0]"], "config key augment.sizes: got 0, expected int >= 1"),
        ("model: {name: a}", ["model.kwargs=3"], "config key model.kwargs: got 3, expected mapping"),
        ("model: {name: a}", ["model.name=[a]"], "config key model.name: got ['a'], expected text"),
        ("model: {name: null}", [], "config key model.name: got None, expected text"),
        ("model: {name: a}", ["hub.push=me"], "config key hub.push: got 'me', expected USER/NAME"),
        ("model: {name: a}", ["optim.name=adamx"], "unknown optimizer 'adamx'"),
        ("model: {name: a}", ["train.precision=fp8"], "got 'fp8', expected one of no, bf16, fp16"),
        ("model: {name: a}", ["train.precision=16"], "got 16, expected one of no, bf16, fp16"),
        (
            "model: {name: a}",
            ["train.trackers=[tensorbored]"],
            "train.trackers: got 'tensorbored', expected one of tensorboard",
        ),
        ("model: {name: a}", ["augment.scale=[0.5]"], "config key augment.scale: got [0.5]"),
        ("model: {name: a}", ["augment.scale=[0.9, 0.1]"], "scale: got [0.9, 0.1], expected 0 < low <= high <= 1"),
        (
            "model: {name: a}",
            ["train.global_batch=8", "train.grad_accum=2"],
            "config train.global_batch (8) and grad_accum (2)",
        ),
        (
            "model: {name: a}",
            ["optim.decay_rate=0.5"],
            "config optim.decay_rate: got 0.5, but schedule is cosine: expected null",
        ),
        ("model: {name: a}", ["optim.schedule=constant", "optim.cycles=2"], "constant has no such settings"),
        (
            "model: {name: a}",
            ["optim.schedule=multistep", "optim.milestones=[4, 2]"],
            "optim.milestones: got [4.0, 2.0], expected ascending numbers",
        ),
        (
            "model: {name: a}",
            ["optim.schedule=step", "optim.decay_epochs=90"],
            "config optim.decay_epochs is 90, expected fewer than train.epochs (10)",
        ),
        *(
            (
                "model: {name: a}",
                [f"augment.auto_augment={policy}"],
                f"augment.auto_augment: got {policy!r}, expected a policy of timm such as rand-m9",
            )
            for policy in (
                "randaug",
                "rand-m9-foo1",
                "rand-foo",
                "rand-mx",
                "augmix-q1",
                "xyz",
                "autoaug-x",
                "rand-m9-",
            )
        ),
        ("model: {name: a}", ["optim.min_lr=-1e-3"], "config key optim.min_lr: got -0.001, expected float >= 0"),
        (
            "model: {name: a, kwargs: {img_size: 64}}",
            ["data.img_size=32"],
            "model.kwargs.img_size is 64, data.img_size is 32: expected one of them",
        ),
        ("model: {name: a, kwargs: {img_size: small}}", [], "config key data.img_size: got 'small'"),
        ("model: {name: a}", ["train.epochs"], "expected section.key=value, got 'train.epochs'"),
        ("model: {name: a}", ["model.name.x=1"], "'name' is a value, not a section"),
        ("model: {name: a}\nmodel: {name: b}", [], "key 'model' is given twice"),
        ("model: {name: a}", ["model.kwargs={a: 1, a: 2}"], "key 'a' is given twice"),
        ("model: 3", [], "config section model: expected keys, got 3"),
        ("model: {pretrained: true}", [], "config key model.name is required"),
        ("data: {root: x}", [], "config key model is required"),
        ("- a\n- b", [], "expected sections with keys, got list"),
        ("3", [], "expected sections with keys, got int"),
        ("model: {name: [", [], "is not valid YAML"),
        ("model: {name: 0x_}", [], "is not valid YAML"),
        ("? [a]\n: b", [], "is not valid YAML"),
    ],
)
def test_bad_config_is_one_line(written, text, overrides, message):
    with pytest.raises(UserError) as caught:
        load_config(written(text), overrides)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.yaml")


def test_messages_name_the_place_of_a_part():
    with pytest.raises(UserError, match=r"^config key task\.smoothing: got 2, expected float in \[0, 1\)$"):
        strict.parse(ClassificationConfig, {"smoothing": 2}, "task.")
    with pytest.raises(UserError, match=r"^unknown config key 'task\.smoothin': did you mean 'task\.smoothing'\?$"):
        strict.parse(ClassificationConfig, {"smoothin": 2}, "task.")


def test_a_task_from_elsewhere_has_its_own_section(written, brightness):
    config = load_config(written("model: {name: a}\ntask: {kind: brightness, gamma: 2}"))
    assert config.task == Brightness(gamma=2.0)
    assert load_config(written(strict.dump(config))) == config
    assert load_config(written("model: {name: a}\ntask: {smoothing: 0.1}")).task == ClassificationConfig(smoothing=0.1)
    for text, message in {
        "{kind: brightness, gama: 2}": "unknown config key 'task.gama': did you mean 'task.gamma'?",
        "{kind: brightness, smoothing: 2}": "unknown config key 'task.smoothing'",
        "{kind: brightness, gamma: 0}": "config key task.gamma: got 0, expected float > 0",
        "{kind: depth}": "unknown task 'depth': known: classification, brightness",
    }.items():
        with pytest.raises(UserError) as caught:
            load_config(written(f"model: {{name: a}}\ntask: {text}"))
        assert message in str(caught.value)


def test_optional_sections_and_inherited_fields():
    @strict.section
    class Longer(Brightness):
        """A section with another section's fields."""

        inner: Brightness | None = None
        free: dict[str, Any] = dataclasses.field(default_factory=dict)

    assert strict.parse(Longer, {"inner": {"gamma": 3}}).inner == Brightness(gamma=3.0)
    assert strict.parse(Longer, {"inner": None}).inner is None
    with pytest.raises(UserError, match=r"config key inner\.gamma: got -1, expected float > 0"):
        strict.parse(Longer, {"inner": {"gamma": -1}})
    assert [(row.key, row.doc) for row in strict.settings(Longer)][:2] == [("kind", "Kind."), ("gamma", "Exponent.")]


def test_every_setting_is_documented(brightness):
    rows = strict.settings(RunConfig)
    keys = [row.key for row in rows]
    assert not [row.key for row in rows if len(row.doc) < 5 or not row.doc.endswith(".")]
    assert strict.flatten(strict.as_dict(strict.parse(RunConfig, {"model": {"name": "a"}}))).keys() <= set(keys)
    by_key = {row.key: row for row in rows}
    assert (by_key["optim.lr"].type, by_key["optim.lr"].default_text) == ("float > 0", "0.001")
    assert by_key["train.precision"].choices == ("no", "bf16", "fp16")
    assert (by_key["model.name"].default_text, by_key["task.gamma"].kind) == ("required", "brightness")
    assert all(strict.sections(RunConfig).values())


def test_the_schema_file_is_up_to_date():
    """If this fails: python tools/index.py settings schema"""
    assert (CONFIGS / "run.schema.json").read_text() == command.schema_text()


def test_the_schema_knows_kinds_bounds_and_docs(brightness):
    schema = strict.json_schema(RunConfig)
    assert schema["required"] == ["model"]
    assert schema["$defs"]["OptimConfig"]["properties"]["lr"]["exclusiveMinimum"] == 0
    assert schema["$defs"]["TrainConfig"]["properties"]["epochs"]["description"].startswith("Number of epochs")
    kinds = schema["properties"]["task"]["anyOf"]
    assert [kind.get("required") for kind in kinds] == [None, ["kind"]]
    assert not schema["$defs"]["TrainConfig"]["additionalProperties"]


def printed(capsys, *arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(arguments))
    return capsys.readouterr().out


def test_the_command_explains_settings(capsys):
    assert [line.split()[0] for line in printed(capsys).splitlines()[:8]] == list(strict.sections(RunConfig))
    assert "optim.schedule  (one of cosine, tanh" in printed(capsys, "optim")
    assert "optim.lr  (float > 0; default 0.001)\n      Peak learning rate." in printed(capsys, "optim.lr")
    assert "task with kind: classification" in printed(capsys, "task")
    assert json.loads(printed(capsys, "--json-schema"))["properties"]["model"]
    text = command.settings_help()
    assert all(row.key in text for row in strict.settings(RunConfig))
    assert max(map(len, text.splitlines())) <= 80
    with pytest.raises(UserError, match="unknown section 'optm': did you mean 'optim'"):
        printed(capsys, "optm")


def test_a_task_of_ones_own_has_its_settings(brightness):
    rows = command.run_settings()["settings"]
    assert [row["key"] for row in rows if row["kind"] == "brightness"][:2] == ["task.kind", "task.gamma"]


def test_bounds_are_shown_however_they_are_given():
    @strict.section
    class Bounded:
        """Bounds of both forms."""

        a: Annotated[float, Field(gt=0)] = 1.0
        """One."""
        b: float = Field(default=1.0, gt=0, le=2)
        """Another."""

    assert [row.type for row in strict.settings(Bounded)] == ["float > 0", "float in (0, 2]"]
    with pytest.raises(UserError, match=r"config key b: got 3\.0, expected float in \(0, 2\]"):
        strict.parse(Bounded, {"b": 3.0})


def test_shipped_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("finetune", "finetune.yaml", "configs/finetune.yaml"):
        assert find_config(name) == CONFIGS / "finetune.yaml"
    assert find_config("recipes/swin") == CONFIGS / "recipes/swin.yaml"
    assert find_config("tosa/quickstart") == CONFIGS / "tosa/quickstart.yaml"
    (tmp_path / "finetune.yaml").write_text("")
    assert find_config("finetune.yaml").resolve() == tmp_path / "finetune.yaml"
    with pytest.raises(UserError, match="unknown config 'finetun': did you mean 'finetune'"):
        find_config("finetun")
    with pytest.raises(UserError, match=r"config file 'none\.yaml' does not exist"):
        find_config("none.yaml")
    assert (ROOT / "configs").resolve() == CONFIGS.resolve()


def test_overrides_of_texts_are_stored_as_typed(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("model: {name: a}\n")
    for typed in (
        "no",
        "on",
        "1e3",
        "2024-01-01",
        "0123",
        "null",
        "~",
        "1_000",
        "12:30:00",
        ".5",
        "photos #2",
        "#2",
        "*.png",
        "=",
        "&a",
    ):
        assert load_config(config, [f"data.root={typed}"]).data.root == typed
    assert load_config(config, ["data.root='no #2'"]).data.root == "no #2"
    for typed, value in (("null", None), ("~", None), ("'null'", "null"), ("no", "no"), ("1e3", "1e3")):
        assert load_config(config, [f"distill.teacher={typed}"]).distill.teacher == value
    assert load_config(config, ["optim.lr=1e-3"]).optim.lr == 0.001
    assert load_config(config, ["optim.betas=[.9, 1e-1]"]).optim.betas == (0.9, 0.1)
    assert load_config(config, ["optim.eps=null", "data.img_size=null", "train.trackers=[]"]).optim.eps is None
    kwargs = load_config(config, ["model.kwargs.a=null", "model.kwargs.b=1e-3", "model.kwargs.c=on"]).model.kwargs
    assert kwargs == {"a": None, "b": 0.001, "c": True}


def test_model_arguments_that_are_settings_move_to_their_place(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("model: {name: a, kwargs: {drop_path_rate: 0.1}}\n")
    moved = load_config(config, ["model.kwargs.img_size=[64, 96]", "model.kwargs.pretrained=true"])
    assert (moved.data.img_size, moved.model.pretrained, moved.model.kwargs) == (
        (64, 96),
        True,
        {"drop_path_rate": 0.1},
    )
    assert load_config(config, ["model.kwargs.img_size=64", "data.img_size=64"]).data.img_size == 64


def test_what_accelerate_was_told_holds_where_the_config_is_silent(tmp_path, monkeypatch):
    config = tmp_path / "a.yaml"
    config.write_text("model: {name: a}\n")
    assert load_config(config).train.precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert load_config(config).train.precision == "bf16"
    assert load_config(config, ["train.precision=no"]).train.precision == "no"
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert load_config(config).train.compile
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="--mixed_precision is 'fp8', expected one of no, bf16, fp16"):
        load_config(config)
