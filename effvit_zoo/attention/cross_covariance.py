"""Cross-covariance attention: out = softmax(t cos(q, k)) v over pairs of channels instead of tokens, so cost is linear in the tokens.

"XCiT: Cross-Covariance Image Transformers", arXiv:2106.09681, in the form of EdgeNeXt, arXiv:2206.10589.
Official code: https://github.com/mmaaz60/EdgeNeXt @ 388450404f, models/sdta_encoder.py (MIT). Own code.

Deliberate differences: the norms scale the small D x D product rather than queries and keys; x / max(|x|, 1e-12) is written
x * rsqrt(|x|^2 + 1e-24), which every runtime has kernels for (equal but for vectors shorter than 1e-11); half-precision queries and
keys are compared in float32, where sums of squares over many tokens do not overflow.

As a token mixer of a plain ViT a class token is treated as any other token: it enters the comparison of the channels and receives the same
mixture of them. (XCiT itself adds the class token after these layers.)

Layout: the functions take channels by tokens, (B, H, D, N); the modules tokens by channels, (B, N, C). B batch, N tokens, H heads,
D channels per head, C = H * D.
"""

from functools import partial
from typing import Any, Callable, Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import nn

from ._linear import exceeds_chunk, sum_over_chunks, widen
from ._mixer import MixerShape, TokenMixer


def naive_cross_covariance_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, temperature: torch.Tensor
) -> torch.Tensor:
    """The formula pair by pair of channels, (B, H, D, N); for tests."""
    cosines = F.cosine_similarity(q.unsqueeze(-2), k.unsqueeze(-3), dim=-1, eps=0.0)  # (B, H, D, D)
    return (temperature * cosines).softmax(-1) @ v


def _products(q: torch.Tensor, k: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Channels by tokens (..., D, N) -> q k^T, (..., D, D), and the squared norms of q's and of k's rows, (..., D)."""
    return q @ k.transpose(-2, -1), (q * q).sum(-1), (k * k).sum(-1)


@torch.fx.wrap
@register_notrace_function
def channel_cosines(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Cosines between channels over all tokens, (..., D, N) and (..., D, N) -> (..., D, D), in float32 at least; 0 for zero vectors.

    One node for fx, which cannot branch on the dtype.
    """
    if torch.jit.is_scripting():
        products, q_squares, k_squares = _products(widen(q), widen(k))
    elif exceeds_chunk(q.shape[-1] * q.shape[-2], q, k):
        products, q_squares, k_squares = sum_over_chunks(_products, q, k, axis=-1)
    else:
        products, q_squares, k_squares = _products(widen(q), widen(k))
    return products * torch.rsqrt(q_squares + 1e-24).unsqueeze(-1) * torch.rsqrt(k_squares + 1e-24).unsqueeze(-2)


def cross_covariance_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, temperature: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor:
    """softmax(temperature * cos(q, k)) v, where cos compares channels over all tokens.

    Args:
        q: Queries, (B, H, D, N).
        k: Keys, (B, H, D, N).
        v: Values, (B, H, D, N).
        temperature: Factor of the cosines, one per head, (H, 1, 1).
        dropout: Share of the D x D weights that are set to zero, the rest scaled up; 0 outside training.

    Returns:
        (B, H, D, N) in v's dtype.
    """
    weights = channel_cosines(q, k) * temperature  # (B, H, D, D)
    weights = weights.softmax(-1)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    return weights.to(v.dtype) @ v


class CrossCovarianceAttention(nn.Module):
    """Cross-covariance attention with its projections, (B, N, C) -> (B, N, C).

    Args:
        dim: C.
        num_heads: H.
        qkv_bias: Whether queries, keys and values have a bias.
        attn_drop: Dropout of the D x D weights.
        proj_drop: Dropout of the output.

    Raises:
        ValueError: If `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got dim={dim}, num_heads={num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Temperature 1; the linear layers have their own."""
        nn.init.ones_(self.temperature)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        D = C // self.num_heads
        qkv = self.qkv(x).transpose(1, 2).reshape(B, 3, self.num_heads, D, N)
        q, k, v = qkv.unbind(1)
        x = cross_covariance_attention(q, k, v, self.temperature, self.attn_drop if self.training else 0.0)
        x = x.reshape(B, C, N).transpose(1, 2)  # (B, N, C)
        return self.proj_drop(self.proj(x))


class CrossCovarianceMixer(TokenMixer):
    """Cross-covariance attention as a token mixer, (B, N, C) -> (B, N, C). Adds a learned `temperature` per head, 1 at first."""

    label, axes = "cross-covariance", "channels"
    supports_attn_drop = True

    @classmethod
    def benchmark_function(cls, shape: MixerShape) -> Callable[..., Any]:
        return partial(cross_covariance_attention, temperature=torch.ones(shape.heads, 1, 1))

    def __init__(self, dim: int, num_heads: int = 8, device=None, dtype=None, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Temperature 1; the linear layers have their own."""
        nn.init.ones_(self.temperature)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = q.transpose(-2, -1), k.transpose(-2, -1), v.transpose(-2, -1)  # (B, H, D, N)
        drop = self.attn_drop.p if self.training else 0.0
        return cross_covariance_attention(q, k, v, self.temperature, drop).transpose(-2, -1)  # (B, H, N, D)
