"""Segments scenes of garments with the ViTs of a finished ToSA training: the dense backbone beside token selection.

    python tools/tosa_dense_demo.py --run runs/tosa [--config configs/tosa/dense_demo.yaml] [--output FILE.json]

A scene is a canvas with some images of Fashion-MNIST at random places and sizes; each pixel belongs to one of the ten classes or to the
background. Backbone and a linear head on its full grid of features are trained for the same number of steps at every attention ratio,
from the same weights (the dense model's at a ratio of 1, those of the last stage below). Printed: pixel accuracy, mean intersection over
union, multiply-accumulates and time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from effvit_zoo import config as strict
from effvit_zoo import hub, to_tosa
from effvit_zoo.data import open_splits
from effvit_zoo.errors import OneLineParser, UserError, run_command
from effvit_zoo.measure import cost
from effvit_zoo.measure.host import processor_name
from effvit_zoo.measure.timing import time_in_turns
from effvit_zoo.models.tosa_vit import ToSAViT

CONFIG = Path(__file__).parent.parent / "configs" / "tosa" / "dense_demo.yaml"
CLASSES = 11  # ten garments, and the background as the last


@strict.section
class DemoConfig:
    side: int = 64
    """Pixels along a scene."""
    garments: tuple[int, int] = (2, 4)
    """Fewest and most of them in a scene."""
    ratios: tuple[float, ...] = (1.0, 0.5, 0.25)
    steps: int = 500
    batch_size: int = 16
    lr: float = 1e-3
    val_scenes: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if self.side < 32 or self.side % 4:
            raise ValueError(f"side must be a multiple of 4 from 32, got {self.side}")
        if not 1 <= self.garments[0] <= self.garments[1]:
            raise ValueError(f"garments must be 1 <= fewest <= most, got {self.garments}")
        if min(self.steps, self.batch_size, self.val_scenes) < 1 or self.lr <= 0:
            raise ValueError("steps, batch_size, val_scenes and lr must be positive")
        if not self.ratios or not all(0 <= ratio <= 1 for ratio in self.ratios):
            raise ValueError(f"ratios must lie in [0, 1], got {list(self.ratios)}")


class Segmenter(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes, H, W): a linear head on the grid of the backbone's last layer, interpolated."""

    def __init__(self, backbone: ToSAViT) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.num_features, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        (grid,) = self.backbone.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        return F.interpolate(self.head(grid), size=x.shape[-2:], mode="bilinear")


