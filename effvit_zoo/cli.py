"""The entry point of `effzoo`: `effvit_zoo.cli.main`."""

from .commands import COMMANDS as COMMANDS
from .commands import main as main
