"""`effzoo config`."""

from __future__ import annotations

import argparse

from ._until_merge import settings_help

HELP = "show every setting with its type, default and meaning"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", metavar="SECTION", help="one section only")


def run(args: argparse.Namespace) -> None:
    print(settings_help())
