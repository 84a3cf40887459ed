"""What a training refuses before its folder exists, what gives way and is said, and what a failed start leaves behind."""

from __future__ import annotations

import os
import stat

import pytest
from runs import make_photos, summary, train_small

from effvit_zoo import hub, run_folder
from effvit_zoo.errors import UserError
from effvit_zoo.pipelines import PIPELINES
from effvit_zoo.tasks import Classification
from effvit_zoo.training import engine
from effvit_zoo.training.config import CONFIGS, load_config
from effvit_zoo.training.prepare import build_model, prepare
from effvit_zoo.training.run import dry_run

RUNS = sorted(
    path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml") if "accelerate" not in path.parts
)
RUNS.remove("tosa/dense_demo.yaml")  # of a tool


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    counts = {"train": {"blue": 4, "red": 4}, "val": {"blue": 1, "red": 1}}
    return make_photos(tmp_path_factory.mktemp("photos"), counts)


def settings(photos, *more):
    return [f"data.root={photos}", "data.check_duplicates=false", *more]


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        ("effzoo_swiftformer_xs", ["train.batch_size=1"]),
        ("effzoo_swiftformer_xs", ["train.batch_size=4", "train.grad_accum=8"]),
        ("effzoo_efficientvit_b0", ["train.batch_size=1"]),
    ],
)
def test_a_single_value_per_channel_is_refused_at_the_start(photos, tmp_path, capsys, model, batch):
    given = settings(photos, f"model.name={model}", "data.img_size=32", *batch)
    assert train_small(tmp_path / "run", *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in (model, batch[0].replace("=", " "), "train.grad_accum", "32 x 32", "more than 1 value per channel"):
        assert part in line
    assert not (tmp_path / "run").exists()


def test_a_single_image_works_where_the_maps_are_larger(photos, tmp_path):
    given = settings(photos, "model.name=effzoo_vit_pico", "train.batch_size=1")
    assert train_small(tmp_path / "run", *given) == 0


def test_trying_a_single_image_leaves_the_model_as_it_was(photos, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("model: {name: effzoo_swiftformer_xs}\n")
    config = load_config(
        config, [f"data.root={photos}", "data.img_size=64", "data.num_workers=0", "train.batch_size=1"]
    )
    model = prepare(config, 1).model
    assert all(
        buffer.abs().max() == 0 for name, buffer in model.named_buffers() if "running_mean" in name or "tracked" in name
    )


def test_an_optimizer_that_cannot_be_made_is_refused_before_data_is_read(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Classification, "open_splits", lambda *_: pytest.fail("data was read"))
    for more in (
        ["optim.name=sgd", "optim.betas=[0.9, 0.99]"],
        ["optim.betas=[0.9]"],
        ["augment.auto_augment=randaug"],
    ):
        assert train_small(tmp_path / "run", *settings(photos, *more)) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_a_layer_decay_that_the_model_has_not_leaves_no_folder(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "make_optimizer", lambda *_: (_ for _ in ()).throw(UserError("no groups")))
    assert train_small(tmp_path / "run", *settings(photos)) == 2
    assert capsys.readouterr().err == "error: no groups\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("error", "code"), [(UserError("full"), 2), (KeyboardInterrupt(), 130)])
def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing_in_the_way(
    photos, tmp_path, monkeypatch, capsys, error, code
):
    with monkeypatch.context() as patched:

        def fail(self, batches):
            raise error

        patched.setattr(engine.Loop, "_optimizer_step", fail)
        assert train_small(tmp_path / "run", *settings(photos)) == code
    assert not run_folder.is_taken(tmp_path / "run")
    assert train_small(tmp_path / "run", *settings(photos, "train.seed=1")) == 0
    assert train_small(tmp_path / "run", *settings(photos)) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_killed_start_can_be_mended(photos, tmp_path):
    """A process that is killed leaves its config and no checkpoint."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("model: {name: effzoo_vit_pico}\ntrain: {batch_size: 4096}\n")
    assert train_small(tmp_path / "run", *settings(photos), more=["--resume", "auto"]) == 0


def test_a_folder_is_trained_in_by_one_process(photos, tmp_path, monkeypatch, capsys):
    def held(file):
        raise BlockingIOError

    monkeypatch.setattr(run_folder, "_lock", held)
    assert train_small(tmp_path / "run", *settings(photos)) == 2
    assert "another process is training in" in capsys.readouterr().err


def test_files_have_the_mode_of_new_files(photos, tmp_path):
    umask = os.umask(0o027)
    try:
        assert (
            train_small(tmp_path / "run", *settings(photos, "train.ema_decay=0.9", "train.trackers=[tensorboard]")) == 0
        )
    finally:
        os.umask(umask)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path.suffix for path in modes} >= {".safetensors", ".json", ".yaml", ".csv", ".html", ".png"}
    assert {path: oct(mode) for path, mode in modes.items() if mode != 0o640} == {}


def test_launchers_and_configs_do_not_contradict_each_other_silently(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train_small(tmp_path / "a", *settings(photos)) == 0
    assert summary(tmp_path / "a")["precision"] == "bf16"
    assert load_config(tmp_path / "a/config.yaml").train.precision == "bf16"
    assert "accelerate" not in capsys.readouterr().out
    assert train_small(tmp_path / "b", *settings(photos, "train.precision=no")) == 0
    assert "train.precision is no, accelerate launch was told bf16: no is used" in capsys.readouterr().out
    assert summary(tmp_path / "b")["precision"] == "no"
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert train_small(tmp_path / "c", *settings(photos)) == 2
    assert "--gradient_accumulation_steps is 4, train.grad_accum is 1" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert train_small(tmp_path / "c", *settings(photos)) == 2
    assert "DeepSpeed" in capsys.readouterr().err


def test_a_single_epoch_works_and_says_what_gives_way(photos, tmp_path, capsys):
    config = CONFIGS / "finetune.yaml"
    more = ["model.pretrained=false", "data.img_size=32", "optim.min_lr=0.1"]
    assert train_small(tmp_path / "run", *settings(photos, *more), config=config) == 0
    said = capsys.readouterr().out
    assert "optim.warmup_epochs is 0.8 and train.epochs 1: the warm-up is shortened to 0.1 epochs" in said
    assert "starts from random weights, for which 40 training images are few" in said
    assert "optim.min_lr is 0.1, above the peak: 0.001 is used" in said


@pytest.mark.parametrize("name", RUNS)
def test_every_shipped_config_takes_a_single_epoch(name):
    if name.startswith("tosa/"):
        stages = ("dense", "selectors", "finetune")
        pipeline = PIPELINES["tosa"]
        config = pipeline.load(CONFIGS / name, [f"{stage}.train.epochs=1" for stage in stages])
        runs = [stage.run_config(config, CONFIGS) for stage in pipeline.stages]
    else:
        runs = [load_config(CONFIGS / name, ["train.epochs=1"])]
    for run in runs:
        resolved = run.resolve_for_processes(1)
        assert resolved.optim.warmup_epochs < resolved.train.epochs == 1


@pytest.mark.parametrize(
    ("name", "size"), [("effzoo_vit_pico", 64), ("effzoo_swin_tiny_patch4_window7_224", 128), ("mixer_s32_224", 96)]
)
def test_a_size_given_to_the_model_is_the_size_of_the_data(photos, tmp_path, name, size):
    config = tmp_path / "a.yaml"
    config.write_text(f"model: {{name: {name}, kwargs: {{img_size: {size}}}}}\n")
    assert dry_run(config, [f"data.root={photos}"])["input_size"] == [3, size, size]
    if name.startswith("mixer"):
        folder = hub.save(
            build_model(load_config(config), None), tmp_path / "saved", data_config={"input_size": (3, size, size)}
        )
        assert hub.load(folder).stem.img_size == (size, size)


def test_processes_without_a_validation_image_take_part_with_none():
    from effvit_zoo.data.plan import BatchPlan

    plan = BatchPlan(2, 8, num_processes=3)
    shares = [
        [[key.image for key in keys] for keys in plan.batches(process, 0, plan.steps_per_epoch)] for process in range(3)
    ]
    assert sorted(image for share in shares for keys in share for image in keys) == [0, 1]
    assert {len(share) for share in shares} == {1}
    with pytest.raises(UserError, match="2 training images can't be shared by 3 processes"):
        plan.require_shares()


def test_an_output_that_cannot_be_written_is_refused_before_data_is_read(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Classification, "open_splits", lambda *_: pytest.fail("data was read"))
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file/run"):
        assert train_small(output, *settings(photos), config=CONFIGS / "quickstart.yaml") == 2
        assert "is a file, expected a folder" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert train_small(tmp_path / "run", *settings(photos)) == 2
    assert "is read-only, name another --output" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, about the network
def test_layers_that_share_weights_train_resume_and_load(photos, tmp_path):
    given = settings(photos, "model.name=coat_tiny", "train.batch_size=4", "data.img_size=64", "train.epochs=2")
    assert train_small(tmp_path / "run", *given) == 0
    assert hub.load(tmp_path / "run/best").num_classes == 2
    assert train_small(tmp_path / "run", *given, more=["--resume", "auto"]) == 0
