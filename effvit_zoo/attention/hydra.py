"""Hydra attention: as many heads as channels, cosine similarity; each query gates one global vector. O(N C), no matrix products.

"Hydra Attention: Efficient Attention with Many Heads", arXiv:2209.07484; there is no official repository, the code is the paper's appendix.
Own code; deliberate differences:
  - a token of zeros stays zero, with gradient 0 (theirs divides 0 by 0);
  - norms and the sum over tokens run in float32 whatever the input.
The weights may be negative and do not sum to 1: the output grows with the number of tokens (as its root for unrelated tokens, linearly
for alike ones), so a change of image size changes the size of the branch. A class token is one more token. The paper replaces the last
layers, or interleaved ones, rather than all.

Layout: function (B, N, C) -> (B, N, C), module the same; B batch, N tokens, C channels.
"""

from functools import partial
from typing import Tuple

import torch
from timm.layers import register_notrace_function

from ._linear import (
    attend_in_pieces,
    inverse_norm,
    is_eager_inference,
    map_chunks,
    sum_over_chunks,
    widen,
    without_autocast,
)
from ._mixer import TokenMixer


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
    (kv,) = sum_over_chunks(partial(_summarise, eps=eps), k, v)
    map_chunks(out, partial(_unit_vectors, eps=eps), q, factor=kv)


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
        if not is_eager_inference(q, k, v):
            return _attend(q, k, v, eps)
        attend, attend_image = partial(_attend, eps=eps), partial(_attend_image, eps=eps)
        return attend_in_pieces(attend, attend_image, q, k, v, partial(q.new_empty, q.shape))


class HydraAttention(TokenMixer):
    """Hydra attention, (B, N, C) -> (B, N, C). `num_heads` only says over what `qk_norm` normalises; mixing has C heads."""

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # (B, H, N, D) -> (B, N, C), a view of the projection's output
        out = hydra_attention(q.transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2), v.transpose(1, 2).flatten(2))
        B, N, _ = out.shape
        return out.reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, N, D)
