"""What `fuse` is made of: normalisation and scales folded into the adjacent layer, and activations in place.

Folding is exact algebra in float64, with results in the layer's own dtype; every function returns a new layer.
"""

import copy
from typing import Optional, Tuple, TypeVar

import torch
from torch import nn

from ..attention._recording import is_traced

LayerT = TypeVar("LayerT", nn.Conv2d, nn.Linear)


class InplaceGELU(nn.GELU):
    """GELU that overwrites its input unless it is traced or differentiated, where it is plain GELU.

    The hidden features of an MLP are a network's largest buffers: a second one for the activation costs page faults that were measured
    as a quarter of SwiftFormer-S's time at batch 8 on a CPU. Only for an input that nothing else reads, as in `fc2(act(fc1(x)))`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and not is_traced(x) and not x.requires_grad:
            return torch.ops.aten.gelu_(x, approximate=self.approximate)
        return nn.functional.gelu(x, approximate=self.approximate)


def inplace_activation(act: nn.Module) -> nn.Module:
    """The same activation in place where torch supports it (GELU, ReLU, SiLU, Hardswish); any other module is returned unchanged."""
    if isinstance(act, nn.GELU):
        return InplaceGELU(act.approximate).train(act.training)
    if isinstance(act, (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)):
        act = copy.copy(act)
        act.inplace = True
    return act


def batch_norm_affine(norm: nn.Module) -> Tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift), each (C,) float64, with norm(x) = scale * x + shift in eval mode."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"only a BatchNorm with running statistics can be folded, got {type(norm).__name__}")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.detach().double(), shift * norm.weight.detach().double()
        shift = shift + norm.bias.detach().double()
    return scale, shift


def _with_weights(layer: LayerT, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> LayerT:
    dtype, trainable = layer.weight.dtype, layer.weight.requires_grad
    folded = copy.deepcopy(layer)
    folded.weight = nn.Parameter(weight.to(dtype), requires_grad=trainable)
    folded.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=trainable)  # type: ignore[assignment]
    return folded


def fold_output_affine(layer: LayerT, scale: torch.Tensor, shift: Optional[torch.Tensor] = None) -> LayerT:
    """The layer whose output is scale * layer(x) + shift, for BatchNorm or layer scale after a layer. Always exact.

    Args:
        layer: Conv2d (any groups, stride, padding) or Linear.
        scale: C_out values of any shape.
        shift: C_out values of any shape, or None for zero.
    """
    scale = scale.detach().double().flatten()
    weight = layer.weight.detach().double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    bias = None if layer.bias is None else layer.bias.detach().double() * scale
    if shift is not None:
        shift = shift.detach().double().flatten()
        bias = shift if bias is None else bias + shift
    return _with_weights(layer, weight, bias)


def fold_input_affine(layer: LayerT, scale: torch.Tensor, shift: Optional[torch.Tensor] = None) -> LayerT:
    """The layer whose output is layer(scale * x + shift), for BatchNorm before a layer.

    Args:
        layer: Conv2d (any groups) or Linear.
        scale: C_in values of any shape.
        shift: C_in values of any shape, or None for zero.

    Raises:
        ValueError: If there is a shift and the convolution pads: the zeros at the border would have to be shifted too.
    """
    scale = scale.detach().double().flatten()
    weight = layer.weight.detach().double()
    groups = 1
    if isinstance(layer, nn.Conv2d):
        groups = layer.groups
        if shift is not None and layer.padding not in ((0, 0), "valid"):
            raise ValueError(f"a shift before a padded convolution cannot be folded, got padding={layer.padding}")
    kernel = [1] * (weight.ndim - 2)

    def per_weight(value: torch.Tensor) -> torch.Tensor:
        # (groups, C_out / groups, C_in / groups)
        value = value.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
        return value.reshape(weight.shape[0], weight.shape[1], *kernel)

    bias = None if layer.bias is None else layer.bias.detach().double()
    if shift is not None:
        moved = (weight * per_weight(shift.detach().double().flatten())).flatten(1).sum(1)  # (C_out,)
        bias = moved if bias is None else bias + moved
    return _with_weights(layer, weight * per_weight(scale), bias)


def fold_norm_after(layer: LayerT, norm: nn.Module) -> LayerT:
    """norm(layer(x)) as one layer; the layer itself if the norm is an Identity."""
    return layer if isinstance(norm, nn.Identity) else fold_output_affine(layer, *batch_norm_affine(norm))


def fold_norm_before(norm: nn.Module, layer: LayerT) -> LayerT:
    """layer(norm(x)) as one layer; the layer itself if the norm is an Identity. Raises ValueError for a padded convolution."""
    return layer if isinstance(norm, nn.Identity) else fold_input_affine(layer, *batch_norm_affine(norm))
