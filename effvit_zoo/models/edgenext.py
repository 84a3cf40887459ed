"""EdgeNeXt: convolutional encoders with kernels that grow from 3 to 9, and one split depthwise transpose attention (SDTA) per late stage.

"EdgeNeXt: Efficiently Amalgamated CNN-Transformer Architecture for Mobile Vision Applications", arXiv:2206.10589, CADL 2022.
Official code: https://github.com/mmaaz60/EdgeNeXt @ 388450404f (MIT). Own code with timm's parameter names.

Kept from the official code: the last of the split channel groups may be narrower and bypasses the convolutions; SDTA adds nothing but the
MLP's output to its input; the position encoding is in stage 2 alone and always float32; the bn_hs variants continue from the normalised
map in SDTA, normalise before pooling, and of their convolutions only SDTA's have biases.
Deliberate differences, none in value: the position encoding has no batch axis, and its sines and cosines are cached per image size.

Layout: feature maps (B, C, H, W), channels last in memory; MLPs see (B, H, W, C), attention (B, N, C) with N = H * W. Any image of
at least 32 x 32 pixels.
"""

import functools
import math
import re
from typing import Any, ClassVar, Dict, List, Sequence, Tuple

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    register_notrace_function,
)
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..attention._recording import is_eager, is_traced, remember
from ..attention.cross_covariance import CrossCovarianceAttention
from ._base import NANO64, HierarchicalBackbone, Stage, build, imagenet_cfg, unwrap_state_dict
from ._fold import batch_norm_affine, fold_norm_after, fold_norm_before, fold_output_affine, inplace_activation

__all__ = ["EdgeNeXt"]

# Hidden features of an MLP per chunk and thread, 3 MB in float32. Larger buffers are allocated anew by the system in every call and do
# not stay in the cache: a batch of 8 cost the small model 28,000 page faults on one core, none in chunks, at 0.7 of the time.
HIDDEN_ELEMENTS = 3 * 2**18


def _norm(dim: int, bn_hs: bool, device=None, dtype=None) -> nn.Module:
    dd = {"device": device, "dtype": dtype}
    return nn.BatchNorm2d(dim, **dd) if bn_hs else LayerNorm2d(dim, eps=1e-6, **dd)


@torch.fx.wrap
@register_notrace_function
def fourier_features(x: torch.Tensor, wavelengths: List[float]) -> torch.Tensor:
    """Sines and cosines of every pixel's position, which runs from above 0 to 2 pi along either axis. One node for fx.

    Args:
        x: Feature map, of which size and device matter, (B, C, H, W).
        wavelengths: Divisors of the position, K of them.

    Returns:
        (H, W, 4 K) in float32: sine and cosine in turn for every wavelength, first of the row, then of the column.
    """
    divisor = torch.tensor(wavelengths, dtype=torch.float32, device=x.device)
    ones = torch.ones_like(x[0, 0], dtype=torch.float32)  # (H, W); sizes stay symbols where they are symbols
    rows, columns = ones.cumsum(0), ones.cumsum(1)
    rows = rows / (rows[-1:] + 1e-6) * (2 * math.pi)
    columns = columns / (columns[:, -1:] + 1e-6) * (2 * math.pi)
    rows, columns = rows.unsqueeze(-1) / divisor, columns.unsqueeze(-1) / divisor  # (H, W, K)
    rows = torch.stack((rows.sin(), rows.cos()), -1).flatten(2)
    columns = torch.stack((columns.sin(), columns.cos()), -1).flatten(2)
    return torch.cat((rows, columns), 2)


def _features_of_size(height: int, width: int, wavelengths: Tuple[float, ...], device: torch.device) -> torch.Tensor:
    return fourier_features(torch.empty(1, 1, height, width, device=device), list(wavelengths))


