"""Learning from a trained model beside the labels: hard, soft and by a classifier of its own ("token").

"Distilling the Knowledge in a Neural Network", arXiv:1503.02531 (soft), and "Training data-efficient image transformers &
distillation through attention", arXiv:2012.12877 (hard, token); losses as in facebookresearch/deit @ 0282d2a, Apache-2.0.

Deliberate differences: the teacher sees the images in its own size and normalisation, whatever the student's; its classes are
matched by name where both sides have names; the soft loss is a mean over images as in the first paper (DeiT's code divides by
the number of classes too); "token" needs no token, only a model of timm's convention
`set_distilled_training`, such as SwiftFormer with its second classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn

from .. import hub
from ..data.loader import Batch
from ..errors import UserError
from ..evaluation.compare import class_order
from ..training.config import DistillConfig
from .classification import Classification, top1


class Teacher:
    """A frozen classifier that is asked with the student's batches.

    Args:
        model: Images to logits.
        student_config: timm's preprocessing settings that the batches were made with (input_size, mean, std).
        class_names: The student's classes, by index.
        precision: "no", "bf16" or "fp16", what the teacher computes in.

    Raises:
        UserError: The teacher doesn't know the classes.
    """

    def __init__(
        self, model: nn.Module, student_config: Mapping[str, Any], class_names: Sequence[str], precision: str = "no"
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        config = resolve_data_config({}, model=model)
        self.size: tuple[int, int] = tuple(config["input_size"][1:])
        self.channels = int(config["input_size"][0])
        if self.channels not in (1, 3):
            raise UserError(f"the teacher takes {self.channels} channels, expected 3 (RGB) or 1 (grey)")
        num_classes = int(getattr(model, "num_classes", 0))
        if num_classes < len(class_names):
            raise UserError(f"the teacher knows {num_classes} classes, the data has {len(class_names)}")
        labels = hub.label_names(model)
        if labels is None and num_classes != len(class_names):
            raise UserError(
                f"the teacher knows {num_classes} classes without their names, the data has {len(class_names)}: expected as many"
            )
        order = class_order(tuple(class_names), labels, num_classes)
        self.order = None if order == list(range(num_classes)) else torch.tensor(order)
        # x * std + mean undoes the student's normalisation, and the teacher's is put in its place
        mean, std = _column(student_config["mean"]), _column(student_config["std"])
        own_mean, own_std = _column(config["mean"]), _column(config["std"])
        self.undo, self.redo = (std, mean), (own_std, own_mean)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) of the student -> the teacher's logits (B, num_classes), in fp32, in the student's order."""
        device = images.device
        self.model.to(device)
        with torch.no_grad():
            std, mean = (each.to(device) for each in self.undo)
            images = images.float() * std + mean
            if images.shape[1] != self.channels:
                images = images.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
            if tuple(images.shape[2:]) != self.size:
                images = F.interpolate(images, self.size, mode="bicubic", antialias=True, align_corners=False)
            std, mean = (each.to(device) for each in self.redo)
            images = (images.clamp(0, 1) - mean) / std
            with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
                logits = self.model(images)
            logits = logits.float()
            return logits if self.order is None else logits[:, self.order.to(device)]


class Distillation:
    """Classification in which a share of the loss comes from a teacher. The teacher is outside what is trained and saved.

    Args:
        classification: Student, labels' loss and mixing.
        teacher: What answers for the same (mixed) images.
        config: Kind, share and temperature.

    Raises:
        UserError: "token" with a model that has no classifier for the teacher.
    """

    def __init__(self, classification: Classification, teacher: Teacher, config: DistillConfig) -> None:
        self.classification, self.teacher, self.config = classification, teacher, config
        if config.kind == "token":
            model: Any = classification.model
            if not hasattr(model, "set_distilled_training"):
                raise UserError(
                    f"distill.kind is token, but {type(model).__name__} has no classifier for the teacher: expected hard or soft"
                )
            model.set_distilled_training(True)

    @property
    def model(self) -> nn.Module:
        return self.classification.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self.classification.model = model

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = batch["image"], batch["target"]
        image, soft_target = self.classification.mix(image, target)
        answer = self.model(image)
        logits, learner = answer if isinstance(answer, tuple) else (answer, answer)
        logits, learner = logits.float(), learner.float()
        taught = distillation_loss(learner, self.teacher(image), self.config.kind, self.config.temperature)
        labelled = self.classification.label_loss(logits, soft_target)
        alpha = self.config.alpha
        return (1 - alpha) * labelled + alpha * taught, {"top1": top1(logits, target)}


def distillation_loss(logits: Tensor, teacher_logits: Tensor, kind: str, temperature: float = 1.0) -> Tensor:
    """Mean loss of logits against a teacher's, both (B, C).

    Soft is T^2 KL(teacher || student) of softmaxes at temperature T; hard is the cross entropy with the teacher's first choice.
    """
    if kind == "soft":
        teacher = F.log_softmax(teacher_logits / temperature, dim=1)
        student = F.log_softmax(logits / temperature, dim=1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
    return F.cross_entropy(logits, teacher_logits.argmax(1))


def load_teacher(
    config: DistillConfig, student_config: Mapping[str, Any], class_names: Sequence[str], precision: str = "no"
) -> Teacher:
    """The teacher that a config names, with its weights. Raises `UserError`."""
    if config.teacher is None:
        raise ValueError("expected distill.teacher to name a model, got None")
    model = hub.load(config.teacher, pretrained=True, **config.teacher_kwargs)
    return Teacher(model, student_config, class_names, precision)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)
