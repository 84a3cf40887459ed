"""Interleaved timing of calls that are to be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from .progress import progress

Key = TypeVar("Key", bound=Hashable)


def time_in_turns(
    calls: Mapping[Key, Callable[[], Any]], repeats: int, burst: int = 3, warmup: int = 2, title: str = ""
) -> dict[Key, float]:
    """Median milliseconds of each call. Calls take turns in short bursts, so that a change of the clock rate affects all alike.

    Args:
        calls: Name -> call.
        repeats: Least number of timed calls for each name.
        burst: Calls in a row. The first of a burst is not timed, as its caches hold another call's data, unless it is the only one.
        warmup: Calls before the first timed one.
        title: What is timed, for the progress bar.
    """
    times: dict[Key, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warmup):
            call()
    timed = max(1, burst - 1)
    for _ in progress(range(1, 1 + -(-repeats // timed)), title or "timing, round"):
        for name, call in calls.items():
            for turn in range(burst):
                start = time.perf_counter()
                call()
                if turn or burst == 1:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}
