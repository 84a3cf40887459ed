"""Model cards: what was recorded of a model, as metadata for the Hub (model-index) and as text. Nothing else is stated.

Everything below the last line of a generated card belongs to its readers: a later push rewrites what stands above and keeps the rest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..run_folder import ARCHITECTURE_KEY, CONFIG, EXTRA_KEY, MODEL_CONFIG, RECORDS, SUMMARY, VALIDATION
from ..version import __version__
from .folder import HUB, LOCAL

INSTALL = "```bash\npip install effvit_zoo\n```"
"""First lines of the card of a model that timm alone can't build; the script follows."""

OWN_WORDS = "<!-- What stands below this line is kept when the model is pushed again. -->"
_DATA_SETS = {
    "builtin:fashion-mnist": ("zalando-datasets/fashion_mnist", "Fashion-MNIST"),
    "builtin:fashion-mnist-mini": (
        "zalando-datasets/fashion_mnist",
        "Fashion-MNIST, the 10,000 images that ship with effvit_zoo",
    ),
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says that depends on the task.

    Attributes:
        pipeline_tag: The Hub's name of the task, e.g. "image-classification".
        task_title: The same in words, e.g. "Image classification".
        metrics: Key of recorded results -> (title, the Hub's metric type), e.g. {"top1": ("Top-1 accuracy, %", "accuracy")}.
        introduction: Continues "`ARCHITECTURE` ", e.g. "with 3 classes".
        sections: (heading, Markdown) of further sections.
        usage: USER/NAME[@REVISION] -> a complete Python script.
        figures: File name of a figure in the run folder -> its caption.
        tags: Further tags on the Hub.
        recipe: Name of the shipped config that fine-tunes such a model; "" for none.
    """

    pipeline_tag: str
    task_title: str
    metrics: Mapping[str, tuple[str, str]]
    introduction: str
    sections: tuple[tuple[str, str], ...]
    usage: Callable[[str], str]
    figures: Mapping[str, str]
    tags: tuple[str, ...] = ()
    recipe: str = ""


class _Records:
    """What the published files say: the model's config and, under `training/`, the run's config, summary and measurements."""

    def __init__(self, files: Mapping[str, Any], license: str | None) -> None:
        def record(name: str, default: Any) -> Any:
            read = json.loads if name.endswith(".json") else yaml.safe_load
            content = read(files.get(f"{RECORDS}/{name}", b"null"))
            return content if isinstance(content, type(default)) else default

        self.config = json.loads(files[MODEL_CONFIG])
        self.cfg: dict[str, Any] = self.config.get("pretrained_cfg") or {}
        self.extra: dict[str, Any] = self.config.get(EXTRA_KEY) or {}
        self.run: dict[str, Any] = record(CONFIG, {})
        self.summary: dict[str, Any] = record(SUMMARY, {})
        self.validation = [row for row in record(VALIDATION, []) if isinstance(row, dict)]
        self.input_size = list(self.cfg.get("input_size") or (3, 224, 224))
        self.data, self.split = _data_of(self.extra.get("data", self.summary.get("data")))
        self.started_from = self._started_from()
        self.license = license or (self.cfg.get("license") if self.started_from else None)

    def _started_from(self) -> str | None:
        """The weights that training started from or that were converted, by their name on the Hub where that is known."""
        if converted := self.extra.get("converted_from"):
            return str(converted)
        model = self.run.get("model") or {}
        name = str(model.get("name", ""))
        if name.startswith((HUB, "hf_hub:")):
            return name.partition(":")[2].partition("@")[0]
        if name.startswith(LOCAL) or "/" in name:
            return Path(name.removeprefix(LOCAL)).name
        if not model.get("pretrained"):
            return None
        cfg = timm.models.get_pretrained_cfg(name)
        return (cfg.hf_hub_id or name) if cfg else name

    def measured(self, metrics: Mapping[str, object]) -> list[dict[str, Any]]:
        """Results, each with data and split: that of training, then those of later validations that differ."""
        own = {key: self.extra.get(key, self.summary.get(key)) for key in metrics}
        rows = [{"data": self.data, "split": self.split, **own}, *self.validation]
        rows = [
            row | {"split": str(row.get("split") or "validation")} for row in rows if isinstance(row.get("data"), str)
        ]
        found: list[dict[str, Any]] = []
        for row in rows:
            keys = [key for key in metrics if _is_number(row.get(key))]
            known = (other for other in found if self._is_same_set(row, other))
            if keys and not any(all(_is_close(row[key], other.get(key)) for key in keys) for other in known):
                found.append(row)
        return found

    def _is_same_set(self, row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether two results may be of the same images at the same size: one data set and, where both say it, one number of images."""
        counts = {row.get("images"), other.get("images")} - {None}
        same = _data_set(row["data"]) == _data_set(other["data"]) and _size_of(row, self) == _size_of(other, self)
        return same and len(counts) <= 1


def make(
    files: Mapping[str, Any],
    repo_id: str,
    facts: CardFacts,
    *,
    revision: str | None = None,
    license: str | None = None,
    own_words: str = "",
) -> str:
    """The card of a model for a place on the Hub.

    Args:
        files: What is published, content by name in the repository: config.json and, under `training/`, the records of the run.
        repo_id: USER/NAME.
        facts: What depends on the task.
        revision: Branch that the usage names; None for the main one.
        license: Of the weights; None for what the records say.
        own_words: Text of an earlier card to keep at the end.
    """
    records = _Records(files, license)
    place = f"{repo_id}@{revision}" if revision else repo_id
    script = f"```python\n{facts.usage(place)}```"
    in_timm = ARCHITECTURE_KEY in records.config
    parts = [
        *(() if in_timm else (INSTALL, script)),
        f"# {repo_id.partition('/')[2]}",
        _introduction(records, facts),
        "## Use",
        *(("The architecture is one of timm's too, which is all that this needs:", script) if in_timm else ()),
        f"For images and folders of them: `effzoo predict --model {HUB}{place} photo.jpg`.",
        f"To train it further: `effzoo train --config {facts.recipe} --set model.name={HUB}{place} data.root=FOLDER`."
        if facts.recipe
        else "",
        "## Results",
        _results(records, facts),
        *(part for heading, text in facts.sections for part in (f"## {heading}", text)),
        *_training(records, place),
        *(f"![{text}]({RECORDS}/{name})" for name, text in facts.figures.items() if f"{RECORDS}/{name}" in files),
        _settings(files),
        *_origin(records),
        OWN_WORDS,
        own_words.strip(),
    ]
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{_metadata(records, facts, repo_id).to_yaml()}\n---\n\n{body}\n"))


def own_words(text: str) -> str:
    """What people wrote into a card: all below the last line of a generated card, all of the body of any other."""
    if OWN_WORDS in text:
        return text.partition(OWN_WORDS)[2].strip()
    if text.startswith("---\n"):
        text = text[4:].partition("\n---")[2]
    return text.strip()


def figures_in(text: str) -> list[str]:
    """Names in the repository of the figures that a generated card shows."""
    above, mark, _ = text.partition(OWN_WORDS)
    return re.findall(rf"\]\(({RECORDS}/[\w-]+\.png)\)", above) if mark else []


def _data_of(record: Any) -> tuple[str | None, str]:
    """Root and validation split of what config.json or a summary records of the training data: the root alone, or a mapping."""
    if isinstance(record, Mapping):
        split = record.get("val_split")
        return record.get("root"), split if isinstance(split, str) and split != "auto" else "validation"
    return record, "validation"


def _metadata(records: _Records, facts: CardFacts, repo_id: str) -> ModelCardData:
    results = [
        EvalResult(
            task_type=facts.pipeline_tag,
            task_name=facts.task_title,
            dataset_type=_data_set(row["data"])[0],
            dataset_name=_data_set(row["data"])[1],
            dataset_split=row["split"],
            metric_type=kind,
            metric_name=title,
            metric_value=round(row[key], 3),
        )
        for row in records.measured(facts.metrics)
        if _size_of(row, records) == ""
        for key, (title, kind) in facts.metrics.items()
        if _is_number(row.get(key))
    ]
    data_sets = {name for row in records.measured(facts.metrics) if "/" in (name := _data_set(row["data"])[0])}
    base = records.started_from or ""
    return ModelCardData(
        library_name="timm",
        pipeline_tag=facts.pipeline_tag,
        tags=[facts.pipeline_tag, "timm", *facts.tags, "effvit_zoo"],
        license=records.license,
        base_model=base if "/" in base else None,
        datasets=sorted(data_sets) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=repo_id.partition("/")[2],
        eval_results=results or None,
    )


def _data_set(root: str) -> tuple[str, str]:
    """The Hub's kind or id of a data set, and its name."""
    if root in _DATA_SETS:
        return _DATA_SETS[root]
    source, slash, rest = root.partition("/")
    if slash and source in ("hfds", "hfids"):
        return rest, rest
    return "imagefolder", Path(root).name or root


def _size_of(row: Mapping[str, Any], records: _Records) -> str:
    """ ", at 64 x 64" for a result that was measured at another input size than the model's own."""
    size = row.get("input_size")
    return f", at {' x '.join(map(str, size[1:]))}" if isinstance(size, list) and size != records.input_size else ""


def _introduction(records: _Records, facts: CardFacts) -> str:
    paper = f" ({records.cfg['paper_name']})" if records.cfg.get("paper_name") else ""
    data = f", trained on {_data_set(records.data)[1]}" if records.data else ""
    verb = "converted" if records.extra.get("converted_from") else "starting"
    origin = f", {verb} from {records.started_from}" if records.started_from else ""
    return f"`{records.config['architecture']}`{paper} {facts.introduction}{data}{origin}."


def _results(records: _Records, facts: CardFacts) -> str:
    rows = []
    for row in records.measured(facts.metrics):
        images = f", {row['images']:,} images" if _is_number(row.get("images")) else ""
        where = f"{_data_set(row['data'])[1]}, {row['split']}{images}{_size_of(row, records)}"
        for key, (title, _) in facts.metrics.items():
            if _is_number(row.get(key)):
                rows.append((f"{title} ({where})", f"{row[key]:.2f}"))
    rows.append(("Input (channels x height x width)", " x ".join(map(str, records.input_size))))
    for key, title, shown in (
        ("params", "Parameters", lambda value: f"{value / 1e6:.2f} M"),
        ("macs", "Multiply-accumulates per image", lambda value: f"{value / 1e9:.3f} G"),
        ("val_images", "Validation images", lambda value: f"{value:,}"),
    ):
        if _is_number(records.summary.get(key)):
            rows.append((title, shown(records.summary[key])))
    lines = [("", ""), ("---", "---"), *rows]
    return "\n".join(f"| {' | '.join(map(escaped, line))} |" for line in lines)


def _training(records: _Records, place: str) -> list[str]:
    if not records.run:
        return []
    summary = records.summary
    processes = summary["processes"] if _is_number(summary.get("processes")) else 1
    launch = f"torchrun --no-python --nproc_per_node {processes} " if processes > 1 else ""
    root = str((records.run.get("data") or {}).get("root", ""))
    own_data = "" if root.startswith(("builtin:", "hfds/")) else " --set data.root=FOLDER"
    name, _, revision = place.partition("@")
    pull = f"effzoo pull {name}{f' --revision {revision}' if revision else ''}"
    notes = []
    if _is_number(summary.get("seconds")):
        where = summary.get("processor") if summary.get("device") == "cpu" else summary.get("device")
        notes.append(f"{summary['seconds']:.0f} s on {processes} x {where or 'an unnamed device'}")
    if _is_number(summary.get("images_per_second")):
        notes.append(f"{summary['images_per_second']:.0f} training images per second")
    if isinstance(versions := summary.get("versions"), dict):
        notes.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return [
        "## Training",
        f"```bash\n{pull} && cd {name.partition('/')[2]}\n{launch}effzoo train --config {RECORDS}/{CONFIG}{own_data}\n```",
        "; ".join(notes) + "." if notes else "",
    ]


def _settings(files: Mapping[str, Any]) -> str:
    text = files.get(f"{RECORDS}/{CONFIG}", b"").decode()
    return f"<details><summary>All settings</summary>\n\n```yaml\n{text}```\n\n</details>" if text else ""


def _origin(records: _Records) -> list[str]:
    ids = records.cfg.get("paper_ids") or []
    papers = [
        f"[{text}](https://arxiv.org/abs/{text.partition(':')[2]})" if text.startswith("arXiv:") else text
        for text in ([ids] if isinstance(ids, str) else ids)
    ]
    lines = [f"Weights: {records.license}." if records.license else "No licence of the weights was stated."]
    if papers:
        lines.append(f"Architecture: {records.cfg.get('paper_name') or 'see'}, {', '.join(papers)}.")
    if records.cfg.get("origin_url"):
        lines.append(f"Original code: {records.cfg['origin_url']}")
    return ["## Licence and origin", "\n".join(f"- {line}" for line in lines), f"Made with effvit_zoo {__version__}."]


def escaped(text: str) -> str:
    """Text for a Markdown table or paragraph, on one line."""
    return " ".join(str(text).split()).replace("|", r"\|").replace("<", "&lt;")


def _is_close(value: float, other: Any) -> bool:
    return _is_number(other) and math.isclose(value, other, rel_tol=1e-5)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
