"""Convolutional modulation of Conv2Former: a large depthwise convolution in the place of the attention matrix.

"Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition", arXiv:2211.11943, TPAMI 2024.
Official code: https://github.com/HVision-NKU/Conv2Former @ 94fd1c4d0a (Apache-2.0, class SpatialAttention). Own code, official names:

    out = proj(a * v(x)),    a = DW_k(GELU(W x))

Every value is weighted, channel by channel, by what its k x k neighbourhood says; there is no softmax and there are no heads, and the
cost is linear in the number of pixels. As in the official code the normalisation before it belongs to the module. There is no function
beside the module because the formula without its four convolutions is one product.

Layout: feature maps (B, C, H, W) throughout; any height and width, also below the kernel's.
"""

import torch
from timm.layers import LayerNorm2d
from torch import nn


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
