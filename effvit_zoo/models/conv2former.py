"""Conv2Former: transformer blocks whose attention is a large depthwise convolution multiplied with the values, in four stages.

"Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition", arXiv:2211.11943, TPAMI 2024.
Official code: https://github.com/HVision-NKU/Conv2Former @ 94fd1c4d0a (Apache-2.0), models/conv2former.py. Own code.

Kept from the official code: GELU before BatchNorm in the stem; no norm after the last stage, but a 1x1 convolution to 1280 channels, GELU
and LayerNorm between it and the pooling; GELU inside the MLP's residual; kernel 7 in `n` and `b_22k`, 11 in the others (its Jittor file
has 11 in `n` too; the PyTorch file had 11 until the commit that published the checkpoints, so 7 is presumably what they need).
Deliberate differences: names of the stages, of the layer scales and of the head are timm's (the official classifier is `pred`); the layer
scale's initial value is an argument; `forward_features` ends before the 1280-channel convolution, which belongs to the head.

Preprocessing is the README's, ImageNet's mean and std; the official model's `default_cfg` says 0.5, which the README contradicts. The
checkpoints are on a file-sharing site without direct downloads: `effzoo convert` reads files that were downloaded by hand.

Layout: feature maps (B, C, H, W). Any image size of at least 31 x 31; sides are cropped to a multiple of 32 at the right and bottom.
"""

import re
from typing import Any, ClassVar, Dict, List, Optional, Sequence

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, LayerScale2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..attention.conv_modulation import ConvModulation
from ._base import NANO64, HierarchicalBackbone, Stage, build, imagenet_cfg, unwrap_state_dict
from ._fold import fold_norm_before, fold_output_affine, inplace_activation

__all__ = ["Conv2Former"]


class Stem(nn.Sequential):
    """Three convolutions, the first two with GELU and then BatchNorm: (B, in_chans, H, W) -> (B, dim, H / 4, W / 4)."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, bias=False, **dd),
            nn.GELU(),
            nn.BatchNorm2d(dim // 2, **dd),
            nn.Conv2d(dim // 2, dim // 2, 3, padding=1, bias=False, **dd),
            nn.GELU(),
            nn.BatchNorm2d(dim // 2, **dd),
            nn.Conv2d(dim // 2, dim, 2, stride=2, bias=False, **dd),
        )

    def fuse(self) -> "Stem":
        """Folds the second BatchNorm into the convolution after it; the first one precedes a padded convolution and stays.

        The weights become channels_last, and with them, in eager mode, the feature maps of the whole network: LayerNorm and the 1x1
        convolutions then read them in memory order.
        """
        self[1], self[4] = inplace_activation(self[1]), inplace_activation(self[4])
        self[6] = fold_norm_before(self[5], self[6])  # type: ignore[type-var]
        self[5] = nn.Identity()
        return self.to(memory_format=torch.channels_last)


class Downsample(nn.Sequential):
    """Between stages: LayerNorm and a 2x2 convolution of stride 2."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(LayerNorm2d(in_dim, eps=1e-6, **dd), nn.Conv2d(in_dim, dim, 2, stride=2, **dd))


class Mlp(nn.Module):
    """LayerNorm and a pointwise MLP with a depthwise 3x3 convolution inside, which has its own residual."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = LayerNorm2d(dim, eps=1e-6, **dd)
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.pos = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.act: nn.Module = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.fc1(self.norm(x)))
        return self.fc2(x + self.act(self.pos(x)))


class Block(nn.Module):
    """Convolutional modulation and MLP, each with layer scale and residual."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        kernel_size: int,
        layer_scale_init: float,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.attn = ConvModulation(dim, kernel_size, **dd)
        self.mlp = Mlp(dim, hidden_dim, **dd)
        self.layer_scale_1: nn.Module = LayerScale2d(dim, layer_scale_init, **dd)
        self.layer_scale_2: nn.Module = LayerScale2d(dim, layer_scale_init, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.layer_scale_1(self.attn(x)))
        return x + self.drop_path(self.layer_scale_2(self.mlp(x)))

    def fuse(self) -> "Block":
        """Folds the layer scales into the convolutions before them; activations act in place."""
        if isinstance(self.layer_scale_1, LayerScale2d) and isinstance(self.layer_scale_2, LayerScale2d):
            self.attn.proj = fold_output_affine(self.attn.proj, self.layer_scale_1.gamma)
            self.mlp.fc2 = fold_output_affine(self.mlp.fc2, self.layer_scale_2.gamma)
            self.layer_scale_1 = self.layer_scale_2 = nn.Identity()
        self.attn.att[1] = inplace_activation(self.attn.att[1])
        self.mlp.act = inplace_activation(self.mlp.act)
        return self


