"""Converts a checkpoint of a paper's official repository, of timm or of a training run to a model folder.

The file is read as weights only: a pickle may hold nothing but tensors and `argparse.Namespace`, in which official checkpoints keep
their settings. The model's family renames the parameters, then every name and shape must match.
"""

from __future__ import annotations

import argparse
import importlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict, model_entrypoint
from torch import nn

from ..errors import UserError, one_line, unknown_choice
from ..models._base import unwrap_state_dict
from .folder import HUB, LOCAL, listed, resolve_name, save


def convert(file: str | Path, name: str, folder: str | Path) -> Path:
    """Writes the weights of a checkpoint file as a model folder.

    Args:
        file: A checkpoint; tensors at its top or under "model", "state_dict" or a key of averaged weights, which have precedence.
        name: A registered model, with or without a weights tag; the tag says which preprocessing goes with the weights.
        folder: Where to; an existing model folder is replaced, as by `save`.

    Returns:
        The folder's absolute path.

    Raises:
        UserError: The file is no readable checkpoint or asks for code, its weights aren't the model's, or the folder holds
            something else.
        OSError: A disk fails.
    """
    file, folder = Path(file), Path(folder)
    resolved = resolve_name(name)
    if resolved.startswith((LOCAL, HUB)):
        raise UserError(f"expected the name of a model, got {name}: the weights are those of the file")
    if file.resolve().parent == folder.resolve():
        raise UserError(f"the checkpoint {file} lies in the output folder itself, which would replace it")
    complaint = f"{file} does not hold the weights of {name}"
    weights = _tensors(_read(file), file)
    model: Any = timm.create_model(resolved, device="meta")
    weights = _renamed(weights, model, complaint)
    num_classes = _num_classes(weights, model)
    if num_classes != model.num_classes:
        model = timm.create_model(resolved, device="meta", num_classes=num_classes)
    _fill(model, weights, complaint)
    try:
        return save(model, folder, extra={"converted_from": file.name})
    except ValueError as error:
        raise UserError(str(error)) from error


def _read_pickle(file: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about formats, each followed by the error that is reported
        return torch.load(file, map_location="cpu", weights_only=True)


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": load_file,
    **dict.fromkeys((".pth", ".pt", ".bin", ".tar"), _read_pickle),  # timm writes .pth.tar
}
SUFFIXES = tuple(_READERS)


def _read(file: Path) -> Any:
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


def _tensors(content: Any, file: Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint, without the prefixes of wrappers."""
    weights = unwrap_state_dict(content) if isinstance(content, dict) else content
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"checkpoint {file} holds no weights but {_described(weights)}, expected a mapping of tensors")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"checkpoint {file}: {key} is {_described(value)}, expected a tensor")
        if value.is_meta or value.layout is not torch.strided:
            raise UserError(f"checkpoint {file}: {key} is a tensor without data or a sparse one, expected a dense one")
    return clean_state_dict(dict(weights))


def _described(value: object) -> str:
    return f"an empty {type(value).__name__}" if value in ({}, [], ()) else f"a {type(value).__name__}"


def _renamed(weights: dict[str, torch.Tensor], model: Any, complaint: str) -> dict[str, torch.Tensor]:
    """The weights under the model's own names, by its family's `checkpoint_filter_fn`.

    That function also resamples what depends on the image's size, which is good for fine-tuning; here it would make another model.
    """
    family = importlib.import_module(model_entrypoint(model.pretrained_cfg["architecture"]).__module__)
    filter_fn = getattr(family, "checkpoint_filter_fn", None)
    if filter_fn is None:
        return weights
    try:
        renamed = filter_fn(dict(weights), model)
    except (RuntimeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        raise UserError(f"{complaint}: {one_line(error)}") from error
    sizes = Counter(tensor.numel() for tensor in weights.values())
    for key, tensor in renamed.items():
        if not sizes[tensor.numel()]:
            raise UserError(f"{complaint}: {key} is of another image or window size")
        sizes[tensor.numel()] -= 1
    return renamed


def _num_classes(weights: Mapping[str, torch.Tensor], model: Any) -> int:
    """Outputs of the checkpoint's classifier; those of the model where it has none, which is reported as missing later."""
    classifier = model.pretrained_cfg.get("classifier") or ""
    head = weights.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
    return model.num_classes if head is None or head.ndim == 0 else head.shape[0]


def _fill(model: nn.Module, weights: Mapping[str, torch.Tensor], complaint: str) -> None:
    """Gives a model on the meta device the weights, in its own types, if all names and shapes agree."""
    expected = model.state_dict()
    # counts of batches decide nothing, and not every converter keeps them
    missing = [key for key in expected if key not in weights and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in weights if key not in expected]
    misshapen = [
        f"{key} (is {tuple(weights[key].shape)}, expected {tuple(tensor.shape)})"
        for key, tensor in expected.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    mistyped = [
        f"{key} (is {weights[key].dtype})"
        for key, tensor in expected.items()
        if key in weights and tensor.is_floating_point() and not weights[key].is_floating_point()
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen, "of another type": mistyped}
    if differences := listed(found):
        raise UserError(f"{complaint}: {differences}")
    own = {  # a copy each: tensors of a pickle may be views of one storage
        key: weights[key].to(tensor.dtype, copy=True) if key in weights else torch.zeros_like(tensor, device="cpu")
        for key, tensor in expected.items()
    }
    model.load_state_dict(own, assign=True)
