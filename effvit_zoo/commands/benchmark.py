"""`effzoo benchmark WHAT`: one of the benchmarks, each with its own arguments."""

from ..benchmark.command import add_arguments as add_arguments
from ..benchmark.command import run as run

HELP = "measure speed and memory against timm's own models"
