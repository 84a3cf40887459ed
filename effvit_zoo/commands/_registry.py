"""What timm's registry knows of this package's models."""

from __future__ import annotations

import timm
from timm.models import get_arch_pretrained_cfgs, model_entrypoint


def model_names() -> list[str]:
    """Names of this package's models."""
    return timm.list_models("effzoo_*")


def family(name: str) -> str:
    """The module that defines a model, e.g. "swiftformer"."""
    return model_entrypoint(name).__module__.rpartition(".")[2]


def weight_tags(name: str) -> list[str]:
    """Tags of a model's published weights."""
    return [cfg.tag or "default" for cfg in get_arch_pretrained_cfgs(name).values() if cfg.has_weights]
