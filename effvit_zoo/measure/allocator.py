"""The C library's allocator: whether it keeps the memory that a training step frees."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next step, instead of returning it to the system and paging it in again.

    It changes the whole process: call it from a command, not from a library function. A training step allocates and frees the same large
    tensors every time. By default glibc maps many of them anew, those above 32 MB always, and on a CPU the page faults can take a quarter
    of the step. `MALLOC_*` variables and `GLIBC_TUNABLES` take precedence; another C library is left as it is.

    Returns:
        Whether the allocator was changed.
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
