"""EfficientViT of MIT HAN lab: convolutional stages, then stages that alternate multi-scale linear attention and inverted bottlenecks.

"EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction", arXiv:2205.14756, ICCV 2023. Not MSRA's EfficientViT.
Official code: https://github.com/mit-han-lab/efficientvit @ de7d7733cc (Apache-2.0). Own code with timm's parameter names.

Two series follow one plan (`SERIES`): b (Hardswish, inverted bottlenecks, attention in the last two stages, norm eps 1e-5) and l (GELU,
fused inverted bottlenecks, attention in the last stage only, norm eps 1e-7).

Kept from the official code: the series' norm eps in every norm (timm has 1e-5 in the head's BatchNorm of the l series too, which moves
logits by less than 1e-6). Kept from timm: eps 1e-5 in the attention, where the official code has 1e-15; see `attn_eps`. Unlike in both, the
head also works without pooling: it then classifies every position.

Layout: feature maps (B, C, H, W). Any image size; a stride-2 convolution halves it, rounding up.
"""

import re
from collections import OrderedDict
from typing import Any, ClassVar, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from timm.layers import DropPath, SelectAdaptivePool2d
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..attention.multiscale_linear import MultiScaleLinearAttention
from ..errors import unknown_choice_text
from ._base import NANO64, HierarchicalBackbone, Stage, build, imagenet_cfg, unwrap_state_dict
from ._fold import fold_norm_after

__all__ = ["EfficientViT"]


class Layer(NamedTuple):
    """One convolution of a local block."""

    name: str
    kernel_size: int
    depthwise: bool = False


# convolutions of the local blocks; the first with a kernel above 1 has the block's stride, all but the last the hidden width
LOCAL_BLOCKS: Dict[str, Tuple[Layer, ...]] = {
    "separable": (Layer("depth_conv", 3, depthwise=True), Layer("point_conv", 1)),
    "plain": (Layer("conv1", 3), Layer("conv2", 3)),
    "inverted": (Layer("inverted_conv", 1), Layer("depth_conv", 3, depthwise=True), Layer("point_conv", 1)),
    "fused": (Layer("spatial_conv", 3), Layer("point_conv", 1)),
}


class StagePlan(NamedTuple):
    """One stage: a local block of stride 2 without shortcut, then `depth` blocks, one less with `depth_counts_first`."""

    local_block: str
    first_expansion: int
    expansion: int
    attention: bool = False
    fewer_norms: bool = False
    depth_counts_first: bool = False


class Series(NamedTuple):
    """Settings that all sizes of a series share."""

    stem_block: str
    stages: Tuple[StagePlan, ...]
    act: str
    norm_eps: float


ACTIVATIONS = {
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}

SERIES: Dict[str, Series] = {
    "b": Series(
        stem_block="separable",
        stages=(
            StagePlan("inverted", 4, 4, depth_counts_first=True),
            StagePlan("inverted", 4, 4, depth_counts_first=True),
            StagePlan("inverted", 4, 4, attention=True, fewer_norms=True),
            StagePlan("inverted", 4, 4, attention=True, fewer_norms=True),
        ),
        act="hardswish",
        norm_eps=1e-5,
    ),
    "l": Series(
        stem_block="plain",
        stages=(
            StagePlan("fused", 16, 4),
            StagePlan("fused", 16, 4),
            StagePlan("inverted", 16, 4, fewer_norms=True),
            StagePlan("inverted", 24, 6, attention=True, fewer_norms=True),
        ),
        act="gelu_tanh",
        norm_eps=1e-7,
    ),
}


