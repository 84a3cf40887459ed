"""The isotropic vision transformer of all plain ViT families: timm's, with a mixer per block, a stem for small images, and sizes.

DeiT's shapes: arXiv:2012.12877, https://github.com/facebookresearch/deit (Apache-2.0). timm's `VisionTransformer` (Apache-2.0) does the
rest. Deliberate differences: the sizes `pico`, see `isotropic_vit`, and `nano64`, see `NANO64`.

Layout: tokens (B, N, C), prefix tokens first, then patches in row-major order.
"""

import copy
import sys
from functools import partial
from typing import Any, Callable, ClassVar, Dict, Mapping, Optional, Sequence, Tuple, Type, TypeVar, Union

import torch
from timm.layers import LayerNorm2d, LayerScale, PatchEmbed, to_2tuple
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn

from ..attention import TokenMixer
from ._base import NANO64, imagenet_cfg, started
from ._fold import fold_output_affine
from ._swap import SHARED, mixers_by_block, place_tokens

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ViTT = TypeVar("ViTT", bound="IsotropicViT")


class ConvStem(nn.Sequential):
    """Overlapping patches in two steps, P pixels wide in all: (B, in_chans, H, W) -> (B, dim, H / P, W / P).

    A convolution of stride P / 2 to 2 / P of the channels, LayerNorm over them, GELU, and a 3x3 convolution of stride 2. Not BatchNorm: a
    training step must not depend on how its images are distributed over processes.
    """

    def __init__(
        self, in_chans: int, dim: int, patch_size: int = 4, bias: bool = True, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        hidden, stride = 2 * dim // patch_size, patch_size // 2
        super().__init__(
            nn.Conv2d(in_chans, hidden, 2 * stride - 1, stride=stride, padding=stride - 1, **dd),
            LayerNorm2d(hidden, eps=1e-6, **dd),
            nn.GELU(),
            nn.Conv2d(hidden, dim, 3, stride=2, padding=1, bias=bias, **dd),
        )


class ConvPatchEmbed(PatchEmbed):
    """timm's patch embedding with a `ConvStem` as its projection; patches are 4 x 4 or 8 x 8.

    Raises:
        ValueError: On another patch size, or a change of it.
    """

    def __init__(
        self,
        img_size: Union[int, Tuple[int, int], None] = 32,
        patch_size: Union[int, Tuple[int, int]] = 4,
        in_chans: int = 3,
        embed_dim: int = 64,
        norm_layer: Optional[Callable] = None,
        output_fmt: Optional[str] = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        height, width = to_2tuple(patch_size)
        if height != width or height not in (4, 8):
            raise ValueError(
                f"the convolutional stem makes patches of 4 x 4 or 8 x 8 pixels, got patch_size={patch_size}"
            )
        super().__init__(
            img_size=img_size,
            patch_size=height,
            in_chans=in_chans,
            embed_dim=embed_dim,
            norm_layer=norm_layer,
            output_fmt=output_fmt,
            bias=bias,
            strict_img_size=strict_img_size,
            dynamic_img_pad=dynamic_img_pad,
            **dd,
        )
        self.proj = ConvStem(in_chans, embed_dim, height, bias=bias, **dd)  # type: ignore[assignment]

    def set_input_size(
        self,
        img_size: Union[int, Tuple[int, int], None] = None,
        patch_size: Union[int, Tuple[int, int], None] = None,
    ) -> None:
        """Changes the image size, in pixels; the patches stay."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"the convolutional stem has patch_size={self.patch_size}, it can't become {patch_size}")
        super().set_input_size(img_size=img_size)


class IsotropicBlock(Block):
    """timm's block, whose layer scale can be folded into the projections before it."""

    def fuse(self) -> "IsotropicBlock":
        """Folds layer scale into the output projections of attention and MLP."""
        if isinstance(self.ls1, LayerScale):
            for name in getattr(self.attn, "output_projections", ("proj",)):
                setattr(self.attn, name, fold_output_affine(getattr(self.attn, name), self.ls1.gamma))
            self.ls1 = nn.Identity()
        if isinstance(self.ls2, LayerScale):
            self.mlp.fc2 = fold_output_affine(self.mlp.fc2, self.ls2.gamma)  # type: ignore[type-var]
            self.ls2 = nn.Identity()
        return self


def _block_with_own_mixer(
    block_fn: Callable[..., nn.Module], classes: Mapping[int, Type[TokenMixer]], attn_layer: Any, depth: int, **kwargs
) -> nn.Module:
    """Block number `depth` with its mixer of `classes`, or the model's `attn_layer`."""
    return block_fn(attn_layer=classes.get(depth, attn_layer), depth=depth, **kwargs)


def _take_over(module_cls: Type[ModuleT], module: nn.Module) -> ModuleT:
    """A module of the given class with the parts (parameters, buffers, children, attributes) of another, instead of new ones."""
    new = module_cls.__new__(module_cls)
    new.__setstate__(dict(module.__dict__))
    return new


class IsotropicViT(VisionTransformer):
    """timm's VisionTransformer with mixers that may differ from block to block; it sets their grid and number of prefix tokens.

    Args:
        mixers: Mechanism in `TOKEN_MIXERS` -> list of the blocks that it mixes, negative indices from the end; the others have
            `attn_layer`.
        depth: Number of blocks.
        block_fn: Builds a block; None for `block_cls`.
        kwargs: timm's.

    Raises:
        ValueError: For an unknown mechanism or block, one that is named twice, or no fixed grid where a mechanism needs it.
    """

    block_cls: ClassVar[Type[Block]] = IsotropicBlock

    def __init__(
        self,
        *,
        mixers: Optional[Mapping[str, Sequence[int]]] = None,
        depth: int = 12,
        block_fn: Optional[Callable[..., nn.Module]] = None,
        **kwargs: Any,
    ) -> None:
        block_fn = block_fn or self.block_cls
        if mixers:
            block_fn = partial(_block_with_own_mixer, block_fn, mixers_by_block(mixers, depth))
        super().__init__(depth=depth, block_fn=block_fn, **kwargs)  # type: ignore[arg-type]

    @classmethod
    def from_vit(cls: Type[ViTT], vit: VisionTransformer) -> ViTT:
        """A model of this class with deep copies of a ViT's parts; its blocks become `block_cls`."""
        model = _take_over(cls, copy.deepcopy(vit))
        for i, block in enumerate(model.blocks):
            model.blocks[i] = _take_over(cls.block_cls, block)
        return model

    @torch.jit.ignore
    def place_tokens(self) -> None:
        """Sets the number of prefix tokens and the grid of patches in the mixers that need them."""
        place_tokens(self)

    def set_input_size(
        self, img_size: Optional[Tuple[int, int]] = None, patch_size: Optional[Tuple[int, int]] = None
    ) -> None:
        """Changes image or patch size, in pixels, and resamples the position embedding."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self.place_tokens()


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: VisionTransformer) -> Dict[str, torch.Tensor]:
    """Official DeiT keys and those of every ViT checkpoint that timm reads -> ours; ours are unchanged.

    Parameters that a plain ViT does not have (layer scale, a mixer's own temperature or convolution) and that the checkpoint lacks in every
    block keep the model's initial values.
    """
    converted = vit_checkpoint_filter_fn(state_dict, model, adapt_layer_scale=True)
    present = {key.split(".", 2)[-1] for key in converted if key.startswith("blocks.")}
    for key, value in model.state_dict().items():
        if key.startswith("blocks.") and key.split(".", 2)[-1] not in present and _is_extra(key):
            converted[key] = value
    return converted


def _is_extra(key: str) -> bool:
    """Whether a block's parameter is one that a plain ViT does not have."""
    module, _, rest = key.split(".", 2)[-1].partition(".")
    return module in ("ls1", "ls2") or (module == "attn" and rest.partition(".")[0] not in SHARED)


SIZES: Dict[str, Dict[str, Any]] = {
    "pico": {
        "patch_size": 4,
        "embed_layer": ConvPatchEmbed,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "weight_init": "jax",
    },
    "nano64": {
        "patch_size": 8,
        "embed_layer": ConvPatchEmbed,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "weight_init": "jax",
    },
    "tiny": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
}


_OWN_CFGS: Dict[str, Dict[str, Any]] = {
    "pico": {"first_conv": "patch_embed.proj.0", "input_size": (3, 32, 32), "crop_pct": 1.0},
    "nano64": {"first_conv": "patch_embed.proj.0", **NANO64},
}
"""Size in no paper -> what its config has of its own."""


def vit_cfgs(name: str, size: str, deit_weights: bool, **paper: str) -> Dict[str, Dict[str, Any]]:
    """A model's entry in `default_cfgs`: its preprocessing, and the location of DeiT's weights of that size if they are the model's own.

    Args:
        name: Name of the model, without a tag.
        size: A key of `SIZES`.
        deit_weights: Whether DeiT's weights are the model's own (other models can load them from a file).
        paper: origin_url, paper_name, paper_ids.
    """
    overrides: Dict[str, Any] = {"first_conv": "patch_embed.proj", **paper}
    if size in _OWN_CFGS:
        overrides |= _OWN_CFGS[size]
    elif deit_weights:
        name += ".fb_in1k"
        overrides["hf_hub_id"] = f"timm/deit_{size}_patch16_224.fb_in1k"
    overrides |= {"pool_size": None, "fixed_input_size": True}
    cfg = imagenet_cfg(classifier="head", license="apache-2.0", **overrides)
    return {name: cfg}


def register_vit(
    module: str,
    name: str,
    size: str,
    mechanism: str,
    model_cls: Type[IsotropicViT] = IsotropicViT,
    filter_fn: Callable[..., Dict[str, torch.Tensor]] = checkpoint_filter_fn,
    **own: Any,
) -> None:
    """Registers one model in timm, by a function in the family's module, where it is found and pickled.

    Args:
        module: The family's `__name__`.
        name: Name of the model, without a tag.
        size: A key of `SIZES`.
        mechanism: The mixer, for the docstring.
        model_cls: The network.
        filter_fn: Checkpoint keys -> the model's.
        own: Construction arguments besides the size's.
    """

    def assemble(**model_kwargs: Any) -> IsotropicViT:
        model = model_cls(**model_kwargs)
        model.place_tokens()  # before weights are loaded
        return model

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        out_indices = kwargs.pop("out_indices", 3)
        model = build_model_with_cfg(
            assemble,
            name,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            **{**SIZES[size], **own, **kwargs},
        )
        return started(model, pretrained)

    create.__name__ = create.__qualname__ = name
    create.__module__ = module
    create.__doc__ = f"ViT-{size} with {mechanism}." + (" The size is not in the paper." if size in _OWN_CFGS else "")
    setattr(sys.modules[module], name, register_model(create))
