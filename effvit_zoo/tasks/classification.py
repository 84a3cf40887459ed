"""Image classification: cross entropy or binary cross entropy, with mixup, CutMix and label smoothing; top-1 and top-5 accuracy."""

from __future__ import annotations

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
from ..viz.fonts import is_drawable, undrawable
from ..viz.matrix import confusion_matrix
from ..viz.predictions import annotate
from ._augment import ImageAugment, Probability, image_transforms
from ._card import classification_card
from ._classification_evaluator import ClassificationEvaluator
from ._linear_probe import LinearProbe
from ._scores import TOP5_FROM, dense_counts, paired_interval, per_class, wilson_interval
from .contract import Difference, Metric, Picture, Section, Table, Task, mean_over_images

SPELT = 20  # names in a note
ISOLATE, POP = "\u2068", "\u2069"  # around a name, whose script may run from right to left
UNEQUAL = 2  # ratio of the largest to the smallest class from which on the run warns
MANY_CLASSES, FIRST_CLASSES = 12, 5  # number from which on a list of classes is shortened, and to how many
MATRIX_UP_TO = 300  # classes up to which the confusion matrix is drawn, of which more couldn't be told apart
TABLE_UP_TO = 200  # classes in a table: the weakest
CONFUSION = "confusion_matrix.png"


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

    def idle(self) -> set[str]:
        switch = set() if self.mixup and self.cutmix else {"mix_switch_prob"}
        return super().idle() | switch | (set() if self.mixup or self.cutmix else {"mix_prob"})


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
    classes: Literal["name", "position"] = "name"
    """How the classes of weights to start from correspond to the data's: the classifier keeps the rows of classes that both have."""


