"""Images of a folder with their labels in a table: a .csv or .tsv with a header, a row for each image.

Columns are found by their names, in any case: `PATH`, `LABEL` and, where there is one, `SPLIT` below. Paths are relative to the data
folder or to the table's own folder; where no file has the name, its name without extension counts. Commas, semicolons, tabs and bars
separate cells; text is UTF-8 or UTF-16. Every row is used, counted as left out, or refused.
"""

from __future__ import annotations

import csv
import os
import posixpath
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from ..file_types import is_image, why_left_out
from ..inventory import Inventory, LeftOut, take_inventory
from ..sources import FilePaths, ImageSource
from ._names import TEST, VAL, composed, few, find_split, natural_order
from ._request import Request, image_source

SUFFIXES = (".csv", ".tsv")
PATH = [
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "image_file",
    "image_name",
]
PATH += ["img", "name", "image_id", "id"]
LABEL = ["label", "class", "class_name", "category", "target", "label_name", "species"]
SPLIT = ["split", "subset", "set", "partition"]


@dataclass(frozen=True)
class _Row:
    line: int
    path: str
    label: str
    split: str


@dataclass(frozen=True)
class _Table:
    """A table that was read; `split` tells whether it has such a column."""

    rows: list[_Row]
    split: bool
    notes: tuple[str, ...]


def splits(request: Request) -> Sequence[str]:
    table = _read(Path(request.labels or ""))
    return sorted({row.split for row in table.rows} - {""}) if table.split else ()


def open_split(request: Request, split: str | None) -> ImageSource:
    path, folder = Path(request.labels or ""), request.name
    table, inventory, left_out = _read(path), take_inventory(folder), LeftOut()
    names = {row.split for row in table.rows} - {""}
    if split is None and any(find_split(name, group) for name in names for group in (VAL, TEST)):
        raise UserError(f"no rows of the split train in {path}: found {few(sorted(names))}")
    files = _Files(folder, path, inventory)
    used: dict[str, _Row] = {}
    for row in table.rows:
        found = files.find(row.path)
        if reason := _reason(row, found, table):
            left_out.add(reason, row.path or f"line {row.line}")
        elif (before := used.setdefault(found or "", row)) is not row:
            _require_equal(path, before, row)
            left_out.add("repeated rows", row.path)
    if not used:
        raise UserError(
            "; ".join([f"no row of {path} has an image below {folder}", *left_out.notes(str(path), "rows")])
        )
    unlisted = [name for name in inventory.images if name not in used]
    if unlisted:
        inventory.left_out.add("images that are not in the table", unlisted[0], len(unlisted))
    if Path(folder).resolve() in path.resolve().parents:
        inventory.left_out.counts[why_left_out(path.name)] -= 1  # the table itself
    notes = (*table.notes, *left_out.notes(str(path), "rows"), *inventory.left_out.notes(folder))
    paths = sorted(name for name, row in used.items() if split is None or row.split == split)
    labels = [used[name].label for name in paths]
    classes = natural_order(labels)
    index = {name: i for i, name in enumerate(classes)}
    return image_source(folder, FilePaths(folder, paths), classes, [index[label] for label in labels], request, notes)


def unused(request: Request, used: Collection[str], class_names: Collection[str]) -> list[str]:
    """A note on the rows of splits that are not used."""
    counts = Counter(row.split for row in _read(Path(request.labels or "")).rows if row.split not in (*used, ""))
    names = [f"{name} with {count} rows" for name, count in sorted(counts.items())]
    return [f"left out of {request.labels}, which is read by its {few(used)}: {few(names)}"] if names else []


def _reason(row: _Row, found: str | None, table: _Table) -> str:
    """Why a row is left out; "" for a row that is used."""
    if found is None:
        return "rows whose file does not exist"
    if not is_image(found):
        return why_left_out(found)
    if not row.label:
        return "rows without a label"
    return "rows without a split" if table.split and not row.split else ""


