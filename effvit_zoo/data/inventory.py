"""Every file below a folder: an image, or left out for a reason that is counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from ..errors import UserError
from .file_types import is_hidden, is_image, why_left_out


@dataclass
class LeftOut:
    """Files that are not read: their number and an example for each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        self.counts[reason] += count
        self.examples.setdefault(reason, name)

    def add_file(self, path: str) -> bool:
        """Notes a regular file by its path, unless it is an image; whether it was noted."""
        if any(is_hidden(part) for part in path.split("/")):
            self.add("hidden", path)
        elif not is_image(path):
            self.add(why_left_out(path), path)
        else:
            return False
        return True

    def notes(self, where: str, what: str = "files") -> tuple[str, ...]:
        """A line that says what was left out of `where`, or nothing."""
        self.counts = +self.counts
        if not self.counts:
            return ()
        parts = [f"{count} {reason} (e.g. {self.examples[reason]})" for reason, count in self.counts.most_common()]
        total = self.counts.total()
        return (f"left out of {where}: {total} {what if total > 1 else what.removesuffix('s')}: {'; '.join(parts)}",)


@dataclass
class Inventory:
    """What lies below a folder.

    Attributes:
        images: Relative paths of images, with "/" as separator, sorted.
        empty: Innermost folders without images, sorted.
        left_out: All other files.
    """

    images: list[str]
    empty: list[str]
    left_out: LeftOut


def take_inventory(folder: str, exclude: Collection[str] = ()) -> Inventory:
    """Lists everything below a folder, in an order that does not depend on the file system. Links are followed.

    Args:
        folder: Folder.
        exclude: Names directly in it to pass over.

    Raises:
        OSError: A folder can't be read.
    """
    found = Inventory([], [], LeftOut())
    seen = {os.path.realpath(folder)}  # each real folder is read once: links may form cycles

    def visit(path: str, prefix: str) -> None:
        names, inner = 0, []
        for entry in entries(path):
            name = prefix + entry.name
            if not prefix and entry.name in exclude:
                continue
            if entry.is_dir():
                if is_hidden(entry.name):
                    if count := _count_files(entry.path):
                        found.left_out.add("hidden", name, count)
                elif (real := os.path.realpath(entry.path)) in seen:
                    found.left_out.add("link to a folder that is read already", name)
                else:
                    seen.add(real)
                    inner.append(entry)
            elif not entry.is_file():
                broken = entry.is_symlink() and not os.path.exists(entry.path)
                found.left_out.add("broken link" if broken else "not a regular file", name)
            elif not found.left_out.add_file(name):
                found.images.append(name)
                names += 1
        if prefix and not names and not inner:
            found.empty.append(prefix.rstrip("/"))
        for entry in inner:
            visit(entry.path, f"{prefix}{entry.name}/")

    visit(folder, "")
    return Inventory(sorted(found.images), sorted(found.empty), found.left_out)


def entries(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name. Raises `UserError` where there is none."""
    if not os.path.isdir(folder):
        raise UserError(f"no such folder: {folder}")
    with os.scandir(folder) as found:
        return sorted(found, key=lambda entry: entry.name)


def _count_files(folder: str) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))