class ConvNormAct(nn.Sequential):
    """Convolution, optional BatchNorm, optional activation; without BatchNorm the convolution has a bias.

    Args:
        in_dim: Channels in.
        dim: Channels out.
        kernel_size: Odd width in pixels; half of it is padded.
        stride: Pixels in per pixel out.
        depthwise: One filter per channel.
        norm_eps: Eps of BatchNorm, None for no BatchNorm.
        act: One of `ACTIVATIONS`, None for none.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        stride: int = 1,
        depthwise: bool = False,
        norm_eps: Optional[float] = 1e-5,
        act: Optional[str] = None,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        groups = in_dim if depthwise else 1
        conv = nn.Conv2d(in_dim, dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=norm_eps is None, **dd)
        layers: List[Tuple[str, nn.Module]] = [("conv", conv)]
        if norm_eps is not None:
            layers.append(("norm", nn.BatchNorm2d(dim, eps=norm_eps, **dd)))
        if act is not None:
            layers.append(("act", ACTIVATIONS[act]()))
        super().__init__(OrderedDict(layers))

    def fuse(self) -> nn.Module:
        """Convolution and activation, with BatchNorm folded in; the convolution alone if there is no activation."""
        return _fold_norm(self)


def _fold_norm(layers: nn.Sequential) -> nn.Module:
    """A chain of conv, optional norm and optional act, with the norm folded in."""
    parts = dict(layers.named_children())
    if "norm" in parts:
        parts["conv"] = fold_norm_after(parts["conv"], parts.pop("norm"))  # type: ignore[type-var]
    return nn.Sequential(OrderedDict(parts)) if len(parts) > 1 else parts["conv"]


class LocalBlock(nn.Sequential):
    """A chain of `ConvNormAct`, the last without activation: (B, in_dim, H, W) -> (B, dim, H / stride, W / stride).

    Args:
        kind: One of `LOCAL_BLOCKS`.
        in_dim: Channels in.
        dim: Channels out.
        stride: Pixels in per pixel out.
        expansion: Hidden channels per channel in.
        fewer_norms: BatchNorm after the last convolution only.
        norm_eps: Eps of BatchNorm.
        act: One of `ACTIVATIONS`.
    """

    def __init__(
        self,
        kind: str,
        in_dim: int,
        dim: int,
        stride: int = 1,
        expansion: int = 1,
        fewer_norms: bool = False,
        norm_eps: float = 1e-5,
        act: str = "hardswish",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        hidden = in_dim * expansion
        plan = LOCAL_BLOCKS[kind]
        for i, layer in enumerate(plan):
            last = i == len(plan) - 1
            wide = layer.kernel_size > 1
            conv = ConvNormAct(
                in_dim,
                dim if last else hidden,
                layer.kernel_size,
                stride if wide else 1,
                depthwise=layer.depthwise,
                norm_eps=None if fewer_norms and not last else norm_eps,
                act=None if last else act,
                device=device,
                dtype=dtype,
            )
            self.add_module(layer.name, conv)
            in_dim = hidden
            if wide:
                stride = 1


class ResidualBlock(nn.Module):
    """x + main(x), or main(x) without shortcut."""

    def __init__(self, main: nn.Module, shortcut: bool = True) -> None:
        super().__init__()
        self.main = main
        self.shortcut = shortcut
        self.drop_path: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.main(x)
        return x + self.drop_path(y) if self.shortcut else y  # x first: the sum takes its memory layout


class Stem(nn.Sequential):
    """A convolution of stride 2, then local blocks: (B, in_chans, H, W) -> (B, dim, H / 2, W / 2)."""

    def __init__(
        self, kind: str, in_chans: int, dim: int, depth: int, norm_eps: float, act: str, device=None, dtype=None
    ) -> None:
        super().__init__()
        common = {"norm_eps": norm_eps, "act": act, "device": device, "dtype": dtype}
        self.in_conv: nn.Module = ConvNormAct(in_chans, dim, 3, stride=2, **common)
        for i in range(depth):
            self.add_module(f"res{i}", ResidualBlock(LocalBlock(kind, dim, dim, **common)))

    def fuse(self) -> "Stem":
        """Folds the first BatchNorm and makes the network channels-last: all later layers follow the layout of this output.

        Depthwise convolutions then run two to three times as fast on a CPU; the graph stays the same.
        """
        self.in_conv = _fold_norm(self.in_conv)  # type: ignore[arg-type]
        self.in_conv.conv.to(memory_format=torch.channels_last)
        return self


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention for global context, an inverted bottleneck for local context, each with a residual."""

    def __init__(self, attention: MultiScaleLinearAttention, local: LocalBlock) -> None:
        super().__init__()
        self.context_module = ResidualBlock(attention)
        self.local_module = ResidualBlock(local)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.local_module(self.context_module(x))

    def fuse(self) -> "EfficientViTBlock":
        """Folds BatchNorm into the attention's projection; the convolutions of the local block fold their own."""
        attention = self.context_module.main
        if isinstance(attention.proj, nn.Sequential):
            attention.proj = _fold_norm(attention.proj)
        return self


