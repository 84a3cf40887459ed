"""Models from checkpoint files of a paper's official repository, of timm or of any training, and their conversion to model folders.

The file is read as data only and the weights are found in it, see `checkpoint`. The model's family renames the parameters; numbers of
classes and channels and the image size follow from the weights. Then every name and shape must match.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model, split_model_name_tag
from torch import nn

from ..errors import UserError, one_line
from ..models import STARTED_RANDOM
from . import checkpoint
from .checkpoint import SUFFIXES as SUFFIXES
from .checkpoint import Found
from .folder import FILE, HUB, LOCAL, listed, resolve_name, save


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose weights are those of a model.

    Attributes:
        model: The model, with the weights.
        kwargs: Its constructor arguments.
        found: Where the weights were.
        names: Class names that the checkpoint gives, None where it gives none.
    """

    model: Any
    kwargs: dict[str, Any]
    found: Found
    names: list[str] | None

    @property
    def note(self) -> str:
        """What was taken, in words; "" where there was no choice."""
        beside = f", {self.found.left_out} tensors beside them left out" if self.found.left_out else ""
        return f"weights under {self.found.key!r}{beside}" if self.found.key else ""


def convert(
    file: str | Path,
    name: str,
    folder: str | Path,
    *,
    key: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    tell: Callable[[str], object] | None = None,
) -> Path:
    """Writes the weights of a checkpoint file as a model folder.

    Args:
        file: A checkpoint; its weights may lie under any keys and prefixes. Averaged weights have precedence.
        name: A registered model, with or without a weights tag; the tag says which published weights these are.
        folder: Where to; an existing model folder is replaced, as by `save`.
        key: Place of the weights, keys joined by dots, where several would do.
        kwargs: Constructor arguments that the weights don't tell, e.g. `window_size`.
        tell: Called with a line about where the weights were, unless it was the top of the file.

    Returns:
        The folder's absolute path.

    Raises:
        UserError: The file is no readable checkpoint or asks for code, its weights aren't the model's, or the folder holds
            something else.
        OSError: A disk fails.
    """
    file, folder = Path(file), Path(folder)
    resolved = resolve_name(name)
    if resolved.startswith((LOCAL, HUB, FILE)):
        raise UserError(f"expected the name of a model, got {name}: the weights are those of the file")
    if file.resolve().parent == folder.resolve():
        raise UserError(f"the checkpoint {file} lies in the output folder itself, which would replace it")
    opened = open_checkpoint(checkpoint.read(file), file, resolved, key, kwargs or {})
    model = opened.model
    published = timm.models.get_pretrained_cfg(resolved)
    tagged = bool(split_model_name_tag(resolved)[1]) and published and published.num_classes == model.num_classes
    setattr(model, STARTED_RANDOM, not tagged)
    try:
        extra = {"converted_from": file.name}
        saved = save(model, folder, label_names=opened.names, data_config=_data_config(model), extra=extra)
    except ValueError as error:
        raise UserError(str(error)) from error
    if opened.note and tell is not None:
        tell(opened.note)
    return saved


def load_checkpoint(
    file: Path, *, architecture: str | None = None, key: str | None = None, pretrained: bool = True, **kwargs: Any
) -> nn.Module:
    """A model with the weights of a checkpoint file; `kwargs` as for `timm.create_model`, e.g. another `num_classes` or `in_chans`.

    Args:
        file: As in `convert`.
        architecture: A registered model; None for what the file itself says.
        key: As in `convert`.
        pretrained: False for the model that the weights belong to, without them.
        kwargs: Constructor arguments that differ from those that follow from the weights.

    Raises:
        UserError: As `convert`, and where the architecture isn't known.
    """
    content = checkpoint.read(file)
    name = architecture or checkpoint.recorded_architecture(content)
    if name is None or not is_model(split_model_name_tag(name)[0]):
        said = f"names the architecture {name!r}, which is not known" if name else "doesn't say its architecture"
        raise UserError(
            f"{file} {said}: name it by model.architecture=NAME (in Python architecture=), "
            f"or run `effzoo convert {file} --model NAME --output FOLDER` and use the folder; `effzoo list` has the names"
        )
    build_only = {k: v for k, v in kwargs.items() if k not in ("num_classes", "in_chans", "img_size", "device")}
    opened = open_checkpoint(content, file, resolve_name(name), key, build_only)
    wanted = opened.kwargs | kwargs
    overlay: dict[str, Any] = dict.fromkeys(("hf_hub_id", "hf_hub_filename", "url", "file", "source", "tag", "license"))
    overlay |= {"state_dict": opened.model.state_dict(), "num_classes": opened.model.num_classes, "custom_load": False}
    overlay |= _data_config(opened.model)
    try:
        model: Any = timm.create_model(resolve_name(name), pretrained, pretrained_cfg_overlay=overlay, **wanted)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"cannot build {name} for the weights of {file}: {one_line(error)}") from error
    model.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k != "state_dict"}
    if opened.names and model.num_classes == len(opened.names):
        model.pretrained_cfg["label_names"] = opened.names
    setattr(model, STARTED_RANDOM, True)
    model.effvit_zoo_record = {"converted_from": file.name}
    return model


