"""`effzoo benchmark tosa`: what token selection saves, and, for a trained run, what its selectors are worth.

Without a run: a ToSA-ViT against the dense ViT of the same weights on torch's fused attention, both in turns in one process: eager torch,
and ONNX Runtime and OpenVINO where they are installed.

With the output folder of a ToSA training: how well the selectors predict (share of the true most important tokens that they find, KL
divergence), top-1 at the same ratio with the learned selectors and with controls in their place, before and after the fine-tuning, and
top-1 against multiply-accumulates and time. The controls are random tokens (the mean of some draws), a fixed set of tokens (the mean of
the true importance over training images), the column sums and the class token's row of the map before, and no patches at all. They are
printed where they win, too.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .. import hub, run_folder
from ..attention.token_select import number_selected, select_tokens, token_importance
from ..data import Batch, Feed, readable
from ..errors import UserError, unknown_choice
from ..export.deployed import RUNTIMES, run_in
from ..measure import cost
from ..measure.host import gemm_gflops, processor_name
from ..measure.peak import peak_bytes
from ..measure.timing import time_in_turns
from ..models import to_tosa
from ..models.tosa_vit import ToSAViT
from ..pipelines.tosa import DENSE_MODEL, FINETUNE, SELECTORS, TOSA
from ..report.rows import check_output, make_console, write_rows
from ..tasks import Section
from ..tasks import Table as ReportTable
from ..training.config import load_run
from ..training.prepare import prepare
from ..viz.selection import metric_over_cost

RATIOS_FIGURE = "ratios.png"

FORMS: Mapping[str, tuple[int, int, int]] = {
    "fast": (1, 1, 4),
    "default": (3, 4, 8),
    "full map, as in the paper": (1, 1, 1),
}
"""Form -> kernel, hidden ratio and stride of the selectors."""

STATIC_BATCHES = 16
"""Training batches over which the fixed set of tokens is averaged."""


def run(args: argparse.Namespace) -> None:
    """Measures and prints; `args` as `arguments.tosa` defines them. Raises `UserError`."""
    check_output(args.output)
    torch.set_num_threads(args.threads)
    console = make_console()
    if args.run is None:
        runtimes = _runtimes(args.runtimes)
        for side in args.img_sizes:
            hub.load(args.model, pretrained=False, img_size=side, device="meta")
        console.print(
            f"{processor_name()}, {args.threads} thread(s), float32 matrix products {gemm_gflops():.0f} GFLOP/s, "
            f"torch {torch.__version__}, batch {args.batch_size}"
        )
        rows = []
        for side in args.img_sizes:
            console.print(f"timing {side} pixels", style="dim")
            models = speed_models(args.model, side, args.ratios or [0.5])
            sample = torch.randn(args.batch_size, 3, side, side)
            rows += measure_speed(models, sample, ["torch", *runtimes], args.threads, args.repeats)
        _print_speed(console, args.model, rows)
    else:
        rows = measure_selectors(args.run, args.ratios or [0.5, 0.25], console)
    if args.output:
        write_rows(rows, args.output)


def _runtimes(asked: Sequence[str] | None) -> Sequence[str]:
    """Names of targets: those asked for, or all that are installed. Raises `UserError` for an unknown one."""
    for name in asked or ():
        if name not in RUNTIMES:
            raise unknown_choice("runtime", name, RUNTIMES)
    return [name for name, target in RUNTIMES.items() if target.installed] if asked is None else asked


def speed_models(name: str, side: int, ratios: Sequence[float]) -> dict[str, nn.Module]:
    """The dense ViT, and ToSA-ViTs of the same weights in every form of `FORMS` at every ratio, by name."""
    dense: Any = hub.load(name, img_size=side).eval()
    models: dict[str, nn.Module] = {"dense": dense}
    for ratio in ratios:
        for form, (kernel, hidden, stride) in FORMS.items():
            torch.manual_seed(0)
            try:
                models[f"{form}, r = {ratio:g}"] = to_tosa(dense, ratio, kernel, hidden, stride).eval()
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error
    return models


def measure_speed(
    models: Mapping[str, nn.Module], sample: Tensor, runtimes: Sequence[str], threads: int = 1, repeats: int = 20
) -> list[dict[str, Any]]:
    """A row per runtime and model: times in ms, their ratio to the dense model's, GMACs and peak memory in MB.

    Args:
        models: Name -> model; one is called "dense".
        sample: Images (B, C, H, W).
        runtimes: "torch" and names in `RUNTIMES`.
        threads: Number of threads of the other runtimes.
        repeats: Timed calls per model.
    """
    costs: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        costs[name] = {"img_size": sample.shape[-1], "form": name}
        costs[name]["gmacs"] = cost.count_macs(model, tuple(sample.shape[1:])) / 1e9
        with torch.inference_mode():
            costs[name]["peak_mb"] = peak_bytes(partial(model, sample)) / 2**20
    rows = []
    for runtime in runtimes:
        calls: dict[str, Callable[[Tensor], Any]] = {
            name: model if runtime == "torch" else run_in(runtime, model, sample, threads)
            for name, model in models.items()
        }
        with torch.inference_mode():
            times = time_in_turns({name: partial(call, sample) for name, call in calls.items()}, repeats, burst=2)
        rows += [
            {**costs[name], "runtime": runtime, "ms": times[name], "ratio": times[name] / times["dense"]}
            for name in models
        ]
    return rows


def _print_speed(console: Console, model: str, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=f"{model}: token selection against the dense model")
    for column in ("pixels", "runtime", "form", "GMACs", "", "peak MB", "ms", "against dense"):
        table.add_column(column, justify="left" if column in ("runtime", "form") else "right")
    dense_macs = {row["img_size"]: row["gmacs"] for row in rows if row["form"] == "dense"}
    for row in rows:
        saved = 100 * (row["gmacs"] / dense_macs[row["img_size"]] - 1)
        table.add_row(
            str(row["img_size"]),
            row["runtime"],
            row["form"],
            f"{row['gmacs']:.2f}",
            f"{saved:+.1f} %",
            f"{row['peak_mb']:.0f}",
            f"{row['ms']:.1f}",
            f"{100 * (row['ratio'] - 1):+.1f} %",
        )
    console.print(table)


def measure_selectors(folder: Path, ratios: Sequence[float], console: Console) -> list[dict[str, Any]]:
    """Rows of selector, ratio and top-1 before and after the fine-tuning; prints also quality and cost, and draws ratios.png."""
    for stage in (SELECTORS, FINETUNE):
        if not (folder / stage / run_folder.CONFIG).is_file():
            raise UserError(f"{folder} is not the output folder of a finished ToSA training: it has no {stage}")
    feed = _feed(folder)
    models = {stage: _tosa(folder / stage / run_folder.LAST) for stage in (SELECTORS, FINETUNE)}
    console.print(f"{folder}: {feed.describe()['val_images']} validation images")
    _print_quality(console, selector_quality(models[SELECTORS], readable(feed.val_batches(0), _ignore), ratios))
    batches = itertools.islice(feed.train_batches(0, 0, STATIC_BATCHES), STATIC_BATCHES)
    static = static_importance(models[SELECTORS], readable(batches, _ignore))
    rows: list[dict[str, Any]] = []
    for name, ratio in itertools.product(CONTROLS, ratios):
        row: dict[str, Any] = {"selector": name, "ratio": ratio}
        for stage, model in models.items():
            draws = [controlled(model, name, static, seed) for seed in range(DRAWS.get(name, 1))]
            row[stage] = statistics.mean(top1(draw, feed, ratio) for draw in draws)
        rows.append(row)
    for name, ratio in (("dense model", 1.0), ("no patches (class token alone)", 0.0)):
        measured = {stage: top1(model, feed, ratio) for stage, model in models.items()}
        rows.append({"selector": name, "ratio": ratio, **measured})
    _print_selectors(console, rows)
    compared = compare_ratios(folder, sorted({1.0, 0.0, *ratios}, reverse=True))
    print_ratios(console, compared)
    controls: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["selector"] in CONTROLS and row["selector"] != "learned":
            controls.setdefault(row["selector"], []).append({"ratio": row["ratio"], "top1": row[FINETUNE]})
    draw_ratios(folder, compared, controls)
    console.print(f"figure: {folder / RATIOS_FIGURE}")
    return rows


def _print_selectors(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="top-1 in percent with the network of before and after the fine-tuning")
    for column in ("tokens chosen by", "attention ratio", "before", "after"):
        table.add_column(column, justify="left" if column.startswith("tokens") else "right")
    for row in rows:
        table.add_row(row["selector"], f"{row['ratio']:g}", f"{row[SELECTORS]:.2f}", f"{row[FINETUNE]:.2f}")
    console.print(table)


def conclude(folder: Path) -> None:
    """Compares the ratios that a finished training asks for; writes them into its summary and draws ratios.png."""
    ratios = TOSA.load(folder / run_folder.CONFIG).ratios
    rows = compare_ratios(folder, ratios)
    print_ratios(make_console(), rows)
    draw_ratios(folder, rows)
    summary = run_folder.read_json(folder / run_folder.SUMMARY)
    run_folder.write_json(folder / run_folder.SUMMARY, summary | {"ratios": rows})
    head = ("attention ratio", "top-1, %", "multiply-accumulates, millions", "ms per image")
    table = ReportTable(head, [[row["name"], row["top1"], row["macs"] / 1e6, row["ms"]] for row in rows])
    text = f"The finished model at several attention ratios, and the dense model. {_host()}."
    TOSA.report(folder, sections=[Section("Accuracy against cost", text, RATIOS_FIGURE, table)])


def draw_ratios(
    folder: Path, rows: Sequence[Mapping[str, Any]], controls: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> None:
    """ratios.png of rows as `compare_ratios` gives them, the dense model first."""
    metric_over_cost(
        "ToSA",
        rows[1:],
        rows[0],
        folder / RATIOS_FIGURE,
        key="top1",
        label="top-1, %",
        subtitle=f"r: attention ratio. {_host()}",
        controls=controls,
    )


def _host() -> str:
    """Where and how time is measured, for figures."""
    return f"Time of one image at a time on {processor_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def compare_ratios(folder: Path, ratios: Sequence[float], repeats: int = 20) -> list[dict[str, Any]]:
    """The dense model of a ToSA training and its ToSA-ViT at several ratios.

    Args:
        folder: Output folder of the pipeline.
        ratios: Attention ratios.
        repeats: Timed calls; one image, all models in turns.

    Returns:
        A row for the dense model and one per ratio: name, ratio, top1 in percent, macs, ms of one image.
    """
    feed = _feed(folder)
    size = feed.data_config["input_size"]
    tosa, dense = _tosa(folder / FINETUNE / run_folder.LAST), hub.load(folder / DENSE_MODEL).eval()
    models: dict[str, Any] = {"dense": dense}
    for ratio in ratios:
        models[f"{ratio:g}"] = copy.deepcopy(tosa)
        models[f"{ratio:g}"].set_attention_ratio(ratio)
    sample = torch.randn(1, *size)
    with torch.inference_mode():
        times = time_in_turns({name: partial(model, sample) for name, model in models.items()}, repeats)
    return [
        {
            "name": name,
            "ratio": None if name == "dense" else model.attention_ratio,
            "top1": top1(model, feed),
            "macs": cost.count_macs(model, size),
            "ms": times[name],
        }
        for name, model in models.items()
    ]


def print_ratios(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of `compare_ratios`'s rows."""
    table = Table(title=f"dense ViT and ToSA. {_host()}")
    for column in ("attention ratio", "top-1", "MMACs", "", "ms", ""):
        table.add_column(column, justify="right")
    dense = rows[0]
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['top1']:.2f} %",
            f"{row['macs'] / 1e6:.2f}",
            f"{100 * (row['macs'] / dense['macs'] - 1):+.1f} %",
            f"{row['ms']:.2f}",
            f"{100 * (row['ms'] / dense['ms'] - 1):+.1f} %",
        )
    console.print(table)


