"""Linear and Conv2d on weights that are kept in oneDNN's own layout, with the activations behind them computed in the same kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class PackedLinear(nn.Module):
    """Linear on weights that are packed once. `rows` is the number of input rows to be fast at; any other number works too."""

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.weight, self.bias = linear.weight, linear.bias
        self.activation, self.algorithm = "none", ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self.activation, [], self.algorithm)


class PackedConv2d(nn.Module):
    """Conv2d on weights that are packed once. `shape` (B, C, H, W) is the input to be fast at; any other size works too."""

    def __init__(self, conv: nn.Conv2d, shape: Sequence[int]):
        super().__init__()
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *self.geometry, list(shape))
        self.weight, self.bias = conv.weight, conv.bias
        self.activation, self.algorithm = "none", ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run = torch.ops.mkldnn._convolution_pointwise
        return run(x, self.packed, self.bias, *self.geometry, self.activation, [], self.algorithm)


def pack(model: nn.Module, sample: torch.Tensor, activations: bool = False) -> None:
    """Replaces every Linear and Conv2d that `model(sample)` calls by its packed form, in place.

    Args:
        model: A model in eval mode.
        sample: An input of the shape to be fast at.
        activations: Let a packed layer also compute the activation after it among the children of the same module. Children may be
            called in another order than they are listed in, so compare the outputs.

    Raises:
        RuntimeError: This build of torch lacks the operators.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        raise RuntimeError("this build of torch has no packed oneDNN layers")
    shapes: dict[nn.Module, torch.Size] = {}

    def note_shape(layer: nn.Module, args: tuple[torch.Tensor]) -> None:
        shapes[layer] = args[0].shape

    layers = [module for module in model.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    hooks = [layer.register_forward_pre_hook(note_shape) for layer in layers]
    model(sample)
    for hook in hooks:
        hook.remove()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if layer not in shapes:
                continue
            if type(layer) is nn.Linear:
                setattr(parent, name, PackedLinear(layer, shapes[layer][:-1].numel()))
            elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
                setattr(parent, name, PackedConv2d(layer, shapes[layer]))
        if activations:
            _absorb_activations(parent)


def _absorb_activations(parent: nn.Module) -> None:
    """Moves each activation among a module's children into the packed layer before it, if only Identity and Dropout lie between."""
    packed: PackedLinear | PackedConv2d | None = None
    for name, child in list(parent.named_children()):
        if isinstance(child, PackedLinear | PackedConv2d):
            packed = child
        elif packed is not None and (fused := _onednn_activation(child)):
            packed.activation, packed.algorithm = fused
            setattr(parent, name, nn.Identity())
            packed = None
        elif not isinstance(child, nn.Identity | nn.Dropout):
            packed = None


def _onednn_activation(module: nn.Module) -> tuple[str, str] | None:
    """oneDNN's name and algorithm for an activation module, None for any other module."""
    if isinstance(module, nn.GELU):
        return "gelu", module.approximate
    names = {nn.ReLU: "relu", nn.SiLU: "swish", nn.Hardswish: "hardswish"}
    return (names[type(module)], "") if type(module) in names else None
