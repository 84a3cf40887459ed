"""Peak memory of one call on a CPU, exact to the byte, from the allocations that torch's profiler records.

The resident size of a process says it only roughly: the C library keeps freed memory for later, pages count when they are first touched,
and libraries load lazily. The profiler sees every allocation and release of torch's own allocator instead, also those inside a kernel.
Not in it: the scratch space that MKL and oneDNN allocate by themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that is allocated at any moment of a call, without what was there before and without the tensors that it returns."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with _no_log_lines():
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                out = call()
            profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event["args"] for event in sorted(events, key=lambda e: e.get("ts", 0)) if event["name"] == "[memory]"]
    last_use = {change["Addr"]: i for i, change in enumerate(changes)}
    results = {last_use.get(x.untyped_storage().data_ptr()) for x in tree_leaves(out)}
    allocated = peak = 0
    for i, change in enumerate(changes):
        if i in results:
            continue
        allocated += change["Bytes"]
        peak = max(peak, allocated)
    return peak


@contextlib.contextmanager
def _no_log_lines() -> Iterator[None]:
    """Keeps what the profiler's library prints about itself, and about graphics cards that it misses, off the terminal."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
