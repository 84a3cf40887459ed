"""Models for deployment: exported files in other runtimes, and the fastest form on this host."""

from __future__ import annotations

from pathlib import Path

from . import executorch, onnx, openvino
from .contract import Target

TARGETS: dict[str, Target] = {target.name: target for target in (onnx.TARGET, openvino.TARGET, executorch.TARGET)}
"""Name -> what writes a model for a runtime and runs it there."""


def target_of(path: str | Path) -> Target | None:
    """The target of a file by its suffix; None where it is no exported file."""
    return next((target for target in TARGETS.values() if target.suffix == Path(path).suffix), None)
