"""Models of this package that are timm's in disguise: what is pushed of them names timm's architecture, so that plain timm loads it.

A twin has the same parameters under the same names and gives the same logits for the weights at hand, which is tried, not assumed. The
config.json that is pushed then names timm's model, with ours beside it in `ARCHITECTURE_KEY`, which the loaders of this package prefer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import is_model

PREFIX = "effzoo_"
OTHER_NAMES = {f"effzoo_vit_{size}": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
"""Models whose twin in timm has another name than theirs without the prefix."""

TOLERANCE = 1e-5  # of logits, relative to the largest


def twin_of(architecture: str) -> str | None:
    """The name of timm's model of the same architecture, None where there is none by name."""
    name = OTHER_NAMES.get(architecture, architecture.removeprefix(PREFIX))
    return name if architecture.startswith(PREFIX) and is_model(name) else None


def proven_twin(model: Any, config: Mapping[str, Any]) -> str | None:
    """The name of timm's model that is equal to a model with its weights; None where there is none.

    Args:
        model: The model, on the CPU.
        config: Content of its config.json.
    """
    name = twin_of(str(config["architecture"]))
    if name is None:
        return None
    args = {**(config.get("model_args") or {}), "num_classes": model.num_classes}
    try:
        twin = timm.create_model(name, **args)
        twin.load_state_dict(model.state_dict())
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return None  # an argument, e.g. a mixer, or a parameter that timm's doesn't have
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = model.eval()(images), twin.eval()(images)
    return name if bool((ours - theirs).abs().max() <= TOLERANCE * ours.abs().max().clamp_min(1)) else None
