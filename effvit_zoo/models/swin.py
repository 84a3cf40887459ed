"""Swin: a hierarchical transformer whose attention stays inside small windows that shift from block to block.

"Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv:2103.14030, ICCV 2021.
Official code: https://github.com/microsoft/Swin-Transformer @ f82860bfb5 (MIT). Own code with timm's parameter names: timm's state dicts
load as they are, and the downsampling is at the start of a stage (officially at the end of the one before).

Deliberate differences: any image size at any time. With `img_size` (or after `set_input_size`) windows and bias tables are those of timm's
model (Apache-2.0) with the same arguments, and so are the values. At another size each map gets the windows of a model built for that size,
with the biases of the same offsets. Pixels beyond a multiple of the patch size are cropped, as in timm. Positions and masks are not in the
state dict; those of official checkpoints are dropped.

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

from ..attention._mixer import is_plain_linear
from ..attention._recording import is_eager_inference, is_traced, remember
from ..attention.window import WindowAttention, crop_bias, window_kinds, window_rows
from ._base import NANO64, HierarchicalBackbone, Stage, build, imagenet_cfg, unwrap_state_dict

__all__ = ["SwinTransformer"]

Size = Tuple[int, int]
Windows = Union[int, Sequence[int], Sequence[Sequence[int]]]

CHUNK_TOKENS = 1024  # tokens per thread that a fused stage computes at a time, so that hidden layers stay in the cache


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
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(
            3
        )  # (B, H / 2, W / 2, 4 C), neighbours in the order of columns, then rows
        return self.reduction(self.norm(x))


class SwinBlock(nn.Module):
    """Window attention and MLP, each with LayerNorm before it and a residual; (B, H, W, C) -> (B, H, W, C)."""

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

    def run(
        self, source: torch.Tensor, result: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor, kinds: torch.Tensor
    ) -> None:
        """`forward` in eval mode, for a block with fused attention, some windows at a time.

        Args:
            source: All tokens of all images, (B * H * W, C).
            result: Output tokens, likewise; may be `source`, as every window reads only the tokens that it writes.
            rows: The tokens of each window, (M, N); negative for padding.
            bias: Addends of the scores, (K, heads, N, N).
            kinds: Index into the K of each window, (M,).
        """
        N = rows.shape[1]
        padded = rows.numel() != source.shape[0]
        step = max(1, CHUNK_TOKENS * torch.get_num_threads() // N)
        for row, kind in zip(rows.split(step), kinds.split(step), strict=True):
            row = row.flatten()
            real = row >= 0
            x = source.index_select(0, row.clamp(min=0) if padded else row)  # (m * N, C)
            y = self.norm1(x)
            if padded:
                y = y * real.unsqueeze(1)
            q, k, v = self.attn.project_qkv(y.reshape(-1, N, y.shape[1]))  # (m * heads, N, D)
            scores = bias.index_select(0, kind).reshape(-1, N, N).baddbmm_(q, k.transpose(1, 2))
            y = self.attn.join_heads(torch.bmm(F.softmax(scores, dim=-1), v)).flatten(0, 1)  # (m * N, C)
            if padded:
                row, x, y = row[real], x[real], y[real]
            x = _add_linear(x, y, self.attn.proj)
            y = _apply_inplace(self.mlp.act, self.mlp.fc1(self.norm2(x)))
            x = _add_linear(x, y, self.mlp.fc2)
            result.index_copy_(0, row, x)


def _apply_inplace(act: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if type(act) is nn.GELU:
        return torch.ops.aten.gelu_(x, approximate=act.approximate)  # torch has no other name for it
    return act(x)


def _add_linear(x: torch.Tensor, y: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """x + layer(y), written to x; a plain linear layer accumulates its products directly in x."""
    if is_plain_linear(layer) and layer.bias is not None:
        return x.add_(layer.bias).addmm_(y, layer.weight.t())
    return x.add_(layer(y))


@torch.jit.ignore
def _is_plain_inference(x: torch.Tensor) -> bool:
    return is_eager_inference(x) and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


class SwinStage(Stage):
    """Patch merging, except in the first stage, then blocks, every second one with shifted windows."""

    def fuse(self) -> "FusedStage":
        """The same stage with constant biases, in the fastest form for inference."""
        blocks: List[Any] = list(self.blocks)
        for block in blocks:
            block.attn.fuse()
        return FusedStage(self)


class FusedStage(Stage):
    """A stage for inference, with the blocks and the results of the stage that it was made from.

    Plain CPU inference computes a whole block for a few windows at a time, which keeps all intermediate results in the cache; blocks after
    the first work in place. Otherwise (gradients, autocast, tracing, other devices) it calls the blocks.
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
        """The blocks on a map (B, H, W, C), some windows of all images at a time."""
        B, H, W, C = x.shape
        first_token = H * W * torch.arange(B).reshape(B, 1)
        source = x.reshape(B * H * W, C)
        result = torch.empty_like(source)
        blocks: List[Any] = list(self.blocks)
        for block in blocks:
            window, shifted = block.attn.window_size, block.attn.shifted
            bias = crop_bias(block.attn.bias_by_kind, H, W, window)
            kinds = remember(window_kinds, x, H, W, window, shifted).repeat(B)  # (B * n,)
            rows = remember(window_rows, x, H, W, window, shifted)  # (n * N,)
            rows = torch.where(rows < 0, rows, rows + first_token).reshape(kinds.shape[0], -1)  # (B * n, N)
            block.run(source, result, rows, bias, kinds)
            source = result
        return result.reshape(B, H, W, C)


