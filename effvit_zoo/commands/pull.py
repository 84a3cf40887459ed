"""`effzoo pull`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "download a model and verify it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="USER/NAME", help="the model on the Hub")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new folder for it (default: NAME)")


def run(args: argparse.Namespace) -> None:
    from .. import hub

    folder = hub.pull(args.name, args.output, revision=args.revision)
    print(f"{folder}: to be used as {hub.LOCAL}{folder}")
