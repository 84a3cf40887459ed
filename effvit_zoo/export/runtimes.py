"""A model in another runtime on this host, as a function of an image: what its speed there is measured with.

The package of a runtime is imported when it is asked for, and its absence is one line.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, unknown_choice

Runner = Callable[[torch.Tensor], torch.Tensor]
Opened = tuple[Runner, list[int | None]]
"""A function of images, and the shape (B, C, H, W) of its input, None where any size will do."""


def export_onnx(model: nn.Module, sample: torch.Tensor, path: Path) -> None:
    """Writes a model in eval mode as ONNX for any number of images of the sample's size.

    Raises:
        UserError: The packages that torch's exporter needs are missing.
    """
    need("onnx", "onnx")
    need("onnxscript", "onnx")
    dynamic = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    example = torch.cat([sample, sample]) if len(sample) == 1 else sample  # one image would be taken for a constant
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
            torch.onnx.export(program, f=path, verbose=False)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def open_onnx(path: Path, threads: int) -> Opened:
    """An ONNX file in ONNX Runtime. Raises `UserError` where that isn't installed, and ONNX Runtime's own errors."""
    runtime = need("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    dtype = torch.float16 if entry.type == "tensor(float16)" else torch.float32
    shape = [side if isinstance(side, int) else None for side in entry.shape]
    return lambda images: torch.from_numpy(session.run(None, {entry.name: images.to(dtype).numpy()})[0]), shape


def open_openvino(path: Path, threads: int) -> Opened:
    """An OpenVINO or ONNX file in OpenVINO, in float32. Raises `UserError` where that isn't installed, and OpenVINO's own errors."""
    runtime = need("openvino", "openvino")
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = runtime.Core().compile_model(str(path), "CPU", settings)
    shape = [None if side.is_dynamic else side.get_length() for side in compiled.input(0).get_partial_shape()]
    return lambda images: torch.from_numpy(compiled(images.numpy())[0]), shape


RUNTIMES: dict[str, Callable[[Path, int], Opened]] = {"onnxruntime": open_onnx, "openvino": open_openvino}
"""Name of a runtime -> what opens an ONNX file with a number of threads."""


def run_in(runtime: str, model: nn.Module, sample: torch.Tensor, threads: int = 1) -> Runner:
    """A model as a function of float32 images (B, C, H, W) of the sample's size, computed by another runtime.

    Args:
        runtime: A name in `RUNTIMES`.
        model: In eval mode.
        sample: An image, (B, C, H, W).
        threads: That the runtime may use.

    Raises:
        UserError: An unknown runtime, or one that isn't installed.
    """
    if runtime not in RUNTIMES:
        raise unknown_choice("runtime", runtime, list(RUNTIMES))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, sample, path)
        return RUNTIMES[runtime](path, threads)[0]


def need(package: str, extra: str) -> Any:
    """A package of an extra of this one. Raises `UserError` with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f'{package} is not installed: pip install "effvit_zoo[{extra}]"') from None
