"""Training configuration. Every default stands in one of these sections, `data.config` or the task's; invalid values fail at load.

`images per optimizer step = train.batch_size * processes * train.grad_accum`; `train.global_batch` fixes it for any number of
processes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from timm.optim import list_optimizers

from .. import config as strict
from .. import hub, run_folder, tasks
from ..config import one_of, section
from ..data.config import DataConfig
from ..errors import UserError, unknown_choice
from ..tasks import DistillConfig
from ._processes import launched_compile, launched_precision

Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]

SCHEDULE_SETTINGS = {
    "cosine": ("cycles", "cycle_decay"),
    "tanh": ("cycles", "cycle_decay"),
    "step": ("decay_epochs", "decay_rate"),
    "multistep": ("milestones", "decay_rate"),
    "poly": ("power", "cycles", "cycle_decay"),
    "wsd": ("decay_epochs",),
    "rsqrt": ("decay_epochs", "timescale_epochs"),
}
"""Schedule -> the settings in `optim` that it alone has."""

ONE_SETTING = {"img_size": "data.img_size", "pretrained": "model.pretrained"}
"""Arguments of models that are settings of a run -> their keys."""

CONFIGS = Path(__file__).parent.parent / "configs"
"""The configs that the package ships."""


@section
class ModelConfig:
    """Model to train and the weights to start from."""

    name: str
    """Name in timm's registry (`effzoo_*` or any other), `local-dir:FOLDER`, `hf-hub:USER/NAME`, or a checkpoint file."""
    architecture: str | None = None
    """Name in timm's registry that the weights of a checkpoint file belong to; null for what the file says."""
    pretrained: bool = False
    """Start from the weights that belong to the name; folders and Hub names always bring theirs."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further constructor arguments, e.g. `drop_path_rate: 0.1`."""


def _known_optimizer(name: str) -> str:
    known = [str(optimizer) for optimizer in list_optimizers()]
    if name.lower() not in known:
        raise unknown_choice("optimizer", name, known)
    return name


