"""Trains the pico ViT with every mechanism by one recipe, then swaps each mechanism into the softmax model and fine-tunes it.

    python tools/compare_mixers.py [--output runs/mixers] [--mixers elu sima ...] [--set section.key=value ...]

The first column of the table is the top-1 of a mechanism trained from scratch, the second that of the trained softmax model after
`swap_attention` and a short fine-tuning (Hydra in the last two layers, as its paper recommends; the others in all). Runs are stored in
the output folder and resumed when the command is repeated. The exit code is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from effvit_zoo import hub, swap_attention
from effvit_zoo.errors import OneLineParser, run_command, unknown_choice
from effvit_zoo.models.isotropic_vit import FAMILIES, model_name
from effvit_zoo.training.run import train

CONFIG = Path(__file__).parent.parent / "configs" / "mixers.yaml"
NAMES = {mixer: model_name(mixer, "pico") for mixer in FAMILIES}
LAYERS: dict[str, list[int]] = {"hydra": [-2, -1]}
"""Mechanism -> the layers in which it replaces softmax; all for the others."""
TUNING = ("optim.lr=5e-4", "optim.warmup_epochs=0.5", "train.epochs=3")
LEAST_TOP1, LEAST_SHARE = 80.0, 97.0
"""Top-1 in percent when trained from scratch; percentage of the softmax model's top-1 after the swap."""


def main(argv: Sequence[str] | None = None) -> bool:
    """Trains the missing models and prints the table; returns whether all targets are met."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/mixers"), help="(default: %(default)s)")
    parser.add_argument("--mixers", nargs="+", default=list(NAMES), metavar="NAME", help="(default: all)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="overrides of config values")
    args = parser.parse_args(argv)
    for name in args.mixers:
        if name not in NAMES:
            raise unknown_choice("mechanism", name, list(NAMES))
    names = list(dict.fromkeys(["softmax", *args.mixers]))
    trained = {name: run(args.output / name, [f"model.name={NAMES[name]}", *args.set]) for name in names}
    tuned = {name: swap(name, args.output, args.set) for name in names if name != "softmax"}
    return report(trained, tuned)


def run(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The summary of a run, which is started or resumed if it is not complete."""
    summary = folder / "summary.json"
    if not summary.is_file():
        train(CONFIG, overrides, folder, resume="auto")
    return json.loads(summary.read_text(encoding="utf-8"))


def swap(name: str, output: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The summary of the fine-tuning after softmax was swapped for another mechanism."""
    start = output / "swapped" / name
    if not start.is_dir():
        hub.save(swap_attention(hub.load(output / "softmax"), name, LAYERS.get(name)), start)  # type: ignore[arg-type]
    return run(output / f"softmax-{name}", [f"model.name=local-dir:{start}", *TUNING, *overrides])


def report(trained: Mapping[str, Mapping[str, Any]], tuned: Mapping[str, Mapping[str, Any]]) -> bool:
    table = Table(title=f"top-1 on {trained['softmax']['data']}, %")
    for column in ("mechanism", "trained", "swapped for softmax", "of softmax", "images/s"):
        table.add_column(column, justify="left" if column == "mechanism" else "right")
    met = True
    for name, summary in trained.items():
        met &= summary["top1"] > LEAST_TOP1
        cells = ["", ""]
        if name in tuned:
            share = 100 * tuned[name]["top1"] / trained["softmax"]["top1"]
            met &= share >= LEAST_SHARE
            layers = LAYERS.get(name)
            where = "" if layers is None else f" (last {len(layers)})"
            cells = [f"{tuned[name]['top1']:.2f}{where}", f"{share:.1f} %"]
        table.add_row(name, f"{summary['top1']:.2f}", *cells, f"{summary['images_per_second']:.0f}")
    console = Console()
    console.print(table)
    verdict = "met" if met else "missed"
    console.print(f"targets (each above {LEAST_TOP1:g} %, {LEAST_SHARE:g} % of softmax after the swap): {verdict}")
    return met


if __name__ == "__main__":
    outcome: list[bool] = []
    code = run_command(lambda: outcome.append(main()))
    sys.exit(code or int(not all(outcome)))
