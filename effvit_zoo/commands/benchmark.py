"""`effzoo benchmark WHAT`: one table of benchmarks, each with its arguments in `benchmark.arguments` and its body in a file."""

from __future__ import annotations

import argparse
import importlib

from ..benchmark import arguments

HELP = "measure speed and memory: of any models, of attention, against timm, of token selection"

BENCHMARKS = {
    "models": "any models and model folders: milliseconds and images per second here",
    "attention": "every attention mechanism alone: time and memory as the number of tokens grows",
    "backbones": "our backbones against timm's: eager, compiled, training, memory",
    "tosa": "token selection: its speed against the dense model, or what the selectors of a trained run are worth",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="benchmark", metavar="WHAT", required=True)
    for name, text in BENCHMARKS.items():
        getattr(arguments, name)(choices.add_parser(name, help=text, description=text))


def run(args: argparse.Namespace) -> None:
    importlib.import_module(f"..benchmark.{args.benchmark}", __package__).run(args)