@section
class OptimConfig:
    """Optimizer, learning-rate schedule and gradient clipping."""

    name: Annotated[str, AfterValidator(_known_optimizer)] = "adamw"
    """Name in timm's optimizer factory."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    lr_base_batch: Count | None = None
    """Number of images per step that `lr` refers to: the rate becomes lr * images / lr_base_batch. Null for `lr` unchanged."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay; biases and norms are exempt."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of optimizers that have one, e.g. SGD."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], ...] | None = None
    """Decay rates of the gradient's running moments; null for the optimizer's default."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Term added to denominators for stability; null for the optimizer's default."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor of the learning rate from each layer to the layer below it; null for one rate."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Limit for gradients, as `clip_mode` defines it; null for no clipping."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """Clipping by the norm of all gradients, by value, or adaptively relative to the weights (`agc`, arXiv:2102.06171)."""
    schedule: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"] = "cosine"
    """timm's learning-rate schedule, updated at every optimizer step."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the end of cosine, tanh, poly, wsd and rsqrt."""
    decay_epochs: Annotated[float, Field(gt=0)] | None = None
    """Epochs from one decay of `step` to the next, null for 0.3 of the run; or length of the last phase of `wsd` and `rsqrt`, in
    which the rate falls to `min_lr`, null for 0.2 of it."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor of the rate at each decay of `step` and `multistep`; null for 0.1."""
    milestones: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Numbers of epochs after which `multistep` decays; null for 0.3, 0.6 and 0.9 of the run."""
    power: Annotated[float, Field(gt=0)] | None = None
    """Exponent of `poly`: the rate is proportional to (1 - t) ** power, t from 0 to 1; null for 0.9."""
    cycles: Count | None = None
    """Number of equal parts of the run, at the start of each of which cosine, tanh and poly begin anew; null for 1."""
    cycle_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor of the peak rate from one of the `cycles` to the next; null for 1."""
    timescale_epochs: Annotated[float, Field(gt=0)] | None = None
    """`rsqrt` is proportional to (1 + epochs / timescale_epochs) ** -0.5; null for the length of the warm-up, or 1 without one."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Length of the linear warm-up in epochs; a tenth of a run of which it would be more than a fifth."""
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the start of the warm-up."""
    warmup_prefix: bool = False
    """Start of the schedule after the warm-up; otherwise the warm-up replaces its first steps."""

    def __post_init__(self) -> None:
        taken = SCHEDULE_SETTINGS.get(self.schedule, ())
        for name in dict.fromkeys(name for names in SCHEDULE_SETTINGS.values() for name in names):
            if getattr(self, name) is not None and name not in taken:
                has = f"{self.schedule} has {', '.join(taken)}" if taken else f"{self.schedule} has no such settings"
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, but schedule is {self.schedule}: expected null ({has})"
                )
        if self.milestones is not None and list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones: got {list(self.milestones)}, expected ascending numbers")


@section
class TrainConfig:
    """Training loop: epochs, batches, precision, checkpoints, trackers."""

    epochs: Count = 10
    """Number of epochs."""
    batch_size: Count = 64
    """Number of images per process and forward pass."""
    grad_accum: Count = 1
    """Number of forward passes per optimizer step."""
    global_batch: Count | None = None
    """Number of images per optimizer step over all processes, from which `grad_accum` follows; null for `grad_accum` as given."""
    seed: CountOrZero = 0
    """Seed of initial weights, order and augmentation."""
    head_init: Literal["probe", "random"] | None = None
    """How new outputs start: solved on the trained network's features (`probe`), which is the run's first result, or `random`. Null for
    a probe where training starts from trained weights and their outputs don't fit the data, so that these are new."""
    batchnorm: Literal["fixed", "train"] | None = None
    """BatchNorm in training: with the statistics of the trained weights (`fixed`) or of each batch (`train`). Null for fixed where
    training starts from trained weights with a `batch_size` below 128."""
    freeze_epochs: CountOrZero = 0
    """Number of initial epochs that train only the classifier; the backbone's BatchNorms use their stored statistics meanwhile."""
    patience: CountOrZero = 0
    """Number of epochs without a better validation metric after which training stops; 0 for no early stopping."""
    precision: Literal["no", "bf16", "fp16"] | None = None
    """Mixed precision; `no` for float32, null for that of `accelerate launch`, or float32 without it."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of the averaged weights, which are then the ones validated and saved; 0 for no averaging."""
    channels_last: bool = False
    """Channels-last memory format."""
    compile: bool = False
    """Compilation of the model by `torch.compile`."""
    grad_checkpointing: bool = False
    """Recomputation of activations in the backward pass: less memory, about a third more time."""
    deterministic: bool = False
    """Deterministic algorithms only; slower on GPUs, not needed on CPUs."""
    max_bad_steps: Count = 10
    """Number of consecutive steps with a non-finite loss that aborts the run and saves the batch; fewer are rolled back and counted."""
    checkpoint_steps: CountOrZero = 0
    """Number of optimizer steps between resumable checkpoints; 0 for one at the end of each epoch only."""
    keep_checkpoints: Count = 2
    """Number of latest checkpoints to keep."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Experiment trackers that receive the curves; all but TensorBoard are separate packages."""

    def __post_init__(self) -> None:
        if self.global_batch is not None and self.grad_accum != 1:
            raise ValueError(
                f"global_batch ({self.global_batch}) and grad_accum ({self.grad_accum}) are both given: expected one of them"
            )


def _repo_name(name: str | None) -> str | None:
    if name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None:
        raise ValueError("expected USER/NAME")
    return name


@section
class HubConfig:
    """Upload of the trained model to the Hugging Face Hub."""

    push: Annotated[str | None, AfterValidator(_repo_name)] = None
    """USER/NAME of the repository that receives the model folder at the end of the run; null for no upload."""
    push_best: bool = True
    """Upload of the best epoch's model rather than the last one's."""
    push_every_best: bool = False
    """Upload at every better epoch too. Upload failures are reported; training continues, and the next upload includes all files."""


def _configs() -> Mapping[str, type]:
    return {name: task.Config for name, task in tasks.TASKS.items()}


def _augments() -> Mapping[str, type]:
    return {name: task.Augment for name, task in tasks.TASKS.items()}


TASK = one_of(_configs, default=tasks.DEFAULT)
AUGMENT = one_of(_augments, default=tasks.DEFAULT, by="task")


