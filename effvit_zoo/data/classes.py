"""Classes of data that is labelled by class: given indices by a class map, and checked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from timm.data.readers.class_map import load_class_map

from ..errors import UserError
from .roots import Root, opening
from .roots._names import by_index, composed, few
from .sources import ImageSource
from .streams.source import StreamSource

ClassMap = Mapping[str, int] | str


def open_labelled(root: Root, split: str | None, class_map: ClassMap | None, training: bool = False) -> Any:
    """A split by its exact name, with the class indices of `class_map`. Raises `UserError`, also where classes have no names."""
    source = root.open(split, training)
    if not isinstance(source, ImageSource | StreamSource):
        return source
    source = with_composed_names(source)
    if class_map is not None:
        with opening(root.request.root):
            source = relabel(source, load_class_map(class_map, root.request.root if root.is_folder else ""))
    if not source.class_names:
        raise UserError(
            f"{root.request.root} does not name its classes: give a class_map, e.g. a .txt with one name a line"
        )
    if alike := _alike(source.class_names):
        source = source.with_notes(f"classes of {source.title} that differ in case or spaces only: {few(alike)}")
    return source


def with_composed_names(source: ImageSource | StreamSource) -> ImageSource | StreamSource:
    """`source` with its class names in Unicode's composed form; classes whose names are then equal become one."""
    names = tuple(dict.fromkeys(map(composed, source.class_names)))
    if names == source.class_names:
        return source
    index = {name: i for i, name in enumerate(names)}
    return source.with_classes(names, np.array([index[composed(name)] for name in source.class_names], dtype=np.int32))


def _alike(names: Iterable[str]) -> list[str]:
    """Names that another one equals but for case and spaces, next to each other."""
    groups = defaultdict(list)
    for name in names:
        groups["".join(name.split()).casefold()].append(name)
    return [name for group in groups.values() if len(group) > 1 for name in group]


def relabel(source: ImageSource | StreamSource, class_to_idx: Mapping[str, int]) -> ImageSource | StreamSource:
    """`source` with these class indices; classes that are not among them are left out, as in timm.

    Where the data has numbers instead of names, or no names, number n gets the nth name.
    """
    class_to_idx = {composed(name): index for name, index in class_to_idx.items()}
    names, old = by_index(class_to_idx), source.class_names
    nameless = old == tuple(str(i) for i in range(len(old))) and len(old) <= len(names)
    if nameless and not any(name in class_to_idx for name in old):
        new_index = np.arange(len(names), dtype=np.int32)
    else:
        new_index = np.array([class_to_idx.get(name, -1) for name in old], dtype=np.int32)
    if (new_index < 0).all():
        raise UserError(f"no class of {source.title} ({few(old)}) is in the class map ({few(names)})")
    if omitted := [name for name, index in zip(old, new_index, strict=False) if index < 0]:
        source = source.with_notes(f"left out of {source.title}: classes that are not in the class map: {few(omitted)}")
    return source.with_classes(names, new_index)


def require_classes(train: Any) -> None:
    """Raises `UserError` where a labelled training split has a single class."""
    if isinstance(train, ImageSource | StreamSource) and len(train.class_names) < 2:
        said = f"only one class in {train.title}: {train.class_names[0]}; expected at least two"
        raise UserError("; ".join([said, *train.notes]))


def with_same_classes(root: str, train: Any, val: Any) -> Any:
    """`val` with the class indices of `train`. Raises `UserError` where two labelled splits differ in their classes."""
    a, b = getattr(train, "class_names", None), getattr(val, "class_names", None)
    if a is None or b is None or a == b:
        return val
    if sorted(a) == sorted(b):
        return val.with_classes(a, np.array([a.index(name) for name in b], dtype=np.int32))
    pairs = (("train", a, b), ("val", b, a))
    only = [
        f"only in {side}: {few(missing)}"
        for side, here, there in pairs
        if (missing := [n for n in here if n not in there])
    ]
    raise UserError(f"train and val of {root} have different classes; {'; '.join(only)}")
