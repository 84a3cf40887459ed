"""Convolutional modulation of Conv2Former: out = proj(a * v(x)) with a = DW_k(GELU(W x)), a depthwise convolution instead of attention.

"Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition", arXiv:2211.11943, TPAMI 2024.
Official code: https://github.com/HVision-NKU/Conv2Former @ 94fd1c4d0a (Apache-2.0, class SpatialAttention). Own code, official names.

Every value is weighted, channel by channel, by its k x k neighbourhood; there is no softmax and there are no heads, and the cost is linear
in the number of pixels. As in the official code the normalisation before it belongs to the module. There is no pure function because the
formula without its four convolutions is one product.

As a token mixer of a plain ViT, W and v are the first and the last third of `qkv`; the keys between them are not computed, and kept only so
that weights fit. Prefix tokens (class, registers) have no neighbourhood of their own: each is weighted by the mean of a over all patches,
and does not influence the patches.

Layout: feature maps (B, C, H, W), any height and width, also below the kernel's; the mixer has tokens, (B, N, C).
"""

from typing import Any, Callable, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from ._mixer import GridMixer, MixerShape


def naive_conv_modulation(x: torch.Tensor, v: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The formula pixel by pixel, with the neighbourhood cut at the border; for tests.

    Args:
        x: W x before GELU, (B, C, H, W).
        v: Values, (B, C, H, W).
        kernel: Depthwise weights, (C, 1, k, k).
        bias: (C,).
    """
    a, reach = x * (1 + torch.erf(x / 2**0.5)) / 2, kernel.shape[-1] // 2
    out = torch.empty_like(v)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            top, left = max(i - reach, 0), max(j - reach, 0)
            near = a[:, :, top : i + reach + 1, left : j + reach + 1]
            weights = kernel[:, 0, top - i + reach :, left - j + reach :][:, : near.shape[2], : near.shape[3]]
            out[:, :, i, j] = v[:, :, i, j] * ((weights * near).sum((2, 3)) + bias)
    return out


class ConvModulation(nn.Module):
    """LayerNorm and convolutional modulation, (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: Channels.
        kernel_size: Side of the depthwise kernel in pixels of the feature map; odd.

    Raises:
        ValueError: On an even kernel size, which has no centre.
    """

    def __init__(self, dim: int, kernel_size: int = 11, device=None, dtype=None) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        dd = {"device": device, "dtype": dtype}
        self.norm = LayerNorm2d(dim, eps=1e-6, **dd)
        self.att = nn.Sequential(
            nn.Conv2d(dim, dim, 1, **dd),
            nn.GELU(),
            nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd),
        )
        self.v = nn.Conv2d(dim, dim, 1, **dd)
        self.proj = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.proj(self.att(x) * self.v(x))


class ConvModulationMixer(GridMixer):
    """Convolutional modulation as a token mixer, (B, N, C) -> (B, N, C). Adds the depthwise convolution `conv`, 11 x 11; no heads.

    Raises:
        ValueError: On `qk_norm`, as there is no product of queries and keys; in `forward` if the tokens are not the grid's.
    """

    label, axes = "conv modulation", "tokens"
    kernel_size: ClassVar[int] = 11

    def __init__(
        self, dim: int, num_heads: int = 8, qk_norm: bool = False, device=None, dtype=None, **kwargs: Any
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        if qk_norm:
            raise ValueError(f"{self.mechanism} compares no queries with keys, got qk_norm=True, expected False")
        k = self.kernel_size
        self.conv = nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, device=device, dtype=dtype)

    @classmethod
    def benchmark_function(cls, shape: MixerShape) -> Callable[..., Any]:
        mixer = cls(shape.heads * shape.dim, shape.heads, dtype=shape.dtype).requires_grad_(False)
        mixer.grid_size = shape.grid
        return lambda q, k, v: mixer.modulate(q, v)

    def modulate(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Patches after W (B, rows * columns, C) and values of all tokens (B, N, C) -> (B, N, C)."""
        P, (height, width) = self.num_prefix_tokens, self.grid_size
        a = F.gelu(x)
        # (B, C, H, W) with channels last in memory, which also torch sees as such: a transposed batch of one it does not
        a = a.unflatten(1, [height, width]).permute(0, 3, 1, 2)
        a = self.conv(a).flatten(2).transpose(1, 2)  # (B, N - P, C)
        if P > 0:
            a = torch.cat([a.mean(1, keepdim=True).expand(-1, P, -1), a], dim=1)
        return a * v

    def mix_tokens(self, x: torch.Tensor) -> torch.Tensor:
        C = x.shape[-1]
        patches = self.project_part(x[:, self.num_prefix_tokens :], 0, C)
        v = self.project_part(x, 2 * C, 3 * C)
        return self.proj_drop(self.proj(self.norm(self.modulate(patches, v))))
