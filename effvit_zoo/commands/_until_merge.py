"""Interfaces that the commands use and that other rooms are about to offer, over what these rooms have now."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from PIL import Image

from ..errors import UserError

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def find_config(name: str) -> Path:  # training.config
    path = Path(name)
    return CONFIGS / f"{name}.yaml" if not path.suffix and (CONFIGS / f"{name}.yaml").is_file() else path


def settings_help() -> str:  # commands.config
    return ""


def pipeline_of(config: Path) -> str | None:  # pipelines
    from ..pipelines.tosa import is_pipeline

    return "tosa" if is_pipeline(config) else None


def _train_tosa(*args: Any) -> Path:
    from ..pipelines.tosa import train_tosa

    return train_tosa(*args)


PIPELINES = {"tosa": SimpleNamespace(train=_train_tosa)}  # pipelines


class Metric(NamedTuple):  # tasks.contract
    title: str
    unit: str = "%"
    digits: int = 2

    def show(self, value: float) -> str:
        return f"{value:.{self.digits}f} {self.unit}".strip()


def known_metrics() -> dict[str, Any]:  # the metrics of TASKS, and LOSS
    return {"top1": Metric("top-1"), "top5": Metric("top-5"), "loss": Metric("loss", "", 4)}


class Prediction(NamedTuple):  # evaluation.prediction
    image: Path
    rows: list[dict[str, Any]]


def predict(model: Any, paths: Sequence[Path], **options: Any) -> Iterator[Prediction]:  # evaluation.prediction
    from ..evaluation import prediction

    for found in prediction.predict(model, paths, **options):
        best = zip(found.labels, found.indices, found.probabilities, strict=True)
        rows = [
            {"rank": rank, "label": label, "index": index, "probability": share}
            for rank, (label, index, share) in enumerate(best, 1)
        ]
        yield Prediction(found.image, rows)


def task_of(model: Any) -> Any:  # evaluation.prediction
    from ..viz.predictions import annotate

    def draw(image: Image.Image, rows: Sequence[dict[str, Any]]) -> Image.Image:
        return annotate(image, [row["label"] for row in rows], [row["probability"] for row in rows])

    return SimpleNamespace(draw_prediction=draw)


HEAD = ["class", "images", "recall %", "precision %", "F1 %", "most taken for"]


def validate_models(  # evaluation.compare
    names: Sequence[str],
    data: str,
    *,
    img_sizes: Sequence[int] = (),
    on_skip: Callable[[str, UserError], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    from ..evaluation.compare import _validate_named

    args = argparse.Namespace(data=data, **options)
    rows = []
    for name in names:
        try:
            for size in img_sizes or [None]:
                row = _validate_named(name, args, size)
                cells = [
                    [
                        *(c["class"], c["images"], c["recall"], c["precision"], c["f1"]),
                        c["taken_for"] or "",
                    ]
                    for c in row["per_class"]
                ]
                rows.append(row | {"tables": [{"title": "", "head": HEAD, "rows": cells}]})
        except UserError as error:
            if on_skip is None:
                raise
            on_skip(name, error)
    return rows
