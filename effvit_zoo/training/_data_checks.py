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


def record_images(folder: Path, splits: DataSplits) -> None:
    """Keeps the names of a run's images in its folder. They are not kept in memory: a million of them take hundreds of MB."""
    with replacing(folder / DATA) as writing:
        write_listing(writing, listing(splits))


def require_recorded_images(folder: Path, splits: DataSplits, root: str, allow_change: Sequence[str]) -> None:
    """Raises `UserError` where a run's images differ from those that it was started with, unless that is allowed.

    Args:
        folder: Run folder.
        splits: Images now.
        root: The data's name in messages.
        allow_change: What may differ.
    """
    if not (folder / DATA).is_file():  # a run of an earlier version
        return
    before, now = read_listing(folder / DATA), listing(splits)
    groups = [{*images["train"].values()} for images in (before, now)]
    if differ := sorted(groups[0] ^ groups[1]):
        raise UserError(f"{folder} was started with other classes of {root} ({', '.join(differ[:5])}): start a new run")
    changed = changes(before, now)
    if changed and ALLOW_IMAGES not in allow_change:
        raise UserError(
            f"the images of {root} have changed since {folder} was started: {', '.join(changed)}; "
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
            many = "1 image stands" if len(groups) == 1 else f"{len(groups)} images stand"
            notes.append(f"warning: {many} under several labels, e.g. {' and '.join(groups[0][:2])} are the same file")
    return notes
