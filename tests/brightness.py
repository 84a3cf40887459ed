"""A task that the package doesn't know: regression of an image's mean brightness. It needs this file and a row of `TASKS`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from effvit_zoo import hub
from effvit_zoo.config import section
from effvit_zoo.data import open_measured, open_splits
from effvit_zoo.tasks import Evaluation, Metric, Section, Table, Task, mean_over_images
from effvit_zoo.tasks._augment import ImageAugment, image_transforms


@section
class BrightnessConfig:
    """Regression of the mean brightness."""

    kind: Literal["brightness"] = "brightness"
    """Kind of task."""
    power: float = Field(default=2.0, gt=0)
    """Exponent of the error in the loss."""


class Labelled:
    """A source whose targets are the brightness of its images, from 0 to 1."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> tuple[Any, float]:
        image, _ = self.source.load(index)
        return image, float(np.asarray(image).mean() / 255)


class Brightness(Task):
    Config = BrightnessConfig
    metrics: ClassVar = {"mae": Metric("mean error", higher_is_better=False, digits=4)}

    def __init__(self, config: BrightnessConfig | None = None) -> None:
        self.config = config or BrightnessConfig()

    @classmethod
    def open_splits(cls, data, img_mode):
        splits = open_splits(data.root, val_fraction=data.val_fraction, split_seed=data.split_seed, img_mode=img_mode)
        return replace(splits, train=Labelled(splits.train), val=Labelled(splits.val))

    @classmethod
    def open_measured(cls, data, split, record, img_mode):
        measured = open_measured(data.root, split, record=record, img_mode=img_mode)
        return replace(measured, source=Labelled(measured.source))

    @classmethod
    def for_training(cls, config, augment, splits):
        return cls(config)

    @classmethod
    def for_model(cls, model: nn.Module):
        return cls()

    def transforms(self, data_config):
        return image_transforms(ImageAugment(scale=(1, 1), ratio=(1, 1)), data_config)

    def build(self, name, pretrained, kwargs):
        return hub.load(name, pretrained=pretrained, **{**kwargs, "num_classes": 1})

    def objective(self, output: Tensor, target: Tensor) -> Tensor:
        return mean_over_images((output[:, 0] - target).abs() ** self.config.power)

    def values(self, output, batch):
        return {"mae": (output.detach()[:, 0] - batch.target).abs().mean()}

    def evaluator(self, device):
        return BrightnessEvaluator()

    def sections(self, details, image_of, folder):
        rows = [[index, error] for error, index in details["worst"]]
        return [Section("Largest errors", table=Table(("image", "error"), rows))]

    @classmethod
    def card(cls, config):
        return hub.CardFacts(
            pipeline_tag="image-feature-extraction",
            task_title="Brightness",
            metrics={"mae": ("Mean absolute error", "mae")},
            introduction="for the mean brightness of an image",
            sections=(),
            usage=lambda place: (
                f'import effvit_zoo\nmodel = effvit_zoo.create_model("hf-hub:{place}", pretrained=True)\n'
            ),
            figures={},
        )

    def predict(self, output, topk):
        return [[{"brightness": value}] for value in output[:, 0].tolist()]


class BrightnessEvaluator:
    def __init__(self) -> None:
        self.errors: list[tuple[float, int]] = []
        self.squares = torch.zeros((), dtype=torch.float64)

    def update(self, output, batch):
        errors = (output[:, 0] - batch.target).abs()
        self.squares += errors.square().sum()
        self.errors += zip(errors.tolist(), batch.index.tolist(), strict=True)

    def totals(self):
        return {"images": torch.tensor(float(len(self.errors))), "loss": self.squares}

    def rows(self):
        return self.errors

    def result(self, totals, rows):
        images = int(totals["images"])
        metrics = {"mae": sum(error for error, _ in rows) / images, "loss": float(totals["loss"]) / images}
        return Evaluation(images, metrics, {"worst": sorted(rows, reverse=True)[:3]})
