"""SimA: out = q^ k^^T v, where q^ and k^ are q and k divided by their l1 norm over the tokens, channel by channel. No exp, no normaliser.

"SimA: Simple Softmax-free Attention for Vision Transformers", arXiv:2206.08898. Official code: UCDvision/sima@3ec3b8e0 (MIT), class
`SimA` and the class attention of its XCiT variant. Own code; deliberate differences:
  - the norms scale the small D x D product rather than the tokens: q^ (k^^T v) = q diag(1 / (|q|_1 |k|_1)) k^T v;
  - sums are accumulated in float32 whatever the input (1e-12 is 0 in float16, and a channel of zeros would be 0 / 0);
  - a channel that is zero in every token gets the gradient 0, not 1e12;
  - the order of the products follows the cheaper side, as theirs, but from static shapes, so it does not change within one exported file.
The output shrinks as 1 / N, so weights trained at one image size see smaller branches at a larger one. Batches must not contain padding
tokens, which would enter the norms. A class token is treated as any other token; the official XCiT variant appends it for two class
attention layers at the end only.

Layout: functions (B, H, N, D) -> (B, H, N, D), modules (B, N, C) -> (B, N, C); B batch, H heads, N tokens, D = C // H.
"""

from typing import Tuple

import torch
from timm.layers import register_notrace_function

from ._linear import (
    check_heads,
    evaluate,
    inverse_norm,
    map_chunks,
    quadratic_is_cheaper,
    sum_over_chunks,
    widen,
    without_autocast,
)
from ._mixer import TokenMixer


def naive_sima_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """The formula pair by pair: quadratic, for tests."""
    q, k = (x / x.abs().sum(-2, keepdim=True).clamp_min(eps) for x in (q, k))
    return q @ k.mT @ v


def naive_sima_class_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """All rows of SimA, of which the class token's is kept; for tests."""
    return naive_sima_attention(q, k, v, eps)[:, :, :1]


def _l1_norm(x: torch.Tensor) -> torch.Tensor:
    """(..., N, D) -> (..., D), over the tokens."""
    return x.abs().sum(-2)


def _joint_scale(q_norm: torch.Tensor, k_norm: torch.Tensor, eps: float) -> torch.Tensor:
    """Norms (..., D) of both sides -> the factor of each channel of q . k, (..., D)."""
    return inverse_norm(q_norm, eps) * inverse_norm(k_norm, eps)


def _summarise(k: torch.Tensor, v: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (..., N, D) -> k^T v, (..., D, D), and the keys' norms, (..., D)."""
    return k.transpose(-2, -1) @ v, _l1_norm(k)


def _attend_pairs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    dtype = q.dtype
    q, k, v = widen(q), widen(k), widen(v)
    scale = _joint_scale(_l1_norm(q), _l1_norm(k), eps)
    return ((q * scale.unsqueeze(-2)) @ k.transpose(-2, -1) @ v).to(dtype)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    dtype = q.dtype
    q, k, v = widen(q), widen(k), widen(v)
    kv, k_norm = _summarise(k, v)
    scale = _joint_scale(_l1_norm(q), k_norm, eps)
    return (q @ (kv * scale.unsqueeze(-1))).to(dtype)


def _attend_image(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> None:
    kv, k_norm = sum_over_chunks(_summarise, k, v)
    (q_norm,) = sum_over_chunks(lambda q: (_l1_norm(q),), q)
    kv = kv * _joint_scale(q_norm, k_norm, eps).unsqueeze(-1)
    map_chunks(out, lambda q: q @ kv, q)


@torch.fx.wrap
@register_notrace_function
def sima_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """out = q^ k^^T v with x^_nd = x_nd / max(sum_n |x_nd|, eps), for x = q and x = k each over its own tokens; no scale.

    Args:
        q: Queries, (B, H, Nq, D).
        k: Keys, (B, H, Nk, D).
        v: Values, (B, H, Nk, Dv).
        eps: Smallest norm that is divided by, 1e-12 as in the official code.

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


def _attend_class(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    dtype = q.dtype
    q, k, v = widen(q), widen(k), widen(v)
    scale = _joint_scale(_l1_norm(q), _l1_norm(k), eps)  # (B, H, D)
    q = q[:, :, :1] * scale.unsqueeze(-2)  # (B, H, 1, D)
    return (q @ k.transpose(-2, -1) @ v).to(dtype)


@torch.fx.wrap
@register_notrace_function
def sima_class_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """The first row of `sima_attention`: only the class token, at index 0, is a query; the norms are still over all tokens. O(N D).

    Args:
        q: Queries of all tokens, (B, H, N, D); those after the first enter its norm only.
        k: Keys, (B, H, N, D).
        v: Values, (B, H, N, Dv).
        eps: Smallest norm that is divided by, 1e-6 in the official class attention.

    Returns:
        (B, H, 1, Dv) of q's type.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    check_heads(q, k, v)
    if torch.jit.is_scripting():
        return _attend_class(q, k, v, eps)
    with without_autocast(q):
        return _attend_class(q, k, v, eps)


class SimaAttention(TokenMixer):
    """Multi-head SimA, (B, N, C) -> (B, N, C)."""

    label = "SimA"
    function = staticmethod(sima_attention)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sima_attention(q, k, v)


class SimaClassAttention(TokenMixer):
    """SimA for the class token alone, (B, N, C) -> (B, N, C): row 0 is the mixed class token, the other rows are the input's."""

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sima_class_attention(q, k, v)

    def mix_tokens(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project_qkv(x)
        return torch.cat([self.project_out(self.mix(q, k, v)), x[:, 1:]], dim=1)
