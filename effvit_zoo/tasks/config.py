"""Settings of classification and of knowledge distillation."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from ..config import section

Share = Annotated[float, Field(ge=0, le=1)]


def _ascending(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 < values[0] <= values[1]:
        raise ValueError("expected 0 < low <= high")
    return values


def _ascending_shares(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 < values[0] <= values[1] <= 1:
        raise ValueError("expected 0 < low <= high <= 1")
    return values


@section
class AugmentConfig:
    """Augmentation of single images (timm's transforms) and mixing of the images of a batch (timm's Mixup)."""

    scale: Annotated[tuple[float, float], AfterValidator(_ascending_shares)] = (0.08, 1.0)
    """Range of the random crop's area, as a share of the image's."""
    ratio: Annotated[tuple[float, float], AfterValidator(_ascending)] = (0.75, 4 / 3)
    """Range of the random crop's aspect ratio, width over height."""
    hflip: Share = 0.5
    """Probability of a horizontal flip."""
    vflip: Share = 0.0
    """Probability of a vertical flip."""
    color_jitter: float = 0.0
    """Strength of random brightness, contrast and saturation."""
    auto_augment: str | None = None
    """timm's policy string, e.g. `rand-m9-mstd0.5-inc1`; null for none."""
    random_erasing: Share = 0.0
    """Probability that a random rectangle of an image is erased."""
    erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    """Fill of erased rectangles: zeros, one random color, or a random color per pixel."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Mixup's alpha; 0 for no mixup."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """CutMix's alpha; 0 for no CutMix."""
    mix_prob: Share = 1.0
    """Probability that a batch is mixed."""
    mix_switch_prob: Share = 0.5
    """Probability of CutMix rather than mixup where both are on."""


@section
class ClassificationConfig:
    """Image classification: one class for each image."""

    kind: Literal["classification"] = "classification"
    """Kind of task."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing."""
    loss: Literal["ce", "bce"] = "ce"
    """Loss function: cross entropy, or binary cross entropy of each class."""
    class_weights: bool = False
    """Weighting of each image's loss by the inverse of its class's share of the training images."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation of the training images."""


@section
class DistillConfig:
    """Knowledge distillation from a trained teacher."""

    teacher: str | None = None
    """Teacher model, named as in `model.name`, with its weights; null for no distillation."""
    teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further constructor arguments of the teacher."""
    kind: Literal["hard", "soft", "token"] = "hard"
    """Target: the teacher's most probable class (`hard`), its probabilities (`soft`), or as `hard` but learned by the student's own
    distillation classifier (`token`; SwiftFormer and distilled DeiT)."""
    alpha: Share = 0.5
    """Weight of the teacher's part in the loss."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softmax temperature for `soft`."""