def stage_windows(window_size: Windows, num_stages: int) -> List[Size]:
    """(height, width) of every stage's windows.

    Args:
        window_size: One number, one (height, width), or one of these per stage. Two numbers are always (height, width).
        num_stages: Stages.

    Raises:
        ValueError: For anything else, or sizes that are not positive.
    """
    sizes: List[Any] = [window_size] * num_stages
    if not isinstance(window_size, int) and not (len(window_size) == 2 and isinstance(window_size[0], int)):
        sizes = list(window_size)
    pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
    if len(pairs) != num_stages or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise ValueError(
            f"window_size must be positive: a number, (height, width) or {num_stages} of these, got {window_size}"
        )
    return pairs


class SwinTransformer(HierarchicalBackbone):
    """Swin.

    Args:
        img_size: Height and width that the windows are made for; other sizes also run (see `dynamic_img_size`).
        patch_size: Side of the patches.
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier; 0 removes it.
        global_pool: Pooling before the classifier, "" for none.
        embed_dim: Channels of the first stage; every later stage doubles them.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        window_size: Windows: one number, (height, width), or one of these per stage. On smaller maps they shrink.
        dynamic_img_size: False refuses images of another size than `img_size`.
        mlp_ratio: Hidden over outer channels of the MLPs.
        qkv_bias: Bias in the projections to queries, keys and values.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and in the MLPs.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: On an unknown `global_pool` or an impossible `window_size`; when called, on an image smaller than a patch or, without
            `dynamic_img_size`, of another size than `img_size`.
    """

    output_fmt = "NHWC"
    stem_name: ClassVar[str] = "patch_embed"
    stages_name: ClassVar[str] = "layers"

    def __init__(
        self,
        img_size: Union[int, Sequence[int]] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Windows = 7,
        dynamic_img_size: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool)
        dd = {"device": device, "dtype": dtype}
        self.img_size = _image_size(img_size, patch_size)
        self.patch_size = patch_size
        self.dynamic_img_size = dynamic_img_size
        self.min_input_size = patch_size  # type: ignore[misc]
        windows = stage_windows(window_size, len(depths))
        grid = self.img_size[0] // patch_size, self.img_size[1] // patch_size
        self._windows_given = grid, windows  # basis of `set_input_size`
        windows = _windows_that_fit(windows, grid)

        self.patch_embed = PatchEmbed(
            None,
            patch_size,
            in_chans,
            embed_dim,
            norm_layer=nn.LayerNorm,
            output_fmt="NHWC",
            strict_img_size=False,
            **dd,
        )
        dims = [embed_dim * 2**i for i in range(len(depths))]
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks = [
                SwinBlock(
                    dim,
                    num_heads[i],
                    windows[i],
                    shifted=j % 2 == 1,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path_rates[i][j],  # type: ignore[index]
                    **dd,
                )
                for j in range(depth)
            ]
            stages.append(SwinStage(blocks, downsample=PatchMerging(dims[i - 1], dim, **dd) if i else None))
        self.layers = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1], **dd)
        self.head = ClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
        )
        self.finish(dims, first_reduction=patch_size)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, name: str) -> None:
        """Truncated normal 0.02 linear layers with zero bias; the patch convolution keeps torch's default, as officially."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """The bias tables."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    @torch.jit.ignore
    def set_input_size(
        self, img_size: Optional[Union[int, Sequence[int]]] = None, window_size: Optional[Windows] = None
    ) -> None:
        """Makes windows for another image size and interpolates the bias tables to them, with timm's semantics.

        Needed only to change the windows: any size runs without it. Exports keep the setting.

        Args:
            img_size: New height and width; None keeps the present one.
            window_size: New windows, as in the constructor; None scales the last ones that were given with the map.

        Raises:
            ValueError: On impossible sizes, or if the model is fused.
        """
        new_size = self.img_size if img_size is None else _image_size(img_size, self.patch_size)
        grid = new_size[0] // self.patch_size, new_size[1] // self.patch_size
        given = self._windows_given
        if window_size is not None:
            given = grid, stage_windows(window_size, self.num_stages)
        (given_height, given_width), given_windows = given
        windows = [
            (max(1, height * grid[0] // given_height), max(1, width * grid[1] // given_width))
            for height, width in given_windows
        ]
        stages: List[Any] = list(self.layers)  # after pruning fewer than windows
        for stage, window in zip(stages, _windows_that_fit(windows, grid), strict=False):
            for block in stage.blocks:
                block.attn.set_window_size(window)
        self.img_size, self._windows_given = new_size, given
        update_model_input_size(self, new_size, window_size=tuple(windows))

    @torch.jit.ignore
    def check_input(self, x: torch.Tensor) -> None:
        """Raises ValueError for an image smaller than a patch or of a size that is not allowed; no check under a tracer."""
        super().check_input(x)
        if not self.dynamic_img_size and not is_traced(x) and tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(f"dynamic_img_size=False allows images of {self.img_size} only, got {tuple(x.shape[-2:])}")

    def forward_stages(self, x: torch.Tensor, take: List[int], last: int) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        x = self.patch_embed(x)
        taken: List[torch.Tensor] = []
        for i, stage in enumerate(self.layers):
            if i <= last:
                x = stage(x)
                if i in take:
                    taken.append(x)
        return x, taken

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            self.check_input(x)
        return self.norm(self.layers(self.patch_embed(x)))


def _image_size(img_size: Union[int, Sequence[int]], patch_size: int) -> Size:
    height, width = to_2tuple(img_size)
    if min(height, width) < patch_size:
        raise ValueError(f"img_size must be at least the patch size {patch_size}, got {img_size}")
    return height, width


def _windows_that_fit(windows: Sequence[Size], grid: Size) -> List[Size]:
    """The windows cut to the map of their stage, the first of which is `grid`."""
    fitting = []
    for height, width in windows:
        fitting.append((min(height, grid[0]), min(width, grid[1])))
        grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
    return fitting


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Official keys -> timm's, which are ours; patches and bias tables of other sizes are resampled as timm does."""
    state_dict = unwrap_state_dict(state_dict)
    modules = dict(model.named_modules())
    # official stages downsample at their end, so only there the first one does
    downsample_at_end = any(key.startswith("layers.0.downsample.") for key in state_dict)
    converted = {}
    for key, value in state_dict.items():
        if key.endswith((".relative_position_index", ".attn_mask")):
            continue  # these follow from sizes
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        if downsample_at_end:
            key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", key)
        parent = modules.get(key.rpartition(".")[0])
        if (
            key == "patch_embed.proj.weight"
            and isinstance(parent, nn.Conv2d)
            and value.shape[2:] != parent.weight.shape[2:]
        ):
            value = resample_patch_embed(value, list(parent.weight.shape[2:]))
        if key.endswith(".relative_position_bias_table") and isinstance(parent, WindowAttention):
            table = parent.relative_position_bias_table
            if table is not None and value.shape != table.shape:
                value = resize_rel_pos_bias_table(value, parent.window_size, table.shape)
        converted[key] = value
    return converted


def _cfg(**overrides: Any) -> Dict[str, Any]:
    return imagenet_cfg(
        license="mit",
        origin_url="https://github.com/microsoft/Swin-Transformer",
        paper_name="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
        paper_ids="arXiv:2103.14030",
        **{"first_conv": "patch_embed.proj", **overrides},
    )


def _hub_cfg(name: str, tag: str) -> Dict[str, Any]:
    """Weights hosted by timm, with its crop of 0.9 (the official pipeline has 0.875 at 224 and squashes images to 384)."""
    overrides: Dict[str, Any] = {"hf_hub_id": f"timm/{name}.{tag}"}
    if name.endswith("_384"):
        overrides |= {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
    return _cfg(**overrides, **({"num_classes": 21841} if tag == "ms_in22k" else {}))


# ms_in1k: ImageNet-1k; ms_in22k: ImageNet-22k, 21,841 classes; ms_in22k_ft_in1k: the latter fine-tuned on ImageNet-1k.
# The first tag of an architecture is its default: the better one on ImageNet-1k.
TAGS = {
    "swin_tiny_patch4_window7_224": ("ms_in1k", "ms_in22k_ft_in1k", "ms_in22k"),
    "swin_small_patch4_window7_224": ("ms_in22k_ft_in1k", "ms_in1k", "ms_in22k"),
    "swin_base_patch4_window7_224": ("ms_in22k_ft_in1k", "ms_in1k", "ms_in22k"),
    "swin_base_patch4_window12_384": ("ms_in22k_ft_in1k", "ms_in1k", "ms_in22k"),
    "swin_large_patch4_window7_224": ("ms_in22k_ft_in1k", "ms_in22k"),
    "swin_large_patch4_window12_384": ("ms_in22k_ft_in1k", "ms_in22k"),
}

default_cfgs = generate_default_cfgs(
    {
        **{f"effzoo_{name}.{tag}": _hub_cfg(name, tag) for name, tags in TAGS.items() for tag in tags},
        # not in timm
        "effzoo_swin_tiny_c24_patch4_window8_256.ms_in1k": _cfg(
            url="https://github.com/SwinTransformer/storage/releases/download/v1.0.5/swin_tiny_c24_patch4_window8_256.pth",
            input_size=(3, 256, 256),
            pool_size=(8, 8),
            crop_pct=0.875,
        ),
        "effzoo_swin_nano64": _cfg(**{**NANO64, "pool_size": (4, 4)}),
    }
)


def _create(
    variant: str,
    pretrained: bool,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    kwargs: Dict[str, Any],
) -> SwinTransformer:
    match = re.search(r"_patch(\d+)_window(\d+)_(\d+)$", variant)
    if match is None:
        raise ValueError(f"a Swin is named ..._patch<n>_window<n>_<n>, got {variant}")
    patch_size, window_size, img_size = (int(number) for number in match.groups())
    sizes = {
        "img_size": img_size,
        "patch_size": patch_size,
        "window_size": window_size,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
    }
    return build(SwinTransformer, variant, pretrained, checkpoint_filter_fn, sizes, **kwargs)


@register_model
def effzoo_swin_nano64(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Not in the paper (`NANO64`), patches of 2 and windows of 4 pixels: 0.84M parameters, 0.056 GMACs at 64 with 10 classes."""
    sizes: Dict[str, Any] = {"img_size": 64, "patch_size": 2, "window_size": 4, "drop_path_rate": 0.0}
    sizes |= {"embed_dim": 24, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8)}
    return build(SwinTransformer, "effzoo_swin_nano64", pretrained, checkpoint_filter_fn, sizes, **kwargs)


@register_model
def effzoo_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """28.3M parameters, 4.5 GMACs at 224; ImageNet-1k top-1 81.2 (80.9 from ImageNet-22k) officially."""
    return _create("effzoo_swin_tiny_patch4_window7_224", pretrained, 96, (2, 2, 6, 2), (3, 6, 12, 24), kwargs)


@register_model
def effzoo_swin_small_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """49.6M parameters, 8.7 GMACs at 224; ImageNet-1k top-1 83.2 (83.2 from ImageNet-22k) officially."""
    return _create("effzoo_swin_small_patch4_window7_224", pretrained, 96, (2, 2, 18, 2), (3, 6, 12, 24), kwargs)


@register_model
def effzoo_swin_base_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """87.8M parameters, 15.4 GMACs at 224; ImageNet-1k top-1 83.5 (85.2 from ImageNet-22k) officially."""
    return _create("effzoo_swin_base_patch4_window7_224", pretrained, 128, (2, 2, 18, 2), (4, 8, 16, 32), kwargs)


@register_model
def effzoo_swin_base_patch4_window12_384(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """87.9M parameters, 47.1 GMACs at 384; ImageNet-1k top-1 84.5 (86.4 from ImageNet-22k) officially."""
    return _create("effzoo_swin_base_patch4_window12_384", pretrained, 128, (2, 2, 18, 2), (4, 8, 16, 32), kwargs)


@register_model
def effzoo_swin_large_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """196.5M parameters, 34.5 GMACs at 224; ImageNet-1k top-1 86.3 from ImageNet-22k officially."""
    return _create("effzoo_swin_large_patch4_window7_224", pretrained, 192, (2, 2, 18, 2), (6, 12, 24, 48), kwargs)


@register_model
def effzoo_swin_large_patch4_window12_384(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """196.7M parameters, 103.9 GMACs at 384; ImageNet-1k top-1 87.3 from ImageNet-22k officially."""
    return _create("effzoo_swin_large_patch4_window12_384", pretrained, 192, (2, 2, 18, 2), (6, 12, 24, 48), kwargs)


@register_model
def effzoo_swin_tiny_c24_patch4_window8_256(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Heads of 24 channels instead of 32. 28.3M parameters, 5.9 GMACs at 256; ImageNet-1k top-1 81.6 officially."""
    return _create("effzoo_swin_tiny_c24_patch4_window8_256", pretrained, 96, (2, 2, 6, 2), (4, 8, 16, 32), kwargs)
