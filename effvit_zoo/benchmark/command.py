"""`effzoo benchmark WHAT`: one table of benchmarks, each with its arguments and its body."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from rich.console import Console

from ..errors import UserError

BENCHMARKS = {
    "attention": "every attention mechanism alone: time and memory as the number of tokens grows",
    "backbones": "our backbones against timm's: eager, compiled, training, memory",
    "tosa": "token selection: its speed against the dense model, or what the selectors of a trained run are worth",
}


def make_console(width: int = 200) -> Console:
    """The terminal; where there is none, wide enough for the whole of a table."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def check_output(path: Path | None) -> None:
    """Raises `UserError` for a file of another kind than CSV or JSON."""
    if path and path.suffix not in (".csv", ".json"):
        raise UserError(f"--output {path}: expected a name that ends in .csv or .json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="benchmark", metavar="WHAT", required=True)
    for name, text in BENCHMARKS.items():
        importlib.import_module(f"{__package__}.{name}").add_arguments(
            choices.add_parser(name, help=text, description=text)
        )


def run(args: argparse.Namespace) -> None:
    importlib.import_module(f"{__package__}.{args.benchmark}").run(args)