class Scenes:
    """Scenes of the garments in a split, drawn anew by number."""

    def __init__(self, source: Any, config: DemoConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        self.source, self.config = source, config
        self.mean, self.std = (torch.tensor(values).reshape(-1, 1, 1) for values in (mean, std))

    def scene(self, seed: int) -> tuple[Tensor, Tensor]:
        """Normalised pixels (3, side, side) and classes (side, side)."""
        rng, side = np.random.default_rng([self.config.seed, seed]), self.config.side
        pixels = np.full((side, side), int(rng.integers(0, 60)), dtype=np.uint8)
        classes = np.full((side, side), CLASSES - 1)
        for _ in range(rng.integers(self.config.garments[0], self.config.garments[1] + 1)):
            image, target = self.source.load(int(rng.integers(len(self.source))))
            size = int(rng.integers(20, 33))
            garment = np.asarray(image.convert("L").resize((size, size), Image.Resampling.BILINEAR))
            top, left = rng.integers(0, side - size + 1, 2)
            place = np.s_[top : top + size, left : left + size]
            worn = garment > 40
            pixels[place][worn], classes[place][worn] = garment[worn], target
        image = torch.from_numpy(pixels).float().div(255).expand(3, -1, -1)
        return (image - self.mean) / self.std, torch.from_numpy(classes)

    def batches(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(numbers), self.config.batch_size):
            images, classes = zip(
                *(self.scene(number) for number in numbers[start : start + self.config.batch_size]), strict=True
            )
            yield torch.stack(images), torch.stack(classes)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Trains a segmenter per ratio, prints the table and returns its rows."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of a finished ToSA training")
    parser.add_argument("--config", type=Path, default=CONFIG, help="(default: configs/tosa/dense_demo.yaml)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="settings that override the config's")
    parser.add_argument("--output", type=Path, help="write the rows to FILE.json")
    args = parser.parse_args(argv)
    content = strict.read_yaml(args.config)
    strict.apply_overrides(content, args.set)
    config = strict.parse(DemoConfig, content)
    if not (args.run / "3-finetune" / "last").is_dir():
        raise UserError(f"--run {args.run} is not the output folder of a finished ToSA training")
    splits = open_splits("builtin:fashion-mnist-mini", img_mode="L")
    trained: dict[str, Segmenter] = {}
    rows: list[dict[str, Any]] = []
    for ratio in config.ratios:
        backbone = _backbone(args.run, ratio, config.side)
        cfg: Any = backbone.pretrained_cfg
        name = "dense" if ratio == 1 else f"ToSA, r = {ratio:g}"
        trained[name] = train(Segmenter(backbone), Scenes(splits.train, config, cfg["mean"], cfg["std"]), config, name)
        accuracy, iou = evaluate(trained[name], Scenes(splits.val, config, cfg["mean"], cfg["std"]), config)
        macs = cost.count_macs(trained[name], (3, config.side, config.side))
        rows.append({"name": name, "ratio": ratio, "pixel_accuracy": accuracy, "mean_iou": iou, "macs": macs})
    sample = torch.randn(1, 3, config.side, config.side)
    with torch.inference_mode():
        times = time_in_turns({name: partial(model.eval(), sample) for name, model in trained.items()}, 30)
    for row in rows:
        row["ms"] = times[row["name"]]
    _print(rows)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def _backbone(run: Path, ratio: float, side: int) -> ToSAViT:
    """The dense model of a run, or its ToSA-ViT, for images of another size."""
    model: Any = hub.load(str(run / ("dense" if ratio == 1 else "3-finetune/last")), img_size=side)
    model = model if isinstance(model, ToSAViT) else to_tosa(model)
    model.set_attention_ratio(ratio)
    model.selectors.requires_grad_(False)
    return model


def train(model: Segmenter, scenes: Scenes, config: DemoConfig, name: str) -> Segmenter:
    """Trains backbone and head for `config.steps` steps, the same scenes in the same order for every model."""
    torch.manual_seed(config.seed)
    nn.init.normal_(model.head.weight, std=0.02)
    nn.init.zeros_(model.head.bias)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    numbers = range(1_000_000, 1_000_000 + config.steps * config.batch_size)
    model.train()
    for image, target in tqdm(scenes.batches(numbers), total=config.steps, desc=name, mininterval=2):
        optimizer.zero_grad()
        F.cross_entropy(model(image), target).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def evaluate(model: Segmenter, scenes: Scenes, config: DemoConfig) -> tuple[float, float]:
    """Pixel accuracy and mean intersection over union over the classes, both in percent."""
    confusion = torch.zeros(CLASSES * CLASSES, dtype=torch.long)
    for image, target in scenes.batches(range(config.val_scenes)):
        predicted = model(image).argmax(1)
        confusion += torch.bincount((target * CLASSES + predicted).flatten(), minlength=CLASSES**2)
    confusion = confusion.reshape(CLASSES, CLASSES).double()
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    return 100 * float(hits.sum() / confusion.sum()), 100 * float((hits / union)[union > 0].mean())


def _print(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=f"segmentation of garments, {processor_name()}, {torch.get_num_threads()} thread(s)")
    for column in ("backbone", "pixels right", "mean IoU", "MMACs", "", "ms", ""):
        table.add_column(column, justify="left" if column == "backbone" else "right")
    first = rows[0]
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['pixel_accuracy']:.2f} %",
            f"{row['mean_iou']:.2f} %",
            f"{row['macs'] / 1e6:.1f}",
            f"{100 * (row['macs'] / first['macs'] - 1):+.1f} %",
            f"{row['ms']:.2f}",
            f"{100 * (row['ms'] / first['ms'] - 1):+.1f} %",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(run_command(main))