@torch.inference_mode()
def top1(model: Any, feed: Feed, ratio: float | None = None) -> float:
    """Percent of the validation images that a model classifies correctly, at an attention ratio if one is given."""
    hits = images = 0
    for batch in readable(feed.val_batches(0), _ignore):
        logits = model(batch.image) if ratio is None else model.forward_at_ratio(batch.image, ratio)
        hits += int((logits.argmax(1) == batch.target).sum())
        images += len(batch)
    return 100 * hits / images


def _ignore(bad: Sequence[tuple[str, str]]) -> None:
    """Unreadable files were reported by the training."""


class _Chosen(nn.Module):
    """A selector's place taken by any rule of importance."""

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.importance = rule


def _random(static: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda maps: torch.rand(maps.shape[0], maps.shape[-1], generator=generator)


def _static(static: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    return lambda maps: static.expand(maps.shape[0], -1)


def _column_sums(static: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    return token_importance


def _class_attention(static: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    return lambda maps: maps[:, :, 0].softmax(-1).mean(1)


CONTROLS: Mapping[str, Callable[[Tensor, int], Callable[[Tensor], Tensor]] | None] = {
    "learned": None,
    "random": _random,
    "fixed set of tokens": _static,
    "column sums of the map before": _column_sums,
    "class token's attention before": _class_attention,
}
"""Name -> what makes a rule (maps of the layer before (B, H, L, L) -> importance (B, L)) of a layer's fixed importance (L,) and a seed."""

DRAWS = {"random": 4}
"""Control -> how often it is tried with another seed, for its mean: one draw is off by some tenths of a point."""


def controlled(model: ToSAViT, control: str, static: Sequence[Tensor], seed: int = 0) -> ToSAViT:
    """A copy of a model whose tokens are chosen by a control. `static` is what `static_importance` gives, the seed is for random ones."""
    rule = CONTROLS[control]
    if rule is None:
        return model
    changed = copy.deepcopy(model)
    changed.selector_stride = 1  # controls read the full map
    for pair, importance in enumerate(static):
        changed.selectors[2 * pair] = _Chosen(rule(importance, seed))
    return changed


@torch.inference_mode()
def static_importance(model: ToSAViT, batches: Iterable[Batch]) -> list[Tensor]:
    """Mean true importance (L,) of every token in each ToSA layer, over images."""
    sums: list[Tensor] = []
    images = 0
    for batch in batches:
        found = [token_importance(after).sum(0) for _, after in model.score_pairs(batch.image, stride=1)]
        sums = found if not sums else [a + b for a, b in zip(sums, found, strict=True)]
        images += len(batch.image)
    return [total / images for total in sums]


@torch.inference_mode()
def selector_quality(model: ToSAViT, batches: Iterable[Batch], ratios: Sequence[float]) -> list[dict[str, float]]:
    """Per pair of layers: KL divergence in nats of the predicted from the true map, that of a uniform map, and at each ratio the
    share of the truly most important patches that the selector picks (chance: the ratio itself)."""
    prefix, images = model.num_prefix_tokens, 0
    sums: list[dict[str, float]] = [{} for _ in model.token_selectors()]
    for batch in batches:
        image = batch.image
        images += len(image)
        kl = model.selector_losses(image)
        sampled, full = model.score_pairs(image), model.score_pairs(image, stride=1)
        for pair, selector in enumerate(model.token_selectors()):
            truth = full[pair][1].softmax(-1)
            uniform = (truth * truth.clamp(min=1e-30).log()).sum(-1).mean() + torch.tensor(truth.shape[-1]).log()
            found = {"kl": float(kl[pair]), "uniform kl": float(uniform)}
            true, guess = token_importance(full[pair][1]), selector.importance(sampled[pair][0])
            patches = true.shape[1] - prefix
            for ratio in ratios:
                count = number_selected(ratio, patches)
                picked = [
                    torch.zeros_like(true).scatter(1, select_tokens(i, count, prefix), 1.0) for i in (true, guess)
                ]
                both = (picked[0] * picked[1])[:, prefix:].sum(1).mean()
                found[f"overlap {ratio:g}"] = float(both) / max(count, 1)
            for key, value in found.items():
                sums[pair][key] = sums[pair].get(key, 0.0) + value * len(image)
    return [{key: value / images for key, value in row.items()} for row in sums]


def _print_quality(console: Console, quality: Sequence[Mapping[str, float]]) -> None:
    table = Table(title="what the selectors predict, before the fine-tuning")
    table.add_column("pair of layers", justify="right")
    for key in quality[0]:
        table.add_column({"kl": "KL", "uniform kl": "KL of a uniform map"}.get(key, key), justify="right")
    for pair, row in enumerate(quality):
        table.add_row(f"{2 * pair} -> {2 * pair + 1}", *(f"{value:.2f}" for value in row.values()))
    console.print(table)


def _tosa(folder: Path) -> ToSAViT:
    model = hub.load(folder).eval()
    if not isinstance(model, ToSAViT):
        raise UserError(f"{folder}: expected a ToSA-ViT, got {type(model).__name__}")
    return model


def _feed(folder: Path) -> Feed:
    """The images of a pipeline's last stage."""
    return prepare(load_run(folder / FINETUNE), 1).feed