class Head(nn.Module):
    """Pointwise convolution, pooling, one hidden layer, classifier. Without pooling, the layers after it are applied at every position.

    Args:
        in_features: Channels of the feature map.
        widths: Channels of the convolution and of the hidden layer.
        num_classes: Outputs; 0 for no classifier.
        pool_type: As timm's `SelectAdaptivePool2d`, "" for none.
        drop_rate: Dropout before the classifier.
        act: One of `ACTIVATIONS`.
        norm_eps: Eps of both norms.
    """

    def __init__(
        self,
        in_features: int,
        widths: Sequence[int],
        num_classes: int,
        pool_type: str,
        drop_rate: float,
        act: str,
        norm_eps: float,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_features = in_features
        self.num_features = widths[1]
        self.in_conv: nn.Module = ConvNormAct(in_features, widths[0], 1, norm_eps=norm_eps, act=act, **dd)
        self._set_pool(pool_type)
        self.classifier = nn.Sequential(
            nn.Linear(widths[0], widths[1], bias=False, **dd),
            nn.LayerNorm(widths[1], eps=norm_eps, **dd),
            ACTIVATIONS[act](),
            nn.Dropout(drop_rate),
            _classifier(widths[1], num_classes, **dd),
        )

    def _set_pool(self, pool_type: str) -> None:
        self.pooled = pool_type != ""
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=self.pooled)

    def reset(
        self,
        num_classes: int,
        pool_type: Optional[str] = None,
        reset_other: bool = False,
        in_features: Optional[int] = None,
        device=None,
        dtype=None,
    ) -> None:
        """A fresh classifier; arguments as in `HierarchicalBackbone.reset_classifier`, `in_features` takes effect with `reset_other`."""
        if pool_type is not None:
            self._set_pool(pool_type)
        if reset_other:
            self.in_conv = nn.Identity()
            for i in range(3):
                self.classifier[i] = nn.Identity()
            if in_features is not None:
                self.in_features = in_features
            self.num_features = self.in_features
        self.classifier[4] = _classifier(self.num_features, num_classes, device=device, dtype=dtype)
        self.train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(self.in_conv(x))
        if not self.pooled:
            x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        if pre_logits:  # TorchScript cannot slice a Sequential
            x = self.classifier[3](self.classifier[2](self.classifier[1](self.classifier[0](x))))
        else:
            x = self.classifier(x)
        if not self.pooled:
            x = x.permute(0, 3, 1, 2)  # (B, C, H, W)
        return x


