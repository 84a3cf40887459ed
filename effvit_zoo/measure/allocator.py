"""How the C library's allocator treats what a training step frees."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Lets glibc keep freed memory for the next step, instead of giving it back to the system and paging it in again.

    A training step allocates and frees the same large tensors every time. By default glibc maps many of them anew, those above 32 MB
    always, and on a CPU the page faults can take a quarter of the step. What `MALLOC_*` variables ask for goes first; with another C
    library nothing happens.

    Returns:
        Whether it was set.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if not sys.platform.startswith("linux") or chosen:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    never = -1  # a threshold of -1 turns trimming off
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, never))