class Classification(Task):
    """One class per image.

    Args:
        num_classes: Number of classes.
        config: Loss.
        augment: Augmentation.
        labels: Class names in the order of the logits, saved with the model; None where the model has none.
        class_weights: (num_classes,) factors of each image's loss by its class; None for 1.
        shown: Names to show for the classes; None for `labels`, else their numbers.
        known: Lists of names by which data may mean the classes, see `hub.known_names`; the first are labels where there are no others.
    """

    Config = ClassificationConfig
    Augment = ClassificationAugment
    metrics = {  # noqa: RUF012
        "top1": Metric("top-1", "%", is_share=True),
        "top5": Metric("top-5", "%"),
        "macro_f1": Metric("macro-F1", "%"),
    }
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
        known: Sequence[Sequence[str]] = (),
    ) -> None:
        self.num_classes = num_classes
        if num_classes < TOP5_FROM:
            self.metrics = {name: metric for name, metric in self.metrics.items() if name != "top5"}
        self.config, self.augment = config or ClassificationConfig(), augment or ClassificationAugment()
        self.labels = tuple(labels or next(iter(known), ())) or None
        self.shown = tuple(shown or self.labels or map(str, range(num_classes)))
        self.known = (self.labels, *known)
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
        if not (num_classes := int(getattr(model, "num_classes", 0) or 0)):
            raise UserError("the model has no classifier to predict with (num_classes is 0)")
        return cls(num_classes, shown=hub.class_names(model), known=hub.known_names(model))

    def align(self, source: Any, by_position: bool = False) -> tuple[AnySource, str]:
        options: dict[str, Any] = {"by_position": by_position, "as_many": False, "option": "--classes position"}
        order, note = hub.class_order(source.class_names, self.known, self.num_classes, **options)
        return source.with_classes(self.labels or source.class_names, np.asarray(order, dtype=np.int32)), note

    def transforms(self, data_config: Mapping[str, Any]) -> Transforms:
        return image_transforms(self.augment, data_config)

    def data_notes(self, splits: DataSplits) -> list[str]:
        notes = self.picture_notes()
        if not isinstance(splits.train, ImageSource):
            return [f"classes (not counted in a stream): {', '.join(_shortened(self.shown))}", *notes]
        counts = np.bincount(splits.train.targets, minlength=self.num_classes)
        notes.insert(0, _class_note(self.shown, counts, splits.val))
        if counts.max() >= UNEQUAL * counts.min():
            least, most = (f"{self.shown[i]!r} {counts[i]}" for i in (counts.argmin(), counts.argmax()))
            advice = "weighted" if self.config.class_weights else "task.class_weights=true weights them equally"
            notes.append(f"classes are imbalanced: {most} training images, {least} ({advice})")
        return notes

    def picture_notes(self) -> list[str]:
        missing = undrawable(self.shown)
        if not missing:
            return []
        names = ", ".join(f"{number} is {self.shown[number]}" for number in missing[:SPELT])
        more = f" and {len(missing) - SPELT} more" if len(missing) > SPELT else ""
        return [
            f"no installed font can draw {len(missing)} of the {self.num_classes} class names, so pictures show their numbers: "
            f"{names}{more} (a Noto font of the script mends it)"
        ]

    # model

    def build(self, name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
        if (given := kwargs.get("num_classes", self.num_classes)) != self.num_classes:
            raise UserError(f"model.kwargs.num_classes is {given}, the data has {self.num_classes} classes")
        options = {"pretrained": pretrained, "by_position": self.config.classes == "position", **kwargs}
        model, self.start_note, self.new_outputs = hub.load_for_classes(name, self.num_classes, self.labels, **options)
        return model

    def head_solver(self, model: nn.Module) -> LinearProbe:
        return LinearProbe(model, self.num_classes, self.augment.hflip > 0, self.class_weights)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        return self.labels

    def facts(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes}

    @property
    def scope(self) -> str:
        return f"{self.num_classes} classes"

    # objective

    @property
    def loss_title(self) -> str:
        softened = self.config.smoothing or self.mixup is not None
        return {"bce": "binary cross entropy", "ce": "cross entropy of softened labels" if softened else ""}[
            self.config.loss
        ]

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

    def difference(self, details: Mapping[str, Any], before: Mapping[str, Any]) -> Difference | None:
        if not (details.get("hits") and before.get("hits")):
            return None
        *shares, images = paired_interval(details["hits"], before["hits"])
        return Difference(self.metrics["top1"].title, *(100 * share for share in shares), images)

    def result(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Top-1 with its interval, macro-F1, and what always naming the largest class would give."""
        true = np.zeros(self.num_classes, dtype=np.int64)
        for index, _, count in details["cells"]:
            true[index] += count
        images, largest = int(true.sum()), int(true.argmax())
        low, high = wilson_interval(metrics["top1"] / 100, images)
        shown = dict(super().result(metrics, details))
        shown["top-1"] += f" (95 % interval {100 * low:.1f} to {100 * high:.1f} %, {images:,} images)"
        share = 100 * true[largest] / images
        baseline = f"{share:.2f} % by always naming the largest class, {self.shown[largest]}"
        return [*shown.items(), ("baseline", baseline)]

    def sections(
        self, details: Mapping[str, Any], image_of: Callable[[int], tuple[str, Image.Image] | None], folder: Path | None
    ) -> list[Section]:
        cells = details["cells"]
        number = len({true for true, _, _ in cells})
        left_out = f": {TABLE_UP_TO} of {number:,}" if number > TABLE_UP_TO else ""
        table = Section(f"Classes, weakest first{left_out}", table=class_table(cells, self.shown))
        if folder is None:
            return [table]
        matrix = Section("Confusion matrix", f"Not drawn for more than {MATRIX_UP_TO} classes.")
        if self.num_classes <= MATRIX_UP_TO:
            confusion_matrix(dense_counts(cells, self.num_classes), list(self.shown), folder / CONFUSION)
            matrix = Section("Confusion matrix", figure=CONFUSION)
        examples = self._pictures(details.get("examples", ()), image_of)
        mistakes = self._pictures(details["mistakes"], image_of)
        none = "None, or the images are not available (streams are read once)."
        surest = "Wrong answers with the highest probability: often a wrong label, or two objects in one image."
        return [
            Section("Examples", "Validation images chosen at random." if examples else none, pictures=examples),
            Section("Most confident mistakes", surest if mistakes else none, pictures=mistakes),
            matrix,
            table,
        ]

    def _pictures(self, rows: Sequence[Sequence[float]], image_of: Callable) -> list[Picture]:
        """Images with answer, truth and file name, of [probability, index, true class, predicted class] rows."""
        pictures = []
        for probability, index, true, predicted in rows:
            if (found := image_of(int(index))) is not None:
                name, image = found
                said, right = (f"{ISOLATE}{self.shown[int(label)]}{POP}" for label in (predicted, true))
                answer = f"{said} {100 * probability:.0f}\N{NO-BREAK SPACE}%"
                truth = "" if true == predicted else f"is {right}"
                pictures.append(Picture(image, answer, truth, name, is_right=true == predicted))
        return pictures

    @classmethod
    def card(cls, config: Mapping[str, Any]) -> CardFacts:
        return classification_card(config)

    # prediction

    def predict(self, output: Tensor, topk: int) -> list[list[dict[str, Any]]]:
        probabilities = output.float().softmax(dim=1)
        if not probabilities.isfinite().all():
            raise UserError(
                "the model's output for an image is not a number: its weights are damaged, or its precision too low"
            )
        values, indices = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
        return [
            [
                {"rank": rank + 1, "label": self.shown[index], "index": index, "probability": probability}
                for rank, (index, probability) in enumerate(zip(best, row, strict=True))
            ]
            for best, row in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    def draw_prediction(self, image: Image.Image, rows: Sequence[Mapping[str, Any]]) -> Image.Image:
        labels = [row["label"] if is_drawable(row["label"]) else str(row["index"]) for row in rows]
        return annotate(image, labels, [row["probability"] for row in rows])


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


def balanced_weights(targets: np.ndarray, num_classes: int) -> Tensor:
    """(num_classes,) inverse class frequencies, scaled so that the mean over images is 1. A class without images gets 1."""
    counts = np.bincount(targets, minlength=num_classes)
    weights = np.where(counts, len(targets) / (num_classes * np.maximum(counts, 1)), 1.0)
    return torch.tensor(weights, dtype=torch.float32)


def class_table(cells: Sequence[Sequence[int]], names: Sequence[str]) -> Table:
    """Per class that occurs: images, recall, precision, F1 and the most frequent confusion; lowest F1 first, `TABLE_UP_TO` of them."""
    rows = sorted(per_class(cells).items(), key=lambda item: item[1]["f1"])[:TABLE_UP_TO]
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
