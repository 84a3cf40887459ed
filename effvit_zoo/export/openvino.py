"""OpenVINO's format: an .xml file of the graph and a .bin file of the weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from ._onnx_file import write_onnx
from .contract import Opened, Target, need


def export_openvino(model: nn.Module, sample: torch.Tensor, path: Path) -> None:
    """Converts the model's ONNX form; weights stay float32."""
    openvino = need("openvino", "openvino")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        graph = Path(folder) / "model.onnx"
        write_onnx(model, sample, graph)
        openvino.save_model(openvino.convert_model(str(graph)), str(path), compress_to_fp16=False)


def open_openvino(path: Path, threads: int) -> Opened:
    """An OpenVINO or ONNX file, computed in float32."""
    openvino = need("openvino", "openvino")
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    shape = [None if side.is_dynamic else side.get_length() for side in compiled.input(0).get_partial_shape()]
    return Opened(lambda images: torch.from_numpy(compiled(images.contiguous().numpy())[0]), shape)


TARGET = Target("openvino", ".xml", "openvino", "openvino", open_openvino, export_openvino)
