"""Learning rates over a run: every schedule decays as its field defines it, within the run, by settings of its own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from effvit_zoo.errors import UserError
from effvit_zoo.training.config import SCHEDULE_SETTINGS, ModelConfig, OptimConfig, RunConfig, TrainConfig
from effvit_zoo.training.optim import make_scheduler

EPOCHS, PER_EPOCH = 10, 8


def curve(schedule: str, epochs: int = EPOCHS, **settings) -> list[float]:
    """Rates of each step of a run, and the one after the last."""
    config = OptimConfig(lr=1.0, min_lr=0.01, warmup_lr=0.0, schedule=schedule, **settings)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), config.lr)
    scheduler = make_scheduler(optimizer, config, epochs, PER_EPOCH)
    rates = []
    for step in range(epochs * PER_EPOCH + 1):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def at(epoch: float) -> int:
    return round(epoch * PER_EPOCH)


def test_the_ends_of_every_schedule():
    ends = {"cosine": 0.01, "tanh": 0.01, "poly": 0.01, "wsd": 0.01, "rsqrt": 0.01, "step": 1e-3, "multistep": 1e-3}
    for schedule, end in ends.items():
        rates = curve(schedule)
        assert rates[0] == pytest.approx(1.0, abs=1e-5)
        assert rates[-1] == pytest.approx(end)
        assert all(a >= b for a, b in itertools.pairwise(rates))
    assert set(curve("constant")) == {1.0}


def test_curves_between_the_ends():
    t = torch.linspace(0, 1, EPOCHS * PER_EPOCH + 1)[:-1]
    for schedule, shape in {
        "cosine": 0.5 * (1 + torch.cos(math.pi * t)),
        "tanh": 0.5 * (1 - torch.tanh(-7 * (1 - t) + 3 * t)),
        "poly": (1 - t) ** 0.9,
    }.items():
        torch.testing.assert_close(torch.tensor(curve(schedule)[:-1]), 0.01 + 0.99 * shape)
    torch.testing.assert_close(torch.tensor(curve("poly", power=2.0)[:-1]), 0.01 + 0.99 * (1 - t) ** 2)
    stable, last = curve("wsd")[: at(8)], curve("wsd")[at(9)]
    assert set(stable) == {1.0}
    assert last == pytest.approx(0.01 + 0.99 * (1 - math.sqrt(0.5)))
    assert curve("wsd", decay_epochs=5)[at(5) + 1] < 1.0
    assert curve("rsqrt")[at(3)] == pytest.approx(4**-0.5)
    assert curve("rsqrt", timescale_epochs=3)[at(3)] == pytest.approx(2**-0.5)
    assert curve("rsqrt", warmup_epochs=2)[at(4)] == pytest.approx(2**-0.5)


def test_steps_fall_where_they_are_said_to():
    def changes(rates):
        return [
            (step, rates[step] / rates[step - 1]) for step in range(1, len(rates)) if rates[step] != rates[step - 1]
        ]

    tenths = [(at(e), pytest.approx(0.1)) for e in (3, 6, 9)]
    assert changes(curve("step")) == tenths
    assert changes(curve("multistep")) == tenths
    assert changes(curve("step", decay_epochs=4, decay_rate=0.5)) == [(at(4), 0.5), (at(8), 0.5)]
    assert changes(curve("multistep", milestones=(2, 7.5), decay_rate=0.5)) == [(at(2), 0.5), (at(7.5), 0.5)]


def test_cycles_begin_anew():
    rates = curve("cosine", cycles=2, cycle_decay=0.5)
    assert rates[at(5)] == pytest.approx(0.5)
    assert rates[at(5) - 1] < 0.02
    assert rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("schedule", [*SCHEDULE_SETTINGS, "constant"])
@pytest.mark.parametrize("prefix", [False, True])
def test_warmup_rises_to_the_peak_and_the_end_stays(schedule, prefix):
    rates = curve(schedule, warmup_epochs=2, warmup_prefix=prefix)
    assert rates[0] == 0
    rising = rates[: at(2)]
    assert rising == sorted(rising)
    assert rising[-1] > 0.9 * (1 - 1 / at(2))
    assert rates[-1] == pytest.approx(curve(schedule)[-1]) or schedule in ("step", "multistep")


@pytest.mark.parametrize("schedule", [*SCHEDULE_SETTINGS, "constant"])
def test_a_run_of_a_single_step_has_a_rate(schedule):
    config = OptimConfig(lr=1.0, schedule=schedule)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), config.lr)
    make_scheduler(optimizer, config, 1, 1).step_update(0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0, rel=1e-5)


def test_phases_longer_than_the_run_are_refused():
    with pytest.raises(UserError, match="decay_epochs is 9, expected at most the 8 epochs after the warm-up"):
        curve("wsd", decay_epochs=9, warmup_epochs=2)


def test_a_warmup_gives_way_in_a_short_run():
    def resolved(epochs, warmup):
        optim = OptimConfig(warmup_epochs=warmup)
        config = RunConfig(model=ModelConfig(name="a"), optim=optim, train=TrainConfig(epochs=epochs))
        return config.resolve_for_processes(1).optim.warmup_epochs

    assert resolved(10, 2) == 2
    assert resolved(10, 5) == 1
    assert resolved(5, 5) == 0.5
    assert resolved(1, 20) == pytest.approx(0.1)


def test_the_ends_are_not_above_the_peak():
    config = RunConfig(model=ModelConfig(name="a"), optim=OptimConfig(lr=1e-9, warmup_epochs=1)).resolve_for_processes(
        1
    )
    assert (config.optim.min_lr, config.optim.warmup_lr) == (1e-9, 1e-9)
