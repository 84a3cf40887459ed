"""What a training run can be told. Every default stands here, once; a value that can't work is refused before the first step.

`images per optimizer step = train.batch_size * processes * train.grad_accum`, and with `train.global_batch` that many, whatever the
number of processes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from timm.optim import list_optimizers

from .. import config as strict
from ..data.config import DataConfig
from ..errors import UserError, unknown_choice

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
    repeats: int = 1
    """Repeated augmentation (arXiv:1902.05509): so many versions of each image in a step, and as many fewer images in an epoch."""
    sizes: tuple[int, ...] = ()
    """Side lengths in pixels: every step draws one of them for its images (multi-scale training). Empty: `data.img_size`."""

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "random_erasing", "mix_prob", "mix_switch_prob"):
            _require(0 <= getattr(self, name) <= 1, f"{name} is a probability, got {getattr(self, name)}")
        _require(0 < self.scale[0] <= self.scale[1] <= 1, f"scale must be 0 < low <= high <= 1, got {self.scale}")
        _require(0 < self.ratio[0] <= self.ratio[1], f"ratio must be 0 < low <= high, got {self.ratio}")
        _require(min(self.mixup, self.cutmix) >= 0, "mixup and cutmix must be >= 0")
        _require(self.repeats >= 1, f"repeats must be at least 1, got {self.repeats}")
        _require(min(self.sizes, default=1) >= 1, f"sizes must be at least 1 pixel, got {self.sizes}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: str = "adamw"
    """A name of timm's optimizer factory."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_base_batch: int | None = None
    """Images per step that `lr` is meant for: the rate becomes lr * images / lr_base_batch. None: `lr` as it stands."""
    weight_decay: float = 0.05
    momentum: float = 0.9
    betas: tuple[float, float] | None = None
    eps: float | None = None
    layer_decay: float | None = None
    """Factor from one layer to the layer below it; None for one rate for all."""
    clip_grad: float | None = None
    """Largest gradient norm, or what `clip_mode` makes of it."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """`norm`: of all gradients together; `value`: each number; `agc`: adaptive, relative to the weights (arXiv:2102.06171)."""
    schedule: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"] = "cosine"
    """timm's schedule, stepped once per optimizer step."""
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    warmup_prefix: bool = False
    """The schedule begins after the warm-up; otherwise the warm-up takes the place of its first steps."""
    min_lr: float = 1e-6

    def __post_init__(self) -> None:
        known = [str(name) for name in list_optimizers()]
        if self.name.lower() not in known:
            raise unknown_choice("optimizer", self.name, known)
        _require(self.lr > 0, f"lr must be positive, got {self.lr}")
        _require(
            self.lr_base_batch is None or self.lr_base_batch >= 1,
            f"lr_base_batch must be >= 1, got {self.lr_base_batch}",
        )
        _require(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"layer_decay must lie in (0, 1], got {self.layer_decay}",
        )
        _require(self.weight_decay >= 0, f"weight_decay must be >= 0, got {self.weight_decay}")
        _require(self.warmup_epochs >= 0, f"warmup_epochs must be >= 0, got {self.warmup_epochs}")
        _require(self.clip_grad is None or self.clip_grad > 0, f"clip_grad must be positive, got {self.clip_grad}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    epochs: int = 10
    batch_size: int = 64
    """Images per process and forward pass."""
    grad_accum: int = 1
    """Forward passes per optimizer step."""
    global_batch: int | None = None
    """Images per optimizer step over all processes; `grad_accum` then follows from the number of processes."""
    seed: int = 0
    smoothing: float = 0.0
    """Label smoothing."""
    loss: Literal["ce", "bce"] = "ce"
    class_weights: bool = False
    """Weigh each image's loss by the inverse of its class' share of the training images."""
    freeze_epochs: int = 0
    """Train the classifier alone for so many epochs; the backbone's BatchNorms use their stored statistics meanwhile."""
    patience: int = 0
    """Stop after so many epochs without a better validation top-1; 0: never."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    ema_decay: float = 0.0
    """Decay of the averaged weights per step; 0 for none. With it, the averaged model is what is validated and saved."""
    channels_last: bool = False
    compile: bool = False
    grad_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third more time."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time; slower on GPUs, and needless on CPUs."""
    max_bad_steps: int = 10
    """Steps whose loss is not finite are skipped; after so many in a row the run stops, with the batch saved."""
    checkpoint_steps: int = 0
    """Write a resumable checkpoint every so many optimizer steps too; 0: at the end of epochs only."""
    keep_checkpoints: int = 2
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where curves go beside the run folder; all but TensorBoard are packages that have to be installed."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "grad_accum", "keep_checkpoints", "max_bad_steps"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("freeze_epochs", "patience"):
            _require(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name)}")
        _require(
            self.global_batch is None or self.global_batch >= 1, f"global_batch must be >= 1, got {self.global_batch}"
        )
        _require(
            self.global_batch is None or self.grad_accum == 1,
            f"global_batch ({self.global_batch}) and grad_accum ({self.grad_accum}) are both given: expected one of them",
        )
        _require(self.seed >= 0, f"seed must be >= 0, got {self.seed}")
        _require(0 <= self.smoothing < 1, f"smoothing must lie in [0, 1), got {self.smoothing}")
        _require(0 <= self.ema_decay < 1, f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        _require(self.checkpoint_steps >= 0, f"checkpoint_steps must be >= 0, got {self.checkpoint_steps}")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Learning from a trained model beside the labels."""

    teacher: str | None = None
    """A model as in `model.name`, with its weights; None: no distillation."""
    teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further constructor arguments of the teacher."""
    kind: Literal["hard", "soft", "token"] = "hard"
    """`hard`: the teacher's first choice is a second label; `soft`: its probabilities are; `token`: as hard, but learned by the
    student's own distillation classifier (SwiftFormer, distilled DeiT)."""
    alpha: float = 0.5
    """Share of the teacher in the loss."""
    temperature: float = 1.0
    """Of both softmaxes, for `soft`."""

    def __post_init__(self) -> None:
        _require(0 <= self.alpha <= 1, f"alpha must lie in [0, 1], got {self.alpha}")
        _require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    push: str | None = None
    """USER/NAME on the Hub to upload the model folder to when the run is through."""
    push_best: bool = True
    """The best epoch's model; otherwise the last one's."""
    push_every_best: bool = False
    """Upload at every better epoch too. A failure is told and the run goes on; the next upload sends all there is by then."""

    def __post_init__(self) -> None:
        _require(
            self.push is None or re.fullmatch(r"[\w.-]+/[\w.-]+", self.push) is not None,
            f"push is {self.push!r}, expected USER/NAME",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        _require(
            self.optim.warmup_epochs < self.train.epochs,
            f"optim.warmup_epochs is {self.optim.warmup_epochs:g}, expected fewer than train.epochs ({self.train.epochs})",
        )

    def shared_by(self, num_processes: int) -> RunConfig:
        """This config for so many processes: `grad_accum` and `lr` as `global_batch` and `lr_base_batch` want them.

        Raises:
            UserError: `global_batch` is no multiple of what the processes take at once.
        """
        train, optim = self.train, self.optim
        at_once = train.batch_size * num_processes
        if train.global_batch is not None:
            if train.global_batch % at_once:
                raise UserError(
                    f"train.global_batch is {train.global_batch}, expected a multiple of train.batch_size x processes "
                    f"= {train.batch_size} x {num_processes} = {at_once}"
                )
            train = replace(train, grad_accum=train.global_batch // at_once, global_batch=None)
        if optim.lr_base_batch is not None:
            images = at_once * train.grad_accum
            optim = replace(optim, lr=optim.lr * images / optim.lr_base_batch, lr_base_batch=None)
        return replace(self, train=train, optim=optim)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's YAML, sets `section.key=value` overrides, and validates all of it. Raises `UserError`."""
    content = strict.read_yaml(path)
    strict.apply_overrides(content, overrides)
    return strict.parse(RunConfig, content)
