"""The host: processor, versions, and the rate of its own matrix products, which times are to be compared with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .timing import time_in_turns

PACKAGES = ("effvit_zoo", "torch", "torchvision", "timm", "accelerate", "numpy")


def processor_name() -> str:
    """The CPU's model name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Git commit of the running code (None outside a checkout), package versions, platform and processor."""
    root = Path(__file__).resolve().parents[2]
    commit = None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "git_commit": commit,
        "versions": {"python": platform.python_version()} | versions,
        "platform": platform.platform(terse=True),
        "processor": processor_name(),
    }


@contextlib.contextmanager
def onednn_matmul() -> Iterator[None]:
    """Lets torch use oneDNN for float32 matrix products; its previous setting is restored afterwards."""
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # created at run time
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        yield
    finally:
        backend.fp32_precision = before


def gemm_gflops(rows: int = 3136, inner: int = 384, columns: int = 1536, repeats: int = 20) -> float:
    """Highest rate, in GFLOP/s, at which this process multiplies float32 matrices, by MKL or by oneDNN on packed weights."""
    x, weight, bias = torch.randn(rows, inner), torch.randn(columns, inner), torch.randn(columns)
    calls = {"default": lambda: F.linear(x, weight, bias)}
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

        def onednn() -> torch.Tensor:
            with onednn_matmul():
                return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

        calls["onednn"] = onednn
    with torch.inference_mode():
        milliseconds = time_in_turns(calls, repeats)
    return 2 * rows * inner * columns / min(milliseconds.values()) / 1e6
