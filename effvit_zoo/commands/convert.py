"""`effzoo convert`: turns a checkpoint file into a model folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "turn a checkpoint file of any training into a model folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `effzoo convert`."""
    from ..hub.convert import SUFFIXES

    parser.add_argument("file", type=Path, metavar="FILE", help=f"the checkpoint: {', '.join(SUFFIXES)}")
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="model that the weights belong to, e.g. effzoo_*"
    )
    parser.add_argument(
        "--key", help="place of the weights in the file, e.g. state_dict.teacher, where several would do"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="constructor arguments that the weights don't tell, e.g. window_size=8",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the model folder to write")


def run(args: argparse.Namespace) -> None:
    """Converts and prints the folder. Raises `UserError`."""
    from .. import hub
    from ..config import apply_overrides, plain
    from ..hub.convert import convert

    kwargs: dict[str, Any] = {}
    apply_overrides(kwargs, args.set)
    folder = convert(args.file, args.model, args.output, key=args.key, kwargs=plain(kwargs), tell=print)
    config = hub.read_config(folder)
    named = "classes" if config.get("label_names") else "classes without names"
    print(f"{folder}: {args.model} with {config['num_classes']} {named}, to be used as {hub.LOCAL}{folder}")
