"""Runs that are planned by time: their end, the time that is left, how often they are validated, and resuming. No test waits: the
clock is a number."""

import csv
import itertools
from types import SimpleNamespace

import pytest
import torch
from runs import make_photos, summary, train_small
from safetensors.torch import load_file

from effvit_zoo.errors import UserError
from effvit_zoo.training import engine, pace
from effvit_zoo.training.config import TrainConfig
from effvit_zoo.training.pace import Pace, Plan, make_pace, pace_notes


def simulate(minutes, step_seconds, per_epoch=10, epochs=1000, validation=1.0, save=0.5, start=8.0, finish=2.0):
    """A run as the engine's loop makes it. Seconds at its end, its plan, the times at which it was validated, and pairs of the
    seconds that were said to be left and the time."""
    run, now, validated, said = Pace(per_epoch, epochs, 1, 0.5, minutes), start, [], []
    plan, done, step = run.start(), 0, 0
    while True:
        if step >= plan.check:
            plan = run.revise(plan, step, now)
        if run.epoch(step) > done and plan.is_due(step, per_epoch):
            done, now = run.epoch(step), now + validation
            run.validations.add(validation)
            plan = run.revise(plan, step, now)
            validated.append(now)
            run.saves.add(save)
            now += save
        if step >= plan.steps:
            return now + finish, plan, validated, said
        step += 1
        seconds = step_seconds(now)
        now += seconds
        run.steps.add(seconds)
        said.append((run.left(plan, step), now))


HOSTS = {
    "a fast host": (lambda now: 0.05, {}),
    "a slow host": (lambda now: 3.0, {}),
    "slow to begin with": (lambda now: 9.0 if now < 10 else 0.3, {}),
    "twice as slow from the middle on": (lambda now: 0.2 if now < 150 else 0.4, {}),
    "twice as fast from the middle on": (lambda now: 0.4 if now < 150 else 0.2, {}),
    "busy every other half minute": (lambda now: 0.2 if now % 60 < 30 else 0.5, {}),
    "an epoch longer than the run": (lambda now: 0.3, {"per_epoch": 5000}),
    "slow validation": (lambda now: 0.1, {"validation": 12.0, "save": 3.0}),
}


@pytest.mark.parametrize("host", HOSTS)
def test_a_run_ends_in_its_time_with_a_finished_schedule(host):
    seconds, options = HOSTS[host]
    end, plan, validated, said = simulate(5, seconds, **options)
    assert 4 * 60 < end < 5.1 * 60
    assert plan.place(plan.steps, 10**9) == 10**9
    assert validated[-1] == pytest.approx(end - 2 - options.get("save", 0.5))  # the last step is validated
    if "from the middle" not in host and "busy" not in host:
        left = [(left, end - now) for left, now in said if 60 < now < 280]
        assert all(abs(expected - real) <= 0.2 * real + 5 for expected, real in left)


def test_the_place_of_the_schedule_grows_without_a_jump():
    run = Pace(10, 30, 1, minutes=5)
    plan = run.start()
    places = []
    for step, seconds in enumerate([1.0] * 20 + [2.0] * 60 + [0.1] * 400):
        if step >= plan.check:
            plan = run.revise(plan, step, 3.0 * step)
        if step >= plan.steps:
            break
        places.append(plan.place(step, run.longest))
        run.steps.add(seconds)
    assert plan.is_made
    assert all(0 < after - before < run.longest / 8 for before, after in itertools.pairwise(places))


def test_validation_takes_no_longer_than_training():
    end, plan, validated, _ = simulate(5, lambda now: 0.1, validation=6.0, save=1.0)
    assert plan.every == 7
    assert 7 * (len(validated) - 1) < end / 2
    assert simulate(5, lambda now: 0.1, validation=0.5, save=0.1)[1].every == 1


def test_more_time_than_epochs_ends_sooner():
    end, plan, *_ = simulate(60, lambda now: 0.1, epochs=3)
    assert plan.steps == 30
    assert end < 20


