"""Checkpoint files of anybody's training: read as data only, and the weights of a model found in them.

The weights may lie under any keys ("model_state_dict", "model_ema.module", ...) and behind any prefixes ("module.", "model._orig_mod.",
...): both are the same to a reader that joins nested keys by dots. The place is where the model's own names and shapes are.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib
import pathlib
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models import model_entrypoint

from ..errors import UserError, one_line, unknown_choice

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model")
"""Keys of averaged weights, which are preferred to the others beside them."""

NAMES = ("label_names", "class_names", "classes", "class_to_idx", "names")
"""Keys under which trainings keep the names of classes."""

_ARCHITECTURE = ("arch", "architecture", "model_name")


class _Settings(dict):
    """Stands for Lightning's AttributeDict, a dict whose items are attributes too."""


def _safe_globals() -> list[Any]:
    """Classes that hold data and run nothing: torch lets them through besides tensors. A name may be one of another version."""
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    found: list[Any] = [
        *(argparse.Namespace, types.SimpleNamespace, collections.Counter, collections.defaultdict, collections.deque),
        *(datetime.datetime, datetime.date, datetime.timedelta, np.dtype, np.ndarray),
        *(getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType")),
        *((pathlib.PurePath, f"pathlib.{name}") for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
    ]
    for core in ("numpy._core", "numpy.core"):
        found += [(scalar, f"{core}.multiarray.scalar"), (rebuild, f"{core}.multiarray._reconstruct")]
    for package in ("lightning_fabric", "lightning.fabric", "pytorch_lightning"):
        for module in ("utilities.data", "utilities.parsing"):
            found.append((_Settings, f"{package}.{module}.AttributeDict"))
    return found


def _read_pickle(file: Path) -> Any:
    with torch.serialization.safe_globals(_safe_globals()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about formats, each followed by the error that is reported
        return torch.load(file, map_location="cpu", weights_only=True)


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": load_file,
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".tar"), _read_pickle),  # timm writes .pth.tar
}
SUFFIXES = tuple(_READERS)


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is that of a file with a checkpoint's suffix."""
    path = Path(path).expanduser()
    return path.suffix.lower() in _READERS and path.is_file()


def read(file: Path) -> Any:
    """What a checkpoint file holds. Raises `UserError`."""
    if not file.is_file():
        raise UserError(f"checkpoint {file} is {'not a file' if file.exists() else 'not there'}")
    if file.suffix.lower() not in _READERS:
        raise unknown_choice("kind of checkpoint", file.suffix or file.name, SUFFIXES)
    if file.stat().st_size == 0:
        raise UserError(f"checkpoint {file} is empty")
    try:
        return _READERS[file.suffix.lower()](file)
    except PermissionError:
        raise
    except Exception as error:  # only parsers of torch and safetensors run here; damaged files make them raise anything, TypeErrors too
        text = one_line(error, limit=10_000)
        if requested := re.search(r"(?:GLOBAL|class) ([\w.]+)", text):
            reason = f"it asks for {requested.group(1)}; nothing was run"
            raise UserError(f"checkpoint {file} holds more than weights: {reason}") from error
        text = text.partition("WeightsUnpickler error: ")[2] or text  # after advice to load it unsafely
        reason = re.split(r"\. | Check the documentation", text)[0][:150]
        raise UserError(f"checkpoint {file} is damaged, incomplete or no checkpoint ({reason})") from error


@dataclass(frozen=True)
class Found:
    """A model's weights in a checkpoint.

    Attributes:
        key: Where, as keys joined by dots; "" for the top.
        weights: As the file names them, without the key.
        renamed: The same by the model's names.
        left_out: Tensors beside them.
    """

    key: str
    weights: dict[str, torch.Tensor]
    renamed: dict[str, torch.Tensor]
    left_out: int


