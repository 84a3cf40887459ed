"""Multi-scale linear attention of EfficientViT: out_i = sum_j s_ij v_j / (sum_j s_ij + eps), s_ij = relu(q_i) . relu(k_j).

"EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction", arXiv:2205.14756 (MIT HAN lab, not MSRA's EfficientViT).
Official code: https://github.com/mit-han-lab/efficientvit @ de7d7733cc (Apache-2.0), class `LiteMLA`. Own code with timm's parameter names.

It runs at the pixel's scale and at coarser ones: q, k and v of a coarser scale are those of the surrounding pixels, aggregated by a
depthwise convolution and mixed within each head's q, k or v; their heads are concatenated to the others. Per head, the keys are summed
first, v k^T q / (sum(k) . q): linear in the positions.

Deliberate differences:
  - eps is 1e-5 as in timm, officially 1e-15: that has no float16 value, so a runtime which computes in float16 gets 0 / 0 wherever a query
    has no positive channel, and gradients through float16 overflow. Official logits move by at most 6e-6;
  - the attention is computed in float32 whatever the input, also under autocast: sums over thousands of positions leave float16's range;
  - channels come first, as in the feature map, so there are no transposes;
  - the mixing is a batched product instead of a convolution with hundreds of groups, which runs one group at a time on a CPU;
  - small maps take the same path as large ones (the official code multiplies k^T q first when there are no more pixels than channels).
All but the first leave every value as it is.

As a token mixer of a plain ViT: `proj` maps the pixel's scale and `proj_coarse` the others, which is one projection of both in two parts;
biases are the ViT's, and no BatchNorm follows, as the ViT has LayerNorm before it. Prefix tokens (class, registers) attend and are attended
to at every scale; they have no neighbourhood, so at the coarser scales they keep their own q, k and v.

Layout: module (B, C, H, W) -> (B, C, H, W), mixer (B, N, C) -> (B, N, C); functions (M, D, N) -> (M, D, N): M heads of all images, D
channels each, N = H * W positions.
"""

from collections import OrderedDict
from typing import Any, Callable, ClassVar, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import nn

from ._linear import exceeds_chunk, map_chunks, sum_over_chunks, widen, without_autocast
from ._mixer import GridMixer, MixerShape


def naive_relu_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """One scale pair by pair of positions: quadratic, for tests."""
    scores = q.relu().mT @ k.relu()  # (M, Nq, Nk)
    return (scores @ v.mT / (scores.sum(-1, keepdim=True) + eps)).mT


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    dtype = v.dtype
    q, k, v = widen(q).relu(), widen(k).relu(), widen(v)
    v = F.pad(v, [0, 0, 0, 1], value=1.0)  # (M, Dv + 1, N): the row of ones sums the keys
    kv = torch.bmm(k, v.transpose(1, 2)).transpose(1, 2)  # (M, Dv + 1, D): N is gone, hence linear
    numerator, denominator = torch.bmm(kv, q).split([v.shape[1] - 1, 1], dim=1)
    # one reciprocal per position: cheaper than a division per element, above all in backward
    return (numerator * (denominator + eps).reciprocal()).to(dtype)


