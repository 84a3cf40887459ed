"""Image classification: cross entropy or binary cross entropy, with mixup, CutMix and label smoothing; top-1 and top-5 accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from .. import hub
from ..config import section
from ..data import (
    AnySource,
    Batch,
    DataConfig,
    DataSplits,
    ImageSource,
    Measured,
    Transforms,
    open_measured,
    open_splits,
)
from ..errors import UserError
from ..hub import CardFacts
from ..viz.matrix import confusion_matrix
from ..viz.predictions import annotate, captioned_grid
from ._augment import ImageAugment, Probability, image_transforms
from ._card import classification_card
from .contract import Evaluation, Metric, Section, Table, Task, mean_over_images

WORST = 24  # mistakes that are kept for the report
UNEQUAL = 2  # ratio of the largest to the smallest class from which on the run warns
MANY_CLASSES, FIRST_CLASSES = 12, 5  # number from which on a list of classes is shortened, and to how many
CONFUSION, MISTAKES = "confusion_matrix.png", "mistakes.png"


@section
class ClassificationAugment(ImageAugment):
    """Augmentation of single images (timm's transforms) and mixing of images within a batch (timm's Mixup)."""

    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of mixup's beta distribution (arXiv:1710.09412); 0 for none."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of CutMix's beta distribution (arXiv:1905.04899); 0 for none."""
    mix_prob: Probability = 1.0
    """Probability that a batch is mixed at all."""
    mix_switch_prob: Probability = 0.5
    """Probability of CutMix instead of mixup where both are on."""


@section
class ClassificationConfig:
    """Image classification."""

    kind: Literal["classification"] = "classification"
    """Kind of task."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing."""
    loss: Literal["ce", "bce"] = "ce"
    """Cross entropy, or binary cross entropy per class (arXiv:2110.00476)."""
    class_weights: bool = False
    """Weight each image's loss by the inverse frequency of its class in the training images."""


