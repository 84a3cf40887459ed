"""Transforms of samples: (image, target) -> (tensor, target)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from PIL import Image
from timm.data import create_transform
from torch import Tensor


class Transform(Protocol):
    """A picklable function of an image and its target. Random numbers come from Python's, numpy's and torch's global generators,
    which are seeded for every training sample."""

    def __call__(self, image: Image.Image, target: Any) -> tuple[Tensor, Any]:
        """The image as a tensor (C, H, W) and the target as `torch.utils.data.default_collate` takes it."""


class Transforms(NamedTuple):
    """The transforms of a run.

    Attributes:
        train: For training.
        val: For validation.
        sized: Side length in pixels -> training transform to that size, for multi-scale training.
    """

    train: Transform
    val: Transform
    sized: Mapping[int, Transform] = {}


@dataclass(frozen=True)
class _ImageOnly:
    transform: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image, target: Any) -> tuple[Tensor, Any]:
        return self.transform(image), target


def image_only(transform: Callable[[Image.Image], Tensor]) -> Transform:
    """A transform of the image alone, such as timm's, as a transform of samples."""
    return _ImageOnly(transform)


def validation_transform(data_config: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform for timm's preprocessing settings: PIL image -> tensor (C, H, W)."""
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(**{key: data_config[key] for key in keys})