class PositionalEncodingFourier(nn.Module):
    """Fourier features of the pixels' positions, mapped to the network's width: (B, C, H, W) -> (1, C, H, W).

    Only the input's size and device matter. Features are float32 whatever the model's dtype; they follow from the size alone and are cached
    for the whole process.
    """

    def __init__(self, dim: int, hidden_dim: int = 32, temperature: float = 10000.0, device=None, dtype=None) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * hidden_dim, dim, 1, device=device, dtype=dtype)
        exponent = torch.arange(0, hidden_dim, 2, dtype=torch.float32, device="cpu") / hidden_dim
        self.wavelengths: List[float] = (temperature**exponent).tolist()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            features = fourier_features(x, self.wavelengths)
        else:
            features = self.features(x)
        features = features.to(x.dtype).permute(2, 0, 1).unsqueeze(0)
        return self.token_projection(features)

    @torch.jit.ignore
    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Fourier features of the map's size, (H, W, 2 * hidden_dim); under a tracer as operations on x, so that sizes stay symbols."""
        if not is_eager(x):
            return fourier_features(x, self.wavelengths)
        return remember(_features_of_size, x, x.shape[2], x.shape[3], tuple(self.wavelengths))


class Mlp(nn.Module):
    """Pointwise MLP, (..., C) -> (..., C)."""

    def __init__(self, dim: int, hidden_dim: int, act: nn.Module, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.act = act
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))

    def fuse(self) -> nn.Module:
        """The same layers, applied to chunks of tokens."""
        return ChunkedMlp(self)


class ChunkedMlp(nn.Module):
    """An `Mlp` whose hidden features stay in the cache: eager CPU inference computes them for a chunk of tokens at a time, in place."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = mlp.fc1, inplace_activation(mlp.act), mlp.fc2
        self.hidden_dim = mlp.fc1.out_features
        self.train(mlp.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and not is_traced(x) and not torch.is_grad_enabled() and x.device.type == "cpu":
            return self.forward_chunks(x)
        return self.fc2(self.act(self.fc1(x)))

    @torch.jit.ignore
    def forward_chunks(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        N = tokens.shape[0]
        chunks = math.ceil(N * self.hidden_dim / (HIDDEN_ELEMENTS * torch.get_num_threads()))
        if chunks <= 1:
            return self.fc2(self.act(self.fc1(x)))
        out = torch.empty_like(tokens)
        size = math.ceil(N / chunks)
        for chunk, target in zip(tokens.split(size), out.split(size), strict=True):
            target.copy_(self.fc2(self.act(self.fc1(chunk))))
        return out.view(x.shape)


class ChannelAffine(nn.Module):
    """weight * x + bias per channel: a BatchNorm in eval mode that no convolution can absorb. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale, shift = batch_norm_affine(norm)
        self.weight = nn.Parameter(scale.to(norm.weight.dtype)[:, None, None], requires_grad=norm.weight.requires_grad)
        self.bias = nn.Parameter(shift.to(norm.bias.dtype)[:, None, None], requires_grad=norm.bias.requires_grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.bias, x, self.weight)


