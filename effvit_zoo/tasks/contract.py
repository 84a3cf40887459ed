"""The contract of a task: everything that differs between kinds of training, and nothing else.

A task decides how data and targets are read and augmented, how the model is built, what the loss is, how a model is evaluated, which
metric "best" means, and what reports, model cards and predictions show. Engine, checkpoints, Hub, reports and commands know only this
file. A task is one class in one file and one row of `TASKS`.

Rules that keep "two processes equal one" and exact resume:
  * `loss` is pure: it depends on model, batch and the random state, which the engine sets for every step.
  * A loss is the mean over images of each image's own mean (`mean_over_images`). An image without a valid pixel counts with loss 0.
    So a step's loss is the mean over its images, however they are distributed over processes and micro-batches.
  * What an evaluator counts is summed over processes (`totals`) or concatenated (`rows`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from ..config import section
from ..data import AnySource, Batch, DataConfig, DataSplits, Measured, Transforms
from ..errors import UserError
from ..hub import CardFacts
from ._scores import wilson_interval


@dataclass(frozen=True)
class Metric:
    """How a named value is shown and compared.

    Attributes:
        title: For people, e.g. "top-1".
        unit: "%" or another unit; "" for a plain number.
        higher_is_better: Direction of improvement.
        digits: Decimals in reports.
        is_share: Whether it is the percentage of the images for which something is true, so that it has a confidence interval.
    """

    title: str
    unit: str = ""
    higher_is_better: bool = True
    digits: int = 2
    is_share: bool = False

    def show(self, value: float, digits: int | None = None) -> str:
        """E.g. "87.95 %"."""
        return f"{value:.{self.digits if digits is None else digits}f}{f' {self.unit}' if self.unit else ''}"

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether a value improves on the best so far (None: there is none; NaN: it was not a number)."""
        if than is None or math.isnan(than):
            return True
        return value > than if self.higher_is_better else value < than


@dataclass(frozen=True)
class Evaluation:
    """What measuring a model over a data set gave.

    Attributes:
        images: Number of images measured.
        metrics: Name -> value; "loss" and the names in the task's `metrics`.
        details: JSON values that the task's `sections` are made from, e.g. confusion counts.
        seconds: Wall-clock time.
    """

    images: int
    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


class Evaluator(Protocol):
    """Accumulates over batches; one per process."""

    def update(self, output: Any, batch: Batch) -> None:
        """Adds a batch. `output` is the model's for `batch.image`; both are on the evaluator's device."""

    def totals(self) -> dict[str, Tensor]:
        """Tensors that are added over processes. "images" must be among them."""

    def rows(self) -> list[Any]:
        """Picklable items that are concatenated over processes."""

    def result(self, totals: Mapping[str, Tensor], rows: list[Any]) -> Evaluation:
        """The evaluation, from the sums and items of all processes; `seconds` is filled in by the caller."""


class HeadSolver(Protocol):
    """Finds the outputs' layer of a model from frozen features, without training. Rows of all images are given to `solve` at once.

    Attributes:
        most_images: Images that it can take.
    """

    @property
    def most_images(self) -> int: ...

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """Rows (B, ...) of a batch, on the CPU, from the model in eval mode. Raises `UserError` where the model isn't as expected."""

    def solve(self, rows: Mapping[str, Tensor]) -> str:
        """Sets the layer from the rows of all images, in their order, and says how. Raises `UserError` where there is no solution."""

    def parameters(self) -> list[Tensor]:
        """What `solve` sets."""


@dataclass(frozen=True)
class Difference:
    """How much better one evaluation is than another of the same images, by a share of the images.

    Attributes:
        title: The metric, e.g. "top-1".
        points: Difference in percentage points.
        low, high: Its 95 % interval, from the images that only one of the two gets right.
        images: Number of images.
    """

    title: str
    points: float
    low: float
    high: float
    images: int

    def __str__(self) -> str:
        """E.g. "top-1 +1.41 points (95 % interval -0.43 to 3.25, 495 images)"."""
        interval = f"95 % interval {self.low:.2f} to {self.high:.2f}"
        return f"{self.title} {self.points:+.2f} points ({interval}, {self.images:,} images)"


