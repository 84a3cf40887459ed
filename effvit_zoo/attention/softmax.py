"""Softmax attention, the baseline of all others: out = softmax(q k^T / sqrt(D)) v, quadratic in the number of tokens.

"Attention Is All You Need", arXiv:1706.03762; as a vision backbone: DeiT, arXiv:2012.12877. Own code over torch's fused kernel.
Differs from timm's `Attention` (Apache-2.0) in nothing but the absence of its explicit path: same parameters, same values.

Layout: functions (B, H, N, D) -> (B, H, N, D), module (B, N, C) -> (B, N, C); B batch, H heads, N tokens, D = C // H.
"""

from typing import Optional

import torch
import torch.nn.functional as F

from ._mixer import TokenMixer


def naive_softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The formula with all N x N weights in memory; the truth of the tests and a reference of the benchmark."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: Optional[float] = None) -> torch.Tensor:
    """softmax(scale * q k^T) v for q, k, v of (B, H, N, D); `scale` defaults to D ** -0.5."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class SoftmaxAttention(TokenMixer):
    """Multi-head softmax attention, (B, N, C) -> (B, N, C). Honours every argument of the contract."""

    label = "softmax, SDPA"
    function = staticmethod(softmax_attention)
    supports_attn_drop = True

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return softmax_attention(q, k, v)

    def forward(
        self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Mixes tokens.

        Args:
            x: Tokens, (B, N, C).
            attn_mask: Broadcastable to (B, H, N, N): bool (True = may attend) or added to the scores.
            is_causal: Each token sees itself and those before it; excludes `attn_mask`.
        """
        q, k, v = self.project_qkv(x)
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=drop, is_causal=is_causal)
        return self.project_out(x)
