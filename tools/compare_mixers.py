"""Trains the pico ViT with every mechanism by one recipe, then takes the softmax one to each of the others and fine-tunes it.

    python tools/compare_mixers.py [--output runs/mixers] [--mixers elu sima ...] [--set section.key=value ...]

The first table column is what a mechanism reaches when it is trained from the start, the second what the trained softmax model reaches
after `swap_attention` and a short fine-tuning (Hydra in the last two layers, as its paper recommends; the others in all). Runs lie in
the output folder and are gone on with when the command is repeated. The exit code is 1 if a target is missed.
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
from effvit_zoo.training.run import train

CONFIG = Path(__file__).parent.parent / "configs" / "mixers.yaml"
NAMES = {
    "softmax": "effzoo_vit_pico",
    "elu": "effzoo_elu_vit_pico",
    "cosformer": "effzoo_cosformer_vit_pico",
    "hydra": "effzoo_hydra_vit_pico",
    "sima": "effzoo_sima_vit_pico",
}
SWAPPED: dict[str, list[int] | None] = {"elu": None, "cosformer": None, "sima": None, "hydra": [-2, -1]}
"""Mechanism -> the layers that it takes over; None for all."""
TUNING = ("optim.lr=5e-4", "optim.warmup_epochs=0.5", "train.epochs=3")
LEAST_TOP1, LEAST_SHARE = 80.0, 97.0
"""Percent right when trained from the start; percent of the softmax model's top-1 after the exchange."""


def main(argv: Sequence[str] | None = None) -> bool:
    """Trains what isn't trained yet and prints the table; whether all targets are met."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/mixers"), help="(default: %(default)s)")
    parser.add_argument("--mixers", nargs="+", default=list(NAMES), metavar="NAME", help="(default: all)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="settings that go before the config's")
    args = parser.parse_args(argv)
    for name in args.mixers:
        if name not in NAMES:
            raise unknown_choice("mechanism", name, list(NAMES))
    names = list(dict.fromkeys(["softmax", *args.mixers]))
    trained = {name: run(args.output / name, [f"model.name={NAMES[name]}", *args.set]) for name in names}
    tuned = {name: exchange(name, args.output, args.set) for name in names if name in SWAPPED}
    return report(trained, tuned)


def run(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The summary of a run, which is started or gone on with if it isn't complete."""
    summary = folder / "summary.json"
    if not summary.is_file():
        train(CONFIG, overrides, folder, resume="auto")
    return json.loads(summary.read_text(encoding="utf-8"))


def exchange(name: str, output: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The summary of the fine-tuning behind the exchange of softmax for another mechanism."""
    start = output / "swapped" / name
    if not start.is_dir():
        hub.save(swap_attention(hub.load(output / "softmax"), name, SWAPPED[name]), start)  # type: ignore[arg-type]
    return run(output / f"softmax-{name}", [f"model.name=local-dir:{start}", *TUNING, *overrides])


def report(trained: Mapping[str, Mapping[str, Any]], tuned: Mapping[str, Mapping[str, Any]]) -> bool:
    table = Table(title=f"top-1 on {trained['softmax']['data']}, %")
    for column in ("mechanism", "trained", "exchanged for softmax", "of softmax", "images/s"):
        table.add_column(column, justify="left" if column == "mechanism" else "right")
    met = True
    for name, summary in trained.items():
        met &= summary["top1"] > LEAST_TOP1
        cells = ["", ""]
        if name in tuned:
            share = 100 * tuned[name]["top1"] / trained["softmax"]["top1"]
            met &= share >= LEAST_SHARE
            layers = SWAPPED[name]
            where = "" if layers is None else f" (last {len(layers)})"
            cells = [f"{tuned[name]['top1']:.2f}{where}", f"{share:.1f} %"]
        table.add_row(name, f"{summary['top1']:.2f}", *cells, f"{summary['images_per_second']:.0f}")
    console = Console()
    console.print(table)
    verdict = "met" if met else "missed"
    console.print(f"targets (each above {LEAST_TOP1:g} %, {LEAST_SHARE:g} % of softmax after the exchange): {verdict}")
    return met


if __name__ == "__main__":
    outcome: list[bool] = []
    code = run_command(lambda: outcome.append(main()))
    sys.exit(code or int(not all(outcome)))
