"""What a training run can be told. Every default stands here, once; a value that can't work is refused before the first step.

`images per optimizer step = train.batch_size * processes * train.grad_accum`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from timm.optim import list_optimizers

from .. import config as strict
from ..errors import unknown_choice

Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str
    """A name of timm's registry (`effzoo_*` or any other), `local-dir:FOLDER` or `hf-hub:USER/NAME`."""
    pretrained: bool = False
    """Start from the weights that belong to the name. Folders and hub names always bring theirs."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further constructor arguments, e.g. `drop_path_rate: 0.1`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    root: str = "builtin:fashion-mnist-mini"
    """A folder of images, `builtin:fashion-mnist-mini`, `builtin:fashion-mnist`, or a timm data set such as `hfds/NAME`."""
    train_split: str = "train"
    val_split: str = "auto"
    """`auto`: the folder's or data set's own validation split, else `val_fraction` of the training images, by seed."""
    val_fraction: float = 0.1
    img_size: int | tuple[int, int] | None = None
    """Pixels, a side or (height, width). None: what the model was made for."""
    crop_pct: float | None = None
    """Share of the resized image that validation looks at. None: what the model's weights were validated with."""
    num_workers: int | None = None
    """Loader processes. None: one per core that this process may use, at most 8."""
    on_bad_file: Literal["skip", "raise"] = "skip"
    """`skip`: a file that can't be read is named once, replaced by its neighbour while training and left out of validation."""

    def __post_init__(self) -> None:
        sides = self.img_size if isinstance(self.img_size, tuple) else (self.img_size or 1,)
        _require(min(sides) > 0, f"img_size must be positive, got {self.img_size}")
        _require(0 < self.val_fraction < 1, f"val_fraction must lie between 0 and 1, got {self.val_fraction}")
        _require(self.crop_pct is None or 0 < self.crop_pct <= 1, f"crop_pct must lie in (0, 1], got {self.crop_pct}")
        _require(self.num_workers is None or self.num_workers >= 0, f"num_workers must be >= 0, got {self.num_workers}")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Per-image augmentation (timm's transforms) and mixing of images within a batch (timm's Mixup)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop as a share of the image."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    """timm's policy string, e.g. `rand-m9-mstd0.5-inc1`."""
    random_erasing: float = 0.0
    erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "random_erasing", "mix_prob", "mix_switch_prob"):
            _require(0 <= getattr(self, name) <= 1, f"{name} is a probability, got {getattr(self, name)}")
        _require(0 < self.scale[0] <= self.scale[1] <= 1, f"scale must be 0 < low <= high <= 1, got {self.scale}")
        _require(0 < self.ratio[0] <= self.ratio[1], f"ratio must be 0 < low <= high, got {self.ratio}")
        _require(min(self.mixup, self.cutmix) >= 0, "mixup and cutmix must be >= 0")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: str = "adamw"
    """A name of timm's optimizer factory."""
    lr: float = 1e-3
    """Peak learning rate, used as it stands: it isn't scaled by the batch."""
    weight_decay: float = 0.05
    momentum: float = 0.9
    betas: tuple[float, float] | None = None
    eps: float | None = None
    layer_decay: float | None = None
    """Factor from one layer to the layer below it; None for one rate for all."""
    clip_grad: float | None = None
    """Largest gradient norm."""
    schedule: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"] = "cosine"
    """timm's schedule, stepped once per optimizer step."""
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6

    def __post_init__(self) -> None:
        known = [str(name) for name in list_optimizers()]
        if self.name.lower() not in known:
            raise unknown_choice("optimizer", self.name, known)
        _require(self.lr > 0, f"lr must be positive, got {self.lr}")
        _require(self.warmup_epochs >= 0, f"warmup_epochs must be >= 0, got {self.warmup_epochs}")
        _require(self.clip_grad is None or self.clip_grad > 0, f"clip_grad must be positive, got {self.clip_grad}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    epochs: int = 10
    batch_size: int = 64
    """Images per process and forward pass."""
    grad_accum: int = 1
    """Forward passes per optimizer step."""
    seed: int = 0
    smoothing: float = 0.0
    """Label smoothing."""
    loss: Literal["ce", "bce"] = "ce"
    precision: Literal["no", "bf16", "fp16"] = "no"
    ema_decay: float = 0.0
    """Decay of the averaged weights per step; 0 for none. With it, the averaged model is what is validated and saved."""
    channels_last: bool = False
    compile: bool = False
    checkpoint_steps: int = 0
    """Write a resumable checkpoint every so many optimizer steps too; 0: at the end of epochs only."""
    keep_checkpoints: int = 2
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where curves go beside the run folder; all but TensorBoard are packages that have to be installed."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "grad_accum", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(self.seed >= 0, f"seed must be >= 0, got {self.seed}")
        _require(0 <= self.smoothing < 1, f"smoothing must lie in [0, 1), got {self.smoothing}")
        _require(0 <= self.ema_decay < 1, f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        _require(self.checkpoint_steps >= 0, f"checkpoint_steps must be >= 0, got {self.checkpoint_steps}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _require(
            self.optim.warmup_epochs < self.train.epochs,
            f"optim.warmup_epochs is {self.optim.warmup_epochs:g}, expected fewer than train.epochs ({self.train.epochs})",
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's YAML, sets `section.key=value` overrides, and validates all of it. Raises `UserError`."""
    content = strict.read_yaml(path)
    strict.apply_overrides(content, overrides)
    return strict.parse(RunConfig, content)