def _require_equal(path: Path, one: _Row, two: _Row) -> None:
    """Raises `UserError` where two rows of the same file contradict each other."""
    for what in ("label", "split"):
        a, b = getattr(one, what), getattr(two, what)
        if a != b:
            raise UserError(
                f"{path} has two {what}s for {one.path}: {a} in line {one.line}, {b} in line {two.line}; expected one"
            )


class _Files:
    """Finds the files that a table names."""

    def __init__(self, folder: str, table: Path, inventory: Inventory) -> None:
        self.folder, self.beside = folder, str(table.parent)
        self.images = {composed(name): name for name in inventory.images}
        stems = Counter(os.path.splitext(name)[0] for name in self.images)
        self.stems = {stem: name for name, file in self.images.items() if stems[stem := os.path.splitext(name)[0]] == 1}
        self.stems = {stem: self.images[name] for stem, name in self.stems.items()}

    def find(self, path: str) -> str | None:
        """Path relative to the data folder of a file that a row names, None where there is none."""
        if not path:
            return None
        written = [path, path.replace("\\", "/")]
        for place in (self.folder, self.beside):
            for text in dict.fromkeys(written):
                relative = os.path.relpath(os.path.join(place, text), self.folder).replace(os.sep, "/")
                known = self.images.get(composed(relative)) or self.stems.get(composed(relative))
                if known or os.path.isfile(os.path.join(self.folder, relative)):
                    return known or relative
        return None


def _read(path: Path) -> _Table:
    """The rows of a table. Raises `UserError`."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        raise UserError(
            f"expected a table of labels, .csv or .tsv, got {path}{'' if path.exists() else ': no such file'}"
        )
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is not UTF-8 text (line {line}): save it as UTF-8") from None
    lines = text.splitlines(keepends=True)
    header = lines[0] if lines else ""
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=header.count)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        columns, notes = _columns(path, next(reader, []))
        rows = list(_rows(path, reader, columns))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    return _Table(rows, "split" in columns, tuple(notes))


def _columns(path: Path, header: list[str]) -> tuple[dict[str, int], list[str]]:
    """Index of the columns for "path", "label" and, where there is one, "split"; and notes on the others."""
    names = [name.strip().lower().replace(" ", "_").replace("-", "_") for name in header]
    columns: dict[str, int] = {}
    notes = []
    for role, known in (("path", PATH), ("label", LABEL), ("split", SPLIT)):
        if found := [name for name in known if name in names]:
            columns[role] = names.index(found[0])
        elif role != "split":
            expected = f"one of {', '.join(known)}"
            raise UserError(
                f"no column of the {role} in {path}: its first line has {few(header) or 'nothing'}, expected {expected}"
            )
    if other := [name for i, name in enumerate(header) if i not in columns.values()]:
        chosen = ", ".join(f"{header[i].strip()} is the {role}" for role, i in columns.items())
        notes.append(f"columns of {path} that are not used: {few(other)} ({chosen})")
    columns["width"] = len(header)
    return columns, notes


def _rows(path: Path, reader: Iterator[list[str]], columns: Mapping[str, int]) -> Iterator[_Row]:
    for cells in reader:
        line = reader.line_num  # type: ignore[attr-defined]
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > columns["width"]:
            raise UserError(
                f"{path}, line {line}: {len(cells)} cells, expected {columns['width']}; put a text with separators in quotes"
            )
        cells = [cell.strip() for cell in cells] + [""] * (columns["width"] - len(cells))
        split = cells[columns["split"]].casefold() if "split" in columns else ""
        yield _Row(line, cells[columns["path"]], composed(cells[columns["label"]]), split)


def place_of(table: str, folder: str) -> str:
    """Where a table lies relative to its data folder, for a record: inside of it or beside it; elsewhere its name alone."""
    relative = posixpath.normpath(
        os.path.relpath(os.path.realpath(table), os.path.realpath(folder)).replace(os.sep, "/")
    )
    is_near = not relative.startswith("../") or relative.count("/") == 1
    return relative if is_near else posixpath.basename(relative)
