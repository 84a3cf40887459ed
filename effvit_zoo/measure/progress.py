"""A bar on stderr for work of more than a few seconds, which disappears when the work is done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

PATIENCE = 2.0
"""Seconds of silence before the bar appears."""


def progress(items: Sequence[Item], title: str) -> Iterator[Item]:
    """The items, with a bar that says how many are done and names the one in work."""
    start = time.monotonic()
    with tqdm(total=len(items), delay=PATIENCE, leave=False) as bar:
        for item in items:
            bar.set_description(f"{title} {item}", refresh=time.monotonic() - start > PATIENCE)
            yield item
            bar.update()
