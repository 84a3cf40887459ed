"""`effzoo convert`."""

from ..hub.convert import add_arguments as add_arguments
from ..hub.convert import run as run

HELP = "turn a checkpoint file of an official repository into a model folder"
