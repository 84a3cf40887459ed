"""Class labels of models: which ones a model has, how they are shown, and how they correspond to the classes of something else.

Classes correspond by name. ImageNet's ids and names, from timm's tables, are those of a model only where its weights are known to be
ImageNet's: by the tag of the weights, in which timm's registry and its repositories on the Hub name the data. A number of classes alone
says nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from timm.data import ImageNetInfo
from torch import nn

from ..errors import UserError
from ..models import STARTED_RANDOM

_SUBSETS = {
    ("1k", 1000): "imagenet-1k",
    ("21k", 11221): "imagenet-21k-miil",
    ("12k", 11821): "imagenet-12k",
    ("22k", 21841): "imagenet-22k",
    ("22k", 21842): "imagenet-22k-ms",
    ("21k", 21843): "imagenet-21k-goog",
}
"""(what a tag calls the data, number of classes) -> timm's table."""

_ID = re.compile(r"n\d{8}")  # WordNet's


@dataclass(frozen=True)
class ClassMatch:
    """How classes that are wanted, by name, correspond to those that a model knows.

    Attributes:
        kind: "same" names in the same order; "permuted", the same in another order; "subset", some of the model's in any order;
            "different", at least one is not among the model's; "unknown", one side has numbers instead of names.
        order: Index in the model of each wanted class; None for "different" and "unknown".
        strange: Wanted classes that the model doesn't have, where the kind is "different".
    """

    kind: str
    order: tuple[int, ...] | None = None
    strange: tuple[str, ...] = ()


def match_classes(wanted: Sequence[str], *known: Sequence[str] | None) -> ClassMatch:
    """The one rule by which two lists of classes correspond. Names are compared in Unicode's composed form (NFC).

    Args:
        wanted: Names of the classes that outputs are wanted for, e.g. those of the data.
        known: Names of the model's classes by index, or several such lists, e.g. ids and descriptions; None where it has none.
            The first list counts that has all wanted names, else the first.
    """
    lists = [[*map(_composed, names)] for names in known if names]
    names = [*map(_composed, wanted)]
    if names in lists:
        return ClassMatch("same", tuple(range(len(names))))
    if not lists or _are_numbers(names) or _are_numbers(lists[0]):
        return ClassMatch("unknown")
    for candidates in lists:
        counts = Counter(candidates)  # a name that several classes have names none of them
        places = {name: index for index, name in enumerate(candidates) if counts[name] == 1}
        if len(set(names)) == len(names) and all(name in places for name in names):
            kind = "permuted" if len(names) == len(candidates) else "subset"
            return ClassMatch(kind, tuple(places[name] for name in names))
    strange = tuple(name for name in wanted if _composed(name) not in lists[0])
    return ClassMatch("different", None, strange or tuple(wanted))


def class_order(
    wanted: Sequence[str],
    known: Sequence[Sequence[str] | None],
    num_classes: int,
    *,
    by_position: bool = False,
    as_many: bool = True,
    whose: str = "the model",
    option: str,
) -> tuple[tuple[int, ...], str]:
    """The model's class index for each class of the data, and a note for the user, "" where nothing has to be said.

    Args:
        wanted: Class names of the data.
        known: As in `match_classes`.
        num_classes: Number of the model's classes.
        by_position: Class number n of the data is number n of the model, whatever the names.
        as_many: Without names, both must have the same number of classes.
        whose: The model in messages.
        option: The setting that gives `by_position`, for messages.

    Raises:
        UserError: There is a class that the model doesn't have, or one side has no names and their numbers differ.
    """
    match = ClassMatch("unknown") if by_position else match_classes(wanted, *known)
    if match.order is not None:
        return match.order, ""
    if match.kind == "different":
        raise UserError(
            f"{whose} doesn't know {len(match.strange)} of the data's {len(wanted)} classes, the first is {match.strange[0]!r}: "
            f"expected names of the model's classes, or {option} to compare by position"
        )
    if len(wanted) > num_classes:
        raise UserError(f"{whose} knows {num_classes} classes, the data has {len(wanted)}")
    nameless = "the data has" if any(known) else f"{whose} has"
    if len(wanted) < num_classes and as_many and not by_position:
        raise UserError(
            f"{whose} knows {num_classes} classes{'' if any(known) else ' without their names'}, the data has {len(wanted)}"
            f"{' without theirs' if any(known) else ''}: expected as many, or {option} to compare by position"
        )
    reason = "" if by_position else f" ({nameless} no class names)"
    return tuple(range(len(wanted))), f"classes of the data and of {whose} are compared by position{reason}"


