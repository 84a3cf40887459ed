"""`effzoo convert`: turns a checkpoint file into a model folder."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "turn a checkpoint file of an official repository into a model folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `effzoo convert`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="the checkpoint, e.g. model.pth or model.safetensors")
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="model that the weights belong to, e.g. effzoo_*"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the model folder to write")


def run(args: argparse.Namespace) -> None:
    """Converts and prints the folder. Raises `UserError`."""
    from .. import hub
    from ..hub.convert import convert

    folder = convert(args.file, args.model, args.output)
    classes = hub.read_config(folder)["num_classes"]
    print(f"{folder}: {args.model} with {classes} classes, to be used as {hub.LOCAL}{folder}")
