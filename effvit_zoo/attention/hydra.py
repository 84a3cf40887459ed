"""Hydra attention: out_i = q^_i * sum_j k^_j * v_j elementwise, with unit vectors q^ and k^. O(N C), without matrix products.

It is linear attention with as many heads as channels and the cosine similarity as its kernel: each query gates one global vector.

"Hydra Attention: Efficient Attention with Many Heads", arXiv:2209.07484; there is no official repository, the code is the paper's appendix.
Own code; deliberate differences:
  - a token of zeros stays zero, with gradient 0 (theirs divides 0 by 0);
  - norms and the sum over tokens are computed in float32 whatever the input.
The weights may be negative and do not sum to 1: the output grows with the number of tokens (as its root for unrelated tokens, linearly
for alike ones), so a change of image size changes the scale of the branch. A class token is treated as any other token. The paper replaces
the last layers, or interleaved ones, rather than all.

Layout: functions and module (B, N, C) -> (B, N, C); B batch, N tokens, C channels.
"""

from typing import Tuple

import torch
from timm.layers import register_notrace_function

from ._linear import evaluate, inverse_norm, map_chunks, sum_over_chunks, widen, without_autocast
from ._mixer import TokenMixer


def naive_hydra_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Ordinary linear attention with C heads of one channel, pair by pair: O(N^2 C), for tests."""
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    q, k, v = (x.mT.unsqueeze(-1) for x in (q, k, v))  # (B, C, N, 1)
    return (q @ k.mT @ v).squeeze(-1).mT


def _inverse_l2_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """(..., N, C) -> (..., N, 1), over the channels."""
    return inverse_norm(torch.linalg.vector_norm(x, dim=-1, keepdim=True), eps)


def _summarise(k: torch.Tensor, v: torch.Tensor, eps: float) -> Tuple[torch.Tensor]:
    """Keys and values (..., N, C) -> sum_n k_n / ||k_n|| * v_n, (..., 1, C); the norms weight the sum, so k is scaled nowhere."""
    return (_inverse_l2_norm(k, eps).transpose(-2, -1) @ (k * v),)


def _unit_vectors(q: torch.Tensor, eps: float) -> torch.Tensor:
    """(..., N, C) -> (..., N, C), every token divided by its norm."""
    return q * _inverse_l2_norm(q, eps)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    (kv,) = _summarise(widen(k), widen(v), eps)
    return (_unit_vectors(widen(q), eps) * kv).to(q.dtype)


def _attend_image(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> None:
    (kv,) = sum_over_chunks(lambda k, v: _summarise(k, v, eps), k, v)
    map_chunks(out, lambda q: _unit_vectors(q, eps), q, factor=kv)


@torch.fx.wrap
@register_notrace_function
def hydra_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """out_i = q_i / ||q_i|| * sum_j k_j / ||k_j|| * v_j, all elementwise, with l2 norms over all C channels of a token.

    Args:
        q: Queries, (B, Nq, C).
        k: Keys, (B, Nk, C).
        v: Values, (B, Nk, C).
        eps: Smallest norm that is divided by.

    Returns:
        (B, Nq, C) of q's type.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(f"expected q, k, v of (B, N, C), got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    if q.shape[-1] != k.shape[-1] or k.shape[1:] != v.shape[1:]:
        raise ValueError(
            "expected q, k, v of equal channels and k, v of equal tokens, "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if torch.jit.is_scripting():
        return _attend(q, k, v, eps)
    with without_autocast(q):
        return evaluate(_attend, _attend_image, q, k, v, eps=eps)


class HydraAttention(TokenMixer):
    """Hydra attention, (B, N, C) -> (B, N, C). `num_heads` matters to `qk_norm` only; mixing has C heads."""

    label, axes = "Hydra", "tokens"
    function = staticmethod(hydra_attention)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # (B, H, N, D) -> (B, N, C), a view of the projection's output
        out = hydra_attention(q.transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2), v.transpose(1, 2).flatten(2))
        B, N, _ = out.shape
        return out.reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, N, D)
