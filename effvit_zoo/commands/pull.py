"""`effzoo pull`: downloads a model from the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "download a model from the Hub into a folder and verify it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `effzoo pull`."""
    parser.add_argument("name", metavar="USER/NAME", help="the model on the Hub")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="new folder for the model (default: NAME)")


def run(args: argparse.Namespace) -> None:
    """Pulls and prints the folder. Raises `UserError`."""
    from .. import hub

    folder = hub.pull(args.name, args.output, revision=args.revision)
    print(f"{folder}: to be used as {hub.LOCAL}{folder}")