class Head(ClassifierHead):
    """1x1 convolution, GELU and LayerNorm on the feature map, then timm's pooling, dropout and classifier `fc`."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_classes: int,
        pool_type: str,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(hidden_features, num_classes, pool_type, drop_rate, **dd)
        self.conv: nn.Module = nn.Conv2d(in_features, hidden_features, 1, **dd)
        self.act: nn.Module = nn.GELU()
        self.norm: nn.Module = LayerNorm2d(hidden_features, eps=1e-6, **dd)

    def reset(
        self,
        num_classes: int,
        pool_type: Optional[str] = None,
        reset_other: bool = False,
        in_features: Optional[int] = None,
        device=None,
        dtype=None,
    ) -> None:
        """A new classifier; `reset_other` removes all other layers but the pooling, for feature maps of `in_features` channels."""
        if reset_other:
            self.conv, self.act, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        width = in_features if isinstance(self.conv, nn.Identity) else None  # else that of the 1x1 convolution
        super().reset(num_classes, pool_type, in_features=width, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.norm(self.act(self.conv(x)))
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def fuse(self) -> "Head":
        """The activation acts in place."""
        self.act = inplace_activation(self.act)
        return self


class Conv2Former(HierarchicalBackbone):
    """Conv2Former.

    Args:
        depths: Blocks per stage.
        embed_dims: Channels per stage.
        kernel_size: Side of the modulation's depthwise kernels, in all stages.
        mlp_ratio: Hidden over outer channels of the MLPs.
        head_dim: Channels that the head widens the last feature map to.
        layer_scale_init: Initial layer scale.
        num_classes: Outputs of the classifier; 0 removes it.
        in_chans: Channels of the image.
        global_pool: One of `pool_types`; "" returns the widened feature map unpooled.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: On another `global_pool` or an even `kernel_size`.
    """

    min_input_size: ClassVar[int] = 31  # the stride-2 stem rounds up, the four layers after it round down

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        head_dim: int = 1280,
        layer_scale_init: float = 1e-6,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool)
        dd = {"device": device, "dtype": dtype}
        self.stem = Stem(in_chans, embed_dims[0], **dd)
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            rates: List[float] = drop_path_rates[i]  # type: ignore[assignment]
            blocks = [Block(dim, int(mlp_ratio * dim), kernel_size, layer_scale_init, rate, **dd) for rate in rates]
            stages.append(Stage(blocks, downsample=Downsample(embed_dims[i - 1], dim, **dd) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        self.head = Head(embed_dims[-1], head_dim, num_classes, global_pool, drop_rate, **dd)
        self.finish(embed_dims)


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Official keys -> ours. Every rule leaves our own names alone."""
    renamed = {}
    for key, value in unwrap_state_dict(state_dict).items():
        key = re.sub(r"^downsample_layers\.0\.", "stem.", key)
        key = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", key)
        key = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
        key = re.sub(r"(\.layer_scale_[12])$", r"\1.gamma", key)
        key = re.sub(r"^head\.0\.", "head.conv.", key)
        key = re.sub(r"^head\.2\.", "head.norm.", key)
        key = re.sub(r"^pred\.", "head.fc.", key)
        renamed[key] = value
    return renamed


def _cfg(**overrides: Any) -> Dict[str, Any]:
    return imagenet_cfg(
        license="apache-2.0",
        origin_url="https://github.com/HVision-NKU/Conv2Former",
        paper_name="Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition",
        paper_ids="arXiv:2211.11943",
        **overrides,
    )