@dataclass(frozen=True)
class Table:
    """A table of a report: column titles and rows of cells. Numbers are formatted by the report."""

    head: tuple[str, ...]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Picture:
    """An image of a report, with text below it.

    Attributes:
        image: The image.
        title: First line, e.g. what the model says.
        text: Second line, e.g. what would be right; "" for none.
        name: Name of the file.
        is_right: Whether the model is right; None where that is no question.
    """

    image: Image.Image
    title: str
    text: str
    name: str
    is_right: bool | None = None


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Heading.
        text: A sentence below it, "" for none.
        figure: File name of an image in the run folder, "" for none.
        table: A table, or None.
        pictures: Images side by side.
    """

    title: str
    text: str = ""
    figure: str = ""
    table: Table | None = None
    pictures: Sequence[Picture] = ()


class Objective(Protocol):
    """What is trained, and by which loss. A task is one; distillation and the stages of a pipeline are others, around a task.

    Where the loss can't be compared with the validation's, an attribute `loss_title` says what it is; curves then show them apart.
    """

    def trainable(self, model: nn.Module) -> nn.Module:
        """The module that is optimised: `model` itself, or a module whose attribute `model` it is. Called once; may freeze parameters."""

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's loss, a scalar, and further batch means to report, by name. `model` is what `trainable` returned, wrapped for
        the processes of the run."""


