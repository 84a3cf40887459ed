"""ELU linear attention: out_i = sum_j s_ij v_j / sum_j s_ij, s_ij = phi(q_i) . phi(k_j), phi(x) = elu(x) + 1. Linear in the tokens.

"Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", arXiv:2006.16236.
Official code: idiap/fast-transformers@2ad36b97 (MIT), `attention/linear_attention.py`. Own code; deliberate differences:
  - bidirectional only, layout (B, H, N, D) where theirs is (B, N, H, D), and no key mask;
  - phi is exp(min(x, 0)) + max(x, 0), with elu's slope of 1 at 0: elu(x) + 1 cancels for negative x, to 0 from about
    -17 down in float32 and from -8 in bfloat16;
  - sums are accumulated in float32 whatever the input: the normaliser is about 1.35 D N, which exceeds float16's range at 784 tokens of 64
    channels, and 1 / 1e-6 has no float16 value;
  - with fewer tokens than channels the product is (phi(q) phi(k)^T) v, the same result in a cheaper order.
There are no positions in it; a class token is treated as any other token.

Layout: functions (B, H, N, D) -> (B, H, N, D), module (B, N, C) -> (B, N, C); B batch, H heads, N tokens, D = C // H.
"""

from typing import Tuple

import torch
from timm.layers import register_notrace_function

from ._linear import (
    check_heads,
    evaluate,
    map_chunks,
    quadratic_is_cheaper,
    row_dot,
    sum_over_chunks,
    widen,
    without_autocast,
)
from ._mixer import TokenMixer


def naive_elu_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """The formula pair by pair: quadratic, for tests."""
    q, k = (torch.where(x >= 0, x + 1, x.clamp(max=0).exp()) for x in (q, k))
    scores = q @ k.mT  # (B, H, Nq, Nk)
    return scores @ v / (scores.sum(-1, keepdim=True) + eps)


def _phi(x: torch.Tensor) -> torch.Tensor:
    # x - relu(x) is min(x, 0) with slope 1 at 0; torch's clamp and minimum have slopes 0 and 1/2 there
    positive = x.relu()
    return (x - positive).exp() + positive


def _summarise(k: torch.Tensor, v: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (..., N, D) -> sums of phi(k)^T v, (..., D, D), and of phi(k), (..., 1, D)."""
    k = _phi(k)
    return k.transpose(-2, -1) @ v, k.sum(-2, keepdim=True)


def _read(q: torch.Tensor, kv: torch.Tensor, k_sum: torch.Tensor, eps: float) -> torch.Tensor:
    """Queries (..., N, D) against a summary -> (..., N, D)."""
    q = _phi(q)
    return (q @ kv) / (row_dot(q, k_sum) + eps)


def _attend_pairs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    dtype = q.dtype
    scores = _phi(widen(q)) @ _phi(widen(k)).transpose(-2, -1)  # (B, H, Nq, Nk)
    return ((scores @ widen(v)) / (scores.sum(-1, keepdim=True) + eps)).to(dtype)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    kv, k_sum = _summarise(widen(k), widen(v))
    return _read(widen(q), kv, k_sum, eps).to(q.dtype)


def _attend_image(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> None:
    kv, k_sum = sum_over_chunks(_summarise, k, v)
    map_chunks(out, lambda q: _read(q, kv, k_sum, eps), q)


@torch.fx.wrap
@register_notrace_function
def elu_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """out_i = sum_j s_ij v_j / (sum_j s_ij + eps) with s_ij = (elu(q_i) + 1) . (elu(k_j) + 1); no scale.

    Args:
        q: Queries, (B, H, Nq, D).
        k: Keys, (B, H, Nk, D).
        v: Values, (B, H, Nk, Dv).
        eps: Added to the normaliser, 1e-6 as in the official code.

    Returns:
        (B, H, Nq, Dv) of q's type.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    check_heads(q, k, v)
    quadratic = quadratic_is_cheaper(q, k)
    if torch.jit.is_scripting():
        return _attend_pairs(q, k, v, eps) if quadratic else _attend(q, k, v, eps)
    with without_autocast(q):
        if quadratic:
            return evaluate(_attend_pairs, None, q, k, v, eps=eps)
        return evaluate(_attend, _attend_image, q, k, v, eps=eps)


class EluLinearAttention(TokenMixer):
    """Multi-head ELU linear attention, (B, N, C) -> (B, N, C)."""

    label = "ELU"
    function = staticmethod(elu_linear_attention)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return elu_linear_attention(q, k, v)
