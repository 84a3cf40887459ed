"""Kinds of roots: the one table of what a `data.root` can be, and a root opened with it.

A root is one of
  builtin:fashion-mnist-mini       10,000 + 2,000 images that ship with the package (assets/README.md)
  builtin:fashion-mnist[@FOLDER]   all 60,000 + 10,000: from FOLDER, else $EFFVIT_ZOO_DATA, else Debian's package, else torchvision
  FOLDER                           one folder per class, or train and val folders of such; tars may replace folders
  FILE.tar                         a tar of class folders
  FILE.csv                         a table of images and their labels (table.py); `labels` names the table of a FOLDER
  torch/NAME[@FOLDER]  hfds/NAME[@CACHE]  hfids/NAME[@CACHE]  tfds/NAME[@FOLDER]  wds/FOLDER     as in timm's `create_dataset`

A path that exists is a folder, also one called like a kind: with a folder ./torch/mine, `torch/mine` is that folder.

A kind is one file with its functions `splits` and `open`, and one row of `KINDS`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ...errors import UserError, one_line
from ..images import MODES
from ..sources import AnySource
from . import fashion_mnist, folder, table, timm_sets
from ._names import TRAIN, VAL, few, find_split
from ._request import Kind, Request

KINDS: Mapping[str, Kind] = {
    "folder": Kind(folder.splits, folder.open_split, free_form=False, unused=folder.unused),
    "table": Kind(table.splits, table.open_split, free_form=False, unused=table.unused),
    "builtin": Kind(fashion_mnist.splits, fashion_mnist.open_split, free_form=False),
    "torch": Kind(timm_sets.torch_splits, timm_sets.open_torch),
    "hfds": Kind(timm_sets.hub_splits, timm_sets.open_hfds, ("datasets",), "datasets"),
    "hfids": Kind(timm_sets.hub_splits, timm_sets.open_stream, ("datasets",), "datasets"),
    "tfds": Kind(
        timm_sets.tfds_splits,
        timm_sets.open_stream,
        ("tensorflow", "tensorflow_datasets"),
        "tensorflow tensorflow-datasets",
    ),
    "wds": Kind(timm_sets.wds_splits, timm_sets.open_stream, ("webdataset",), "webdataset"),
}

PLAIN_KINDS = ("folder", "table", "builtin")
"""Kinds that aren't named before a slash."""

_CLIENT_ERRORS = (OSError, ValueError, LookupError, RuntimeError, AssertionError, ImportError, EOFError)


@contextmanager
def opening(root: str) -> Iterator[None]:
    """Turns the errors of client libraries into a `UserError`: what the user can correct is the root or the split.

    These are the libraries' own classes and the built-in ones that they raise for bad input. Any other built-in exception, such as a
    TypeError, is a defect and passes through.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if type(error).__module__ == "builtins" and not isinstance(error, _CLIENT_ERRORS):
            raise
        raise UserError(f"cannot open {root}: {one_line(error, limit=1000)}") from error


def parse(
    root: str | os.PathLike[str],
    kinds: Mapping[str, Kind] = KINDS,
    img_mode: str = "RGB",
    labels: str | os.PathLike[str] | None = None,
) -> Request:
    """A root taken apart; nothing is opened. A table is looked for by its path, then in the root. Raises `UserError`."""
    text = os.path.expanduser(os.fspath(root))
    if labels is None and text.lower().endswith(table.SUFFIXES) and "table" in kinds and not os.path.isdir(text):
        return Request(text, "table", os.path.dirname(text) or ".", None, img_mode, labels=text)
    if labels is not None:
        given = os.path.expanduser(os.fspath(labels))
        if "table" not in kinds or not os.path.isdir(text):
            raise UserError(f"data.labels is {given}: expected a folder of images as data.root, got {text}")
        inside = os.path.join(text, given)
        path = given if os.path.isfile(given) or not os.path.isfile(inside) else inside
        return Request(text, "table", text, None, img_mode, labels=path)
    separator = ":" if text.startswith("builtin:") else "/"
    kind, _, name = text.partition(separator)
    kind, place = kind.lower(), None
    named_by_slash = kind not in PLAIN_KINDS and not os.path.exists(text)
    if kind not in kinds or not name or not (separator == ":" or named_by_slash):
        kind, name = "folder", text
    elif kind == "wds":
        place = os.path.expanduser(name)
    else:
        name, _, place = name.partition("@")
        place = os.path.expanduser(place) or None
    return Request(text, kind, name, place, img_mode)


@dataclass(frozen=True)
class Root:
    """A root and the names of its splits.

    Attributes:
        request: The root, taken apart.
        kind: Its row of the table.
        splits: Names of the splits that exist; empty when unknown or when the root is not divided.
    """

    request: Request
    kind: Kind
    splits: Sequence[str]

    @classmethod
    def find(
        cls,
        root: str | os.PathLike[str],
        img_mode: str,
        download: bool,
        kinds: Mapping[str, Kind] = KINDS,
        labels: str | os.PathLike[str] | None = None,
    ) -> Root:
        """Raises `UserError` for a root that doesn't exist, a missing package or an unknown image mode."""
        if img_mode not in MODES.values():
            raise UserError(f"expected img_mode RGB or L, got {img_mode!r}")
        request = replace(parse(root, kinds, img_mode, labels), download=download)
        kind = kinds[request.kind]
        if any(importlib.util.find_spec(module) is None for module in kind.modules):
            raise UserError(f"{request.root} needs another package: pip install {kind.package}")
        with opening(request.root):
            return cls(request, kind, tuple(kind.splits(request)))

    @property
    def is_folder(self) -> bool:
        """Whether the data are files below a folder, labelled by their folders or by a table."""
        return self.request.kind in ("folder", "table")

    @property
    def notes(self) -> list[str]:
        """What the user should know about how the root was read."""
        kind = self.request.root.partition("/")[0].lower()
        if not self.is_folder or kind not in KINDS or kind in PLAIN_KINDS:
            return []
        return [f"{self.request.root} is the folder ./{self.request.root}, not a data set of the kind {kind}"]

    @property
    def path(self) -> str | None:
        """Resolved path of the data, None where the name is not a path."""
        return os.path.realpath(self.request.name) if os.path.exists(self.request.name) else None

    def unused(self, used: Collection[str], class_names: Collection[str]) -> list[str]:
        """Notes on what is there beside the splits that are used. Raises `UserError`."""
        with opening(self.request.root):
            return self.kind.unused(self.request, used, class_names)

    def choose(self, wanted: str) -> str | None:
        """The name of the split to open for `wanted`, None where the root is not divided. "auto" is val, else test."""
        if wanted == "auto":
            return find_split("val", self.splits) or find_split("test", self.splits)
        found = find_split(wanted, self.splits)
        if found or (self.is_folder and find_split(wanted, (TRAIN[0], VAL[0]))):
            return found
        if not self.kind.free_form:
            raise UserError(f"no split {wanted!r} in {self.request.root}: found {few(self.splits) or 'none'}")
        return wanted

    def open(self, split: str | None, training: bool = False) -> AnySource:
        """A split by its exact name; None opens everything. Raises `UserError`."""
        with opening(self.request.root):
            return self.kind.open(replace(self.request, training=training), split)
