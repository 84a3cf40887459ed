"""Counts of a classifier's right and wrong answers over batches and processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Batch
from ._scores import macro_f1, pack_hits
from .contract import Evaluation

WORST = 24  # mistakes that are kept for the report
EXAMPLES = 12  # images that stand for all in the report


class ClassificationEvaluator:
    """Top-1, top-5, macro-F1 and loss, counts of (true class, predicted class), the most confident mistakes, and examples.

    Memory is linear in the number of images, not quadratic in the number of classes.
    """

    def __init__(self, device: torch.device) -> None:
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, loss, top-1 hits, top-5 hits
        self.answers: list[Tensor] = []  # (B, 3) index, true and predicted class, per batch
        self.worst = torch.full((WORST, 5), -1.0, dtype=torch.float64, device=device)  # rows as in `_first`
        self.examples = torch.full((EXAMPLES, 5), -1.0, dtype=torch.float64, device=device)

    def update(self, output: Tensor, batch: Batch) -> None:
        logits, target = output.float().to(self.sums.device), batch.target.to(self.sums.device)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == target[:, None]
        loss = F.cross_entropy(logits, target, reduction="sum")
        images = torch.tensor(float(len(target)), device=self.sums.device)
        self.sums += torch.stack([images, loss, hits[:, 0].sum(), hits.sum()])
        predicted, index = ranked[:, 0], batch.index.to(target.device)
        self.answers.append(torch.stack([index, target, predicted], dim=1))
        probability = logits.softmax(1).gather(1, predicted[:, None])[:, 0].double()
        answers = torch.stack([probability, index.double(), target.double(), predicted.double()], dim=1)
        self.worst = _first(self.worst, torch.where(predicted == target, -1.0, probability), answers)
        self.examples = _first(self.examples, (index * 2654435761 % 2**32).double(), answers)  # as good as random

    def totals(self) -> dict[str, Tensor]:
        return dict(zip(("images", "loss", "top1", "top5"), self.sums.unbind(), strict=True))

    def rows(self) -> list[Any]:
        answers = torch.cat(self.answers).cpu().numpy() if self.answers else np.empty((0, 3), dtype=np.int64)
        kept = [[row for row in rows.tolist() if row[0] >= 0] for rows in (self.worst, self.examples)]
        return [(answers, *kept)]

    def result(self, totals: Mapping[str, Tensor], rows: list[Any]) -> Evaluation:
        images = float(totals["images"])
        answers = np.concatenate([answers for answers, *_ in rows])
        cells = Counter(map(tuple, answers[:, 1:].tolist()))
        mistakes: list[list[float]] = []
        examples: list[list[float]] = []
        for _, worst, some in rows:
            mistakes += worst
            examples += some
        counts = [[true, predicted, count] for (true, predicted), count in sorted(cells.items())]
        metrics = {name: 100 * float(totals[name]) / images for name in ("top1", "top5")}
        return Evaluation(
            images=int(images),
            metrics={**metrics, "macro_f1": macro_f1(counts), "loss": float(totals["loss"]) / images},
            details={
                "cells": counts,
                "hits": pack_hits(answers[:, 0], answers[:, 1] == answers[:, 2]),
                "mistakes": [row[1:] for row in sorted(mistakes, reverse=True)[:WORST]],
                "examples": [row[1:] for row in sorted(examples, reverse=True)[:EXAMPLES]],
            },
        )


def _first(kept: Tensor, rank: Tensor, answers: Tensor) -> Tensor:
    """The rows of the highest ranks, among those so far and a batch's, as many as there were; nothing is read back from the device.

    Rows are: rank (-1 for none), probability of the predicted class, index of the image, true class, predicted class.
    """
    rows = torch.cat([kept, torch.cat([rank[:, None], answers], dim=1)])
    return rows[rows[:, 0].topk(len(kept)).indices]