class MlpBranch(nn.Module):
    """The last branch of both blocks: norm, MLP, layer scale `gamma`, stochastic depth."""

    def __init__(
        self,
        dim: int,
        expand_ratio: float,
        ls_init_value: float,
        bn_hs: bool,
        drop_path: float,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.ls_init_value = ls_init_value
        self.norm = _norm(dim, bn_hs, **dd)
        self.mlp = Mlp(dim, int(expand_ratio * dim), nn.Hardswish() if bn_hs else nn.GELU(), **dd)
        self.gamma = nn.Parameter(torch.empty(dim, **dd)) if ls_init_value > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def reset_parameters(self) -> None:
        """Layer scales only; every layer has its own."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("gamma"):
                nn.init.constant_(parameter, self.ls_init_value)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W), to be added to the block's input."""
        x = self.norm(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        x = self.mlp(x)
        if self.gamma is not None:
            x = x * self.gamma
        return self.drop_path(x.permute(0, 3, 1, 2))


class ConvBlock(MlpBranch):
    """Depthwise convolution, norm and MLP, with a residual."""

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        expand_ratio: float = 4.0,
        ls_init_value: float = 1e-6,
        bn_hs: bool = False,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, expand_ratio, ls_init_value, bn_hs, drop_path, **dd)
        self.conv_dw = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=not bn_hs, **dd)
        self.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(self.conv_dw(x))

    def fuse(self) -> "ConvBlock":
        """Folds a BatchNorm into the convolution before it and the layer scale into the MLP."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv_dw = fold_norm_after(self.conv_dw, self.norm)
            self.norm = nn.Identity()
        _fold_gamma(self)
        return self


class SplitTransposeBlock(MlpBranch):
    """SDTA: chained depthwise convolutions over groups of channels, cross-covariance attention, MLP; the residual adds the MLP's output.

    Args:
        dim: C.
        num_scales: Groups that the channels are split into, all of them ceil(C / num_scales) wide but the last.
        num_heads: Heads of the attention.
        use_pos_emb: Whether the position encoding is added before attention.

    Raises:
        ValueError: If the channels cannot be split into `num_scales` >= 2 such groups, or into the heads.
    """

    def __init__(
        self,
        dim: int,
        num_scales: int = 2,
        num_heads: int = 8,
        use_pos_emb: bool = False,
        expand_ratio: float = 4.0,
        ls_init_value: float = 1e-6,
        bn_hs: bool = False,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, expand_ratio, ls_init_value, bn_hs, drop_path, **dd)
        width = -(-dim // max(num_scales, 1))
        rest = dim - width * (num_scales - 1)
        if num_scales < 2 or rest <= 0:
            raise ValueError(
                f"expected two or more groups of channels, the last not empty, got {num_scales} of dim={dim}"
            )
        self.widths = [width] * (num_scales - 1) + [rest]
        self.convs = nn.ModuleList(
            [nn.Conv2d(width, width, 3, padding=1, groups=width, **dd) for _ in range(num_scales - 1)]
        )
        self.pos_embd = PositionalEncodingFourier(dim, **dd) if use_pos_emb else None
        self.norm_first = not bn_hs
        self.norm_xca = _norm(dim, bn_hs, **dd)
        self.gamma_xca = nn.Parameter(torch.empty(dim, **dd)) if ls_init_value > 0 else None
        self.xca = CrossCovarianceAttention(dim, num_heads, **dd)
        self.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.mix_scales(x)
        if not self.norm_first:
            x = self.norm_xca(x)
        if self.pos_embd is not None:
            x = x + self.pos_embd(x)
        return shortcut + self.branch(x + self.attend(self.norm_xca(x) if self.norm_first else x))

    def mix_scales(self, x: torch.Tensor) -> torch.Tensor:
        """Every group but the last is convolved after adding the result of the group before it, (B, C, H, W) -> (B, C, H, W)."""
        groups = x.split(self.widths, 1)
        mixed: List[torch.Tensor] = []
        y = groups[0]
        for i, conv in enumerate(self.convs):
            if i > 0:
                y = y + groups[i]
            y = conv(y)
            mixed.append(y)
        mixed.append(groups[-1])
        return torch.cat(mixed, 1)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Scaled attention on a feature map, (B, C, H, W) -> (B, C, H, W)."""
        B, C, H, W = x.shape
        x = self.xca(x.flatten(2).transpose(1, 2))  # (B, N, C)
        if self.gamma_xca is not None:
            x = x * self.gamma_xca
        return self.drop_path(x.transpose(1, 2).reshape(B, C, H, W))

    def fuse(self) -> "SplitTransposeBlock":
        """Folds the MLP's BatchNorm and both layer scales into the linear layers next to them.

        The other BatchNorm stays as an affine map, because the chained convolutions before it also feed each other.
        """
        if isinstance(self.norm, nn.BatchNorm2d):
            self.mlp.fc1 = fold_norm_before(self.norm, self.mlp.fc1)
            self.norm = nn.Identity()
        if isinstance(self.norm_xca, nn.BatchNorm2d):
            self.norm_xca = ChannelAffine(self.norm_xca)
        if self.gamma_xca is not None:
            self.xca.proj = fold_output_affine(self.xca.proj, self.gamma_xca)
            self.gamma_xca = None
        _fold_gamma(self)
        return self


