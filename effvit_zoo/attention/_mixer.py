"""TokenMixer, the base class of all interchangeable token mixers: one q, k, v projection, heads, one output projection.

A mechanism is a pure function of q, k, v; its module subclasses `TokenMixer` and defines `mix(q, k, v)`. Constructor, call and
parameter names are those of timm's `Attention` (Apache-2.0), so a mixer is a drop-in `attn_layer` of timm's `VisionTransformer` and
loads its weights. Arguments that a mechanism cannot honour raise ValueError instead of being ignored.

Layout: (B, N, C) -> (B, N, C), heads inside: B batch, N tokens, C channels, H heads, D = C // H.
"""

import math
from typing import Any, Callable, ClassVar, NamedTuple, Optional, Tuple, Type, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import nn


class MixerShape(NamedTuple):
    """Size of one benchmark: N tokens, H heads, D channels per head."""

    tokens: int
    heads: int
    dim: int
    dtype: torch.dtype

    @property
    def grid(self) -> Tuple[int, int]:
        """(rows, columns) of N patches, as square as N allows."""
        rows = next(r for r in range(math.isqrt(self.tokens), 0, -1) if self.tokens % r == 0)
        return rows, self.tokens // rows


@torch.fx.wrap
@register_notrace_function
def refuse_mask(mechanism: str, attn_mask: Optional[torch.Tensor], is_causal: bool) -> None:
    """Raises ValueError if there is a mask or causality. A leaf for fx, to which every argument of a model looks like a tensor."""
    if attn_mask is not None:
        raise ValueError(f"{mechanism} attends to every token, got an attn_mask, expected None")
    if is_causal:
        raise ValueError(f"{mechanism} is bidirectional, got is_causal=True, expected False")


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the layer is a product with its weight and nothing else, so that the product may be computed in another way.

    Adapters and quantisation exchange the layer, pruning and observers hook into its call, and offloading replaces its `forward`.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is nn.Linear and "forward" not in layer.__dict__ and not any(hooks)


