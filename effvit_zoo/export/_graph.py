"""A model as targets convert it: one tensor in, named tensors out, with the input and the precision that the file is to have."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models import reparameterize_model
from torch import Tensor, nn

from ._forms import transform

MOST_IMAGES = 1024
"""Largest number of images of a call, where a file takes any number."""
INPUTS = {"tensor": "image", "pixels": "pixels"}
"""Kind of input -> its name in the file."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class _Function(nn.Module):
    """A model with its preprocessing, if it is to have one, and with its outputs as a tuple.

    Args:
        model: Images (B, C, H, W) to a tensor, a sequence of tensors or tensors by name.
        outputs: Names of the outputs, in order.
        scaling: (mean, std) of the channels: the input is uint8 (B, H, W, C). None: it is float32 (B, C, H, W), normalised.
        dtype: What the model computes in; inputs and outputs stay as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Sequence[str],
        scaling: tuple[Sequence[float], Sequence[float]] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.model, self.outputs, self.dtype, self.has_scaling = model, tuple(outputs), dtype, scaling is not None
        if scaling is not None:
            mean, std = (torch.tensor(values, dtype=torch.float32) for values in scaling)
            self.scale: Tensor
            self.shift: Tensor
            self.register_buffer("scale", 1 / (255 * std))
            self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.has_scaling:  # along the last axis, so that no runtime has to change the layout of a constant
            images = (images.float() * self.scale + self.shift).permute(0, 3, 1, 2)
        if self.dtype != torch.float32:
            images = images.to(self.dtype)
        return tuple(output.float() for output in output_list(self.model(images), self.outputs))


def output_list(output: Any, names: Sequence[str]) -> list[Tensor]:
    """A model's output as a list of tensors: one, a sequence, or tensors by name."""
    if isinstance(output, Tensor):
        return [output]
    return [output[name] for name in names] if isinstance(output, Mapping) else list(output)


@dataclass(frozen=True)
class Graph:
    """What a target converts. Its module is its own: a target may change it.

    Attributes:
        module: One tensor to a tuple of tensors.
        sample: An input of one image.
        input_name: The input's name.
        output_names: The outputs' names.
        batch: Images of a call; None for any number from 1 to `MOST_IMAGES`.
        precision: "fp32", "fp16" or "bf16".
        opset: ONNX's; None for the exporter's own.
        labels: Names of the classes that the only output has logits of; empty where it has none.
    """

    module: Any
    sample: Tensor
    input_name: str = "image"
    output_names: tuple[str, ...] = ("output",)
    batch: int | None = None
    precision: str = "fp32"
    opset: int | None = None
    labels: tuple[str, ...] = ()

    @property
    def takes_pixels(self) -> bool:
        """Whether the input is uint8 (B, H, W, C)."""
        return self.sample.dtype == torch.uint8

    @property
    def example(self) -> Tensor:
        """An input to trace with: two images for any number of them, since one would be exported as a constant."""
        return self.sample.expand(self.batch or 2, *self.sample.shape[1:]).contiguous()

    def cast(self) -> Graph:
        """The graph with a model that computes in its precision, for targets that don't lower the precision themselves."""
        dtype = DTYPES[self.precision]
        self.module.model.to(dtype)
        self.module.dtype = dtype
        return replace(self, module=self.module)

    def program(self) -> torch.export.ExportedProgram:
        """The graph as torch.export has it."""
        dynamic = None if self.batch else ({0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)},)
        with quiet(), torch.no_grad():
            return torch.export.export(self.module, (self.example,), dynamic_shapes=dynamic)


class _Ends(nn.Module):
    """A function with the input and the output that devices' image classifiers have."""

    def __init__(self, inner: nn.Module, is_image: bool, is_classifier: bool) -> None:
        super().__init__()
        self.inner, self.is_image, self.is_classifier = inner, is_image, is_classifier

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.inner(images.permute(0, 2, 3, 1) if self.is_image else images)
        return (outputs[0].softmax(1),) if self.is_classifier else outputs


def with_ends(graph: Graph, is_classifier: bool) -> Graph:
    """A graph that takes float32 images (1, C, H, W) of values from 0 to 255 where it took pixels, and gives probabilities for logits."""
    is_image = graph.takes_pixels
    sample = graph.sample.permute(0, 3, 1, 2).float().contiguous() if is_image else graph.sample
    return replace(graph, module=_Ends(graph.module, is_image, is_classifier).eval(), sample=sample)


def make_graph(
    model: nn.Module,
    size: Sequence[int],
    forms: Sequence[str] = (),
    *,
    scaling: tuple[Sequence[float], Sequence[float]] | None = None,
    output_names: Sequence[str] = ("output",),
    batch: int | None = None,
    precision: str = "fp32",
    opset: int | None = None,
    labels: Sequence[str] = (),
) -> Graph:
    """A graph of a copy of a model, fused and in the given forms.

    Args:
        model: In eval mode on the CPU; it is left as it is.
        size: (C, H, W) of its images.
        forms: Names in `_forms.FORMS`.
        scaling: (mean, std), for uint8 images (B, H, W, C); None for normalised float32 images (B, C, H, W).
        output_names: Names of the outputs.
        batch: Images of a call, None for any number.
        precision: A key of `DTYPES`.
        opset: ONNX's.
        labels: Names of the classes that the only output has logits of.
    """
    fused = transform(reparameterize_model(copy.deepcopy(model).eval(), inplace=True), forms).requires_grad_(False)
    for tensor in (*fused.parameters(), *fused.buffers()):
        tensor.data = (
            tensor.data.contiguous()
        )  # folding may leave weights in channels_last, which XNNPACK's compiler refuses
    channels, height, width = size
    sample = torch.zeros(1, channels, height, width)
    if scaling is not None:
        sample = torch.zeros(1, height, width, channels, dtype=torch.uint8)
    function = _Function(fused, output_names, scaling).eval()
    name = INPUTS["tensor" if scaling is None else "pixels"]
    return Graph(function, sample, name, tuple(output_names), batch, precision, opset, tuple(labels))


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keeps what converters say in Python's logs, as warnings, and in C++ straight to the console to themselves; their errors are
    exceptions."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", *loggers)
    held = {name: logging.getLogger(name).level for name in names}
    with open(os.devnull, "w") as nothing, warnings.catch_warnings():
        streams = [(number, os.dup(number)) for number in (1, 2)]
        try:
            warnings.simplefilter("ignore")
            for name in names:
                logging.getLogger(name).setLevel(logging.ERROR)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, _ in streams:
                os.dup2(nothing.fileno(), number)
            yield
        finally:
            for number, copy_of_it in streams:
                os.dup2(copy_of_it, number)
                os.close(copy_of_it)
            for name, level in held.items():
                logging.getLogger(name).setLevel(level)
