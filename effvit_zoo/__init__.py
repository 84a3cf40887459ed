"""effvit_zoo: efficient vision transformers in timm's registry. Importing this package registers every `effzoo_*` model.

The one process in which it doesn't is the command line's own: torch and timm take seconds to import, and `effzoo list` needs neither.
There, a command imports what it uses; `hub`, through which all commands get their models, registers them.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from torch import nn


def _is_command_line() -> bool:
    """Whether this process is `effzoo`, `python -m effvit_zoo`, or the one that tries an exported file without torch; -m is the
    program's name until its module is found."""
    program = Path((getattr(sys, "argv", None) or [""])[0]).name
    modules = {("-m", __name__), ("-m", f"{__name__}.export.fresh")}
    return program in ("effzoo", "effzoo.exe") or (program == "-m" and not modules.isdisjoint(pairwise(sys.orig_argv)))


if not _is_command_line():
    from . import export as export
    from . import hub as hub
    from . import models as models
    from .evaluation.prediction import predict as predict
    from .export.deployed import open_exported as open_exported
    from .export.optimize import optimize_for_inference as optimize_for_inference
    from .hub import pull as pull
    from .models import swap_attention as swap_attention
    from .models import to_dense as to_dense
    from .models import to_tosa as to_tosa

__all__ = [
    "__version__",
    "create_model",
    "export",
    "list_models",
    "open_exported",
    "optimize_for_inference",
    "predict",
    "pull",
    "push",
    "swap_attention",
    "to_dense",
    "to_tosa",
]


def create_model(name: str | Path, pretrained: bool | None = None, **kwargs: Any) -> nn.Module:
    """A model by whatever the command line takes: a name, a model or run folder, `hf-hub:USER/NAME`, or a checkpoint file.

    Args:
        name: As in `hub.load`.
        pretrained: Whether to load weights. None: yes for folders, the Hub and files, no for plain names.
        kwargs: As for `timm.create_model`; for a checkpoint file also `architecture` and `key`.

    Raises:
        UserError: As `hub.load`, in one line.
    """
    from . import hub

    return hub.load(name, pretrained=pretrained, **kwargs)


def list_models(filter: str = "effzoo_*", pretrained: bool = False) -> list[str]:
    """Names of this package's models that match a wildcard; with `pretrained`, the `model.tag` names that have weights."""
    import timm

    return [n for n in timm.list_models(filter, pretrained=pretrained) if n.startswith("effzoo_")]


def push(folder: str | Path, repo_id: str, **options: Any) -> str:
    """Publishes a model folder, or the `best/` of a run folder, on the Hub with a card, as one commit.

    Args:
        folder: The folder; it isn't changed. What its run recorded is uploaded to `training/`.
        repo_id: USER/NAME; created where it doesn't exist.
        options: private, revision, license and message, as in `effvit_zoo.hub.push`.

    Returns:
        The commit's address.

    Raises:
        UserError: The folder is not a loadable model in its training form, holds a token, or the Hub refuses; the message says
            what is on the Hub afterwards.
    """
    from . import hub
    from .tasks import card_facts

    return hub.push(folder, repo_id, card_facts, **options)
