"""ExecuTorch programs (.pte). They are opened only; there is no exporter yet."""

from __future__ import annotations

from pathlib import Path

from .contract import Opened, Target, need


def open_executorch(path: Path, threads: int) -> Opened:
    """The number of threads is ExecuTorch's own choice."""
    runtime = need("executorch.runtime", "executorch").Runtime.get()
    method = runtime.load_program(str(path)).load_method("forward")
    shape: list[int | None] = list(method.metadata.input_tensor_meta(0).sizes())
    return Opened(
        lambda images: method.execute([images.contiguous()])[0].clone(), shape
    )  # the next call reuses the output's memory


TARGET = Target("executorch", ".pte", "executorch", "executorch", open_executorch)