def _outputs(layer: nn.Module, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A part of a linear layer's outputs; fx records the call."""
    if isinstance(x, torch.fx.Proxy) or not is_plain_linear(layer):
        return layer(x)[..., start:stop]
    return F.linear(x, layer.weight[start:stop], None if layer.bias is None else layer.bias[start:stop])


class TokenMixer(nn.Module):
    """Projections, heads and dropout around `mix`; (B, N, C) -> (B, N, C).

    Subclasses override `mix`, or `mix_tokens` if they use the projections in another way, and set the members for the benchmark: `label`,
    `axes`, and `function` or `benchmark_function`. A mechanism that supports a mask or causality overrides `forward` too, from
    `project_qkv` and `project_out`; one with attention weights that can be dropped sets `supports_attn_drop`.

    Args:
        dim: Channels C of the tokens.
        num_heads: Heads H; must divide `dim`.
        qkv_bias: Bias in the q, k, v projection.
        qk_norm: Normalise each head's q and k over D with `norm_layer` before mixing.
        scale_norm: Normalise the mixed tokens over C with `norm_layer` before the output projection.
        proj_bias: Bias in the output projection.
        attn_drop: Dropout rate of the attention weights, for mechanisms that have any.
        proj_drop: Dropout rate after the output projection.
        norm_layer: Needed by `qk_norm` and `scale_norm`.

    Raises:
        ValueError: If `num_heads` does not divide `dim`, a norm is requested without `norm_layer`, or `attn_drop` is not supported.
    """

    label: ClassVar[str] = ""
    """Name in tables and plots."""
    axes: ClassVar[str] = "heads"
    """Axis order of the pure function's inputs: "heads" (B, H, N, D), "tokens" (B, N, C) or "channels" (B, H, D, N)."""
    function: ClassVar[Optional[Callable[..., Any]]] = None
    """The pure function where it needs nothing but q, k, v."""
    supports_attn_drop: ClassVar[bool] = False
    output_projections: ClassVar[Tuple[str, ...]] = ("proj",)
    """The Linear layers whose sum is the output, into which a factor of the output can be folded."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Optional[Type[nn.Module]] = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.mechanism = type(self).__name__
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"{self.mechanism}: dim must be a multiple of num_heads, got dim={dim}, num_heads={num_heads}"
            )
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError(f"{self.mechanism}: qk_norm and scale_norm need a norm_layer, got None")
        if attn_drop > 0.0 and not self.supports_attn_drop:
            raise ValueError(
                f"{self.mechanism} has no attention weights to drop, got attn_drop={attn_drop}, expected 0"
            )
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if norm_layer is not None and qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if norm_layer is not None and qk_norm else nn.Identity()
        self.norm = norm_layer(dim, **dd) if norm_layer is not None and scale_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def benchmark_function(cls, shape: MixerShape) -> Callable[..., Any]:
        """The mechanism without projections as a function of q, k, v, for tokens of this shape; here `function`."""
        assert cls.function is not None, f"{cls.__name__} has neither function nor benchmark_function"
        return cls.function

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The mechanism: q, k, v of (B, H, N, D) -> (B, H, N, D)."""
        raise NotImplementedError

    def project_qkv(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (B, N, C) -> q, k, v, each (B, H, N, D), q and k normalised if `qk_norm`."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)  # (B, N, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D) each
        return self.q_norm(q), self.k_norm(k), v

    def project_part(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Outputs `start` to `stop` of `qkv`, (B, N, C) -> (B, N, stop - start); a plain layer computes no others."""
        if torch.jit.is_scripting():
            part = self.qkv(x)[..., start:stop]
        else:
            part = _outputs(self.qkv, x, start, stop)
        return part

    def project_out(self, x: torch.Tensor) -> torch.Tensor:
        """Mixed heads (B, H, N, D) -> tokens (B, N, C)."""
        B, H, N, D = x.shape
        x = x.transpose(1, 2).reshape(B, N, H * D)  # (B, N, C)
        return self.proj_drop(self.proj(self.norm(x)))

    def mix_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Projections and mechanism, (B, N, C) -> (B, N, C)."""
        q, k, v = self.project_qkv(x)
        return self.project_out(self.mix(q, k, v))

    def forward(
        self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False
    ) -> torch.Tensor:
        refuse_mask(self.mechanism, attn_mask, is_causal)
        return self.mix_tokens(x)


@torch.fx.wrap
@register_notrace_function
def check_grid(mechanism: str, x: torch.Tensor, num_prefix_tokens: int, grid_size: Tuple[int, int]) -> None:
    """Raises ValueError unless tokens (B, N, C) are `num_prefix_tokens` and a grid of (rows, columns). Reads no batch size."""
    rows, columns = grid_size
    if rows < 1 or columns < 1 or x.shape[1] != num_prefix_tokens + rows * columns:
        raise ValueError(
            f"{mechanism} expected {num_prefix_tokens} prefix tokens and a grid of {rows} x {columns}, got {x.shape[1]} tokens"
        )


class GridMixer(TokenMixer):
    """Base class of mixers that read a patch's neighbourhood, (B, N, C) -> (B, N, C).

    Attributes:
        grid_size: (rows, columns) of patches in row-major order; set by the model after construction and whenever the image size changes.
        num_prefix_tokens: Number of tokens at the front that are not on the grid; set by the model.
    """

    __constants__: ClassVar = [
        "grid_size",
        "num_prefix_tokens",
    ]  # TorchScript sees class attributes only if they are named
    grid_size: Tuple[int, int] = (0, 0)
    num_prefix_tokens: int = 0

    def forward(
        self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False
    ) -> torch.Tensor:
        refuse_mask(self.mechanism, attn_mask, is_causal)
        check_grid(self.mechanism, x, self.num_prefix_tokens, self.grid_size)
        return self.mix_tokens(x)
