"""SwiftFormer: convolutional encoders with one efficient additive attention block at the end of each of four stages.

"SwiftFormer: Efficient Additive Attention for Transformer-based Real-time Mobile Vision Applications", arXiv:2303.15446, ICCV 2023.
Official code: https://github.com/Amshaker/SwiftFormer @ 4aa6cd6752 (Apache-2.0). Own code with timm's parameter names.

Kept from the official code: two classifiers (the second learns from the teacher), whose mean is the output outside distillation;
BatchNorm before pooling; biases in front of BatchNorm. Like timm and unlike the official code, stochastic depth also acts in the
convolutional encoders (the official stage forgets to pass it on); this changes training only. The crop for evaluation is timm's 0.95;
the official pipeline has 0.875.

Layout: feature maps (B, C, H, W). Any image size.
"""

import re
from typing import TYPE_CHECKING, Any, ClassVar, Dict, List, Optional, Sequence, Tuple

import torch
from timm.layers import DropPath, calculate_drop_path_rates, get_device_dtype
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..attention.additive import EfficientAdditiveAttention
from ._base import NANO64, HierarchicalBackbone, Stage, build, imagenet_cfg, unwrap_state_dict
from ._fold import fold_norm_after, fold_norm_before, fold_output_affine, inplace_activation

__all__ = ["SwiftFormer"]