@section
class RunConfig:
    """All settings of a training run."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    task: Annotated[Any, TASK] = TASK.field()
    """What is learned: settings of the task named by `kind`."""
    augment: Annotated[Any, AUGMENT] = AUGMENT.field()
    """Augmentation of training images, as the task defines it."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        optim, epochs = self.optim, self.train.epochs
        for name, values in {"decay_epochs": (optim.decay_epochs,), "milestones": optim.milestones or ()}.items():
            late = [value for value in values if value is not None and value >= epochs]
            if late:
                raise ValueError(f"optim.{name} is {late[0]:g}, expected fewer than train.epochs ({epochs})")

    @property
    def starts_trained(self) -> bool:
        """Whether training starts from trained weights. Raises `UserError` for a model that there isn't."""
        return self.model.pretrained or hub.brings_weights(self.model.name)

    def resolve_for_processes(self, num_processes: int) -> RunConfig:
        """This config with `grad_accum` and `lr` computed from `global_batch`, `lr_base_batch` and the number of processes, and with
        a warm-up that fits into the run and rates at both ends that are not above the peak.

        Raises:
            UserError: `global_batch` is not a multiple of the images that all processes take in one forward pass.
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
        if optim.warmup_epochs > train.epochs / 5:
            optim = replace(optim, warmup_epochs=train.epochs / 10)
        optim = replace(optim, min_lr=min(optim.min_lr, optim.lr), warmup_lr=min(optim.warmup_lr, optim.lr))
        return replace(self, train=train, optim=optim)


def parse_run(content: dict[str, Any]) -> RunConfig:
    """A run's config from YAML or plain values. Arguments of the model that are settings of the run are moved to their place.

    Raises:
        UserError: Invalid settings, or one that is given twice with different values.
    """
    model = content.get("model")
    kwargs = model.get("kwargs") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(kwargs, dict):
        model["kwargs"] = {name: value for name, value in kwargs.items() if name not in ONE_SETTING}
        for name in kwargs.keys() & ONE_SETTING.keys():
            key = ONE_SETTING[name]
            section, _, leaf = key.partition(".")
            place, value = content.setdefault(section, {}), strict.plain(kwargs[name])
            given = strict.plain(place.get(leaf)) if isinstance(place, dict) else None
            if given not in (None, value):
                raise UserError(f"model.kwargs.{name} is {value}, {key} is {given}: expected one of them, the latter")
            if isinstance(place, dict) and value is not None:
                place[leaf] = value
    return strict.parse(RunConfig, content)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's YAML, applies `section.key=value` overrides, validates the result, and completes it by what `accelerate launch`
    was told. Raises `UserError`."""
    return _complete(strict.read_yaml(path), overrides)


def load_run(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a run folder. Settings of a version that did not have them yet are what it did: `data.split_seed` was `train.seed`,
    BatchNorm was trained, and no run began with a probe."""
    content = strict.read_yaml(folder / run_folder.CONFIG)
    data, train = content.get("data") or {}, content.get("train") or {}
    if isinstance(data, dict) and isinstance(train, dict) and "seed" in train and "split_seed" not in data:
        content["data"] = {**data, "split_seed": train["seed"]}
    if isinstance(train, dict) and "seed" in train:
        content["train"] = {"head_init": "random", "batchnorm": "train", **train}
    return _complete(content, overrides)


def _complete(content: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    strict.apply_overrides(content, overrides)
    config = parse_run(content)
    precision: Any = config.train.precision or launched_precision() or "no"
    train = replace(config.train, precision=precision, compile=config.train.compile or launched_compile())
    return replace(config, train=train)


def find_config(name: str | Path) -> Path:
    """The file of a config.

    Args:
        name: Path of a file, or name of a shipped config with or without suffix: "finetune", "recipes/swin", "configs/finetune.yaml".

    Raises:
        UserError: There is neither such a file nor such a config.
    """
    if Path(name).is_file():
        return Path(name)
    files = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "accelerate"]
    shipped = {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in files}
    wanted = Path(name).as_posix().removeprefix("configs/").removesuffix(".yaml")
    if wanted in shipped:
        return shipped[wanted]
    if Path(name).suffix in (".yaml", ".yml"):
        raise UserError(f"config file {str(name)!r} does not exist")
    raise unknown_choice("config", str(name), list(shipped))
