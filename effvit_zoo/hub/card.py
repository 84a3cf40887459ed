"""Model cards: what was recorded of a model, as the Hub reads it (metadata, model-index) and as people do. Nothing else is said.

Everything below the last line of a made card belongs to people: a later push renews what stands above it and leaves that alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..version import __version__

OWN_WORDS = "<!-- What stands below this line is kept when the model is pushed again. -->"
SHOWN_CLASSES = 50
_FIGURES = {"curves.png": "Loss and accuracy over the epochs", "confusion_matrix.png": "Confusion matrix"}
_METRICS = {"top1": "Top-1 accuracy, %", "top5": "Top-5 accuracy, %"}
_DATA_SETS = {
    "builtin:fashion-mnist": ("zalando-datasets/fashion_mnist", "Fashion-MNIST"),
    "builtin:fashion-mnist-mini": (
        "zalando-datasets/fashion_mnist",
        "Fashion-MNIST, the 10,000 images that ship with effvit_zoo",
    ),
}


class Facts:
    """All that is known of a published model: its config and, under `training/`, the run's config, summary and measurements."""

    def __init__(self, folder: Path, license: str | None = None) -> None:
        records = folder / "training"
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.cfg: dict[str, Any] = self.config.get("pretrained_cfg") or {}
        self.noted: dict[str, Any] = self.config.get("effvit_zoo") or {}
        self.run = _load(records / "config.yaml", {})
        self.summary = _load(records / "summary.json", {})
        self.validation = _rows(_load(records / "validation.json", []))
        self.benchmark = _rows(_load(records / "benchmark.json", []))
        self.figures = [name for name in _FIGURES if (records / name).is_file()]
        self.architecture: str = self.config["architecture"]
        self.started_from = self._started_from()
        self.license = license or self.noted.get("license") or (self.cfg.get("license") if self.started_from else None)

    def _started_from(self) -> str | None:
        """The weights that training began with or that were converted, by their name on the Hub where that is known."""
        if converted := self.noted.get("converted_from"):
            return str(converted)
        model = self.run.get("model") or {}
        name = str(model.get("name", ""))
        if name.startswith(("hf-hub:", "hf_hub:")):
            return name.partition(":")[2].partition("@")[0]
        if name.startswith("local-dir:") or "/" in name:
            return Path(name.partition(":")[2] or name).name
        if not model.get("pretrained"):
            return None
        cfg = timm.models.get_pretrained_cfg(name)
        return (cfg.hf_hub_id or name) if cfg else name

    @property
    def input_size(self) -> list[int]:
        """(C, H, W)."""
        return list(self.cfg.get("input_size") or (3, 224, 224))

    @property
    def labels(self) -> list[str]:
        names = self.config.get("label_names") or []
        return [str(name) for name in (names.values() if isinstance(names, Mapping) else names)]

    @property
    def data(self) -> str | None:
        return self.noted.get("data") or self.summary.get("data")

    def measured(self) -> list[dict[str, Any]]:
        """Accuracies, each with data and split: that which training saw last, then those of later validations."""
        own = {key: self.noted.get(key, self.summary.get(key)) for key in _METRICS}
        rows = [{"data": self.data, "split": "validation", **own}, *self.validation]
        return [row for row in rows if isinstance(row.get("data"), str) and _is_number(row.get("top1"))]


def make(
    folder: Path, repo_id: str, *, revision: str | None = None, license: str | None = None, own_words: str = ""
) -> str:
    """The card of a model folder for a place on the Hub.

    Args:
        folder: config.json and, where there are any, the records of the run under `training/`.
        repo_id: USER/NAME.
        revision: Branch that the usage shall name; None for the main one.
        license: Of the weights; None for what the folder says.
        own_words: Text of an earlier card to keep at the end.
    """
    facts = Facts(folder, license)
    place = f"{repo_id}@{revision}" if revision else repo_id
    parts = [
        f"# {repo_id.partition('/')[2]}",
        _introduction(facts),
        "## Use",
        "With the package `effvit_zoo` installed:",
        f"```python\n{usage(facts, place)}```",
        f"Or, for pictures and folders of them: `effzoo predict --model hf-hub:{place} photo.jpg`. To train it further: "
        f"`python train.py --set model.name=hf-hub:{place} data.root=FOLDER`.",
        "## Results",
        _results(facts),
        *_classes(facts),
        *_training(facts),
        *_origin(facts),
        OWN_WORDS,
        own_words.strip(),
    ]
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{_metadata(facts, repo_id).to_yaml()}\n---\n\n{body}\n"))


def own_words(text: str) -> str:
    """What people wrote into a card: all below the line of a made card, all of the body of any other."""
    if OWN_WORDS in text:
        return text.partition(OWN_WORDS)[2].strip()
    if text.startswith("---\n"):
        text = text[4:].partition("\n---")[2]
    return text.strip()


def usage(facts: Facts, place: str) -> str:
    """A script that classifies `photo.jpg`; `place` is USER/NAME[@REVISION]."""
    mode = "L" if facts.input_size[0] == 1 else "RGB"
    names = (
        "model.pretrained_cfg" + '["label_names"]' if facts.labels else f"range({facts.config.get('num_classes', 0)})"
    )
    shown = min(5, int(facts.config.get("num_classes") or 5))
    return f'''import effvit_zoo  # registers effzoo_*; timm has no plugin discovery, so this line comes first
import timm
import torch
from PIL import Image

model = timm.create_model("hf-hub:{place}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
names = {names}

image = Image.open("photo.jpg").convert("{mode}")
with torch.inference_mode():
    probabilities = model(transform(image)[None]).softmax(dim=1)[0]
for probability, index in zip(*map(torch.Tensor.tolist, probabilities.topk({shown}))):
    print(f"{{100 * probability:.1f}} %  {{names[index]}}")
'''


