"""Peak memory of one call on a CPU, exact to the byte, from the allocations that torch's profiler records.

The resident size of a process is only an estimate: the C library keeps freed memory for later, pages count when they are first touched,
and libraries load lazily. The profiler sees every allocation and release of torch's own allocator, also those inside a kernel.
The scratch space that MKL and oneDNN allocate themselves is not included.
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
    """Peak of the bytes allocated during a call, without those allocated before and without the tensors that it returns."""
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
    """Discards the log lines that the profiler's library prints to stderr about itself and about missing GPUs."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
