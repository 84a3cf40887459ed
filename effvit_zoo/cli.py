"""The entry point of `effzoo`: `effvit_zoo.cli.main`."""

from .commands.cli import COMMANDS as COMMANDS
from .commands.cli import main as main
