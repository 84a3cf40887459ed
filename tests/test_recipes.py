"""Every recipe loads, plans what was published, and trains: two steps on a handful of images, with the sizes brought down."""

from pathlib import Path

import pytest
import yaml
from runs import ROOT, make_photos, summary, train_small

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.training.config import load_config
from effvit_zoo.training.run import dry_run

RECIPES = sorted((ROOT / "configs/recipes").glob("*.yaml"))

# images per step, learning rate, epochs, warm-up epochs, weight decay: as in the sources that each recipe's header names
PUBLISHED = {
    "conv2former": (1024, 1e-3, 300, 5, 0.05),
    "deit_vit": (1024, 1e-3, 300, 5, 0.05),
    "edgenext": (4096, 6e-3, 300, 20, 0.05),
    "efficientvit": (1024, 2e-3, 320, 20, 0.1),
    "hydra_vit": (1024, 1e-3, 300, 5, 0.05),  # DeiT's: its own isn't known
    "sima_vit": (1024, 1e-3, 300, 5, 0.05),
    "swiftformer": (2048, 2e-3, 300, 5, 0.025),
    "swin": (1024, 1e-3, 300, 20, 0.05),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    counts = {"blue": 8, "red": 8}
    return make_photos(tmp_path_factory.mktemp("photos"), {"train": counts, "val": {"blue": 2, "red": 2}})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "pico"
    return hub.save(effvit_zoo.create_model("effzoo_vit_pico", num_classes=2), folder, label_names=["blue", "red"])


def test_every_family_has_a_recipe():
    assert [path.stem for path in RECIPES] == sorted(PUBLISHED)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_says_where_it_comes_from(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("arXiv:", "source:", "published:", "hardware:", "hours:", "command:   accelerate launch"):
        assert word in header
    assert f"configs/recipes/{path.name}" in header
    assert "configs/README.md" in header


def test_the_launch_lines_are_in_the_readme():
    text = (ROOT / "configs/README.md").read_text()
    for words in (
        "python train.py",
        "--num_processes 8",
        "--num_machines 4",
        "configs/accelerate/fsdp.yaml",
        "--dry-run",
    ):
        assert words in text
    for path in RECIPES:  # its other launch lines rely on this
        train = load_config(path).train
        assert train.global_batch % (8 * train.batch_size) == train.global_batch % 32 == 0


def test_editors_find_the_schema():
    """Each run's config names the JSON schema in its first line, relative to itself."""
    paths = [*RECIPES, *(ROOT / "configs").glob("*.yaml")]
    for path in paths:
        first = path.read_text().splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema=")
        assert (path.parent / first.partition("=")[2]).resolve() == (
            ROOT / "effvit_zoo/configs/run.schema.json"
        ).resolve()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("processes", [1, 8])
def test_the_dry_run_is_what_was_published(path, processes):
    facts = dry_run(path, num_processes=processes)
    got = tuple(facts[key] for key in ("images_per_step", "lr", "epochs", "warmup_epochs", "weight_decay"))
    assert got == pytest.approx(PUBLISHED[path.stem])
    assert facts["params"] > 1e6
    assert "not there" in facts["data"]  # and that is no error


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_steps(path, photos, teacher, tmp_path):
    config = load_config(path)
    size = 32 if path.stem.endswith("_vit") else 64
    settings = [
        f"data.root={photos}",
        f"data.img_size={size}",
        "train.global_batch=null",
        "train.precision=no",
        "optim.warmup_epochs=0",
        f"train.ema_decay={min(config.train.ema_decay, 0.5)}",
    ]
    name = config.model.name  # the isotropic ones are 22M and more: their tiny size has the same parts
    settings.append(f"model.name={name.replace('small', 'tiny').replace('base', 'tiny') if size == 32 else name}")
    if config.augment.sizes:
        settings.append(f"augment.sizes=[{size}, {size + 32}]")
    if config.distill.teacher:
        settings.append(f"distill.teacher={teacher}")
    assert train_small(tmp_path / "run", *settings, config=path) == 0
    assert summary(tmp_path / "run")["steps"] == 2
    assert summary(tmp_path / "run")["skipped_steps"] == 0


def test_the_dry_run_of_data_that_is_there(photos, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("model: {name: effzoo_vit_pico}\n")
    settings = [f"data.root={photos}", "train.grad_accum=2", "train.epochs=3", "train.batch_size=4"]
    assert train_small(tmp_path / "run", *settings, more=["--dry-run"], config=config) == 0
    said = {line[:17].strip(): line[17:] for line in capsys.readouterr().out.splitlines()}
    assert not (tmp_path / "run").exists()
    assert said["batch"] == "4 per process x 1 processes x 2 accumulated"
    assert said["images per step"] == "8"
    assert "2 classes, 16 training and 4 validation images" in said["data"]
    assert (said["steps per epoch"], said["steps"]) == ("2", "6")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_all_other_configs_load(path):
    load_config(path)


def test_the_sharded_launch_config_is_one_of_accelerates():
    from accelerate.commands.config.config_args import load_config_from_file

    path = Path(ROOT / "configs/accelerate/fsdp.yaml")
    assert load_config_from_file(str(path)).fsdp_config["fsdp_version"] == 2
    assert yaml.safe_load(path.read_text())["distributed_type"] == "FSDP"