def label_names(model_or_cfg: nn.Module | Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names in the order of the logits, or None where the model (or its `pretrained_cfg`) has none that fit it."""
    cfg, num_classes = _cfg_of(model_or_cfg)
    names = cfg.get("label_names")
    if isinstance(names, Mapping):  # index -> name, with JSON's string keys
        by_index = {int(index): str(label) for index, label in names.items()}
        names = [by_index.get(index, str(index)) for index in range(num_classes or len(by_index))]
    if not names or (num_classes is not None and len(names) != num_classes):
        return None
    return tuple(map(str, names))


def known_names(model_or_cfg: nn.Module | Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """All lists of names by which a model's classes can be meant: its labels or else ImageNet's ids, then what is shown for them."""
    names = label_names(model_or_cfg)
    info = _imagenet(model_or_cfg)
    if names is None and info is not None:
        names = tuple(info.label_names())
    if names is None:
        return ()
    lists = [names]
    if (shown := _described(names, model_or_cfg)) != names:
        lists += [shown, tuple(name.partition(",")[0] for name in shown)]
    return tuple(lists)


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Display name of each logit: the model's own labels, ImageNet's where the weights are ImageNet's, else the numbers."""
    known = known_names(model)
    if not known:
        return tuple(str(index) for index in range(getattr(model, "num_classes", 0)))
    return known[1] if len(known) > 1 else known[0]


def _described(names: tuple[str, ...], model_or_cfg: nn.Module | Mapping[str, Any]) -> tuple[str, ...]:
    """The names in words, where the model's config or, for WordNet's ids, timm's table has them."""
    described = _cfg_of(model_or_cfg)[0].get("label_descriptions") or {}
    if not described and all(_ID.fullmatch(name) for name in names):
        with suppress(KeyError):  # ids that WordNet doesn't have: names of something else
            described = {name: _table("imagenet-1k").label_name_to_description(name) for name in names}
    return tuple(str(described.get(name, name)) for name in names)


def _imagenet(model_or_cfg: nn.Module | Mapping[str, Any]) -> ImageNetInfo | None:
    """timm's table of the classes of weights that are known to be ImageNet's."""
    cfg, num_classes = _cfg_of(model_or_cfg)
    if getattr(model_or_cfg, STARTED_RANDOM, False):
        return None
    tag, place = str(cfg.get("tag") or ""), str(cfg.get("hf_hub_id") or "")
    if not tag and place.startswith("timm/"):
        tag = place.partition(".")[2]
    sets = re.findall(
        r"(?<![a-z\d])in(1k|12k|21k|22k)(?![a-z\d])", tag
    )  # in22k_ft_in1k: the last is what the classes are of
    subset = _SUBSETS.get((sets[-1], num_classes or 0)) if sets else None
    return _table(subset) if subset else None


@cache
def _table(subset: str) -> ImageNetInfo:
    return ImageNetInfo(subset)


def _cfg_of(model_or_cfg: nn.Module | Mapping[str, Any]) -> tuple[Mapping[str, Any], int | None]:
    """Pretrained config and number of classes."""
    if isinstance(model_or_cfg, nn.Module):
        cfg: Mapping[str, Any] = getattr(model_or_cfg, "pretrained_cfg", None) or {}
        return cfg, getattr(model_or_cfg, "num_classes", cfg.get("num_classes"))
    return model_or_cfg, model_or_cfg.get("num_classes")


def _composed(name: object) -> str:
    return unicodedata.normalize("NFC", str(name))


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether names are just the numbers of the classes."""
    return all(name == str(index) for index, name in enumerate(names))
