"""ToSA's training in three stages: a dense ViT, the token selectors, the ViT again with selection on.

The paper (arXiv:2406.08816) says neither how many stages there are nor what is trained in them. These are the ones that worked best on
Fashion-MNIST:

1. `dense`: a ViT like any other; left out where `model` brings trained weights.
2. `selectors`: the network is frozen and in eval mode; each selector learns the true attention map of the layer after it, by KL divergence.
   Validation measures the model with selection on, at `attention_ratio`.
3. `finetune`: the selectors are frozen; the network adapts to the tokens that they select, trained on the labels and on the dense
   model's logits. The attention ratio is sampled anew for every step, which gives one checkpoint for every ratio.

Besides the stages' run folders the output folder holds two model folders, `dense` (the trained dense ViT) and `start` (the same with new
selectors), and summary.json.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import config as strict
from .. import hub, run_folder
from ..config import section
from ..data import Batch, DataConfig, seed_everything
from ..errors import UserError
from ..measure import cost
from ..models import AtRatio, SelectorLosses, to_dense, to_tosa
from ..models.tosa_vit import ToSAViT
from ..report.run_page import write_summary
from ..tasks import TASKS, DistillConfig, Objective, Task
from ..training.config import ModelConfig, OptimConfig, RunConfig, TrainConfig, parse_run
from ..training.prepare import prepare
from ._report import history
from .contract import Pipeline, Stage, is_done

DENSE, SELECTORS, FINETUNE = "1-dense", "2-selectors", "3-finetune"
"""Run folders of the stages."""
DENSE_MODEL, START = "dense", "start"
"""Model folders beside them."""

Ratio = Annotated[float, Field(ge=0, le=1)]
Ratios = Annotated[tuple[Ratio, ...], Field(min_length=1)]


@section
class StageConfig:
    """A stage of the pipeline."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batches and precision."""
    task: dict[str, Any] = field(default_factory=dict)
    """Settings of the task that override the pipeline's."""
    augment: dict[str, Any] = field(default_factory=dict)
    """Augmentation settings that override the pipeline's."""


@section
class FinetuneConfig(StageConfig):
    """The third stage."""

    ratios: Ratios = (0.8, 0.6, 0.5, 0.4, 0.25)
    """Attention ratios, one of which is sampled for every step."""
    alpha: Ratio = 0.5
    """Weight of the dense model's logits against that of the labels; 0 for labels alone."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Temperature of the distillation from the dense model."""


@section
class SelectorConfig:
    """Shape of the token selectors: the arguments of `ToSAViT` of the same names."""

    kernel: int = 3
    """Kernel size of the convolutions, odd."""
    hidden_ratio: int = 4
    """Channels between the convolutions, as a multiple of the heads."""
    stride: int = 8
    """Every N-th query is read; 1 for the full map."""


@section
class ToSAConfig:
    """The pipeline `tosa`."""

    pipeline: Literal["tosa"] = "tosa"
    """Name of the pipeline."""
    model: ModelConfig
    """Model of the first stage."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data of all stages."""
    task: dict[str, Any] = field(default_factory=dict)
    """Task of all stages, as in the config of a run."""
    augment: dict[str, Any] = field(default_factory=dict)
    """Augmentation of all stages, as in the config of a run."""
    selector: SelectorConfig = field(default_factory=SelectorConfig)
    """Shape of the selectors."""
    attention_ratio: Ratio = 0.5
    """Attention ratio at which stages 2 and 3 are validated, and with which the finished model is saved."""
    ratios: Ratios = (1.0, 0.8, 0.5, 0.25, 0.0)
    """Attention ratios that are compared at the end."""
    dense: StageConfig | None = None
    """First stage; None where the model brings trained weights for the data's classes."""
    selectors: StageConfig = field(default_factory=StageConfig)
    """Second stage."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Third stage."""


def _run_config(
    config: ToSAConfig, stage: StageConfig, model: ModelConfig, distill: DistillConfig | None = None
) -> Any:
    return parse_run(
        {
            "model": strict.as_dict(model),
            "data": strict.as_dict(config.data),
            "task": {**config.task, **stage.task},
            "augment": {**config.augment, **stage.augment},
            "optim": strict.as_dict(stage.optim),
            "train": strict.as_dict(stage.train),
            "distill": strict.as_dict(distill or DistillConfig()),
        },
    )


def _dense(config: ToSAConfig, folder: Path) -> RunConfig | None:
    return None if config.dense is None else _run_config(config, config.dense, config.model)


def _selectors(config: ToSAConfig, folder: Path) -> RunConfig:
    return _run_config(config, config.selectors, ModelConfig(name=f"{hub.LOCAL}{folder / START}"))


def _finetune(config: ToSAConfig, folder: Path) -> RunConfig:
    stage = config.finetune
    distill = None
    if stage.alpha:
        teacher = f"{hub.LOCAL}{folder / DENSE_MODEL}"
        distill = DistillConfig(teacher=teacher, kind="soft", alpha=stage.alpha, temperature=stage.temperature)
    return _run_config(config, stage, ModelConfig(name=f"{hub.LOCAL}{folder / SELECTORS / run_folder.LAST}"), distill)


