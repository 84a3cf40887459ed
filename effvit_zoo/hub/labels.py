"""Class labels of models: which ones a model has, how they are shown, and how the classes of a data set map to them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from ..errors import UserError


def label_names(model_or_cfg: nn.Module | Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names in the order of the logits, or None where the model (or its `pretrained_cfg`) has none that fit it."""
    if isinstance(model_or_cfg, nn.Module):
        cfg = getattr(model_or_cfg, "pretrained_cfg", None) or {}
        num_classes = getattr(model_or_cfg, "num_classes", cfg.get("num_classes"))
    else:
        cfg, num_classes = model_or_cfg, model_or_cfg.get("num_classes")
    names = cfg.get("label_names")
    if isinstance(names, Mapping):  # index -> name, with JSON's string keys
        by_index = {int(index): str(label) for index, label in names.items()}
        names = [by_index.get(index, str(index)) for index in range(num_classes or len(by_index))]
    if not names or (num_classes is not None and len(names) != num_classes):
        return None
    return tuple(map(str, names))


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Display name of each logit: the model's own labels, ImageNet's for a head of its size, else the indices."""
    names = label_names(model)
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    if names is not None:
        described = cfg.get("label_descriptions") or {}
        if not described and (subset := infer_imagenet_subset(model)):
            described = ImageNetInfo(subset).label_descriptions(as_dict=True)  # for labels that are WordNet ids
        return tuple(str(described.get(name, name)) for name in names)
    if subset := infer_imagenet_subset(model):
        return tuple(ImageNetInfo(subset).label_descriptions())
    return tuple(str(index) for index in range(getattr(model, "num_classes", 0)))


def class_order(source_classes: tuple[str, ...], labels: tuple[str, ...] | None, num_classes: int) -> list[int]:
    """The model's class index for each class of the data: by name where both have names, else by position.

    Args:
        source_classes: Class names of the data.
        labels: Class names of the model, None where it has none.
        num_classes: Number of the model's classes.

    Raises:
        UserError: The data has a class that the model doesn't know.
    """
    if labels is not None:
        source_classes = tuple(unicodedata.normalize("NFC", name) for name in source_classes)
        places = {unicodedata.normalize("NFC", name): index for index, name in enumerate(labels)}
        strange = [name for name in source_classes if name not in places]
        if not strange:
            return [places[name] for name in source_classes]
        if any(name in places for name in source_classes) or len(source_classes) != num_classes:
            raise UserError(
                f"the model doesn't know {len(strange)} of the data's {len(source_classes)} classes, the first is {strange[0]!r}"
            )
    if len(source_classes) > num_classes:
        raise UserError(f"the data has {len(source_classes)} classes, the model {num_classes}")
    return list(range(len(source_classes)))
