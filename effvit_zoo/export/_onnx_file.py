"""Writing ONNX, for every target that starts from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ._graph import Graph, quiet
from .contract import need


def onnx_program(graph: Graph) -> Any:
    """The graph as torch's exporter gives it, a `torch.onnx.ONNXProgram`. Raises `UserError` for missing packages."""
    need("onnx", "onnx")
    need("onnxscript", "onnx")
    program = graph.program()
    entry, exits = [graph.input_name], [*graph.output_names]
    with quiet():
        return torch.onnx.export(
            program, input_names=entry, output_names=exits, opset_version=graph.opset, verbose=False
        )


def write_onnx(graph: Graph, path: Path) -> None:
    """Writes a graph as one ONNX file."""
    onnx_program(graph).save(path, external_data=False)