def open_checkpoint(content: Any, file: Path, name: str, key: str | None, kwargs: Mapping[str, Any]) -> Opened:
    """The model that a checkpoint holds the weights of. Raises `UserError` where they aren't those of the named one."""
    complaint = f"{file} does not hold the weights of {name}"
    given = dict(kwargs)
    model = _on_meta(name, given)
    found = checkpoint.find(content, file, model, key)
    sizes = _sizes(found, model)
    sizes = {argument: value for argument, value in sizes.items() if argument not in given}
    if sizes:
        given |= sizes
        model = _on_meta(name, given)
        found = checkpoint.find(content, file, model, found.key)
    _refuse_resampled(found, complaint)
    _fill(model, found.renamed, f"{complaint}{f' under {found.key!r}' if found.key else ''}")
    return Opened(model, given, found, checkpoint.recorded_names(content, model.num_classes))


def _on_meta(name: str, kwargs: Mapping[str, Any]) -> Any:
    try:
        return timm.create_model(name, device="meta", **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{name} can't be built with {dict(kwargs)}: {one_line(error)}") from error


def _sizes(found: Found, model: Any) -> dict[str, Any]:
    """Constructor arguments that follow from shapes of the weights and differ from the model's: classes, channels, image size."""
    sizes: dict[str, Any] = {}
    cfg, weights = model.pretrained_cfg, found.renamed
    classifier, first = (_first(cfg.get(entry)) for entry in ("classifier", "first_conv"))
    head = weights.get(f"{classifier}.weight")
    if head is not None and head.ndim and head.shape[0] != model.num_classes:
        sizes["num_classes"] = head.shape[0]
    stem, own = weights.get(f"{first}.weight"), model.state_dict().get(f"{first}.weight")
    if stem is not None and own is not None and stem.ndim == own.ndim == 4 and stem.shape[1] != own.shape[1]:
        sizes["in_chans"] = stem.shape[1]
    table, expected = found.weights.get("pos_embed"), getattr(model, "pos_embed", None)
    if table is not None and expected is not None and table.ndim == 3 and table.shape != expected.shape:
        patches = table.shape[1] - (expected.shape[1] - math.prod(model.patch_embed.grid_size))
        side = math.isqrt(max(patches, 0))
        if side and side * side == patches and table.shape[2] == expected.shape[2]:
            sizes["img_size"] = side * model.patch_embed.patch_size[0]
    return sizes


def _first(names: Any) -> str:
    return names if isinstance(names, str) else str(names[0]) if names else ""


def _data_config(model: Any) -> dict[str, Any]:
    """Preprocessing for the model's own channels and image size, where they differ from its config's."""
    cfg = model.pretrained_cfg
    channels = int(getattr(model, "in_chans", 0) or cfg["input_size"][0])
    first = model.state_dict().get(f"{_first(cfg.get('first_conv'))}.weight")
    if first is not None and first.ndim == 4:
        channels = first.shape[1]
    size = tuple(getattr(getattr(model, "patch_embed", None), "img_size", None) or cfg["input_size"][1:])
    if (channels, *size) == tuple(cfg["input_size"]):
        return {}
    changed: dict[str, Any] = {"input_size": (channels, *size)}
    for key in ("mean", "std"):
        if len(cfg[key]) != channels:
            changed[key] = (sum(cfg[key]) / len(cfg[key]),) * channels
    return changed


def _refuse_resampled(found: Found, complaint: str) -> None:
    """A family's renaming also resamples what depends on the image's size, which is good for fine-tuning; here it would make another
    model."""
    sizes = Counter(tensor.numel() for tensor in found.weights.values())
    for key, tensor in found.renamed.items():
        if not sizes[tensor.numel()]:
            raise UserError(
                f"{complaint}: {key} is of another image or window size (--set img_size=N or window_size=N)"
            )
        sizes[tensor.numel()] -= 1


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
