"""What a time is to be compared with: the rate of the host's own matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..export.optimize import onednn_matmul, time_in_turns


def gemm_gflops(rows: int = 3136, inner: int = 384, columns: int = 1536, repeats: int = 20) -> float:
    """The best rate, in GFLOP/s, at which this process multiplies float32 matrices: by MKL, or by oneDNN on packed weights."""
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