class LayerScale(nn.Module):
    """Multiplies every channel by a learned `gamma`, (C, 1, 1)."""

    def __init__(self, dim: int, init_value: float, device=None, dtype=None) -> None:
        super().__init__()
        self.init_value = init_value
        self.gamma = nn.Parameter(torch.empty(dim, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Stem(nn.Sequential):
    """Two 3x3 convolutions of stride 2, each with BatchNorm and ReLU: (B, in_chans, H, W) -> (B, dim, H / 4, W / 4)."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim // 2, **dd),
            nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.ReLU(),
        )

    def fuse(self) -> "Stem":
        """Folds both BatchNorms into their convolutions."""
        for conv, norm in ((0, 1), (3, 4)):
            self[conv] = fold_norm_after(self[conv], self[norm])  # type: ignore[type-var]
            self[norm] = nn.Identity()
            self[norm + 1] = inplace_activation(self[norm + 1])
        return self


class Embedding(nn.Module):
    """Downsampling between stages: 3x3 convolution of stride 2 and BatchNorm."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x))

    def fuse(self) -> nn.Module:
        """The convolution alone, with BatchNorm folded in."""
        return fold_norm_after(self.proj, self.norm)


class ConvEncoder(nn.Module):
    """Depthwise 3x3, BatchNorm, pointwise MLP, layer scale, residual. With `hidden_dim == dim` it is the paper's local representation."""

    def __init__(self, dim: int, hidden_dim: int, drop_path: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm: nn.Module = nn.BatchNorm2d(dim, **dd)
        self.pwconv1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.act: nn.Module = nn.GELU()
        self.pwconv2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.layer_scale: nn.Module = LayerScale(dim, 1.0, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + self.drop_path(self.layer_scale(y))

    def fuse(self) -> "ConvEncoder":
        """Folds BatchNorm into the depthwise and layer scale into the last pointwise convolution."""
        self.dwconv = fold_norm_after(self.dwconv, self.norm)
        self.norm = nn.Identity()
        self.pwconv2, self.layer_scale = _fold_layer_scale(self.pwconv2, self.layer_scale)
        self.act = inplace_activation(self.act)
        return self


class Mlp(nn.Module):
    """BatchNorm and a pointwise MLP."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1: nn.Module = nn.BatchNorm2d(dim, **dd)
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.act: nn.Module = nn.GELU()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.act(self.fc1(self.norm1(x))))
        return self.drop(self.fc2(x))

    def fuse(self) -> "Mlp":
        """Folds BatchNorm into the first convolution."""
        self.fc1 = fold_norm_before(self.norm1, self.fc1)
        self.norm1 = nn.Identity()
        self.act = inplace_activation(self.act)
        return self


class SwiftFormerEncoder(nn.Module):
    """Local representation, efficient additive attention and MLP, each with a residual."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        layer_scale_init: float,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.local_representation = ConvEncoder(dim, dim, **dd)
        self.attn = EfficientAdditiveAttention(dim, **dd)
        self.linear = Mlp(dim, hidden_dim, drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.layer_scale_1: nn.Module = LayerScale(dim, layer_scale_init, **dd)
        self.layer_scale_2: nn.Module = LayerScale(dim, layer_scale_init, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.local_representation(x)
        x = x + self.drop_path(self.layer_scale_1(self.attn(x)))
        return x + self.drop_path(self.layer_scale_2(self.linear(x)))

    def fuse(self) -> "SwiftFormerEncoder":
        """Folds the layer scales into the projections before them; the parts fold their own BatchNorms."""
        self.attn.final, self.layer_scale_1 = _fold_layer_scale(self.attn.final, self.layer_scale_1)
        self.linear.fc2, self.layer_scale_2 = _fold_layer_scale(self.linear.fc2, self.layer_scale_2)
        return self


def _fold_layer_scale(layer: Any, layer_scale: nn.Module) -> Tuple[Any, nn.Module]:
    if isinstance(layer_scale, LayerScale):
        layer = fold_output_affine(layer, layer_scale.gamma)
    return layer, nn.Identity()


class DistillationHead(nn.Linear):
    """The classifier that learns from the teacher. It refers to the first one, because outside distillation the two act as one.

    Attributes:
        first: The model's `head` in a tuple, so that it does not become this module's child; `SwiftFormer` updates it with `head`.
    """

    if TYPE_CHECKING:  # hidden from TorchScript, which would take it for an attribute's type
        first: Tuple[nn.Module, ...]

    @torch.no_grad()
    def fuse(self) -> None:
        """Makes the first classifier the mean of both; timm's fusion puts the result, None, in this one's place.

        Raises:
            ValueError: If the first classifier is not a linear layer of the same shape.
        """
        (head,) = self.first
        if not isinstance(head, nn.Linear) or head.bias is None or head.weight.shape != self.weight.shape:
            raise ValueError(f"classifiers differ: expected a head like {self}, got {head}")
        for first, second in ((head.weight, self.weight), (head.bias, self.bias)):
            first.copy_((first.double() + second.double()) / 2)


class SwiftFormer(HierarchicalBackbone):
    """SwiftFormer. Fused, it keeps the last BatchNorm, whose output is that of `forward_features`.

    Args:
        depths: Blocks per stage; the last of each is a `SwiftFormerEncoder`, the others are `ConvEncoder`.
        embed_dims: Channels per stage.
        mlp_ratio: Hidden over outer channels of the MLPs.
        layer_scale_init: Initial layer scale of the attention blocks; that of the convolutional encoders is 1.
        num_classes: Outputs of each classifier; 0 removes both.
        in_chans: Channels of the image.
        global_pool: "avg", or "" for none.
        drop_rate: Dropout before the classifiers.
        proj_drop_rate: Dropout in the attention blocks' MLPs.
        drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: On another `global_pool`.
    """

    pool_types: ClassVar[Tuple[str, ...]] = ("", "avg")

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 6, 4),
        embed_dims: Sequence[int] = (48, 56, 112, 220),
        mlp_ratio: float = 4.0,
        layer_scale_init: float = 1e-5,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool)
        dd = {"device": device, "dtype": dtype}
        self.distilled_training = False
        self.stem = Stem(in_chans, embed_dims[0], **dd)
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        in_dim = embed_dims[0]
        for i, dim in enumerate(embed_dims):
            hidden_dim = int(mlp_ratio * dim)
            rates: List[float] = drop_path_rates[i]  # type: ignore[assignment]
            blocks: List[nn.Module] = [ConvEncoder(dim, hidden_dim, rate, **dd) for rate in rates[:-1]]
            blocks.append(SwiftFormerEncoder(dim, hidden_dim, layer_scale_init, proj_drop_rate, rates[-1], **dd))
            stages.append(Stage(blocks, downsample=Embedding(in_dim, dim, **dd) if i else None))
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(embed_dims[-1], **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self._set_classifiers(embed_dims[-1], num_classes, **dd)
        self.finish(embed_dims)

    @torch.jit.ignore
    def get_classifier(self) -> Tuple[nn.Module, Optional[nn.Module]]:
        """(classifier, distillation classifier)."""
        return self.head, self.head_dist

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None, reset_other: bool = False) -> None:
        """Replaces both classifiers; arguments as in the base class (there is nothing else in this head)."""
        if global_pool is not None:
            self.global_pool = self.check_pool(global_pool)
        self.num_classes = num_classes
        self._set_classifiers(self.num_features, num_classes, **get_device_dtype(self))
        self.head.train(self.training)
        self.head_dist.train(self.training)

    @torch.jit.ignore
    def _set_classifiers(self, dim: int, num_classes: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        self.head = nn.Linear(dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head_dist = DistillationHead(dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def __setattr__(self, name: str, value: Any) -> None:
        """Refers the distillation classifier to the present `head`, also after a user has replaced it."""
        super().__setattr__(name, value)
        if name in ("head", "head_dist") and isinstance(self._modules.get("head_dist"), DistillationHead):
            self.head_dist.first = (self.head,)

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """While training, `forward` returns (logits, distillation logits) instead of their mean."""
        self.distilled_training = enable

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature map -> logits, the mean of both classifiers'; a pair of logits in distilled training."""
        if self.global_pool == "avg":
            x = x.mean(dim=(2, 3))
        x = self.head_drop(x)
        if pre_logits:
            return x
        logits = self.head(x)
        if self.head_dist is None:
            return logits
        logits_dist = self.head_dist(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return logits, logits_dist  # type: ignore[return-value]
        return (logits + logits_dist) / 2


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Official keys -> ours; timm's are ours already. Every rule leaves our own names alone."""
    renamed = {}
    for key, value in unwrap_state_dict(state_dict).items():
        key = re.sub(r"^patch_embed\.", "stem.", key)
        key = re.sub(r"^dist_head\.", "head_dist.", key)
        # one list holds stages (even) and the embeddings between them (odd)
        key = re.sub(r"^network\.(\d*[02468])\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.", key)
        key = re.sub(r"^network\.(\d*[13579])\.", lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample.", key)
        key = key.replace(".attn.Proj.", ".attn.proj.")
        key = re.sub(r"(\.layer_scale(?:_[12])?)$", r"\1.gamma", key)
        renamed[key] = value
    return renamed


def _cfg(**overrides: Any) -> Dict[str, Any]:
    cfg = imagenet_cfg(
        crop_pct=0.95,
        classifier=("head", "head_dist"),
        license="apache-2.0",
        origin_url="https://github.com/Amshaker/SwiftFormer",
        paper_name="SwiftFormer: Efficient Additive Attention for Transformer-based Real-time Mobile Vision Applications",
        paper_ids="arXiv:2303.15446",
    )
    return {**cfg, **overrides}


# ImageNet-1k with hard distillation from RegNetY-16GF, hosted by timm
default_cfgs = generate_default_cfgs(
    {
        "effzoo_swiftformer_xs.dist_in1k": _cfg(hf_hub_id="timm/swiftformer_xs.dist_in1k"),
        "effzoo_swiftformer_s.dist_in1k": _cfg(hf_hub_id="timm/swiftformer_s.dist_in1k"),
        "effzoo_swiftformer_l1.dist_in1k": _cfg(hf_hub_id="timm/swiftformer_l1.dist_in1k"),
        "effzoo_swiftformer_l3.dist_in1k": _cfg(hf_hub_id="timm/swiftformer_l3.dist_in1k"),
        "effzoo_swiftformer_nano64": _cfg(**NANO64),
        "effzoo_swiftformer_pico": _cfg(input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0),
    }
)


def _create(variant: str, pretrained: bool, kwargs: Dict[str, Any], **sizes: Sequence[int]) -> SwiftFormer:
    return build(SwiftFormer, variant, pretrained, checkpoint_filter_fn, sizes, **kwargs)


@register_model
def effzoo_swiftformer_pico(pretrained: bool = False, **kwargs: Any) -> SwiftFormer:
    """Not in the paper: XS with 7 blocks instead of 16, for images of about 32 pixels, tests and the quickstart."""
    return _create("effzoo_swiftformer_pico", pretrained, kwargs, depths=(2, 2, 2, 1), embed_dims=(48, 56, 112, 220))


@register_model
def effzoo_swiftformer_nano64(pretrained: bool = False, **kwargs: Any) -> SwiftFormer:
    """Not in the paper (`NANO64`): 0.83M parameters, 0.048 GMACs at 64 with 10 classes."""
    return _create("effzoo_swiftformer_nano64", pretrained, kwargs, depths=(3, 4, 1, 1), embed_dims=(56, 72, 96, 112))


@register_model
def effzoo_swiftformer_xs(pretrained: bool = False, **kwargs: Any) -> SwiftFormer:
    """3.5M parameters, 0.6 GMACs at 224; ImageNet-1k top-1 75.7 in the paper."""
    return _create("effzoo_swiftformer_xs", pretrained, kwargs, depths=(3, 3, 6, 4), embed_dims=(48, 56, 112, 220))


@register_model
def effzoo_swiftformer_s(pretrained: bool = False, **kwargs: Any) -> SwiftFormer:
    """6.1M parameters, 1.0 GMACs at 224; ImageNet-1k top-1 78.5 in the paper."""
    return _create("effzoo_swiftformer_s", pretrained, kwargs, depths=(3, 3, 9, 6), embed_dims=(48, 64, 168, 224))


@register_model
def effzoo_swiftformer_l1(pretrained: bool = False, **kwargs: Any) -> SwiftFormer:
    """12.1M parameters, 1.6 GMACs at 224; ImageNet-1k top-1 80.9 in the paper."""
    return _create("effzoo_swiftformer_l1", pretrained, kwargs, depths=(4, 3, 10, 5), embed_dims=(48, 96, 192, 384))


@register_model
def effzoo_swiftformer_l3(pretrained: bool = False, **kwargs: Any) -> SwiftFormer:
    """28.5M parameters, 4.0 GMACs at 224; ImageNet-1k top-1 83.0 in the paper."""
    return _create("effzoo_swiftformer_l3", pretrained, kwargs, depths=(4, 4, 12, 6), embed_dims=(64, 128, 320, 512))
