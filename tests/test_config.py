"""The strict config loader: what is written is what runs, and what can't be understood is one line."""

import pytest

from effvit_zoo import config as strict
from effvit_zoo.errors import UserError
from effvit_zoo.training.config import RunConfig, load_config


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_values_arrive_with_their_types(written):
    path = written("model: {name: resnet18}\noptim: {lr: 1e-3, betas: [0.9, 0.95]}\ndata: {img_size: [32, 48]}\n")
    config = load_config(
        path, ["train.epochs=3", "train.ema_decay=0.99", "model.kwargs.drop_path_rate=0.1", "data.root=null"][:3]
    )
    assert config.optim.lr == 1e-3
    assert config.optim.betas == (0.9, 0.95)
    assert config.data.img_size == (32, 48)
    assert (config.train.epochs, config.train.ema_decay) == (3, 0.99)
    assert config.model.kwargs == {"drop_path_rate": 0.1}


def test_dump_and_parse_are_inverse(written, tmp_path):
    config = load_config(written("model: {name: a, kwargs: {b: [1, 2]}}\naugment: {scale: [0.5, 1]}\n"))
    (tmp_path / "again.yaml").write_text(strict.dump(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_changed_keys_are_dotted():
    before = strict.parse(RunConfig, {"model": {"name": "a"}})
    after = strict.parse(RunConfig, {"model": {"name": "a", "kwargs": {"x": 1}}, "train": {"seed": 1}})
    assert strict.changed_keys(before, after) == ["model.kwargs", "model.kwargs.x", "train.seed"]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("model: {name: a}\ntrain: {epoch: 3}", [], "unknown config key 'train.epoch': did you mean 'train.epochs'?"),
        ("model: {name: a}\ntrian: {epochs: 3}", [], "unknown config key 'trian': did you mean 'train'?"),
        ("model: {name: a}", ["train.epochs=many"], "config key train.epochs: got 'many', expected int"),
        ("model: {name: a}", ["train.epochs=true"], "config key train.epochs: got True, expected int"),
        ("model: {name: a}", ["train.epochs=0"], "config train.epochs must be at least 1, got 0"),
        ("model: {name: a}", ["train.precision=fp8"], "got 'fp8', expected one of no, bf16, fp16"),
        ("model: {name: a}", ["augment.scale=[0.5]"], "config key augment.scale: got [0.5]"),
        ("model: {name: a}", ["augment.scale=[0.9, 0.1]"], "scale must be 0 < low <= high <= 1"),
        ("model: {name: a}", ["train.epochs"], "expected section.key=value, got 'train.epochs'"),
        ("model: {name: a}", ["model.name.x=1"], "'name' is a value, not a section"),
        ("model: {name: a}\nmodel: {name: b}", [], "key 'model' is given twice"),
        ("model: 3", [], "config section model: expected keys, got 3"),
        ("model: {pretrained: true}", [], "config key model.name is required"),
        ("- a\n- b", [], "expected sections with keys, got list"),
        ("model: {name: [", [], "is not valid YAML"),
    ],
)
def test_bad_config_is_one_line(written, text, overrides, message):
    with pytest.raises(UserError) as caught:
        load_config(written(text), overrides)
    assert message in " ".join(str(caught.value).split())


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
