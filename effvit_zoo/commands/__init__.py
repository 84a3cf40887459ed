"""The commands of `effzoo`: a table of names, each a file of this folder with `HELP`, `add_arguments(parser)` and `run(args)`.

A command's file is imported when the command is chosen. Bad input of any kind, usage included, is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OneLineParser, run_command, unknown_choice
from ..version import __version__

DESCRIPTION = "Efficient vision transformers: list, train, measure and publish them."


@dataclass(frozen=True)
class Command:
    """A row of `COMMANDS`."""

    name: str

    @property
    def module(self) -> Any:
        """The command's file, imported on first use."""
        return importlib.import_module(f"{__name__}.{self.name}")

    @property
    def help(self) -> str:
        """What the command does, in a line."""
        return self.module.HELP

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds description and arguments."""
        parser.description = f"{self.help[:1].upper()}{self.help[1:]}."
        self.module.add_arguments(parser)


COMMANDS = {
    name: Command(name)
    for name in (
        *("list", "info", "predict"),
        *("train", "config", "validate", "export", "demo", "benchmark"),
        *("push", "pull", "weights", "convert"),
        "completion",
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, or 2 after one line on stderr for what the user can mend."""
    try:
        return run_command(lambda: dispatch(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else 0


def dispatch(argv: Sequence[str]) -> None:
    """Runs a command line. Raises `UserError`."""
    parser = _root_parser(add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this help")
    parser.add_argument("command", nargs="?", help="one of the commands below; `effzoo COMMAND --help` explains it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args([*argv])
    if chosen.help or chosen.command is None:
        parser.epilog = "commands:\n" + "\n".join(f"  {row.name:<10} {row.help}" for row in COMMANDS.values())
        parser.print_help()
        return
    if chosen.command not in COMMANDS:
        raise unknown_choice("command", chosen.command, [*COMMANDS])
    command = COMMANDS[chosen.command]
    arguments = OneLineParser(prog=f"effzoo {command.name}")
    command.add_arguments(arguments)
    try:
        command.module.run(arguments.parse_args(chosen.arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # `effzoo list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def full_parser() -> argparse.ArgumentParser:
    """One parser of all commands and their options, for completion and reference pages. Imports every command."""
    parser = _root_parser()
    choices = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(choices.add_parser(name, help=command.help))
    return parser


def _root_parser(add_help: bool = True) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog="effzoo", description=DESCRIPTION, formatter_class=form, add_help=add_help)
    parser.add_argument("--version", action="version", version=f"effvit_zoo {__version__}")
    return parser