@section
class Augment:
    """Augmentation settings of every task."""

    repeats: Annotated[int, Field(ge=1)] = 1
    """N augmented copies of each image per step; an epoch then covers 1/N of the images (arXiv:1902.05509)."""
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Side lengths in pixels, one of which is sampled for every step (multi-scale training); empty for data.img_size."""

    def idle(self) -> set[str]:
        """Names of settings that change nothing, as the others are."""
        return {"repeats"} if self.repeats == 1 else set()

    def in_words(self) -> str:
        """What is done to training images, for reports."""
        said = {name: value for name, value in vars(self).items() if value and name not in self.idle()}
        words = (
            f"{name.replace('_', ' ')} {' to '.join(f'{part:g}' for part in value) if isinstance(value, tuple) else value}"
            for name, value in said.items()
        )
        return ", ".join(words) or "none"


class Task(ABC):
    """Base class of tasks.

    An instance is made for training by `for_training` and for a model that exists by `for_model`.

    Class attributes:
        Config: Dataclass of the YAML's `task` section; its field `kind` is a Literal of the task's name in `TASKS`.
        Augment: Dataclass of the YAML's `augment` section, derived from `Augment`.
        metrics: Name -> Metric of what the evaluator measures. The first is what "best" and `train.patience` refer to.
        logits_axis: Axis of the model's output along which it holds logits of classes (for distillation); None if it holds none.
    """

    Config: ClassVar[type]
    Augment: ClassVar[type[Augment]] = Augment
    metrics: Mapping[str, Metric]
    logits_axis: ClassVar[int | None] = None

    start_note: str = ""
    """What became of the outputs of the weights that training starts from, for the user; "" where there is nothing to say."""
    new_outputs: bool = True
    """Whether the outputs' layer is a new one, not that of the weights that training starts from."""

    # data

    @classmethod
    @abstractmethod
    def open_splits(cls, data: DataConfig, img_mode: str) -> DataSplits:
        """Training and validation samples of a run. `img_mode` is "RGB" or "L". Raises `UserError`."""

    @classmethod
    @abstractmethod
    def open_measured(cls, data: DataConfig, split: str, record: Mapping[str, Any] | None, img_mode: str) -> Measured:
        """Samples to measure a model on. `record` is what the model's training recorded of its data; see `data.open_measured`."""

    @classmethod
    @abstractmethod
    def for_training(cls, config: Any, augment: Any, splits: DataSplits) -> Task:
        """The task for a run's `task` and `augment` sections and its data."""

    @classmethod
    @abstractmethod
    def for_model(cls, model: nn.Module) -> Task:
        """The task of a model that exists. Raises `UserError` where the model can't do it."""

    def align(self, source: AnySource, by_position: bool = False) -> tuple[AnySource, str]:
        """A source whose targets mean what the model's outputs mean, e.g. class indices in the model's order; and a note, "" for none.

        Args:
            source: Samples, with the data's own targets.
            by_position: Targets and outputs correspond by their place, not by name.

        Raises:
            UserError: They don't correspond.
        """
        return source, ""

    @abstractmethod
    def transforms(self, data_config: Mapping[str, Any]) -> Transforms:
        """(image, target) -> (tensor, target) for training and validation, with a training transform for each of `augment.sizes`.

        Args:
            data_config: timm's preprocessing settings.
        """

    def data_notes(self, splits: DataSplits) -> list[str]:
        """What the user should know about the data before training."""
        return []

    def picture_notes(self) -> list[str]:
        """What the user should know before looking at pictures that the task draws."""
        return []

    # model

    @abstractmethod
    def build(self, name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
        """The model to train, with outputs for this task's targets; may set `start_note` and `new_outputs`. Raises `UserError`."""

    def head_solver(self, model: nn.Module) -> HeadSolver:
        """What solves for the outputs' layer. Raises `UserError`, which says what stands in the way, where nothing can."""
        raise UserError("this task has none")

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names of the outputs, saved with the model; None where they have none."""
        return None

    def facts(self) -> dict[str, Any]:
        """What summary and report say about the task, e.g. the number of classes."""
        return {}

    @property
    def scope(self) -> str:
        """The same in words for the console, e.g. "10 classes"."""
        return ""

    # objective

    @property
    def loss_title(self) -> str:
        """What the training loss is, where it can't be compared with the validation's; else ""."""
        return ""

    def trainable(self, model: nn.Module) -> nn.Module:
        return model

    def mix(self, batch: Batch) -> tuple[Tensor, Any]:
        """Images and targets to learn from: the batch's own, or mixed ones."""
        return batch.image, batch.target

    @abstractmethod
    def objective(self, output: Any, target: Any) -> Tensor:
        """Scalar loss of outputs against targets as `mix` returns them: mean over images of per-image means."""

    def values(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Batch means to report beside the loss, by name."""
        return {}

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = self.mix(batch)
        output = model(image)
        return self.objective(output, target), self.values(output, batch)

    # evaluation and presentation

    @abstractmethod
    def evaluator(self, device: torch.device) -> Evaluator:
        """A fresh evaluator."""

    def sections(
        self, details: Mapping[str, Any], image_of: Callable[[int], tuple[str, Image.Image] | None], folder: Path | None
    ) -> list[Section]:
        """Report sections of an evaluation; the first is the picture of the result, with which a report opens.

        Args:
            details: `Evaluation.details`.
            image_of: Index of a validation sample -> its name and image, None where it isn't available.
            folder: Where to write figures; None for tables alone.
        """
        return []

    def intervals(self, metrics: Mapping[str, float], images: int) -> dict[str, list[float]]:
        """NAME_interval -> [low, high], Wilson's 95 % interval in percent, of those metrics that are shares of the images."""
        return {
            f"{name}_interval": [100 * end for end in wilson_interval(metrics[name] / 100, images)]
            for name, metric in self.metrics.items()
            if metric.is_share and name in metrics
        }

    def difference(self, details: Mapping[str, Any], before: Mapping[str, Any]) -> Difference | None:
        """How much better an evaluation is than an earlier one of the same images, from their `Evaluation.details`; None where that
        isn't known."""
        return None

    def result(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The lines of a report's summary that say how good the model is: name -> text. The first is the most important.

        Args:
            metrics: `Evaluation.metrics`.
            details: `Evaluation.details`.
        """
        return [(metric.title, metric.show(metrics[name])) for name, metric in self.metrics.items() if name in metrics]

    @classmethod
    @abstractmethod
    def card(cls, config: Mapping[str, Any]) -> CardFacts:
        """What a model card says that depends on the task. `config` is the content of the model folder's config.json."""

    # prediction

    @abstractmethod
    def predict(self, output: Any, topk: int) -> list[list[dict[str, Any]]]:
        """For each image of a batch the rows to print, best first; all rows have the same keys.

        Args:
            output: The model's.
            topk: Largest number of rows per image.
        """

    def draw_prediction(self, image: Image.Image, rows: Sequence[Mapping[str, Any]]) -> Image.Image:
        """An upright RGB image with its prediction drawn on or beside it."""
        return image


def mean_over_images(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over images of each image's mean over its valid elements: the only way in which a task reduces a loss.

    Args:
        values: (B, ...) losses.
        valid: Mask of the same shape; an image without a valid element counts as 0. None: all are valid.
    """
    values = values.flatten(1) if values.ndim > 1 else values.unsqueeze(1)
    if valid is None:
        return values.mean(1).mean()
    mask = valid.reshape(values.shape)
    sums = torch.where(mask, values, 0).sum(1)
    return (sums / mask.sum(1).clamp_min(1)).mean()
