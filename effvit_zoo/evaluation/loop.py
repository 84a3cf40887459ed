"""Top-1, top-5, loss and confusion counts of a classifier over a data set, shared by training and validate.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import UserError

WORST = 24  # mistakes that are kept to be looked at

Mistake = tuple[float, int, int, int]  # probability of the wrong class, index of the image, true class, predicted class


@dataclass(frozen=True)
class Evaluation:
    """Measured over `images` images: mean cross entropy, top1 and top5 in percent, confusion counts (true, predicted class),
    and the wrong answers that the model was surest of."""

    images: int
    loss: float
    top1: float
    top5: float
    confusion: np.ndarray
    seconds: float
    mistakes: list[Mistake] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def per_class(self) -> list[dict[str, Any]]:
        """As `per_class` of the confusion counts."""
        return per_class(self.confusion)


def per_class(confusion: np.ndarray) -> list[dict[str, Any]]:
    """Per class: images, recall (= accuracy within the class), precision and F1 in percent; None where there is nothing to divide by.

    Args:
        confusion: (C, C) counts, rows are true classes.
    """
    hits, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    rows = []
    for hit, images, named in zip(hits.tolist(), true.tolist(), predicted.tolist(), strict=True):
        rows.append(
            {
                "images": images,
                "recall": 100 * hit / images if images else None,
                "precision": 100 * hit / named if named else None,
                "f1": 200 * hit / (images + named) if images + named else None,
            }
        )
    return rows


def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    num_classes: int,
    accelerator: Accelerator,
    on_bad: Callable[[list[tuple[str, str]]], None],
    channels_last: bool = False,
    in_step: bool = False,
) -> Evaluation:
    """Runs a model in eval mode over this process' batches and sums the counts of all processes.

    Args:
        model: Images (B, 3, H, W) to logits (B, num_classes); its mode is restored afterwards.
        batches: As `loader.collate` makes them.
        num_classes: Side of the confusion matrix; predictions beyond it count in its last column.
        accelerator: Device and processes.
        on_bad: Called with the (name, reason) pairs of unreadable images.
        channels_last: Memory format of the images.
        in_step: Every process calls the model equally often, as one whose weights are shared out must be.

    Raises:
        UserError: If no process has a readable image.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)  # images, loss, top-1 hits, top-5 hits
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=accelerator.device)
    worst = torch.full(
        (WORST, 4), -1.0, dtype=torch.float64, device=accelerator.device
    )  # rows as `Mistake`, -1 for none
    start = time.perf_counter()
    with torch.inference_mode(), accelerator.autocast():
        for batch in _in_step(batches, accelerator) if in_step else batches:
            on_bad(batch["bad"])
            if batch["image"] is None:
                continue
            image = batch["image"].to(accelerator.device, non_blocking=True)
            if channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            target = batch["target"].to(accelerator.device, non_blocking=True)
            logits = model(image)[: len(target)].float()
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = ranked == target[:, None]
            sums += torch.stack(
                [
                    torch.tensor(float(len(target)), device=sums.device),
                    F.cross_entropy(logits, target, reduction="sum"),
                    hits[:, 0].sum(),
                    hits.sum(),
                ]
            )
            worst = _worst_of(worst, logits, ranked[:, 0], target, batch["index"])
            cells = target * num_classes + ranked[:, 0].clamp_max(num_classes - 1)
            confusion += torch.bincount(cells, minlength=num_classes * num_classes)
    sums = accelerator.reduce(sums, "sum")
    confusion = accelerator.reduce(confusion, "sum")
    worst = accelerator.gather(worst)
    model.train(was_training)
    images, loss, top1, top5 = sums.tolist()
    if not images:
        raise UserError("validation found no readable image")
    return Evaluation(
        images=int(images),
        loss=loss / images,
        top1=100 * top1 / images,
        top5=100 * top5 / images,
        confusion=confusion.reshape(num_classes, num_classes).cpu().numpy(),
        seconds=time.perf_counter() - start,
        mistakes=[
            (share, int(index), int(true), int(predicted))
            for share, index, true, predicted in sorted(worst.tolist(), reverse=True)[:WORST]
            if share >= 0
        ],
    )


def _in_step(batches: Iterable[dict[str, Any]], accelerator: Accelerator) -> Iterator[dict[str, Any]]:
    """The batches; an image of zeros without a target where this process has no image while another one has."""
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        image = batch["image"] if batch else None
        state = [batch is not None, *((0, 0, 0) if image is None else image.shape[1:])]
        any_running, *shape = accelerator.gather(torch.tensor([state], device=accelerator.device)).amax(0).tolist()
        if not any_running:
            return
        batch = batch or {"bad": [], "image": None}
        if image is None and shape[0]:
            nothing = torch.zeros(0, dtype=torch.int64)
            batch |= {"image": torch.zeros(1, *shape), "target": nothing, "index": nothing}
        yield batch


def _worst_of(worst: Tensor, logits: Tensor, predicted: Tensor, target: Tensor, index: Tensor) -> Tensor:
    """The surest mistakes (WORST, 4) among those so far and a batch's; nothing is read back from the device."""
    share = logits.softmax(1).gather(1, predicted[:, None])[:, 0]
    share = torch.where(predicted == target, -1.0, share)
    rows = torch.stack([column.double() for column in (share, index.to(share.device), target, predicted)], dim=1)
    rows = torch.cat([worst, rows])
    return rows[rows[:, 0].topk(WORST).indices]
