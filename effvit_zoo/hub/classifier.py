"""Models for the classes of a data set: which rows of the classifier stay, which move, and when a new one is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import nn

from .folder import FILE, HUB, LOCAL, load, read_config, resolve_name
from .labels import ClassMatch, known_names, match_classes

_KEPT = {
    "same": "the data has its classes",
    "permuted": "with its rows in the order of the data's classes",
    "subset": "with the rows of the {wanted} classes of the data, of {known}",
    "position": "by position: class number n of the data is its number n",
}


def load_for_classes(
    name: str,
    num_classes: int,
    wanted: Sequence[str] | None,
    *,
    pretrained: bool,
    by_position: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, str, bool]:
    """A model with an output for each class of a data set, in its order.

    The classifier that comes with the weights is kept where it has all the classes by name, with its rows in the data's order.
    Otherwise it is a new one.

    Args:
        name: As in `load`.
        num_classes: Number of classes of the data.
        wanted: Names of the data's classes, None where it has none.
        pretrained: Whether to load weights.
        by_position: Keep the classifier's first `num_classes` rows whatever the names.
        kwargs: As in `load`.

    Returns:
        The model, what became of the classifier ("" without weights), and whether it is a new one.

    Raises:
        UserError: As `load`.
    """
    kwargs |= {"num_classes": num_classes}
    if not pretrained or wanted is None:
        return load(name, pretrained=pretrained, **kwargs), "", not pretrained
    cfg = classes_of(name, **{key: kwargs[key] for key in ("architecture", "key") if key in kwargs})
    count = int(cfg.get("num_classes") or 0)
    match = _match(wanted, cfg, count, by_position)
    model: Any = load(name, pretrained=True, **kwargs)
    if match.order is not None and match.kind != "same":
        source = model if count == num_classes else load(name, pretrained=True, **{**kwargs, "num_classes": count})
        if not _take_rows(model, source, match.order):
            match = ClassMatch("unknown")
    if match.order is None and count == num_classes:
        _take_rows(model, load(name, pretrained=False, **kwargs), range(num_classes))
    model.pretrained_cfg = model.pretrained_cfg | {"label_names": [*wanted], "label_descriptions": None}
    return model, _note(match, cfg, len(wanted), count), match.order is None


def classes_of(name: str, **of_file: Any) -> Mapping[str, Any]:
    """What is known of the classes of the weights behind a name: label_names, tag, num_classes. `of_file` is for checkpoint files."""
    resolved = resolve_name(name)
    if resolved.startswith(FILE):
        model: Any = load(name, **of_file)
        return model.pretrained_cfg | {"num_classes": model.num_classes}
    if not resolved.startswith((LOCAL, HUB)):
        cfg = timm.models.get_pretrained_cfg(resolved)
        return cfg.to_dict() if cfg else {}
    config = read_config(resolved)
    top = {key: config[key] for key in ("num_classes", "label_names", "label_descriptions") if key in config}
    return {**(config.get("pretrained_cfg") or {}), **top}


def _match(wanted: Sequence[str], cfg: Mapping[str, Any], count: int, by_position: bool) -> ClassMatch:
    if not by_position:
        return match_classes(wanted, *known_names(cfg))
    return ClassMatch("position", tuple(range(len(wanted)))) if len(wanted) <= count else ClassMatch("unknown")


def _note(match: ClassMatch, cfg: Mapping[str, Any], wanted: int, known: int) -> str:
    if match.order is not None:
        return f"classifier: kept, {_KEPT[match.kind].format(wanted=wanted, known=known)}"
    if match.strange:
        return (
            f"classifier: new, the weights' has not {len(match.strange)} of the data's {wanted} classes, "
            f"the first is {match.strange[0]!r}"
        )
    side = "data" if known_names(cfg) else "weights"
    hint = " (task.classes=position keeps the old one)" if wanted <= known else ""
    return f"classifier: new, the {side} name no classes{hint}"


def _take_rows(model: nn.Module, source: nn.Module, order: Sequence[int]) -> bool:
    """Gives a model's classifier rows of another's; false, and nothing changed, where they differ in more than their number."""
    theirs = source.state_dict()
    rows = {key: (tensor, theirs[key][list(order)]) for key, tensor in _classifier(model) if key in theirs}
    if not rows or any(own.shape != taken.shape for own, taken in rows.values()):
        return False
    with torch.no_grad():
        for own, taken in rows.values():
            own.copy_(taken)
    return True


def _classifier(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters of the classifier, or of the classifiers, by name."""
    names = model.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    return ((key, tensor) for key, tensor in model.state_dict().items() if key.startswith(prefixes))
