"""ToSA's training in three stages: a dense ViT, the token selectors, the ViT again with selection on.

The paper (arXiv:2406.08816) says neither how many stages there are nor what is trained in them. These are the ones that worked best on
Fashion-MNIST:

1. `dense`: a ViT like any other, or none at all if `model` brings trained weights.
2. `selectors`: the network is frozen and in eval mode; each selector learns the true attention map of the layer after it, by KL divergence.
   Top-1 is measured with selection on, at `attention_ratio`.
3. `finetune`: the selectors are frozen; the network learns to do with the tokens that they select, from the labels and from the dense
   model's logits. The attention ratio is drawn anew for every step, which gives one checkpoint for every ratio.

Every stage has a run folder of its own and reads the one before, so the pipeline goes on wherever it was cut:

    OUTPUT/config.yaml                      what was asked for
    OUTPUT/1-dense, 2-selectors, 3-finetune runs: summary.json, curves.png, best/, last/, checkpoints/
    OUTPUT/dense, OUTPUT/start              model folders: the trained dense ViT, and the same with new selectors
    OUTPUT/summary.json, ratios.png         dense beside ToSA: top-1, MACs and measured latency at several ratios
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .. import config as strict
from .. import hub
from ..benchmark.tosa import compare_ratios, print_ratios
from ..data.loader import Batch, seed_everything
from ..errors import UserError, unknown_choice
from ..measure import cost
from ..models import to_dense, to_tosa
from ..models.tosa_vit import ToSAViT
from ..report.run_page import write_atomically, write_summary
from ..run_folder import MODEL_CONFIG
from ..tasks.classification import Task
from ..training.config import AugmentConfig, DataConfig, DistillConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from ..training.launch import process_state
from ..training.run import CONFIG_FILE, build_model, prepare, train
from ..viz.selection import accuracy_over_macs

STAGES = {"dense": "1-dense", "selectors": "2-selectors", "finetune": "3-finetune"}
"""Name of a stage -> its run folder in the output folder."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig | None = None
    """None: the pipeline's."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(StageConfig):
    ratios: tuple[float, ...] = (0.8, 0.6, 0.5, 0.4, 0.25)
    """Attention ratios, one of which is drawn for every step."""
    alpha: float = 0.5
    """Weight of the dense model's logits against that of the labels; 0 for labels alone."""
    temperature: float = 2.0
    """Of the distillation from the dense model."""

    def __post_init__(self) -> None:
        _check_ratios("finetune.ratios", self.ratios)


@dataclass(frozen=True, kw_only=True)
class SelectorConfig:
    """As the arguments of `ToSAViT` of the same names."""

    kernel: int = 3
    hidden_ratio: int = 4
    stride: int = 8