def _published_cfg(published: str) -> Dict[str, Any]:
    return _cfg(
        notes=(
            f"Published: {published}.",
            "The checkpoints are linked from the official README (Baidu) and can't be fetched by a program; "
            "mean and std are the README's, the official default_cfg has 0.5.",
        ),
    )


default_cfgs = generate_default_cfgs(
    {
        "effzoo_conv2former_n": _published_cfg("ImageNet-1k top-1 81.5 at 224"),
        "effzoo_conv2former_t": _published_cfg("ImageNet-1k top-1 83.2 at 224"),
        "effzoo_conv2former_s": _published_cfg("ImageNet-1k top-1 84.1 at 224, 84.9 after ImageNet-22k"),
        "effzoo_conv2former_b": _published_cfg("ImageNet-1k top-1 84.4 at 224"),
        "effzoo_conv2former_b_22k": _published_cfg(
            "ImageNet-1k top-1 86.2 at 224 and 87.0 at 384 after ImageNet-22k, for a B of 90M parameters, which would be "
            "kernel 11; the official builder added for these weights has kernel 7 and 88.8M"
        ),
        "effzoo_conv2former_l": _published_cfg("ImageNet-1k top-1 87.0 at 224 and 87.7 at 384 after ImageNet-22k"),
        "effzoo_conv2former_nano64": _cfg(**NANO64),
    }
)


def _create(
    variant: str,
    pretrained: bool,
    depths: Sequence[int],
    embed_dims: Sequence[int],
    kernel_size: int,
    kwargs: Dict[str, Any],
) -> Conv2Former:
    sizes = {"depths": depths, "embed_dims": embed_dims, "kernel_size": kernel_size}
    return build(Conv2Former, variant, pretrained, checkpoint_filter_fn, sizes, **kwargs)


@register_model
def effzoo_conv2former_nano64(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """Not in the paper, whose N is larger (`NANO64`), kernel 7: 0.83M parameters, 0.051 GMACs at 64 with 10 classes."""
    kwargs = {"head_dim": 256, **kwargs}
    return _create("effzoo_conv2former_nano64", pretrained, (2, 3, 2, 1), (56, 80, 96, 112), 7, kwargs)


@register_model
def effzoo_conv2former_n(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """15.0M parameters, 2.3 GMACs at 224, kernel 7; ImageNet-1k top-1 81.5 published."""
    return _create("effzoo_conv2former_n", pretrained, (2, 2, 8, 2), (64, 128, 256, 512), 7, kwargs)


@register_model
def effzoo_conv2former_t(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """26.7M parameters, 4.4 GMACs at 224, kernel 11; ImageNet-1k top-1 83.2 published."""
    return _create("effzoo_conv2former_t", pretrained, (3, 3, 12, 3), (72, 144, 288, 576), 11, kwargs)


@register_model
def effzoo_conv2former_s(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """50.0M parameters, 8.7 GMACs at 224, kernel 11; ImageNet-1k top-1 84.1 published."""
    return _create("effzoo_conv2former_s", pretrained, (4, 4, 32, 4), (72, 144, 288, 576), 11, kwargs)


@register_model
def effzoo_conv2former_b(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """90.0M parameters, 15.9 GMACs at 224, kernel 11; ImageNet-1k top-1 84.4 published."""
    return _create("effzoo_conv2former_b", pretrained, (4, 4, 34, 4), (96, 192, 384, 768), 11, kwargs)


@register_model
def effzoo_conv2former_b_22k(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """88.8M parameters, 15.6 GMACs at 224, kernel 7: the official builder for the weights pre-trained on ImageNet-22k."""
    return _create("effzoo_conv2former_b_22k", pretrained, (4, 4, 34, 4), (96, 192, 384, 768), 7, kwargs)


@register_model
def effzoo_conv2former_l(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """198.9M parameters, 36.0 GMACs at 224, kernel 11; ImageNet-1k top-1 87.0 published, after ImageNet-22k."""
    return _create("effzoo_conv2former_l", pretrained, (4, 4, 48, 4), (128, 256, 512, 1024), 11, kwargs)
