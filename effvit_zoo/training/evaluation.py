"""Top-1, top-5, loss and confusion counts of a classifier over a data set, shared by training and validate.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from ..errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """Measured over `images` images: mean cross entropy, top1 and top5 in percent, confusion counts (true, predicted class)."""

    images: int
    loss: float
    top1: float
    top5: float
    confusion: np.ndarray
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def per_class(self) -> list[dict[str, Any]]:
        """Per class: images, recall (= accuracy within the class) and precision in percent; None where there is nothing to divide by."""
        hits, true, predicted = np.diag(self.confusion), self.confusion.sum(1), self.confusion.sum(0)
        return [
            {
                "images": int(true[index]),
                "recall": 100 * int(hits[index]) / int(true[index]) if true[index] else None,
                "precision": 100 * int(hits[index]) / int(predicted[index]) if predicted[index] else None,
            }
            for index in range(len(hits))
        ]


def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    num_classes: int,
    accelerator: Accelerator,
    on_bad: Callable[[list[tuple[str, str]]], None],
    channels_last: bool = False,
) -> Evaluation:
    """Runs a model in eval mode over this process' batches and sums the counts of all processes.

    Args:
        model: Images (B, 3, H, W) to logits (B, num_classes); its mode is restored afterwards.
        batches: As `loader.collate` makes them.
        num_classes: Side of the confusion matrix; predictions beyond it count in its last column.
        accelerator: Device and processes.
        on_bad: Called with the (name, reason) pairs of unreadable images.
        channels_last: Memory format of the images.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)  # images, loss, top-1 hits, top-5 hits
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=accelerator.device)
    start = time.perf_counter()
    with torch.inference_mode(), accelerator.autocast():
        for batch in batches:
            on_bad(batch["bad"])
            if batch["image"] is None:
                continue
            image = batch["image"].to(accelerator.device, non_blocking=True)
            if channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            target = batch["target"].to(accelerator.device, non_blocking=True)
            logits = model(image).float()
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
            cells = target * num_classes + ranked[:, 0].clamp_max(num_classes - 1)
            confusion += torch.bincount(cells, minlength=num_classes * num_classes)
    sums = accelerator.reduce(sums, "sum")
    confusion = accelerator.reduce(confusion, "sum")
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
    )