def make_start(folder: Path, config: ToSAConfig) -> None:
    """Model folders of the dense ViT and of the same with new selectors, from stage 1 or from the config's model."""
    if (folder / START / run_folder.MODEL_CONFIG).is_file():
        return
    trained: Any = hub.load(folder / DENSE / run_folder.BEST) if config.dense is not None else _given_model(config)
    seed_everything(config.dense.train.seed if config.dense else config.selectors.train.seed)
    labels, cfg = hub.label_names(trained), trained.pretrained_cfg
    model, selector = trained, config.selector
    if not isinstance(trained, ToSAViT):
        try:
            model = to_tosa(trained, config.attention_ratio, selector.kernel, selector.hidden_ratio, selector.stride)
        except ValueError as error:
            raise UserError(str(error)) from error
    model.set_attention_ratio(config.attention_ratio)
    keys = ("input_size", "mean", "std", "crop_pct", "interpolation")
    preprocessing = {key: cfg[key] for key in keys if cfg.get(key)}
    hub.save(to_dense(model), folder / DENSE_MODEL, label_names=labels, data_config=preprocessing)
    hub.save(model, folder / START, label_names=labels, data_config=preprocessing)


def _given_model(config: ToSAConfig) -> Any:
    """The model that the config names, if its outputs are those of the data."""
    run_config = _run_config(config, config.selectors, config.model)
    prepared = prepare(run_config, 1)
    source = hub.classes_of(config.model.name)
    hub.class_order(
        prepared.task.label_names or (),
        hub.known_names(source),
        int(source.get("num_classes") or 0),
        by_position=getattr(run_config.task, "classes", "") == "position",
        whose=config.model.name,
        option="task.classes=position",
    )
    return prepared.model


class SelectorObjective:
    """Stage 2: KL divergence of each selector's map from the next layer's true one; the rest is frozen and in eval mode."""

    loss_title = "KL divergence of the selectors' maps"

    def trainable(self, model: Any) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("selectors."))
        return SelectorLosses(model)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return model(batch.image).mean(), {}


class SampledRatio:
    """Stage 3: another objective at an attention ratio that is sampled for each step; the selectors are frozen.

    The sample follows torch's generator, which the engine seeds for every step, so that a resumed run draws the same.
    """

    def __init__(self, objective: Objective, ratios: Sequence[float]) -> None:
        self.objective, self.ratios = objective, ratios
        self.loss_title = getattr(objective, "loss_title", "")

    def trainable(self, model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            if name.startswith("selectors."):
                parameter.requires_grad_(False)
        inner: Any = self.objective.trainable(model)
        return AtRatio(inner)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = self.ratios[int(torch.randint(len(self.ratios), ()))]
        return self.objective.loss(functools.partial(model, attention_ratio=ratio), batch)


def _train_densely(config: ToSAConfig) -> Any:
    def adapt(task: Task, objective: Objective, model: nn.Module) -> Objective:
        if isinstance(model, ToSAViT):
            model.set_attention_ratio(1.0)
            model.selectors.requires_grad_(False)
        return objective

    return adapt


STAGES = (
    Stage("dense", DENSE, _dense, _train_densely, hand_on=make_start),
    Stage(
        "selectors",
        SELECTORS,
        _selectors,
        lambda config: lambda task, objective, model: SelectorObjective(),
        reads=START,
        has_metric=False,
    ),
    Stage(
        "finetune",
        FINETUNE,
        _finetune,
        lambda config: lambda task, objective, model: SampledRatio(objective, config.finetune.ratios),
        reads=f"{SELECTORS}/{run_folder.LAST}",
    ),
)


def _conclude(folder: Path, config: ToSAConfig) -> None:
    """summary.json of the pipeline: the results of the model that it hands over, that of the last epoch, and the costs of all stages."""
    stages = {
        stage.name: run_folder.read_json(folder / stage.folder / run_folder.SUMMARY)
        for stage in STAGES
        if is_done(folder / stage.folder)
    }
    last = stages["finetune"]
    saved = folder / FINETUNE / run_folder.LAST
    model: Any = hub.load(saved)
    measured = history(folder / FINETUNE)[-1]
    metrics = [name for name in (*TASKS[last["task"]].metrics, "val_loss") if measured.get(name)]
    write_summary(
        folder,
        {
            "model": model.pretrained_cfg["architecture"],
            "data": config.data.root,
            "attention_ratio": config.attention_ratio,
            "task": last["task"],
            **{name: float(measured[name]) for name in metrics},
            **{key: last[key] for key in ("images_per_second", "macs")},
            "params": cost.count_params(model),
            "seconds": sum(summary["seconds"] for summary in stages.values()),
            "stages": {name: {"seconds": summary["seconds"]} for name, summary in stages.items()},
        },
    )
    print(f'model: timm.create_model("local-dir:{saved}", pretrained=True) after import effvit_zoo')


TOSA = Pipeline("tosa", ToSAConfig, STAGES, _conclude, benchmark="tosa")
