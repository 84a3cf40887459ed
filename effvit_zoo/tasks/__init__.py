"""Kinds of training, one file and one row of `TASKS` each. The contract is in `contract`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import unknown_choice
from ..hub import CardFacts
from ..run_folder import EXTRA_KEY
from .classification import Classification as Classification
from .contract import Difference as Difference
from .contract import Evaluation as Evaluation
from .contract import Evaluator as Evaluator
from .contract import HeadSolver as HeadSolver
from .contract import Metric as Metric
from .contract import Objective as Objective
from .contract import Picture as Picture
from .contract import Section as Section
from .contract import Table as Table
from .contract import Task as Task
from .contract import mean_over_images as mean_over_images
from .distillation import Distillation as Distillation
from .distillation import DistillConfig as DistillConfig

DEFAULT = "classification"

TASKS: dict[str, type[Task]] = {DEFAULT: Classification}
"""Kind, as in `task.kind` of a config -> task."""


def recorded_kind(record: Mapping[str, Any]) -> str:
    """The kind of task that a model folder's record (`EXTRA_KEY` of its config.json) names; classification where it names none."""
    kind = str(record.get("task", DEFAULT))
    if kind not in TASKS:
        raise unknown_choice("task", kind, list(TASKS))
    return kind


def task_of(model: nn.Module) -> Task:
    """The task of a model. Raises `UserError` where the model can't do it or its task is unknown."""
    record: Mapping[str, Any] = getattr(model, "effvit_zoo_record", {})
    return TASKS[recorded_kind(record)].for_model(model)


def card_facts(config: Mapping[str, Any]) -> CardFacts:
    """What the card of a model folder says that depends on its task. `config` is the content of config.json."""
    return TASKS[recorded_kind(config.get(EXTRA_KEY) or {})].card(config)
