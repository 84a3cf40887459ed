"""Knowledge distillation: a trained teacher's output is a further target, hard, soft, or for a classifier of its own ("token").

"Distilling the Knowledge in a Neural Network", arXiv:1503.02531 (soft), and "Training data-efficient image transformers &
distillation through attention", arXiv:2012.12877 (hard, token); losses as in facebookresearch/deit @ 0282d2a, Apache-2.0. Works for
every task whose outputs are logits of classes along one axis.

Deliberate differences: the teacher sees the images in its own size and normalisation, whatever the student's; its classes are
matched by name where both sides have names; the soft loss is a mean over images as in the first paper (DeiT's code divides by
the number of classes too); "token" needs no token, only a model of timm's convention `set_distilled_training`, such as SwiftFormer
with its second classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.data import resolve_data_config
from timm.models import get_model_input_config
from torch import Tensor, nn

from .. import hub
from ..config import section
from ..data import Batch
from ..errors import UserError
from .contract import Task


@section
class DistillConfig:
    """Knowledge distillation from a trained teacher."""

    teacher: str | None = None
    """Teacher, a model as in model.name, with its weights; None for no distillation."""
    teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further constructor arguments of the teacher."""
    classes: Literal["name", "position"] = "name"
    """How the teacher's classes correspond to the data's."""
    kind: Literal["hard", "soft", "token"] = "hard"
    """Target from the teacher: its first choice (hard), its probabilities (soft), or its first choice for the student's own
    distillation classifier (token: SwiftFormer, distilled DeiT)."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the teacher in the loss."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softmax temperature for kind=soft."""


class Teacher:
    """A frozen classifier, applied to the student's batches.

    Args:
        model: Images to logits.
        student_config: timm's preprocessing settings that the batches were made with (input_size, mean, std).
        class_names: The student's classes, by index.
        precision: "no", "bf16" or "fp16", the type that the teacher computes in.
        by_position: Class number n of the student is number n of the teacher, whatever the names.

    Attributes:
        note: How classes are compared, where the user should know it; else "".

    Raises:
        UserError: The teacher doesn't know the classes.
    """

    def __init__(
        self,
        model: nn.Module,
        student_config: Mapping[str, Any],
        class_names: Sequence[str],
        precision: str = "no",
        by_position: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        config = resolve_data_config({}, model=model)
        self.size: tuple[int, int] = tuple(
            get_model_input_config(model)["input_size"][1:]
        )  # that of `img_size` if it was given
        self.channels = int(config["input_size"][0])
        if self.channels not in (1, 3):
            raise UserError(f"the teacher takes {self.channels} channels, expected 3 (RGB) or 1 (grey)")
        num_classes = int(getattr(model, "num_classes", 0))
        order, self.note = hub.class_order(
            class_names,
            hub.known_names(model),
            num_classes,
            by_position=by_position,
            whose="the teacher",
            option="distill.classes=position",
        )
        self.order = None if order == tuple(range(num_classes)) else torch.tensor(order)
        # x * std + mean undoes the student's normalisation, and the teacher's is put in its place
        mean, std = _column(student_config["mean"]), _column(student_config["std"])
        own_mean, own_std = _column(config["mean"]), _column(config["std"])
        self.undo, self.redo = (std, mean), (own_std, own_mean)

    def __call__(self, images: Tensor) -> Tensor:
        """The student's normalised images (B, C, H, W) -> the teacher's logits (B, num_classes, ...), float32, in the student's order."""
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
    """Objective around a task: a share of the loss comes from a teacher, which is outside what is trained and saved.

    Args:
        task: Student's loss on the labels, and mixing.
        teacher: Model that answers for the same (mixed) images.
        config: Kind, share and temperature.

    Raises:
        UserError: The task's outputs are not logits.
    """

    def __init__(self, task: Task, teacher: Teacher, config: DistillConfig) -> None:
        if task.logits_axis is None:
            raise UserError("distill.teacher: the outputs of this task are not logits of classes, expected null")
        self.task, self.teacher, self.config, self.axis = task, teacher, config, task.logits_axis
        self.compared = teacher.note  # how the teacher's outputs correspond, for the user
        self.loss_title = "labels and teacher"

    def trainable(self, model: nn.Module) -> nn.Module:
        if self.config.kind == "token":
            if not hasattr(model, "set_distilled_training"):
                raise UserError(
                    f"distill.kind is token, but {type(model).__name__} has no classifier for the teacher: expected hard or soft"
                )
            model.set_distilled_training(True)  # type: ignore[operator]
        return self.task.trainable(model)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = self.task.mix(batch)
        answer = model(image)
        output, learner = answer if isinstance(answer, tuple) else (answer, answer)
        kind, temperature, alpha = self.config.kind, self.config.temperature, self.config.alpha
        taught = distillation_loss(learner.float(), self.teacher(image), kind, temperature, self.axis)
        labelled = self.task.objective(output, target)
        return (1 - alpha) * labelled + alpha * taught, self.task.values(output, batch)


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, kind: str, temperature: float = 1.0, axis: int = 1
) -> Tensor:
    """Mean loss of logits against a teacher's, both with C classes along `axis`: (B, C) or (B, C, H, W).

    Soft is T^2 KL(teacher || student) of softmaxes at temperature T; hard is the cross entropy with the teacher's first choice.
    All images count alike, and within an image all pixels.
    """
    if kind == "soft":
        teacher = F.log_softmax(teacher_logits / temperature, dim=axis)
        student = F.log_softmax(logits / temperature, dim=axis)
        elements = logits.numel() // logits.shape[axis]
        return F.kl_div(student, teacher, reduction="sum", log_target=True) / elements * temperature**2
    return F.cross_entropy(logits.movedim(axis, 1), teacher_logits.argmax(axis))


def load_teacher(
    config: DistillConfig, student_config: Mapping[str, Any], labels: Sequence[str], precision: str = "no"
) -> Teacher:
    """The teacher that a config names, with its weights. Raises `UserError`."""
    if config.teacher is None:
        raise ValueError("expected distill.teacher to name a model, got None")
    model = hub.load(config.teacher, pretrained=True, **config.teacher_kwargs)
    return Teacher(model, student_config, labels, precision, config.classes == "position")


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)
