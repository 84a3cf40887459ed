"""What is learned: a task holds the trained model and turns a batch into a loss. One engine runs all of them.

Contract: `task.model` is the only module that is trained, wrapped and saved; `task.loss(batch)` returns the batch's mean
loss, a scalar, and a dict of further batch means to report. Teachers and mixing live in the task, outside the checkpoint.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from ..data.loader import Batch
from ..training.config import AugmentConfig, TrainConfig


class Task(Protocol):
    model: nn.Module

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]: ...


class Classification:
    """Image classification by cross entropy or binary cross entropy, with mixup, cutmix and label smoothing.

    Args:
        model: Images (B, 3, H, W) to logits (B, num_classes).
        num_classes: Number of classes.
        smoothing: Label smoothing.
        loss: "ce" or "bce" (each class its own yes or no, as in "ResNet strikes back", arXiv:2110.00476).
        augment: Mixing of images; None for none.
        class_weights: (num_classes,) factors of each image's loss by its class; None for 1.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        smoothing: float = 0.0,
        loss: str = "ce",
        augment: AugmentConfig | None = None,
        class_weights: Tensor | None = None,
    ):
        self.model = model
        self.num_classes = num_classes
        self.smoothing = smoothing
        self.criterion = {"ce": _cross_entropy, "bce": _binary_cross_entropy}[loss]
        self.class_weights = class_weights
        self.mixup = None
        if augment is not None and (augment.mixup or augment.cutmix):
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                label_smoothing=smoothing,
                num_classes=num_classes,
            )

    @classmethod
    def from_config(
        cls,
        model: nn.Module,
        num_classes: int,
        train: TrainConfig,
        augment: AugmentConfig,
        class_weights: Tensor | None = None,
    ) -> Classification:
        return cls(
            model,
            num_classes,
            smoothing=train.smoothing,
            loss=train.loss,
            augment=augment,
            class_weights=class_weights,
        )

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = batch["image"], batch["target"]
        image, soft_target = self.mix(image, target)
        logits = self.model(image).float()  # cross entropy wants fp32 logits whatever the autocast type
        return self.label_loss(logits, soft_target), {"top1": top1(logits, target)}

    def label_loss(self, logits: Tensor, soft_target: Tensor) -> Tensor:
        """Mean loss of logits against target distributions, both (B, num_classes)."""
        each = self.criterion(logits, soft_target)  # (B,)
        if self.class_weights is not None:
            each = each * (soft_target @ self.class_weights.to(soft_target))
        return each.mean()

    def mix(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images and target distributions (B, num_classes). Pairs are mixed; of an odd batch the last image stays as it is."""
        paired = len(target) // 2 * 2
        if self.mixup is None or not paired:
            return image, mixup_target(target, self.num_classes, 1.0, self.smoothing)
        mixed, soft = self.mixup(image[:paired].clone(), target[:paired])
        rest = mixup_target(target[paired:], self.num_classes, 1.0, self.smoothing)
        return torch.cat([mixed, image[paired:]]), torch.cat([soft, rest])


def top1(logits: Tensor, target: Tensor) -> Tensor:
    """Percentage of the batch whose largest logit is the target's."""
    return 100 * (logits.detach().argmax(1) == target).float().mean()


def balanced_weights(targets: np.ndarray, num_classes: int) -> Tensor:
    """(num_classes,) the inverse of each class' share, times 1 / num_classes: all classes weigh the same, the mean image 1.

    A class without images gets 1.
    """
    counts = np.bincount(targets, minlength=num_classes)
    weights = np.where(counts, len(targets) / (num_classes * np.maximum(counts, 1)), 1.0)
    return torch.tensor(weights, dtype=torch.float32)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(B,) losses."""
    return F.cross_entropy(logits, target, reduction="none")


def _binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(B,) losses, each the mean over classes."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
