"""ONNX files, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import torch

from ._onnx_file import write_onnx
from .contract import Opened, Target, need


def open_onnx(path: Path, threads: int) -> Opened:
    runtime = need("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    dtype = torch.float16 if entry.type == "tensor(float16)" else torch.float32
    shape = [side if isinstance(side, int) else None for side in entry.shape]

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {entry.name: images.to(dtype).contiguous().numpy()})[0])

    return Opened(run, shape)


def errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's own exceptions share no base class; those of its Python code are RuntimeError and ValueError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*own, RuntimeError, ValueError)


TARGET = Target("onnx", ".onnx", "onnx", "onnxruntime", open_onnx, write_onnx, errors)