@pytest.mark.parametrize("minutes", [0.001, 0.1])
def test_time_for_hardly_a_step_still_gives_a_validated_model(minutes):
    _, plan, validated, _ = simulate(minutes, lambda now: 2.0)
    assert 1 <= plan.steps <= 3
    assert len(validated) == 1
    said = Pace(10, 1000, 1, 0.5, minutes).describe(plan, plan)
    assert said == f"train.minutes is {minutes:g}: no time for more than {plan.steps} steps"


def feed(train_images, val_images, steps_per_epoch=9):
    splits = SimpleNamespace(val=SimpleNamespace(title="photos"))
    counts = {"train_images": train_images, "val_images": val_images}
    return SimpleNamespace(describe=lambda: counts, steps_per_epoch=steps_per_epoch, splits=splits)


def test_many_validation_images_are_validated_less_often():
    assert make_pace(feed(280, 495), TrainConfig()).every == 2
    assert "validated after every 2 epochs, so that 495 validation" in pace_notes(feed(280, 495), TrainConfig())[0]
    assert make_pace(feed(280, 495), TrainConfig(val_every=1)).every == 1
    assert pace_notes(feed(280, 495), TrainConfig(val_every=1)) == []
    assert make_pace(feed(280, 280), TrainConfig()).every == 1
    assert make_pace(feed(280, None), TrainConfig()).every == 1
    with pytest.raises(UserError, match=r"train\.minutes is 5, expected null: photos doesn't say how many"):
        make_pace(feed(280, None), TrainConfig(minutes=5))


def rows(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    counts = {"train": {"blue": 24, "red": 24}, "val": {"blue": 8, "red": 8}}
    return make_photos(tmp_path_factory.mktemp("photos"), counts)


@pytest.fixture
def fake_clock(monkeypatch):
    """A clock that only steps move on, two seconds each; returns the function that makes a run stop before a step."""
    now, original = [0.0], engine.Loop._optimizer_step
    cut = [-1]

    class Cut(BaseException):
        """Stands for a kill: nothing in the program may catch it."""

    def step(self, batches):
        if self.state.step == cut[0]:
            raise Cut
        now[0] += 2.0
        return original(self, batches)

    monkeypatch.setattr(pace, "clock", lambda: now[0])
    monkeypatch.setattr(engine.Loop, "_optimizer_step", step)

    def cut_before(number):
        cut[0] = number
        return Cut

    return cut_before


@pytest.mark.slow
@pytest.mark.parametrize("cut", [3, 9, 14])
def test_a_timed_run_is_resumed_to_the_same_bits(photos, tmp_path, fake_clock, cut):
    """Cut before the plan was made, in the second epoch and in the last: 16 steps of 2 s and an end of 3 s fit into the time."""
    settings = [f"data.root={photos}", "train.minutes=0.62", "train.epochs=30", "optim.warmup_epochs=3"]
    settings += ["train.checkpoint_steps=2", "train.val_every=2"]
    assert train_small(tmp_path / "whole", *settings) == 0
    with pytest.raises(fake_clock(cut)):
        train_small(tmp_path / "cut", *settings)
    fake_clock(-1)
    assert train_small(tmp_path / "cut", *settings, more=["--resume", "auto"]) == 0
    assert [(row["epoch"], row["step"]) for row in rows(tmp_path / "whole")] == [("2", "12"), ("3", "16")]
    assert float(rows(tmp_path / "whole")[-1]["lr"]) == pytest.approx(1e-6)
    assert summary(tmp_path / "whole")["epochs"] == summary(tmp_path / "whole")["epochs_run"] == 3
    for name in ("best", "last"):
        whole, resumed = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "cut"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_run_without_a_time_follows_its_steps():
    run = Pace(10, 3, 1)
    assert run.revise(run.start(), 7, 1e9) == run.start() == Plan(30, 1, 0, 0, 31)
    assert run.start().place(7, 30) == 7
