"""What a run says about its data before the first step, and the refusal to resume over other images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data import (
    DUPLICATES_UP_TO,
    DataConfig,
    DataSplits,
    StreamSource,
    changes,
    duplicates,
    listing,
    read_listing,
    write_listing,
)
from ..errors import UserError
from ..run_folder import DATA, replacing
from ..tasks import Task

ALLOW_IMAGES = "data.files"
"""What `allow_change` names to resume over changed images."""


class Images:
    """The images of a run, by name.

    Args:
        splits: Training and validation images.
        root: The data's name in messages.
    """

    def __init__(self, splits: DataSplits, root: str) -> None:
        self.names, self.root = listing(splits), root

    def write(self, folder: Path) -> None:
        """Keeps the names in a run folder."""
        with replacing(folder / DATA) as writing:
            write_listing(writing, self.names)

    def require_as_before(self, folder: Path, allow_change: Sequence[str]) -> None:
        """Raises `UserError` where they differ from those that the run was started with, unless that is allowed."""
        if not (folder / DATA).is_file():  # a run of an earlier version
            return
        before = read_listing(folder / DATA)
        groups = [{*images["train"].values()} for images in (before, self.names)]
        if differ := sorted(groups[0] ^ groups[1]):
            raise UserError(
                f"{folder} was started with other classes of {self.root} ({', '.join(differ[:5])}): start a new run"
            )
        changed = changes(before, self.names)
        if changed and ALLOW_IMAGES not in allow_change:
            raise UserError(
                f"the images of {self.root} have changed since {folder} was started: {', '.join(changed)}; "
                f"resume with the same, or allow it by --allow-change {ALLOW_IMAGES}"
            )


def data_notes(splits: DataSplits, task: Task, config: DataConfig) -> list[str]:
    """What was left out of the data, the task's notes, and files that are in both splits or under two labels."""
    train, val = splits.train, splits.val
    notes = [*splits.notes, *task.data_notes(splits)]
    if isinstance(train, StreamSource) or isinstance(val, StreamSource):
        return notes
    wanted = config.check_duplicates
    if wanted or (wanted is None and len(train) + len(val) <= DUPLICATES_UP_TO):
        found = duplicates(train, val)
        if pairs := found.shared:
            metric = next(iter(task.metrics.values()))
            notes.append(
                f"warning: {len(pairs)} of {len(val)} validation files are training files too, "
                f"e.g. {pairs[0][0]} is {pairs[0][1]}: {metric.title} will be too good"
            )
        if groups := found.contradictions:
            notes.append(
                f"warning: {len(groups)} images stand under several labels, "
                f"e.g. {' and '.join(groups[0][:2])} are the same file"
            )
    return notes
