"""Models for deployment: exported files in other runtimes, and the fastest form on this host."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from . import coreml, executorch, litert, onnx, openvino, torch_export
from .contract import Target

TARGETS: dict[str, Target] = {
    row.TARGET.name: row.TARGET for row in (onnx, openvino, executorch, coreml, litert, torch_export)
}
"""Name -> what writes a model for a runtime and runs it there."""


def target_of(path: str | Path) -> Target | None:
    """The target of a file by its suffix; None where it is no exported file."""
    return next((target for target in TARGETS.values() if target.suffix == Path(path).suffix), None)


class _Export(ModuleType):
    """This package as a function, so that `effvit_zoo.export(model, targets)` is what its name says."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`folder.export_model`."""
        from .folder import export_model

        return export_model(*args, **kwargs)


sys.modules[__name__].__class__ = _Export
