"""Parameters of a model, and its multiply-accumulates (MACs) for one image.

MACs are those of convolutions and matrix products (half of what `torch.utils.flop_counter` counts), attention included;
element-wise operations, norms and softmax are left out, as in the papers' tables. A model on the meta device is counted
without computing anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models import get_model_input_config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


class _NoValues(TorchFunctionMode):
    """Skips the initialisation of meta tensors, which takes six times as long as building a model without it."""

    fills = frozenset(
        getattr(torch.Tensor, name)
        for name in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")
    )

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping | None = None
    ) -> Any:
        if func in self.fills and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def skeleton(name: str) -> nn.Module:
    """A registered model on the meta device: shapes without values, built in milliseconds."""
    with _NoValues():
        return timm.create_model(name, device="meta")


def count_params(model: nn.Module) -> int:
    """Number of parameters, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_size: Sequence[int] | None = None) -> int:
    """MACs of one forward pass for one image, on the device and in the dtype of the model's parameters.

    Args:
        model: On any device, "meta" included; its train/eval modes are restored.
        input_size: (C, H, W); None for the model's own.
    """
    size = tuple(input_size or get_model_input_config(model)["input_size"])
    like = next(model.parameters())
    image = torch.zeros((1, *size), device=like.device, dtype=like.dtype)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # the counter doesn't know the CPU's fused attention kernel and would count it as 0
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(image)
    finally:
        for module, training in modes:
            module.training = training
    return counter.get_total_flops() // 2