def _fold_gamma(block: MlpBranch) -> None:
    if block.gamma is not None:
        block.mlp.fc2 = fold_output_affine(block.mlp.fc2, block.gamma)
        block.gamma = None


class Stem(nn.Sequential):
    """4x4 patches and norm: (B, in_chans, H, W) -> (B, dim, H / 4, W / 4), channels last in memory."""

    def __init__(self, in_chans: int, dim: int, bn_hs: bool = False, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(nn.Conv2d(in_chans, dim, 4, stride=4, bias=not bn_hs, **dd), _norm(dim, bn_hs, **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x)
        if not torch.jit.is_scripting() and not is_traced(x):
            x = x.contiguous(memory_format=torch.channels_last)  # the layout that LayerNorm keeps and every MLP reads
        return x

    def fuse(self) -> "Stem":
        """Folds a BatchNorm into the convolution."""
        if isinstance(self[1], nn.BatchNorm2d):
            self[0] = fold_norm_after(self[0], self[1])  # type: ignore[type-var]
            self[1] = nn.Identity()
        return self


class Downsample(nn.Sequential):
    """Norm and 2x2 patches: (B, in_dim, H, W) -> (B, dim, H / 2, W / 2)."""

    def __init__(self, in_dim: int, dim: int, bn_hs: bool = False, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(_norm(in_dim, bn_hs, **dd), nn.Conv2d(in_dim, dim, 2, stride=2, bias=not bn_hs, **dd))

    def fuse(self) -> "Downsample":
        """Folds a BatchNorm into the convolution after it."""
        if isinstance(self[0], nn.BatchNorm2d):
            self[1] = fold_norm_before(self[0], self[1])  # type: ignore[type-var]
            self[0] = nn.Identity()
        return self


class EdgeNeXt(HierarchicalBackbone):
    """EdgeNeXt.

    Args:
        depths: Blocks per stage.
        dims: Channels per stage.
        heads: Attention heads per stage.
        global_block_counts: Number of `SplitTransposeBlock` at the end of each stage; the others are `ConvBlock`.
        kernel_sizes: Depthwise kernel of the convolutional blocks per stage, odd.
        d2_scales: Groups of channels in the SDTA blocks per stage.
        use_pos_emb: Per stage, whether the SDTA blocks encode positions.
        expand_ratio: Hidden over outer channels of the MLPs.
        ls_init_value: Initial layer scale; 0 for none.
        bn_hs: The paper's variant with BatchNorm and Hardswish in place of LayerNorm and GELU.
        num_classes: Outputs of the classifier; 0 removes it.
        in_chans: Channels of the image.
        global_pool: "avg", "max", "avgmax", or "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: On another `global_pool`, an even kernel, or channels that heads or groups do not divide.
    """

    pool_types: ClassVar[Tuple[str, ...]] = ("", "avg", "max", "avgmax")
    min_input_size: ClassVar[int] = 32

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (48, 96, 160, 304),
        heads: Sequence[int] = (8, 8, 8, 8),
        global_block_counts: Sequence[int] = (0, 1, 1, 1),
        kernel_sizes: Sequence[int] = (3, 5, 7, 9),
        d2_scales: Sequence[int] = (2, 2, 3, 4),
        use_pos_emb: Sequence[bool] = (False, True, False, False),
        expand_ratio: float = 4.0,
        ls_init_value: float = 1e-6,
        bn_hs: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool)
        if any(size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes must be odd, got {tuple(kernel_sizes)}")
        dd = {"device": device, "dtype": dtype}
        shared: Dict[str, Any] = {"expand_ratio": expand_ratio, "ls_init_value": ls_init_value, "bn_hs": bn_hs, **dd}
        self.stem = Stem(in_chans, dims[0], bn_hs, **dd)
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            rates: List[float] = drop_path_rates[i]  # type: ignore[assignment]
            first_global = depths[i] - global_block_counts[i]
            blocks: List[nn.Module] = [
                ConvBlock(dim, kernel_sizes[i], drop_path=rate, **shared) for rate in rates[:first_global]
            ]
            blocks += [
                SplitTransposeBlock(dim, d2_scales[i], heads[i], use_pos_emb[i], drop_path=rate, **shared)
                for rate in rates[first_global:]
            ]
            stages.append(Stage(blocks, Downsample(dims[i - 1], dim, bn_hs, **dd) if i else None))
        self.stages = nn.Sequential(*stages)
        if bn_hs:
            self.norm = _norm(dims[-1], bn_hs, **dd)
            self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        else:
            self.norm = nn.Identity()
            self.head = NormMlpClassifierHead(
                dims[-1],
                num_classes,
                pool_type=global_pool,
                drop_rate=drop_rate,
                norm_layer=functools.partial(LayerNorm2d, eps=1e-6),
                **dd,
            )
        self.finish(dims)


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Official keys -> ours; timm's are ours already. Every rule leaves our own names alone."""
    norm_in_head = hasattr(model.head, "norm")  # the bn_hs variants have it outside, under its official name
    renamed = {}
    for key, value in unwrap_state_dict(state_dict).items():
        key = re.sub(r"^downsample_layers\.0\.", "stem.", key)
        key = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", key)
        key = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
        key = key.replace(".dwconv.", ".conv_dw.").replace(".pwconv", ".mlp.fc")
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        if norm_in_head:
            key = re.sub(r"^norm\.", "head.norm.", key)
        renamed[key] = value
    return renamed


def _cfg(crop_pct: float = 0.9, **overrides: Any) -> Dict[str, Any]:
    cfg = imagenet_cfg(
        input_size=(3, 256, 256),
        pool_size=(8, 8),
        crop_pct=crop_pct,
        license="mit",
        origin_url="https://github.com/mmaaz60/EdgeNeXt",
        paper_name="EdgeNeXt: Efficiently Amalgamated CNN-Transformer Architecture for Mobile Vision Applications",
        paper_ids="arXiv:2206.10589",
    )
    return {**cfg, **overrides}


def _official(path: str) -> Dict[str, Any]:
    """Weights that only the authors host, with the crop of their evaluation."""
    return _cfg(0.875, url=f"https://github.com/mmaaz60/EdgeNeXt/releases/download/{path}.pth")


# usi: with the distillation recipe of arXiv:2204.03475. Crops of timm's weights are timm's.
default_cfgs = generate_default_cfgs(
    {
        "effzoo_edgenext_xx_small.in1k": _cfg(
            hf_hub_id="timm/edgenext_xx_small.in1k", test_input_size=(3, 288, 288), test_crop_pct=1.0
        ),
        "effzoo_edgenext_x_small.in1k": _cfg(
            hf_hub_id="timm/edgenext_x_small.in1k", test_input_size=(3, 288, 288), test_crop_pct=1.0
        ),
        "effzoo_edgenext_small.usi_in1k": _cfg(
            0.95, hf_hub_id="timm/edgenext_small.usi_in1k", test_input_size=(3, 320, 320), test_crop_pct=1.0
        ),
        "effzoo_edgenext_small.in1k": _official("v1.0/edgenext_small"),
        "effzoo_edgenext_base.usi_in1k": _cfg(
            0.95, hf_hub_id="timm/edgenext_base.usi_in1k", test_input_size=(3, 320, 320), test_crop_pct=1.0
        ),
        "effzoo_edgenext_base.in21k_ft_in1k": _cfg(
            0.95, hf_hub_id="timm/edgenext_base.in21k_ft_in1k", test_input_size=(3, 320, 320), test_crop_pct=1.0
        ),
        "effzoo_edgenext_base.in1k": _official("v1.2/edgenext_base"),
        "effzoo_edgenext_xx_small_bn_hs.in1k": _official("v1.0/edgenext_xx_small_bn_hs"),
        "effzoo_edgenext_x_small_bn_hs.in1k": _official("v1.0/edgenext_x_small_bn_hs"),
        "effzoo_edgenext_small_bn_hs.in1k": _official("v1.0/edgenext_small_bn_hs"),
        "effzoo_edgenext_nano64": _cfg(**NANO64),
    }
)


_NANO64 = {"depths": (4, 4, 2, 1), "dims": (56, 80, 96, 112), "heads": (4, 4, 4, 4)}
_XX_SMALL = {"depths": (2, 2, 6, 2), "dims": (24, 48, 88, 168), "heads": (4, 4, 4, 4)}
_X_SMALL = {"depths": (3, 3, 9, 3), "dims": (32, 64, 100, 192), "heads": (4, 4, 4, 4)}
_SMALL = {"depths": (3, 3, 9, 3), "dims": (48, 96, 160, 304), "heads": (8, 8, 8, 8)}
_BASE = {"depths": (3, 3, 9, 3), "dims": (80, 160, 288, 584), "heads": (8, 8, 8, 8)}


def _create(variant: str, pretrained: bool, sizes: Dict[str, Any], kwargs: Dict[str, Any]) -> EdgeNeXt:
    return build(EdgeNeXt, variant, pretrained, checkpoint_filter_fn, sizes, **kwargs)


@register_model
def effzoo_edgenext_nano64(pretrained: bool = False, **kwargs: Any) -> EdgeNeXt:
    """Not in the paper (`NANO64`): 0.79M parameters, 0.048 GMACs at 64 with 10 classes."""
    return _create("effzoo_edgenext_nano64", pretrained, _NANO64, kwargs)


@register_model
def effzoo_edgenext_xx_small(pretrained: bool = False, **kwargs: Any) -> EdgeNeXt:
    """1.3M parameters, 0.26 GMACs at 256; ImageNet-1k top-1 71.2 in the paper's repository."""
    return _create("effzoo_edgenext_xx_small", pretrained, _XX_SMALL, kwargs)


@register_model
def effzoo_edgenext_x_small(pretrained: bool = False, **kwargs: Any) -> EdgeNeXt:
    """2.3M parameters, 0.53 GMACs at 256; ImageNet-1k top-1 75.0 in the paper's repository."""
    return _create("effzoo_edgenext_x_small", pretrained, _X_SMALL, kwargs)


@register_model
def effzoo_edgenext_small(pretrained: bool = False, **kwargs: Any) -> EdgeNeXt:
    """5.6M parameters, 1.25 GMACs at 256; ImageNet-1k top-1 79.4 in the paper's repository, 81.1 with USI."""
    return _create("effzoo_edgenext_small", pretrained, _SMALL, kwargs)


@register_model
def effzoo_edgenext_base(pretrained: bool = False, **kwargs: Any) -> EdgeNeXt:
    """18.5M parameters, 3.83 GMACs at 256; ImageNet-1k top-1 82.5 in the paper's repository, 83.7 with USI."""
    return _create("effzoo_edgenext_base", pretrained, _BASE, kwargs)


@register_model
def effzoo_edgenext_xx_small_bn_hs(pretrained: bool = False, **kwargs: Any) -> EdgeNeXt:
    """1.3M parameters, 0.26 GMACs at 256; ImageNet-1k top-1 70.3 in the paper's repository."""
    return _create("effzoo_edgenext_xx_small_bn_hs", pretrained, {**_XX_SMALL, "bn_hs": True}, kwargs)


@register_model
def effzoo_edgenext_x_small_bn_hs(pretrained: bool = False, **kwargs: Any) -> EdgeNeXt:
    """2.3M parameters, 0.53 GMACs at 256; ImageNet-1k top-1 74.9 in the paper's repository."""
    return _create("effzoo_edgenext_x_small_bn_hs", pretrained, {**_X_SMALL, "bn_hs": True}, kwargs)


@register_model
def effzoo_edgenext_small_bn_hs(pretrained: bool = False, **kwargs: Any) -> EdgeNeXt:
    """5.6M parameters, 1.25 GMACs at 256; ImageNet-1k top-1 78.4 in the paper's repository."""
    return _create("effzoo_edgenext_small_bn_hs", pretrained, {**_SMALL, "bn_hs": True}, kwargs)