def _metadata(facts: Facts, repo_id: str) -> ModelCardData:
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=_data_set(row["data"])[0],
            dataset_name=_data_set(row["data"])[1],
            dataset_split=str(row.get("split") or "validation"),
            metric_type="accuracy",
            metric_name=title,
            metric_value=round(row[key], 3),
        )
        for row in facts.measured()
        for key, title in _METRICS.items()
        if _is_number(row.get(key))
    ]
    on_hub = facts.started_from if facts.started_from and "/" in facts.started_from else None
    data_sets = sorted({name for row in facts.measured() if "/" in (name := _data_set(row["data"])[0])})
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "effvit_zoo"],
        license=facts.license,
        base_model=on_hub,
        datasets=data_sets or None,
        metrics=["accuracy"] if results else None,
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


def _introduction(facts: Facts) -> str:
    paper = f" ({facts.cfg['paper_name']})" if facts.cfg.get("paper_name") else ""
    data = f", trained on {_data_set(facts.data)[1]}" if facts.data else ""
    count = facts.config.get("num_classes")
    start = (
        f", starting from {facts.started_from}" if facts.started_from and not facts.noted.get("converted_from") else ""
    )
    converted = f", converted from {facts.noted['converted_from']}" if facts.noted.get("converted_from") else ""
    return f"`{facts.architecture}`{paper} with {count} classes{data}{start}{converted}."


def _results(facts: Facts) -> str:
    rows = []
    for row in facts.measured():
        where = f"{_data_set(row['data'])[1]}, {row.get('split') or 'validation'}"
        rows += [
            (f"{title} ({where})", f"{row[key]:.2f}") for key, title in _METRICS.items() if _is_number(row.get(key))
        ]
    summary = facts.summary
    size = " x ".join(map(str, facts.input_size))
    rows.append(("Input (channels x height x width)", size))
    if _is_number(summary.get("params")):
        rows.append(("Parameters", f"{summary['params'] / 1e6:.2f} M"))
    if _is_number(summary.get("macs")):
        rows.append(("Multiply-accumulates per image", f"{summary['macs'] / 1e9:.3f} G"))
    if _is_number(summary.get("val_images")):
        rows.append(("Validation images", f"{summary['val_images']:,}"))
    table = _table(("", ""), rows)
    if facts.benchmark:
        keys = list(dict.fromkeys(key for row in facts.benchmark for key in row))
        cells = [[_cell(row.get(key)) for key in keys] for row in facts.benchmark]
        table += f"\n\nMeasured speed:\n\n{_table(keys, cells)}"
    return table


def _classes(facts: Facts) -> list[str]:
    if not facts.labels:
        return []
    more = f" and {len(facts.labels) - SHOWN_CLASSES} more, in config.json" if len(facts.labels) > SHOWN_CLASSES else ""
    return ["## Classes", ", ".join(map(_escaped, facts.labels[:SHOWN_CLASSES])) + more + "."]


def _training(facts: Facts) -> list[str]:
    if not facts.run:
        return []
    summary = facts.summary
    processes = summary["processes"] if _is_number(summary.get("processes")) else 1
    launch = f"accelerate launch --num_processes {processes} train.py" if processes > 1 else "python train.py"
    root = (facts.run.get("data") or {}).get("root", "")
    own_data = "" if str(root).startswith(("builtin:", "hfds/")) else " --set data.root=FOLDER"
    told = []
    if _is_number(summary.get("seconds")):
        where = summary.get("processor") if summary.get("device") == "cpu" else summary.get("device")
        told.append(f"{summary['seconds']:.0f} s on {processes} x {where or 'an unnamed device'}")
    if _is_number(summary.get("images_per_second")):
        told.append(f"{summary['images_per_second']:.0f} training images per second")
    if isinstance(versions := summary.get("versions"), dict):
        told.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    recipe = yaml.safe_dump(facts.run, sort_keys=False, allow_unicode=True)
    return [
        "## Training",
        f"```bash\n{launch} --config training/config.yaml{own_data}\n```",
        "; ".join(told) + "." if told else "",
        *(f"![{_FIGURES[name]}](training/{name})" for name in facts.figures),
        f"<details><summary>All settings</summary>\n\n```yaml\n{recipe}```\n\n</details>",
    ]


def _origin(facts: Facts) -> list[str]:
    ids = facts.cfg.get("paper_ids") or []
    papers = [
        f"[{text}](https://arxiv.org/abs/{text.partition(':')[2]})" if text.startswith("arXiv:") else text
        for text in ([ids] if isinstance(ids, str) else ids)
    ]
    lines = [f"Weights: {facts.license}." if facts.license else "No licence of the weights was stated."]
    if papers:
        lines.append(f"Architecture: {facts.cfg.get('paper_name') or 'see'}, {', '.join(papers)}.")
    if facts.cfg.get("origin_url"):
        lines.append(f"Its first code: {facts.cfg['origin_url']}")
    return ["## Licence and origin", "\n".join(f"- {line}" for line in lines), f"Made with effvit_zoo {__version__}."]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(text: str) -> str:
    return " ".join(str(text).split()).replace("|", r"\|").replace("<", "&lt;")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rows(content: Any) -> list[dict[str, Any]]:
    return [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []


def _load(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    return content if isinstance(content, type(default)) else default