def find(content: Any, file: Path, model: Any, key: str | None = None) -> Found:
    """The weights of a model in what a checkpoint holds.

    Args:
        content: What `read` gave.
        file: For messages.
        model: The model, on the meta device.
        key: Where to look, where several models are in the file.

    Raises:
        UserError: No tensors, several models of the kind, or a tensor without data. Whether all fits is the caller's to check.
    """
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"checkpoint {file} holds no weights but {_described(content)}, expected a mapping of tensors")
    tensors = dict(_flattened(content))
    if not tensors:
        name, value = next(_leaves(content), ("it", content))
        raise UserError(f"checkpoint {file}: {name} is {_described(value)}, expected a tensor")
    for name, value in tensors.items():
        if value.is_meta or value.layout is not torch.strided:
            raise UserError(f"checkpoint {file}: {name} is a tensor without data or a sparse one, expected a dense one")
    places = [place for place in _places(tensors, model) if not key or place == key or _is_inside(place, key)]
    if not places:
        raise unknown_choice("key of the checkpoint", str(key), [place for place in _places(tensors, model) if place])
    found = [_at(place, tensors, model) for place in places]
    score = {each.key: _fit(each.renamed, model) for each in found}
    best = max(score.values())
    found = [each for each in found if score[each.key] == best]
    found = [each for each in found if not any(_is_inside(other.key, each.key) for other in found)]
    averaged = [each for each in found if set(each.key.split(".")) & set(AVERAGED)]
    if len(averaged) == 1 and len(found) == 2:
        found = averaged
    if len(found) > 1 and best > 0:
        raise UserError(
            f"checkpoint {file} holds the weights of {len(found)} models: choose by --key {' or '.join(e.key for e in found)}"
        )
    return found[0]


def _at(place: str, tensors: Mapping[str, torch.Tensor], model: Any) -> Found:
    start = f"{place}." if place else ""
    weights = {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}
    return Found(place, weights, _renamed(weights, model), len(tensors) - len(weights))


def _places(tensors: Mapping[str, torch.Tensor], model: Any) -> list[str]:
    """Keys below which there are about as many tensors as the model has, the top always."""
    counts = collections.Counter({"": len(tensors)})
    for name in tensors:
        parts = name.split(".")
        counts.update(".".join(parts[:depth]) for depth in range(1, min(len(parts), 8)))
    enough = len(model.state_dict()) / 2
    return [place for place, count in counts.items() if count >= enough or place == ""]


def _is_inside(inner: str, outer: str) -> bool:
    return inner != outer and inner.startswith(f"{outer}." if outer else "")


def _fit(weights: Mapping[str, torch.Tensor], model: Any) -> int:
    """Number of the model's tensors that are there, by name."""
    return sum(name in weights for name in model.state_dict())


def _flattened(content: Mapping[Any, Any], start: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by their keys joined by dots; what an optimizer keeps is not looked into."""
    for key, value in content.items():
        name = f"{start}{key}"
        if isinstance(value, torch.Tensor):
            yield name, value
        elif (
            isinstance(value, Mapping)
            and depth < 4
            and not str(key).startswith(("optim", "lr_sched", "sched", "scaler"))
        ):
            yield from _flattened(value, f"{name}.", depth + 1)


def _leaves(content: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value)
        else:
            yield key, value


def _renamed(weights: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The weights under the model's own names, by its family's `checkpoint_filter_fn`, which also resamples what depends on sizes;
    as they are where that function can't read them."""
    family = importlib.import_module(model_entrypoint(model.pretrained_cfg["architecture"]).__module__)
    filter_fn = getattr(family, "checkpoint_filter_fn", None)
    if filter_fn is None:
        return weights
    with suppress(RuntimeError, ValueError, LookupError, AttributeError, AssertionError, TypeError):
        return filter_fn(dict(weights), model)
    return weights


def _described(value: object) -> str:
    empty = isinstance(value, dict | list | tuple) and not value
    return f"an empty {type(value).__name__}" if empty else f"a {type(value).__name__}"


def recorded_architecture(content: Any) -> str | None:
    """The name of the model that a checkpoint itself gives, as timm's and many other training scripts write it."""
    for settings in _settings(content):
        for key in (*_ARCHITECTURE, "model"):
            if isinstance(settings.get(key), str):
                return settings[key]
    return None


def recorded_names(content: Any, num_classes: int) -> list[str] | None:
    """Names of the classes that a checkpoint itself gives, where there are as many as its classifier has outputs."""
    for settings in _settings(content):
        for key in NAMES:
            value = settings.get(key)
            if isinstance(value, Mapping) and value and all(isinstance(item, int) for item in value.values()):
                value = sorted(value, key=value.__getitem__)  # name -> index
            elif isinstance(value, Mapping):
                value = list(value.values())
            if isinstance(value, list | tuple) and len(value) == num_classes and all(isinstance(v, str) for v in value):
                return list(value)
    return None


def _settings(content: Any) -> Iterator[Mapping[str, Any]]:
    """The mappings of a checkpoint in which a training's settings may be."""
    if not isinstance(content, Mapping):
        return
    yield content
    for key in ("args", "hyper_parameters", "hparams", "config", "cfg", "meta"):
        value = content.get(key)
        value = vars(value) if isinstance(value, argparse.Namespace | types.SimpleNamespace) else value
        if isinstance(value, Mapping):
            yield value
