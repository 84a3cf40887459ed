"""How long a run takes: its plan in optimizer steps, and the time that is left, both from measured times.

`train.minutes` bounds the time of a whole run, from its start to its last figure. Such a run is planned after its first steps and
planned anew where it would miss its end by more than `TOLERANCE`, as the host has become slower or faster. So that each plan
ends with a finished schedule, the schedule is a function of a run's place, which goes from 0 to the steps of `train.epochs`:
between two plans, the place grows evenly with the steps. Without `train.minutes` the place is the step. A plan is part of the
run's state, and a run that is resumed keeps it.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..data import Feed
from ..errors import UserError
from .config import TrainConfig

clock = time.perf_counter
AIM = 0.97  # share of the time that is planned for
TOLERANCE = 0.05  # share of the time by which a plan may miss its end
OVERRUN = 0.1  # share of the time that a last step, in which the schedule ends, may take beyond it
MEASURED_STEPS = 4  # steps that are measured before the first plan
HALF_LIFE = 15.0  # seconds after which a measured time counts half
FINISH = 3.0  # seconds that the last report is expected to take before one was measured


@dataclass(frozen=True)
class Plan:
    """Length of a run, as JSON holds it.

    Attributes:
        steps: Optimizer steps of the run.
        every: Epochs from one validation to the next; the last step is followed by one too.
        from_step: Step at which the plan was made.
        from_place: Place of the schedule at that step.
        check: Step at which the plan is compared with the time again.
        is_made: Whether it rests on measured times; without `train.minutes` it needs none.
    """

    steps: int = 0
    every: int = 1
    from_step: int = 0
    from_place: float = 0.0
    check: int = 1
    is_made: bool = False

    def place(self, step: int, longest: int) -> float:
        """Place of the schedule after a number of steps, out of `longest`."""
        if not self.is_made:
            return self.from_place + step - self.from_step
        share = (step - self.from_step) / max(1, self.steps - self.from_step)
        return self.from_place + (longest - self.from_place) * min(1.0, share)

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether the model is validated after a number of steps."""
        return step >= self.steps or step % (self.every * steps_per_epoch) == 0


class Recent:
    """A mean in which what is long ago counts less. The first value, which warms caches, counts until there is a second, and an
    expected one until there is a first."""

    def __init__(self) -> None:
        self.mean, self.weight, self.number = 0.0, 0.0, 0

    def add(self, seconds: float) -> None:
        self.number += 1
        kept = 0.0 if self.number <= 2 else self.weight * 0.5 ** (seconds / HALF_LIFE)
        self.mean, self.weight = (self.mean * kept + seconds) / (kept + 1), kept + 1

    def expect(self, seconds: float) -> None:
        """Sets the mean."""
        self.mean, self.weight = seconds, max(1.0, self.weight)