def _classifier(in_features: int, num_classes: int, device=None, dtype=None) -> nn.Module:
    return nn.Linear(in_features, num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()


class EfficientViT(HierarchicalBackbone):
    """EfficientViT (MIT HAN lab).

    Args:
        series: "b" or "l", see `SERIES`.
        widths: Channels of the stem and of the four stages.
        depths: Blocks of the stem and of the stages.
        head_dim: Channels of an attention head.
        head_widths: Channels of the head's convolution and of its hidden layer.
        num_classes: Outputs; 0 removes the classifier, but not the hidden layer.
        in_chans: Channels of the image.
        global_pool: "avg", "max", "avgmax", or "" for logits at every position.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last residual branch of the stages, growing linearly over the branches.
        attn_eps: Added to the normaliser of the attention. The official value is 1e-15; with it logits differ by less than 1e-5.

    Raises:
        ValueError: On an unknown `series` or `global_pool`, or if `head_dim` does not divide the width of a stage with attention.
    """

    pool_types: ClassVar[Tuple[str, ...]] = ("", "avg", "max", "avgmax")

    def __init__(
        self,
        series: str = "b",
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        depths: Sequence[int] = (1, 2, 3, 3, 4),
        head_dim: int = 16,
        head_widths: Sequence[int] = (1536, 1600),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool)
        dd = {"device": device, "dtype": dtype}
        if series not in SERIES:
            raise ValueError(unknown_choice_text("EfficientViT series", series, list(SERIES)))
        plan = SERIES[series]
        common = {"norm_eps": plan.norm_eps, "act": plan.act, **dd}

        dim = widths[0]
        self.stem = Stem(plan.stem_block, in_chans, dim, depths[0], **common)

        stages = []
        for stage, width, depth in zip(plan.stages, widths[1:], depths[1:], strict=True):
            kind, fewer = stage.local_block, stage.fewer_norms
            first = LocalBlock(kind, dim, width, 2, stage.first_expansion, fewer, **common)
            dim = width
            blocks: List[nn.Module] = [ResidualBlock(first, shortcut=False)]
            for _ in range(depth - stage.depth_counts_first):
                local = LocalBlock(kind, dim, dim, 1, stage.expansion, fewer, **common)
                if stage.attention:
                    attention = MultiScaleLinearAttention(dim, head_dim, eps=attn_eps, norm_eps=plan.norm_eps, **dd)
                    blocks.append(EfficientViTBlock(attention, local))
                else:
                    blocks.append(ResidualBlock(local))
            stages.append(Stage(blocks))
        self.stages = nn.Sequential(*stages)
        if drop_path_rate > 0.0:
            branches = [m for m in self.stages.modules() if isinstance(m, ResidualBlock) and m.shortcut]
            for i, branch in enumerate(branches):
                branch.drop_path = DropPath(drop_path_rate * (i + 1) / len(branches))

        self.norm = nn.Identity()
        self.head = Head(dim, head_widths, num_classes, global_pool, drop_rate, plan.act, plan.norm_eps, **dd)
        self.finish(widths[1:])

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer, `nn.Identity` if there is none."""
        return self.head.classifier[-1]  # type: ignore[index, return-value]


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Official keys -> ours; timm's are ours already. Every rule leaves our own names alone."""
    state_dict = unwrap_state_dict(state_dict)
    # the l series numbers its stem as stage 0, and only a stem begins with a bare convolution
    stem_is_stage = any(re.match(r"(?:backbone\.)?stages\.0\.op_list\.0\.conv\.", key) for key in state_dict)
    first_stage = 1 if stem_is_stage else 0
    renamed = {}
    for key, value in state_dict.items():
        if stem_is_stage:
            key = re.sub(r"^(?:backbone\.)?stages\.0\.op_list\.", "input_stem.op_list.", key)
        key = re.sub(r"^(?:backbone\.)?input_stem\.op_list\.0\.", "stem.in_conv.", key)
        key = re.sub(r"^(?:backbone\.)?input_stem\.op_list\.(\d+)\.", lambda m: f"stem.res{int(m[1]) - 1}.", key)
        key = re.sub(
            r"^(?:backbone\.)?stages\.(\d+)\.op_list\.(\d+)\.",
            lambda m: f"stages.{int(m[1]) - first_stage}.blocks.{m[2]}.",
            key,
        )
        key = key.replace("head.op_list.0.", "head.in_conv.")
        key = key.replace("head.op_list.2.linear.", "head.classifier.0.")
        key = key.replace("head.op_list.2.norm.", "head.classifier.1.")
        key = key.replace("head.op_list.3.linear.", "head.classifier.4.")
        renamed[key] = value
    return renamed


def _cfg(**overrides: Any) -> Dict[str, Any]:
    return imagenet_cfg(
        first_conv="stem.in_conv.conv",
        classifier="head.classifier.4",
        license="apache-2.0",
        origin_url="https://github.com/mit-han-lab/efficientvit",
        paper_name="EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction",
        paper_ids="arXiv:2205.14756",
        **overrides,
    )


def _weights_cfg(variant: str, size: int) -> Dict[str, Any]:
    """ImageNet-1k weights of one size, from timm's copy on the Hub or else from the authors'."""
    name = f"efficientvit_{variant}"
    overrides: Dict[str, Any] = {"hf_hub_id": f"timm/{name}.r{size}_in1k"}
    if (variant, size) in (("l2", 320), ("l3", 288)):
        overrides = {"url": f"https://huggingface.co/han-cai/efficientvit-cls/resolve/main/{name}_r{size}.pt"}
    if variant == "b0":
        overrides["notes"] = ("registered officially, but without published accuracy or link",)
    return _cfg(
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        crop_pct=0.95 if variant.startswith("b") and size == 224 else 1.0,
        **overrides,
    )


# image sizes with published weights
RESOLUTIONS = {
    "b0": (224,),
    "b1": (224, 256, 288),
    "b2": (224, 256, 288),
    "b3": (224, 256, 288),
    "l1": (224,),
    "l2": (224, 256, 288, 320, 384),
    "l3": (224, 256, 288, 320, 384),
}

default_cfgs = generate_default_cfgs(
    {
        **{
            f"effzoo_efficientvit_{variant}.r{size}_in1k": _weights_cfg(variant, size)
            for variant, sizes in RESOLUTIONS.items()
            for size in sizes
        },
        "effzoo_efficientvit_nano64": _cfg(**NANO64),
    }
)

# name: (series, widths, depths, head_dim, head_widths)
SIZES: Dict[str, Tuple[str, Tuple[int, ...], Tuple[int, ...], int, Tuple[int, int]]] = {
    "nano64": ("b", (16, 72, 80, 96, 96), (1, 3, 4, 1, 1), 16, (192, 192)),
    "b0": ("b", (8, 16, 32, 64, 128), (1, 2, 2, 2, 2), 16, (1024, 1280)),
    "b1": ("b", (16, 32, 64, 128, 256), (1, 2, 3, 3, 4), 16, (1536, 1600)),
    "b2": ("b", (24, 48, 96, 192, 384), (1, 3, 4, 4, 6), 32, (2304, 2560)),
    "b3": ("b", (32, 64, 128, 256, 512), (1, 4, 6, 6, 9), 32, (2304, 2560)),
    "l1": ("l", (32, 64, 128, 256, 512), (1, 1, 1, 6, 6), 32, (3072, 3200)),
    "l2": ("l", (32, 64, 128, 256, 512), (1, 2, 2, 8, 8), 32, (3072, 3200)),
    "l3": ("l", (64, 128, 256, 512, 1024), (1, 2, 2, 8, 8), 32, (6144, 6400)),
}


def _create(size: str, pretrained: bool, kwargs: Dict[str, Any]) -> EfficientViT:
    sizes = dict(zip(("series", "widths", "depths", "head_dim", "head_widths"), SIZES[size], strict=True))
    return build(EfficientViT, f"effzoo_efficientvit_{size}", pretrained, checkpoint_filter_fn, sizes, **kwargs)


@register_model
def effzoo_efficientvit_nano64(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """Not in the paper (`NANO64`), series b with a narrow head: 0.78M parameters, 0.049 GMACs at 64 with 10 classes."""
    return _create("nano64", pretrained, kwargs)


@register_model
def effzoo_efficientvit_b0(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """3.4M parameters, 0.10 GMACs at 224; ImageNet-1k top-1 71.4 (measured by timm; none published)."""
    return _create("b0", pretrained, kwargs)


@register_model
def effzoo_efficientvit_b1(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """9.1M parameters, 0.52 GMACs at 224; published ImageNet-1k top-1 79.4."""
    return _create("b1", pretrained, kwargs)


@register_model
def effzoo_efficientvit_b2(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """24.3M parameters, 1.6 GMACs at 224; published ImageNet-1k top-1 82.1."""
    return _create("b2", pretrained, kwargs)


@register_model
def effzoo_efficientvit_b3(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """48.6M parameters, 4.0 GMACs at 224; published ImageNet-1k top-1 83.5."""
    return _create("b3", pretrained, kwargs)


@register_model
def effzoo_efficientvit_l1(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """52.7M parameters, 5.3 GMACs at 224; published ImageNet-1k top-1 84.5."""
    return _create("l1", pretrained, kwargs)


@register_model
def effzoo_efficientvit_l2(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """63.7M parameters, 6.9 GMACs at 224; published ImageNet-1k top-1 85.1."""
    return _create("l2", pretrained, kwargs)


@register_model
def effzoo_efficientvit_l3(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """246M parameters, 27.6 GMACs at 224; published ImageNet-1k top-1 85.8."""
    return _create("l3", pretrained, kwargs)