@dataclass(frozen=True, kw_only=True)
class ToSAConfig:
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    selector: SelectorConfig = field(default_factory=SelectorConfig)
    attention_ratio: float = 0.5
    """What stages 2 and 3 are validated at, and what the finished model is saved with."""
    ratios: tuple[float, ...] = (1.0, 0.8, 0.5, 0.25, 0.0)
    """What the summary compares."""
    dense: StageConfig | None = None
    """None: `model` brings trained weights for the data's classes."""
    selectors: StageConfig = field(default_factory=StageConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        _check_ratios("attention_ratio", [self.attention_ratio])
        _check_ratios("ratios", self.ratios)


def _check_ratios(key: str, ratios: Sequence[float]) -> None:
    if not ratios or not all(0 <= ratio <= 1 for ratio in ratios):
        raise UserError(f"config key {key}: expected numbers from 0 to 1, got {list(ratios)}")


def is_pipeline(path: str | Path) -> bool:
    """Whether a config has this pipeline's stages. Raises `UserError` for what is no YAML of sections."""
    return "selectors" in strict.read_yaml(path)


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> ToSAConfig:
    """Reads the pipeline's YAML, sets `section.key=value` overrides, and validates all of it. Raises `UserError`."""
    content = strict.read_yaml(path)
    strict.apply_overrides(content, overrides)
    return strict.parse(ToSAConfig, content)


def train_tosa(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    resume: str | None = None,
    stage: str | None = None,
) -> Path:
    """Runs the stages that are not done yet, and then the comparison; returns the output folder.

    Args:
        config_path: YAML of the pipeline.
        overrides: `section.key=value` settings that go before the file's.
        output: Output folder; None for `runs/NAME-OF-CONFIG`.
        resume: "auto" goes on in an output folder where there is something to go on from; None expects a new one.
        stage: Run this stage alone (those before it must be done).

    Raises:
        UserError: For bad input of any kind; what is on disk stays as it was.
    """
    if stage is not None and stage not in STAGES:
        raise unknown_choice("stage", stage, list(STAGES))
    config = load_pipeline(config_path, overrides)
    folder = Path(output) if output is not None else Path("runs") / Path(config_path).stem
    _claim(folder, config, resume, stage)
    for name, text in STAGES.items():
        if stage not in (None, name):
            continue
        if not _is_done(folder / text) and (name != "dense" or config.dense is not None):
            if config.dense is None:
                _make_start(folder, config)
            _train_stage(name, folder, config)
        if name == "dense" and config.dense is not None:
            _make_start(folder, config)
    if stage in (None, "finetune"):
        _compare(folder, config)
    return folder


def _is_done(run: Path) -> bool:
    return (run / "summary.json").is_file()


def _claim(folder: Path, config: ToSAConfig, resume: str | None, stage: str | None) -> None:
    """Writes the config into the output folder, or makes sure that the one there is the same."""
    recorded = folder / CONFIG_FILE
    if resume not in (None, "auto"):
        raise UserError(f"--resume {resume}: a pipeline goes on in its --output folder, expected auto")
    if recorded.is_file():
        if resume is None and stage is None:
            raise UserError(f"{folder} already holds a run: go on with it by --resume auto, or name another --output")
        changed = strict.changed_keys(load_pipeline(recorded), config)
        if changed:
            raise UserError(f"{folder} was started with other settings of {', '.join(changed)}: resume with the same")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not a pipeline's folder: name another --output")
    state = process_state()
    state.wait_for_everyone()
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(recorded, strict.dump(config))
    state.wait_for_everyone()


def _train_stage(name: str, folder: Path, config: ToSAConfig) -> None:
    """One stage, from its own config file, which anyone may read."""
    run = folder / STAGES[name]
    if name != "dense" and not (folder / "start" / MODEL_CONFIG).is_file():
        raise UserError(f"stage {name} needs the dense model in {folder / 'start'}: run the stages before it")
    if name == "finetune" and not _is_done(folder / STAGES["selectors"]):
        raise UserError(f"stage finetune needs {folder / STAGES['selectors']}: run the stages before it")
    plan = folder / f"{STAGES[name]}.yaml"
    state = process_state()
    if state.is_main_process:
        write_atomically(plan, strict.dump(_stage_config(name, folder, config)))
    state.wait_for_everyone()
    train(plan, output=run, resume="auto", adapt=_ADAPTED[name](config))
    state.wait_for_everyone()


def _stage_config(name: str, folder: Path, config: ToSAConfig) -> RunConfig:
    stage: StageConfig | None = getattr(config, name)
    assert stage is not None  # a dense stage that isn't there isn't run
    before = {"dense": None, "selectors": folder / "start", "finetune": folder / STAGES["selectors"] / "last"}[name]
    model = config.model if before is None else ModelConfig(name=f"local-dir:{before}")
    distill = DistillConfig()
    if isinstance(stage, FinetuneConfig) and stage.alpha:
        distill = DistillConfig(
            teacher=f"local-dir:{folder / 'dense'}", kind="soft", alpha=stage.alpha, temperature=stage.temperature
        )
    return RunConfig(
        model=model,
        data=config.data,
        augment=stage.augment or config.augment,
        optim=stage.optim,
        train=stage.train,
        distill=distill,
    )


def _make_start(folder: Path, config: ToSAConfig) -> None:
    """Model folders of the dense ViT and of the same with new selectors, from stage 1 or from what `model` names."""
    state = process_state()
    if state.is_main_process and not (folder / "start" / MODEL_CONFIG).is_file():
        if config.dense is not None:
            trained: Any = hub.load(str(folder / STAGES["dense"] / "best"))
        else:
            feed, _ = prepare(RunConfig(model=config.model, data=config.data), 1)
            trained = _given_model(config, feed.class_names)
        seed_everything(config.dense.train.seed if config.dense else config.selectors.train.seed)
        labels, data_config = hub.label_names(trained), dict(trained.pretrained_cfg)
        model = trained
        if not isinstance(trained, ToSAViT):
            selector = config.selector
            model = to_tosa(trained, config.attention_ratio, selector.kernel, selector.hidden_ratio, selector.stride)
        model.set_attention_ratio(config.attention_ratio)
        preprocessing = {
            key: data_config[key]
            for key in ("input_size", "mean", "std", "crop_pct", "interpolation")
            if data_config.get(key)
        }
        hub.save(to_dense(model), folder / "dense", label_names=labels, data_config=preprocessing)
        hub.save(model, folder / "start", label_names=labels, data_config=preprocessing)
    state.wait_for_everyone()


def _given_model(config: ToSAConfig, class_names: Sequence[str]) -> Any:
    """The model that the config names, if it knows the data's classes."""
    model: Any = hub.load(
        config.model.name, pretrained=config.model.pretrained or hub.brings_weights(config.model.name)
    )
    if model.num_classes != len(class_names):
        raise UserError(
            f"{config.model.name} has {model.num_classes} classes and {config.data.root} has {len(class_names)}: "
            "give the pipeline a dense stage, or a model that was trained on these classes"
        )
    return build_model(RunConfig(model=config.model, data=config.data), len(class_names))


class SelectorTask:
    """Stage 2: KL divergence of each selector's map from the next layer's true one; the rest is frozen and in eval mode."""

    def __init__(self, model: ToSAViT) -> None:
        self.model: Any = model
        self._plain = model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("selectors."))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.model.eval()
        with self._plain.giving_selector_losses():
            losses = self.model(batch["image"])
        return losses.mean(), {}


