"""Trains the size `nano64` of every kind on all of Fashion-MNIST by one recipe, and records each run as a row of a table.

    python tools/train_nano.py [MODEL ...] [--seeds 0] [--output runs/nano] [--results results/nano.csv] [--set section.key=value ...]

A model and seed that have a row are not trained again; a run that was cut off is resumed. The result of a run is its last epoch, not its
best, because the validation images are the test images. Several of these commands can run at the same time, for other models.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import effvit_zoo
from effvit_zoo import run_folder
from effvit_zoo.errors import OneLineParser, UserError, run_command, unknown_choice, whole
from effvit_zoo.report.rows import write_rows

CONFIG = "nano"
COLUMNS = ("model", "seed", "top1", "params", "macs", "epochs", "seconds", "threads", "host", "command", "commit")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what has no row yet, one model after the other."""
    names = effvit_zoo.list_models("*_nano64")
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="(default: all that end in _nano64)")
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0], metavar="N", help="(default: 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/nano"), help="folder of runs (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/nano.csv"), help="(default: %(default)s)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="overrides of config values")
    args = parser.parse_args(argv)
    for name in args.models:
        if name not in names:
            raise unknown_choice("model", name, names)
    known(args.results)  # before hours are spent
    for seed in args.seeds:
        for name in args.models or names:
            if (name, str(seed)) not in known(args.results):
                record(args.results, train(name, seed, args.output / f"{name}-{seed}", args.set))


def known(results: Path) -> set[tuple[str, str]]:
    """(model, seed) of every row. Raises `UserError` for a file that is no table of these."""
    return {(row["model"], row["seed"]) for row in read(results)}


def read(results: Path) -> list[dict[str, str]]:
    if not results.exists():
        return []
    try:
        rows = list(csv.DictReader(results.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {results}: {error}") from error
    if rows and tuple(rows[0]) != COLUMNS:
        raise UserError(f"{results}: expected the columns {', '.join(COLUMNS)}, got {', '.join(map(str, rows[0]))}")
    return rows


def record(results: Path, row: dict[str, Any]) -> None:
    """Adds a row, in the order of model and seed."""
    rows = [*read(results), row]
    write_rows(sorted(rows, key=lambda row: (row["model"], int(row["seed"]))), results)


def train(name: str, seed: int, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Starts or resumes the run unless it is complete; its row.

    Raises:
        UserError: If the training failed, after it has said why.
    """
    settings = [f"model.name={name}", f"train.seed={seed}", *overrides]
    command = ["train", "--config", CONFIG, "--output", str(folder), "--set", *settings]
    if not (folder / run_folder.SUMMARY).is_file():
        done = subprocess.run([sys.executable, "-m", "effvit_zoo", *command, "--resume", "auto"], check=False)
        if done.returncode != 0:
            raise UserError(
                f"the training of {name} ended with exit code {done.returncode}: repeat the command to resume"
            )
    summary = run_folder.read_json(folder / run_folder.SUMMARY)
    last = list(csv.DictReader((folder / run_folder.METRICS).read_text(encoding="utf-8").splitlines()))[-1]
    row = {
        **{key: summary[key] for key in ("params", "macs", "epochs", "threads")},
        "model": name,
        "seed": seed,
        "top1": round(float(last["top1"]), 2),
        "seconds": round(summary["seconds"]),
        "host": summary["processor"],
        "command": shlex.join(["effzoo", *command]),
        "commit": summary["git_commit"],
    }
    return {column: row[column] for column in COLUMNS}


if __name__ == "__main__":
    sys.exit(run_command(main))
