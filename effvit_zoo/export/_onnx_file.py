"""Writing ONNX files, for every target that starts from one."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from .contract import need


def write_onnx(model: nn.Module, sample: torch.Tensor, path: Path) -> None:
    """Writes a model in eval mode as ONNX, for any number of images of the sample's size.

    Args:
        model: On the CPU.
        sample: Images (B, C, H, W).
        path: File to write.

    Raises:
        UserError: The packages that torch's exporter needs are missing.
    """
    need("onnx", "onnx")
    need("onnxscript", "onnx")
    dynamic = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    example = (
        torch.cat([sample, sample]) if len(sample) == 1 else sample
    )  # a batch of one would be exported as a constant
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
