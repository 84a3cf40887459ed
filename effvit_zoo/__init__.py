"""effvit_zoo: efficient vision transformers in timm's registry. Importing this package registers every `effzoo_*` model."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from . import models as models
from .export.optimize import optimize_for_inference as optimize_for_inference
from .models import swap_attention as swap_attention
from .models import to_dense as to_dense
from .models import to_tosa as to_tosa
from .version import __version__ as __version__

__all__ = [
    "__version__",
    "create_model",
    "list_models",
    "optimize_for_inference",
    "swap_attention",
    "to_dense",
    "to_tosa",
]


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model` with this package's models known: a model name, `local-dir:FOLDER` or `hf-hub:USER/NAME`."""
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def list_models(filter: str = "effzoo_*", pretrained: bool = False) -> list[str]:
    """Names of this package's models that match a wildcard; with `pretrained`, the `model.tag` names that have weights."""
    return [n for n in timm.list_models(filter, pretrained=pretrained) if n.startswith("effzoo_")]