class Pace:
    """Measured times of a run, plans made from them, and the time that is left.

    Args:
        steps_per_epoch: Optimizer steps of an epoch.
        epochs: Largest number of epochs.
        every: Fewest epochs from one validation to the next.
        val_share: Validation images as a multiple of a step's, from which the first validation's time is expected.
        minutes: Time of the whole run; None for `epochs` epochs.
    """

    def __init__(
        self, steps_per_epoch: int, epochs: int, every: int, val_share: float = 0.0, minutes: float | None = None
    ) -> None:
        self.per_epoch, self.longest = steps_per_epoch, steps_per_epoch * epochs
        self.every, self.val_share = every, val_share
        self.limit = None if minutes is None else 60 * minutes
        self.steps, self.validations, self.saves = Recent(), Recent(), Recent()
        self.finish = FINISH

    def start(self, step: int = 0, place: float | None = None) -> Plan:
        """The plan before anything is measured: `epochs` epochs from a step on, at its own place or another."""
        check = self.longest + 1 if self.limit is None else step + 1
        return Plan(self.longest, self.every, step, step if place is None else place, check)

    def resume(self, plan: Plan, measured: Sequence[float], step: int, steps_per_epoch: int) -> Plan:
        """The plan of a run that goes on after a number of steps: the recorded one where it was made from measured times.

        Args:
            plan: As recorded.
            measured: Times as recorded; none before the first checkpoint.
            step: Finished steps.
            steps_per_epoch: As recorded, 0 where it wasn't. With another number of images the schedule goes on from its place.
        """
        if measured:
            self.expect(measured)
        if not plan.is_made or self.limit is None:
            return self.start() if steps_per_epoch in (0, self.per_epoch) else self.start(step)
        if steps_per_epoch == self.per_epoch:
            return plan
        longest, done = (number * steps_per_epoch // self.per_epoch for number in (self.longest, step))
        return self.start(step, plan.place(done, longest) / longest * self.longest)

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that a number of steps finishes or is in."""
        return -(-step // self.per_epoch)

    @property
    def _end(self) -> float:
        """Seconds of a validation and what is saved after it. A forward pass is taken to need half of a training step's time."""
        validation = self.validations.mean if self.validations.weight else 0.5 * self.val_share * self.steps.mean
        return validation + self.saves.mean

    def seconds(self, step: int, steps: int, every: int) -> float:
        """Expected seconds from one step, with its validation behind it, to the end of a run of `steps`."""
        period = every * self.per_epoch
        ends = -(-steps // period) - step // period
        return (steps - step) * self.steps.mean + ends * self._end + self.finish

    def left(self, plan: Plan, step: int) -> float | None:
        """Expected seconds to the end of a plan from a step that may have its validation ahead; None before the first step."""
        return self.seconds(step - 1, plan.steps, plan.every) - self.steps.mean if self.steps.weight else None

    def measured(self) -> list[float]:
        """What a plan is made from: seconds of a step, of a validation, of saving, of the last report."""
        return [self.steps.mean, self._end - self.saves.mean, self.saves.mean, self.finish]

    def expect(self, measured: Sequence[float]) -> None:
        """Takes over what another process, or the run before it was cut, has `measured`."""
        *means, self.finish = measured
        for recent, seconds in zip((self.steps, self.validations, self.saves), means, strict=True):
            recent.expect(seconds)

    def revise(self, plan: Plan, step: int, spent: float) -> Plan:
        """The plan to go on with; another one where there is none yet, or where it would miss the end.

        Args:
            plan: The plan so far.
            step: Finished steps.
            spent: Seconds since the run's start.
        """
        if self.limit is None or step >= plan.steps:
            return plan
        plan = replace(plan, check=step + max(1, min(step, (plan.steps - step) // 4)))
        if not plan.is_made and step < MEASURED_STEPS and spent < self.limit / 4:
            return replace(plan, check=step + 1)
        time_left = AIM * self.limit - spent
        misses = self.seconds(step, plan.steps, plan.every) - time_left
        if plan.is_made and (abs(misses) <= TOLERANCE * self.limit or (misses < 0 and plan.steps == self.longest)):
            return plan
        every = max(self.every, math.ceil(self._end / max(1e-9, self.per_epoch * self.steps.mean)))
        choices = range(step, self.longest + 1)
        fits = bisect.bisect_right(choices, time_left, key=lambda steps: self.seconds(step, steps, every))
        has_time = self.seconds(step, step + 1, every) <= (1 + OVERRUN) * self.limit - spent
        steps, place = choices[max(int(has_time), fits - 1)], plan.place(step, self.longest)
        return Plan(steps, every, step, place, step + max(1, min(step, (steps - step) // 4)), is_made=True)

    def describe(self, plan: Plan, before: Plan) -> str:
        """A plan for people, and that it takes the place of another."""
        if plan.steps - plan.from_step <= 1 and self.limit is not None:
            return f"train.minutes is {self.limit / 60:g}: no time for more than {plan.steps} steps"
        epochs = f"{plan.steps / self.per_epoch:.3g} epochs"
        often = "" if plan.every == 1 else f", validated every {plan.every} epochs"
        step = f"{self.steps.mean:.2g} s" if self.steps.mean >= 0.1 else f"{1000 * self.steps.mean:.2g} ms"
        return f"{'planned anew' if before.is_made else 'planned'}: {plan.steps:,} steps of {step} ({epochs}{often})"


def make_pace(feed: Feed, train: TrainConfig) -> Pace:
    """The pace of a run. Raises `UserError` where a timed run's validation images aren't counted."""
    counts = feed.describe()
    images, val_images = counts["train_images"], counts["val_images"]
    if train.minutes is not None and val_images is None:
        raise UserError(
            f"train.minutes is {train.minutes:g}, expected null: {feed.splits.val.title} doesn't say how many images it has, "
            "and the time of a validation has to be known"
        )
    val_share = (val_images or 0) * feed.steps_per_epoch / (images or 1)
    return Pace(feed.steps_per_epoch, train.epochs, validation_period(feed, train), val_share, train.minutes)


def validation_period(feed: Feed, train: TrainConfig) -> int:
    """Epochs from one validation to the next: the fewest in which there are as many training images as validation images. A
    function of the data alone, so that it doesn't depend on where a run was cut."""
    counts = feed.describe()
    images, val_images = counts["train_images"], counts["val_images"]
    return train.val_every or max(1, -(-(val_images or 0) // (images or 1)))


def pace_notes(feed: Feed, train: TrainConfig) -> list[str]:
    """What the user should know about the length of a run and about its validations."""
    notes, counts, every = [], feed.describe(), validation_period(feed, train)
    if train.minutes is not None:
        notes.append(
            f"train.minutes is {train.minutes:g}: the number of steps follows from the time of the first ones, "
            f"at most train.epochs ({train.epochs}) epochs"
        )
    if every > 1 and train.val_every is None:
        notes.append(
            f"validated after every {every} epochs, so that {counts['val_images']:,} validation images take no longer than "
            f"training on {counts['train_images']:,} (train.val_every=1 validates after each)"
        )
    return notes