class DrawnRatio:
    """Stage 3: another task at an attention ratio that is drawn for each of its steps; the selectors are frozen.

    The draw follows torch's generator, which the engine seeds for every step, so that a resumed run draws the same.
    """

    def __init__(self, task: Task, ratios: Sequence[float]) -> None:
        self._task, self._plain, self._ratios = task, task.model, ratios
        for name, parameter in task.model.named_parameters():
            if name.startswith("selectors."):
                parameter.requires_grad_(False)

    @property
    def model(self) -> Any:
        """The inner task's, which the engine wraps."""
        return self._task.model

    @model.setter
    def model(self, wrapped: Any) -> None:
        self._task.model = wrapped

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = self._ratios[int(torch.randint(len(self._ratios), ()))]
        with self._plain.at_ratio(drawn):  # type: ignore[operator]
            return self._task.loss(batch)


def _train_densely(config: ToSAConfig) -> Callable[[Task], Task]:
    def adapt(task: Task) -> Task:
        if isinstance(task.model, ToSAViT):
            task.model.set_attention_ratio(1.0)
            task.model.selectors.requires_grad_(False)
        return task

    return adapt


def _train_selectors(config: ToSAConfig) -> Callable[[Task], Task]:
    return lambda task: SelectorTask(task.model)  # type: ignore[arg-type]


def _train_at_drawn_ratios(config: ToSAConfig) -> Callable[[Task], Task]:
    return lambda task: DrawnRatio(task, config.finetune.ratios)


_ADAPTED: Mapping[str, Callable[[ToSAConfig], Callable[[Task], Task]]] = {
    "dense": _train_densely,
    "selectors": _train_selectors,
    "finetune": _train_at_drawn_ratios,
}


def _compare(folder: Path, config: ToSAConfig) -> None:
    """summary.json and ratios.png: the dense model beside ToSA at every ratio."""
    if not process_state().is_main_process:
        return
    rows = compare_ratios(folder, config.ratios)
    print_ratios(Console(), rows)
    accuracy_over_macs({"ToSA": rows[1:]}, rows[0], folder / "ratios.png")
    runs = {name: folder / text for name, text in STAGES.items() if _is_done(folder / text)}
    stages = {name: json.loads((run / "summary.json").read_text(encoding="utf-8")) for name, run in runs.items()}
    model: Any = hub.load(str(folder / STAGES["finetune"] / "last"))
    write_summary(
        folder,
        {
            "model": model.pretrained_cfg["architecture"],
            "data": config.data.root,
            "attention_ratio": config.attention_ratio,
            "top1": stages["finetune"]["top1"],
            "top5": stages["finetune"]["top5"],
            "images_per_second": stages["finetune"]["images_per_second"],
            "params": cost.count_params(model),
            "macs": stages["finetune"]["macs"],
            "seconds": sum(summary["seconds"] for summary in stages.values()),
            "stages": {
                name: {"top1": summary["top1"], "seconds": summary["seconds"]} for name, summary in stages.items()
            },
            "ratios": rows,
        },
    )
    print(
        f'model: timm.create_model("local-dir:{folder / STAGES["finetune"] / "last"}", pretrained=True) after import effvit_zoo'
    )
