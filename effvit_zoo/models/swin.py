"""Swin: a hierarchical transformer whose attention stays inside small windows that shift from block to block.

"Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv:2103.14030, ICCV 2021.
Official code: https://github.com/microsoft/Swin-Transformer @ f82860bfb5 (MIT). Own code with timm's parameter names: timm's state dicts
load as they are, and the downsampling is at the start of a stage (officially at the end of the one before).

Deliberate differences: any image size at any time. With `img_size` (or after `set_input_size`) windows and bias tables are what timm's model
(Apache-2.0) has with the same arguments, and so are the values; on another size than that, each map gets the windows that it would have
had if the model had been built for it, with the biases of the same offsets. Pixels beyond a multiple of the patch size are left out,
as timm does. Positions and masks are not in the state dict; the official checkpoints' are dropped.

Layout: feature maps (B, H, W, C).
"""

import re
from typing import Any, ClassVar, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    DropPath,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    resample_patch_embed,
    resize_rel_pos_bias_table,
    to_2tuple,
    trunc_normal_,
)
from timm.models import generate_default_cfgs, register_model
from timm.models._input import update_model_input_size
from torch import nn

from ..attention.window import WindowAttention, window_and_shift, window_kinds, window_rows
from ..errors import UserError
from ._base import HierarchicalBackbone, Stage, build, imagenet_cfg, is_traced, unwrap_state_dict

__all__ = ["SwinTransformer"]

Size = Tuple[int, int]
Windows = Union[int, Sequence[int], Sequence[Sequence[int]]]

CHUNK_TOKENS = 1024  # per thread: what a fused stage takes through a block at a time, so that hidden layers stay in the cache


class PatchMerging(nn.Module):
    """Between stages: 2 x 2 neighbours side by side, LayerNorm, linear; (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), out_dim)."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        x = x.reshape(B, (H + 1) // 2, 2, (W + 1) // 2, 2, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H / 2, W / 2, 4 C), neighbours in the order of columns, then rows
        return self.reduction(self.norm(x))


class SwinBlock(nn.Module):
    """Window attention and MLP, each behind a LayerNorm and beside a residual; (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Size,
        shifted: bool,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = WindowAttention(dim, num_heads, window_size, shifted, qkv_bias, attn_drop, proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class SwinStage(Stage):
    """Patch merging, if it is not the first stage, and blocks of which every second is shifted."""

    def fuse(self) -> "FusedStage":
        """The same stage with constant biases, in the form that is fastest without gradients."""
        for block in self.blocks:
            block.attn.fuse()
        return FusedStage(self)


class FusedStage(Stage):
    """A stage for inference: it computes what the stage does that it was made of, with the same blocks.

    In plain CPU inference it takes a few windows at a time through a whole block, which keeps all that lies between two maps in the
    cache; blocks after the first work in place. Otherwise (gradients, autocast, tracing, other devices) it just calls the blocks.
    """

    def __init__(self, stage: SwinStage) -> None:
        super().__init__(list(stage.blocks), stage.downsample)
        self.grad_checkpointing = stage.grad_checkpointing
        self.train(stage.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if not torch.jit.is_scripting() and not self.training and _is_plain_inference(x):
            return self.run_in_chunks(x)
        return self.blocks(x)

    def run_in_chunks(self, x: torch.Tensor) -> torch.Tensor:
        """The blocks on a map (B, H, W, C), some windows at a time; all windows are equal in this, those of one image or of several."""
        B, H, W, C = x.shape
        first_token = H * W * torch.arange(B).reshape(B, 1)
        source = x.reshape(B * H * W, C)
        result = torch.empty_like(source)
        for block in self.blocks:
            window, shifted = block.attn.window_size, block.attn.shifted
            rows = window_rows(H, W, window, shifted).expand(B, -1)  # (B, n * N)
            rows = torch.where(rows < 0, rows, rows + first_token)
            kinds = window_kinds(H, W, window, shifted).repeat(B)  # (B * n,)
            block.run(source, result, rows.reshape(kinds.shape[0], -1), kinds)
            source = result
        return result.reshape(B, H, W, C)