class Classification(Task):
    """One class per image.

    Args:
        num_classes: Number of classes.
        config: Loss.
        augment: Augmentation.
        labels: Class names in the order of the logits, saved with the model; None where the model has none.
        class_weights: (num_classes,) factors of each image's loss by its class; None for 1.
        shown: Names to show for the classes; None for `labels`, else their numbers.
    """

    Config = ClassificationConfig
    Augment = ClassificationAugment
    metrics = {"top1": Metric("top-1", "%"), "top5": Metric("top-5", "%")}  # noqa: RUF012
    logits_axis = 1

    def __init__(
        self,
        num_classes: int,
        config: ClassificationConfig | None = None,
        augment: ClassificationAugment | None = None,
        *,
        labels: Sequence[str] | None = None,
        class_weights: Tensor | None = None,
        shown: Sequence[str] | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.config, self.augment = config or ClassificationConfig(), augment or ClassificationAugment()
        self.labels = None if labels is None else tuple(labels)
        self.shown = tuple(shown or self.labels or map(str, range(num_classes)))
        self.class_weights = class_weights
        self.criterion = {"ce": _cross_entropy, "bce": _binary_cross_entropy}[self.config.loss]
        self.mixup = None
        if self.augment.mixup or self.augment.cutmix:
            self.mixup = Mixup(
                mixup_alpha=self.augment.mixup,
                cutmix_alpha=self.augment.cutmix,
                prob=self.augment.mix_prob,
                switch_prob=self.augment.mix_switch_prob,
                label_smoothing=self.config.smoothing,
                num_classes=num_classes,
            )

    # data

    @classmethod
    def open_splits(cls, data: DataConfig, img_mode: str) -> DataSplits:
        return open_splits(
            data.root,
            train_split=data.train_split,
            val_split=data.val_split,
            val_fraction=data.val_fraction,
            split_seed=data.split_seed,
            labels=data.labels,
            img_mode=img_mode,
        )

    @classmethod
    def open_measured(cls, data: DataConfig, split: str, record: Mapping[str, Any] | None, img_mode: str) -> Measured:
        return open_measured(data.root, split, record=record, labels=data.labels, img_mode=img_mode)

    @classmethod
    def for_training(
        cls, config: ClassificationConfig, augment: ClassificationAugment, splits: DataSplits
    ) -> Classification:
        names, train, weights = splits.class_names, splits.train, None
        if config.class_weights:
            if not isinstance(train, ImageSource):
                raise UserError(f"task.class_weights: {train.title} is a stream, its classes can't be counted")
            weights = balanced_weights(train.targets, len(names))
        return cls(len(names), config, augment, labels=names, class_weights=weights)

    @classmethod
    def for_model(cls, model: nn.Module) -> Classification:
        num_classes = int(getattr(model, "num_classes", 0) or 0)
        if not num_classes:
            raise UserError("the model has no classifier to predict with (num_classes is 0)")
        return cls(num_classes, labels=hub.label_names(model), shown=hub.class_names(model))

    def align(self, source: Any) -> AnySource:
        order = hub.class_order(source.class_names, self.labels, self.num_classes)
        return source.with_classes(self.labels or source.class_names, np.asarray(order, dtype=np.int32))

    def transforms(self, data_config: Mapping[str, Any]) -> Transforms:
        return image_transforms(self.augment, data_config)

    def data_notes(self, splits: DataSplits) -> list[str]:
        if not isinstance(splits.train, ImageSource):
            return [f"classes (not counted in a stream): {', '.join(_shortened(self.shown))}"]
        counts = np.bincount(splits.train.targets, minlength=self.num_classes)
        notes = [_class_note(self.shown, counts, splits.val)]
        if counts.max() >= UNEQUAL * counts.min():
            least, most = (f"{self.shown[i]!r} {counts[i]}" for i in (counts.argmin(), counts.argmax()))
            advice = "weighted" if self.config.class_weights else "task.class_weights=true weights them equally"
            notes.append(f"classes are imbalanced: {most} training images, {least} ({advice})")
        return notes

    # model

    def build(self, name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
        return hub.load(name, pretrained=pretrained, **{**kwargs, "num_classes": self.num_classes})

    @property
    def label_names(self) -> tuple[str, ...] | None:
        return self.labels

    def facts(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes}

    @property
    def scope(self) -> str:
        return f"{self.num_classes} classes"

    # objective

    def mix(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mixed images and target distributions (B, num_classes). Pairs are mixed; the last image of an odd batch stays as it is."""
        image, target, smoothing = batch.image, batch.target, self.config.smoothing
        paired = len(target) // 2 * 2
        if self.mixup is None or not paired:
            return image, mixup_target(target, self.num_classes, 1.0, smoothing)
        mixed, soft = self.mixup(image[:paired].clone(), target[:paired])
        rest = mixup_target(target[paired:], self.num_classes, 1.0, smoothing)
        return torch.cat([mixed, image[paired:]]), torch.cat([soft, rest])

    def objective(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss of logits against target distributions, both (B, num_classes); in float32 whatever the autocast type."""
        each = self.criterion(output.float(), target)  # (B,)
        if self.class_weights is not None:
            each = each * (target @ self.class_weights.to(target))
        return mean_over_images(each)

    def values(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"top1": 100 * (output.detach().argmax(1) == batch.target).float().mean()}

    # evaluation and presentation

    def evaluator(self, device: torch.device) -> ClassificationEvaluator:
        return ClassificationEvaluator(device)

    def sections(
        self, details: Mapping[str, Any], image_of: Callable[[int], tuple[str, Image.Image] | None], folder: Path | None
    ) -> list[Section]:
        cells = details["cells"]
        sections = [Section("Classes, weakest first", table=class_table(cells, self.shown))]
        if folder is not None:
            confusion_matrix(dense_counts(cells, self.num_classes), list(self.shown), folder / CONFUSION)
            sections.append(Section("Confusion matrix", figure=CONFUSION))
            drawn = self._draw_mistakes(details["mistakes"], image_of, folder / MISTAKES)
            text = "Wrong answers with the highest probability: often a wrong label, or two objects in one image."
            none = "None, or the images are not available (streams are read once)."
            sections.append(
                Section("Most confident mistakes", text if drawn else none, figure=MISTAKES if drawn else "")
            )
        return sections

    def _draw_mistakes(self, mistakes: Sequence[Sequence[float]], image_of: Callable, path: Path) -> bool:
        images, captions = [], []
        for probability, index, true, predicted in mistakes:
            found = image_of(int(index))
            if found is not None:
                images.append(found[1])
                captions.append(
                    (f"is {self.shown[int(true)]}", f"{100 * probability:.0f} % {self.shown[int(predicted)]}")
                )
        if images:
            captioned_grid(images, captions, path)
        return bool(images)

    @classmethod
    def card(cls, config: Mapping[str, Any]) -> CardFacts:
        return classification_card(config)

    # prediction

    def predict(self, output: Tensor, topk: int) -> list[list[dict[str, Any]]]:
        probabilities = output.float().softmax(dim=1)
        values, indices = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
        return [
            [
                {"rank": rank + 1, "label": self.shown[index], "index": index, "probability": probability}
                for rank, (index, probability) in enumerate(zip(best, row, strict=True))
            ]
            for best, row in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    def draw_prediction(self, image: Image.Image, rows: Sequence[Mapping[str, Any]]) -> Image.Image:
        return annotate(image, [row["label"] for row in rows], [row["probability"] for row in rows])


class ClassificationEvaluator:
    """Top-1, top-5 and loss, counts of (true class, predicted class), and the most confident mistakes.

    Memory is linear in the number of images, not quadratic in the number of classes.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, loss, top-1 hits, top-5 hits
        self.pairs: list[Tensor] = []  # (B, 2) true and predicted class, per batch
        self.worst = torch.full((WORST, 4), -1.0, dtype=torch.float64, device=device)  # rows as in `_worst_of`

    def update(self, output: Tensor, batch: Batch) -> None:
        logits, target = output.float(), batch.target
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == target[:, None]
        loss = F.cross_entropy(logits, target, reduction="sum")
        images = torch.tensor(float(len(target)), device=self.sums.device)
        self.sums += torch.stack([images, loss, hits[:, 0].sum(), hits.sum()])
        self.pairs.append(torch.stack([target, ranked[:, 0]], dim=1))
        self.worst = _worst_of(self.worst, logits, ranked[:, 0], target, batch.index)

    def totals(self) -> dict[str, Tensor]:
        return dict(zip(("images", "loss", "top1", "top5"), self.sums.unbind(), strict=True))

    def rows(self) -> list[Any]:
        cells = Counter(map(tuple, torch.cat(self.pairs).tolist())) if self.pairs else Counter()
        return [(cells, [row for row in self.worst.tolist() if row[0] >= 0])]

    def result(self, totals: Mapping[str, Tensor], rows: list[Any]) -> Evaluation:
        images = float(totals["images"])
        cells: Counter[tuple[int, int]] = Counter()
        mistakes: list[list[float]] = []
        for counted, worst in rows:
            cells.update(counted)
            mistakes += worst
        return Evaluation(
            images=int(images),
            metrics={
                "top1": 100 * float(totals["top1"]) / images,
                "top5": 100 * float(totals["top5"]) / images,
                "loss": float(totals["loss"]) / images,
            },
            details={
                "cells": [[true, predicted, count] for (true, predicted), count in sorted(cells.items())],
                "mistakes": sorted(mistakes, reverse=True)[:WORST],
            },
        )


def _class_note(names: Sequence[str], train: np.ndarray, val: AnySource) -> str:
    """The classes with their numbers of training and validation images; of many classes the first, the largest and the smallest."""
    held = np.bincount(val.targets, minlength=len(names)) if isinstance(val, ImageSource) else None
    shown = [f"{name} {train[i]}{'' if held is None else f'+{held[i]}'}" for i, name in enumerate(names)]
    note = f"classes (training{'' if held is None else '+validation'} images): {', '.join(_shortened(shown))}"
    if len(names) > MANY_CLASSES:
        note += f"; largest {shown[train.argmax()]}, smallest {shown[train.argmin()]}"
    return note


def _shortened(items: Sequence[str]) -> list[str]:
    return list(items) if len(items) <= MANY_CLASSES else [*items[:FIRST_CLASSES], f"... ({len(items)} classes)"]


def _worst_of(worst: Tensor, logits: Tensor, predicted: Tensor, target: Tensor, index: Tensor) -> Tensor:
    """The most confident mistakes, (WORST, 4), among those so far and a batch's; nothing is read back from the device.

    Rows are: probability of the wrong class (-1 for none), index of the image, true class, predicted class.
    """
    probability = logits.softmax(1).gather(1, predicted[:, None])[:, 0]
    probability = torch.where(predicted == target, -1.0, probability)
    columns = (probability, index.to(probability.device), target, predicted)
    rows = torch.cat([worst, torch.stack([column.double() for column in columns], dim=1)])
    return rows[rows[:, 0].topk(WORST).indices]


def balanced_weights(targets: np.ndarray, num_classes: int) -> Tensor:
    """(num_classes,) inverse class frequencies, scaled so that the mean over images is 1. A class without images gets 1."""
    counts = np.bincount(targets, minlength=num_classes)
    weights = np.where(counts, len(targets) / (num_classes * np.maximum(counts, 1)), 1.0)
    return torch.tensor(weights, dtype=torch.float32)


def dense_counts(cells: Sequence[Sequence[int]], num_classes: int) -> np.ndarray:
    """(C, C) image counts, rows are true classes, from [true, predicted, count] entries."""
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    for true, predicted, count in cells:
        counts[true, predicted] = count
    return counts


def per_class(cells: Sequence[Sequence[int]]) -> dict[int, dict[str, Any]]:
    """Class -> images, recall, precision and F1 in percent (None where undefined), and the class it is most often taken for.

    Args:
        cells: [true class, predicted class, count] entries.
    """
    true, predicted, hits = Counter[int](), Counter[int](), Counter[int]()
    confused: dict[int, tuple[int, int]] = {}  # true class -> (count, -predicted class)
    for t, p, count in cells:
        true[t] += count
        predicted[p] += count
        if t == p:
            hits[t] += count
        else:
            confused[t] = max(confused.get(t, (0, 0)), (count, -p))
    return {
        t: {
            "images": true[t],
            "recall": 100 * hits[t] / true[t],
            "precision": 100 * hits[t] / predicted[t] if predicted[t] else None,
            "f1": 200 * hits[t] / (true[t] + predicted[t]),
            "taken_for": -confused[t][1] if t in confused else None,
            "taken_for_images": confused[t][0] if t in confused else 0,
        }
        for t in sorted(true)
    }


def class_table(cells: Sequence[Sequence[int]], names: Sequence[str]) -> Table:
    """Per class that occurs: images, recall, precision, F1 and the most frequent confusion; lowest F1 first."""
    rows = sorted(per_class(cells).items(), key=lambda item: item[1]["f1"])
    head = ("class", "images", "recall, %", "precision, %", "F1, %", "most often taken for")
    return Table(
        head,
        [
            [
                names[index],
                row["images"],
                row["recall"],
                row["precision"],
                row["f1"],
                "" if row["taken_for"] is None else f"{names[row['taken_for']]} ({row['taken_for_images']})",
            ]
            for index, row in rows
        ],
    )


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(B,) losses."""
    return F.cross_entropy(logits, target, reduction="none")


def _binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(B,) losses, each the mean over classes."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
