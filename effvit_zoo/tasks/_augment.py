"""Augmentation of single images by timm's transforms, for tasks whose target doesn't change with the image."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from timm.data import create_transform
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

from ..config import section
from ..data import Transforms, image_only, validation_transform
from .contract import Augment

POLICIES = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
"""First part of a policy string -> timm's parser; the others are `auto_augment_transform`'s."""

Probability = Annotated[float, Field(ge=0, le=1)]


def _known_policy(policy: str | None) -> str | None:
    if policy is None:
        return None
    expected = "expected a policy of timm such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original or v0"
    kind, *parts = policy.split("-")
    # timm ignores a part without a number, e.g. the "foo" of rand-foo
    if any(
        re.fullmatch(r"t\w+" if kind == "rand" and part[:1] == "t" else r"[a-z]+\d+(\.\d+)?", part) is None
        for part in parts
    ):
        raise ValueError(expected)
    try:
        POLICIES.get(kind, auto_augment_transform)(policy, {"translate_const": 1, "img_mean": (0, 0, 0)})
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(expected) from error
    return policy


@section
class ImageAugment(Augment):
    """Settings of timm's training transform."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop as a share of the image: smallest and largest."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Aspect ratio of the random crop: smallest and largest."""
    hflip: Probability = 0.5
    """Probability of a horizontal flip."""
    vflip: Probability = 0.0
    """Probability of a vertical flip."""
    color_jitter: Annotated[float, Field(ge=0)] = 0.0
    """Strength of random brightness, contrast and saturation; without effect where `auto_augment` is on, as in timm."""
    auto_augment: Annotated[str | None, AfterValidator(_known_policy)] = None
    """timm's policy string, e.g. rand-m9-mstd0.5-inc1; None for none."""
    random_erasing: Probability = 0.0
    """Probability of erasing a rectangle."""
    erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    """Content of the erased rectangle: zeros, one random colour, or random pixels."""

    def idle(self) -> set[str]:
        return super().idle() | ({"erasing_mode"} if not self.random_erasing else set())

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: got {list(self.scale)}, expected 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio: got {list(self.ratio)}, expected 0 < low <= high")


def image_transforms(augment: ImageAugment, data_config: Mapping[str, Any]) -> Transforms:
    """Training and validation transforms of images whose targets stay as they are.

    Args:
        augment: Settings of the training transform, and the side lengths of multi-scale training.
        data_config: timm's preprocessing settings.
    """
    # 0.0 would build a transform that changes nothing; timm takes None, which its annotation leaves out
    color_jitter: Any = augment.color_jitter or None
    make = functools.partial(
        create_transform,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        re_prob=augment.random_erasing,
        re_mode=augment.erasing_mode,
    )
    channels = data_config["input_size"][0]
    return Transforms(
        train=image_only(make(input_size=data_config["input_size"])),
        val=image_only(validation_transform(data_config)),
        sized={size: image_only(make(input_size=(channels, size, size))) for size in augment.sizes},
    )
