"""`effzoo benchmark WHAT`: one table of benchmarks, each with its arguments and its body."""

from __future__ import annotations

import argparse
import importlib

BENCHMARKS = {
    "attention": "every attention mechanism alone: time and memory as the number of tokens grows",
    "backbones": "our backbones against timm's: eager, compiled, training, memory",
    "tosa": "token selection: its speed against the dense model, or what the selectors of a trained run are worth",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="benchmark", metavar="WHAT", required=True)
    for name, text in BENCHMARKS.items():
        importlib.import_module(f"{__package__}.{name}").add_arguments(
            choices.add_parser(name, help=text, description=text)
        )


def run(args: argparse.Namespace) -> None:
    importlib.import_module(f"{__package__}.{args.benchmark}").run(args)
