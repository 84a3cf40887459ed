"""Trainings of several stages, each of them a run of the one engine; one file and one row of `PIPELINES` each."""

from __future__ import annotations

from pathlib import Path

from ..config import read_yaml
from ..errors import unknown_choice
from .contract import Pipeline as Pipeline
from .contract import Stage as Stage
from .tosa import TOSA

PIPELINES: dict[str, Pipeline] = {TOSA.name: TOSA}
"""Value of the key `pipeline` in a config -> pipeline."""


def pipeline_of(config_path: str | Path) -> str | None:
    """Name of the pipeline that a config is of, None for a single run. Raises `UserError` for an unknown one."""
    name = read_yaml(config_path).get("pipeline")
    if name is not None and name not in PIPELINES:
        raise unknown_choice("pipeline", str(name), list(PIPELINES))
    return None if name is None else str(name)