def _summarise(k: torch.Tensor, v: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Keys (D, N) and values (Dv, N) of a head -> sums of v k^T, (Dv, D), and of k, (1, D), after relu."""
    k = k.relu()
    return v @ k.t(), k.sum(-1).unsqueeze(0)


def _attend_head(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> None:
    kv, k_sum = sum_over_chunks(_summarise, k, v, axis=-1)

    def read(q: torch.Tensor) -> torch.Tensor:
        q = q.relu()
        return (kv @ q).mul_((k_sum @ q).add_(eps).reciprocal_())

    map_chunks(out, read, q, axis=-1)


@torch.fx.wrap
@register_notrace_function
def relu_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """out_i = sum_j s_ij v_j / (sum_j s_ij + eps) with s_ij = relu(q_i) . relu(k_j); no scale. Channels first.

    Args:
        q: Queries, (M, D, Nq); M counts the heads of all images.
        k: Keys, (M, D, Nk).
        v: Values, (M, Dv, Nk).
        eps: Added to the normaliser.

    Returns:
        (M, Dv, Nq) of v's type.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(f"expected q, k, v of (M, D, N), got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    if q.shape[1] != k.shape[1] or k.shape[2] != v.shape[2]:
        raise ValueError(
            "expected q, k of equal channels and k, v of equal positions, "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if torch.jit.is_scripting():
        return _attend(q, k, v, eps)
    with without_autocast(q):
        if not exceeds_chunk(q.shape[1] * q.shape[2], q, k, v):
            return _attend(q, k, v, eps)
        out = v.new_empty(q.shape[0], v.shape[1], q.shape[2])
        for i in range(q.shape[0]):
            _attend_head(out[i], q[i], k[i], v[i], eps)
        return out


class GroupedPointwise(nn.Conv2d):
    """A 1x1 convolution in groups, without bias, as one batched product: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, groups: int, device=None, dtype=None) -> None:
        super().__init__(dim, dim, 1, groups=groups, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        D = self.weight.shape[1]
        x = x.reshape(B, self.groups, D, H * W)  # (B, C / D, D, N)
        weight = self.weight.reshape(self.groups, D, D)
        return torch.matmul(weight, x).reshape(B, C, H, W)


class MultiScaleLinearAttention(nn.Module):
    """EfficientViT's attention on a feature map, (B, C, H, W) -> (B, C, H, W).

    The channels of `qkv` are grouped by head, each head's as [q | k | v].

    Args:
        dim: Channels C.
        head_dim: Channels D of a head; must divide `dim`.
        scales: Odd widths, in pixels, of the windows that the additional scales aggregate.
        eps: Added to the normaliser.

    Raises:
        ValueError: If `head_dim` does not divide `dim` or a scale is even.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 32,
        scales: Sequence[int] = (5,),
        eps: float = 1e-5,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"dim must be a multiple of head_dim, got dim={dim}, head_dim={head_dim}")
        if any(scale % 2 == 0 for scale in scales):
            raise ValueError(f"scales must be odd, got {tuple(scales)}")
        self.head_dim = head_dim
        self.eps = eps
        inner = 3 * dim
        self.qkv = nn.Sequential(OrderedDict(conv=nn.Conv2d(dim, inner, 1, bias=False, **dd)))
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inner, inner, scale, padding=scale // 2, groups=inner, bias=False, **dd),
                GroupedPointwise(inner, inner // head_dim, **dd),
            )
            for scale in scales
        )
        self.proj: nn.Module = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(dim * (1 + len(scales)), dim, 1, bias=False, **dd),
                norm=nn.BatchNorm2d(dim, eps=norm_eps, **dd),
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, _, H, W = x.shape
        D = self.head_dim
        scales = [self.qkv(x)]
        for aggregate in self.aggreg:
            scales.append(aggregate(scales[0]))
        qkv = torch.cat(scales, dim=1).reshape(-1, 3 * D, H * W)  # (M, 3 D, N), M = B * heads * scales
        q, k, v = qkv.split([D, D, D], dim=1)
        out = relu_linear_attention(q, k, v, self.eps)
        return self.proj(out.reshape(B, -1, H, W))


class MultiScaleLinearMixer(GridMixer):
    """Multi-scale linear attention as a token mixer, (B, N, C) -> (B, N, C).

    Adds `aggreg`, the aggregation of q, k and v at each coarser scale, and `proj_coarse`, these scales' part of the output projection.

    Raises:
        ValueError: On `scale_norm`, which would have to normalise all scales jointly; in `forward` if the tokens are not the grid's.
    """

    label, axes = "ReLU linear", "channels"
    output_projections = ("proj", "proj_coarse")
    scales: ClassVar[Tuple[int, ...]] = (5,)

    @classmethod
    def benchmark_function(cls, shape: MixerShape) -> Callable[..., Any]:
        """One scale."""
        return lambda q, k, v: relu_linear_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))

    def __init__(
        self, dim: int, num_heads: int = 8, scale_norm: bool = False, device=None, dtype=None, **kwargs: Any
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        if scale_norm:
            raise ValueError(f"{self.mechanism} has several scales, got scale_norm=True, expected False")
        dd = {"device": device, "dtype": dtype}
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * dim, 3 * dim, scale, padding=scale // 2, groups=3 * dim, bias=False, **dd),
                GroupedPointwise(3 * dim, 3 * num_heads, **dd),
            )
            for scale in self.scales
        )
        self.proj_coarse = nn.Linear(len(self.scales) * dim, dim, bias=False, **dd)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) -> (B, (1 + S) H, N, D) with S coarser scales, the pixel's own first."""
        B, H, N, D = q.shape
        P, (height, width) = self.num_prefix_tokens, self.grid_size
        qkv = torch.cat([q, k, v], dim=1).transpose(-2, -1)  # (B, 3 H, D, N)
        patches = qkv[..., P:].reshape(B, 3 * H * D, height, width)
        scales = [qkv]
        for aggregate in self.aggreg:
            coarse = aggregate(patches).reshape(B, 3 * H, D, N - P)
            scales.append(torch.cat([qkv[..., :P], coarse], dim=-1))
        S = len(scales)
        qkv = torch.stack(scales, dim=1).reshape(B, S, 3, H, D, N)
        qkv = qkv.transpose(1, 2).reshape(B, 3, S * H, D, N)
        q, k, v = qkv[:, 0].flatten(0, 1), qkv[:, 1].flatten(0, 1), qkv[:, 2].flatten(0, 1)  # (B S H, D, N)
        return relu_linear_attention(q, k, v).reshape(B, S * H, D, N).transpose(-2, -1)  # (B, S H, N, D)

    def project_out(self, x: torch.Tensor) -> torch.Tensor:
        """Mixed heads of all scales -> tokens (B, N, C)."""
        B, heads, N, D = x.shape
        x = x.transpose(1, 2).reshape(B, N, heads * D)  # (B, N, (1 + S) C)
        fine = self.num_heads * D
        return self.proj_drop(self.proj(x[..., :fine]) + self.proj_coarse(x[..., fine:]))
