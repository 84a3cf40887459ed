"""Efficient additive attention of SwiftFormer: out_i = k^_i * sum_j w_j q^_j, linear in the number of tokens.

One pooled query per image takes the place of a token-to-token matrix. Queries q^ and keys k^ are unit vectors, and the weights w = q^ w_g
are normalised over the tokens.

"SwiftFormer: Efficient Additive Attention for Transformer-based Real-time Mobile Vision Applications", arXiv:2303.15446.
Official code: https://github.com/Amshaker/SwiftFormer @ 4aa6cd6752 (Apache-2.0). Own code.

Deliberate differences, none in value: the factor D ** -0.5 in front of the token weights is left out, as it cancels in their L2
normalisation; x / max(|x|, 1e-12) is written x * rsqrt(|x|^2 + 1e-24), which every runtime has kernels for; the pooling is a product of
matrices; half-precision inputs are normalised in float32, where their squares do not overflow.

As a token mixer of a plain ViT the four projections are those of the paper under the ViT's names: queries and keys are two thirds of
`qkv`; its last third, as there are no values, projects the gated keys (official `Proj`), and `proj` is the last one (`final`). A class
token is treated as any other token, and heads are joined.

Layout: tokens (B, N, C) throughout; B batch, N tokens, C channels; one head.
"""

from functools import partial
from typing import Any, Callable, Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import nn

from ._linear import exceeds_chunk, map_chunks, widen
from ._mixer import MixerShape, TokenMixer


def naive_efficient_additive_attention(
    q: torch.Tensor, k: torch.Tensor, w_g: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The official sequence of operations, with the scale that cancels; for tests."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    weights = F.normalize((q @ w_g) * q.shape[-1] ** -0.5, dim=1)  # (B, N, 1), over the tokens
    return (weights * q).sum(1, keepdim=True) * k, q


@torch.fx.wrap
@register_notrace_function
def l2_normalize(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x divided by its Euclidean norm along `dim`; zero vectors stay zero. One node for fx, which cannot branch on the dtype."""
    if x.dtype in (torch.float16, torch.bfloat16):
        wide = x.float()
        return (wide * torch.rsqrt((wide * wide).sum(dim, keepdim=True) + 1e-24)).to(x.dtype)
    return x * torch.rsqrt((x * x).sum(dim, keepdim=True) + 1e-24)


def _attend(q: torch.Tensor, k: torch.Tensor, w_g: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    q, k = l2_normalize(q, -1), l2_normalize(k, -1)
    score = l2_normalize(q @ w_g, 1)  # (B, N, 1), normalised over tokens, no softmax
    pooled = score.transpose(1, 2) @ q  # (B, 1, C)
    return pooled * k, q


def _attend_image(
    context: torch.Tensor, out_q: torch.Tensor, q: torch.Tensor, k: torch.Tensor, w_g: torch.Tensor
) -> None:
    """Writes the results for one image, (N, C) each, piece by piece; the scores' norm scales the pooled query."""
    w_g = widen(w_g)
    pooled, squares = torch.zeros(()), torch.zeros(())

    def pool(q: torch.Tensor) -> torch.Tensor:
        nonlocal pooled, squares
        q = l2_normalize(q, -1)
        score = (q @ w_g).t()  # (1, N)
        pooled, squares = pooled + score @ q, squares + score @ score.t()
        return q

    map_chunks(out_q, pool, q)
    pooled = pooled * (squares + 1e-24) ** -0.5
    map_chunks(context, partial(l2_normalize, dim=-1), k, factor=pooled)


@torch.fx.wrap
@register_notrace_function
def efficient_additive_attention(
    q: torch.Tensor, k: torch.Tensor, w_g: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Weights every token by w_g^T q, pools the queries with these weights and lets the pooled query gate every key.

    Args:
        q: Queries, (B, N, C).
        k: Keys, (B, N, C).
        w_g: The learned direction that scores tokens, (C, 1); its length has no effect.

    Returns:
        (context, q): the gated keys and the normalised queries, each (B, N, C). The queries are the block's residual path.
    """
    if torch.jit.is_scripting():
        return _attend(q, k, w_g)
    if not exceeds_chunk(q.shape[1] * q.shape[2], q, k, w_g):
        return _attend(q, k, w_g)
    context, out_q = torch.empty_like(k), torch.empty_like(q)
    for i in range(q.shape[0]):
        _attend_image(context[i], out_q[i], q[i], k[i], w_g)
    return context, out_q


class EfficientAdditiveAttention(nn.Module):
    """SwiftFormer's attention on a feature map, (B, C, H, W) -> (B, C, H, W). There is no value projection.

    Parameter names are timm's (`proj` where the official code has `Proj`).
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.to_query = nn.Linear(dim, dim, **dd)
        self.to_key = nn.Linear(dim, dim, **dd)
        self.w_g = nn.Parameter(torch.empty(dim, 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.final = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal `w_g`; the linear layers have their own."""
        nn.init.normal_(self.w_g)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        context, q = efficient_additive_attention(self.to_query(x), self.to_key(x), self.w_g)
        x = self.final(self.proj(context) + q)
        return x.transpose(1, 2).reshape(B, C, H, W)


class EfficientAdditiveMixer(TokenMixer):
    """Efficient additive attention as a token mixer, (B, N, C) -> (B, N, C). Adds the direction `w_g`, (C, 1).

    `num_heads` matters to `qk_norm` only.
    """

    label, axes = "additive", "tokens"

    @classmethod
    def benchmark_function(cls, shape: MixerShape) -> Callable[..., Any]:
        w_g = torch.randn(shape.heads * shape.dim, 1, dtype=shape.dtype)
        return lambda q, k, v: efficient_additive_attention(q, k, w_g)

    def __init__(self, dim: int, num_heads: int = 8, device=None, dtype=None, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        self.w_g = nn.Parameter(torch.empty(dim, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal `w_g`; the linear layers have their own."""
        nn.init.normal_(self.w_g)

    def mix_tokens(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k = (
            self.project_part(x, 0, 2 * C).reshape(B, N, 2, self.num_heads, self.head_dim).unbind(2)
        )  # (B, N, H, D) each
        q, k = self.q_norm(q).reshape(B, N, C), self.k_norm(k).reshape(B, N, C)
        context, q = efficient_additive_attention(q, k, self.w_g)
        x = self.project_part(context, 2 * C, 3 * C) + q
        return self.proj_drop(self.proj(self.norm(x)))
