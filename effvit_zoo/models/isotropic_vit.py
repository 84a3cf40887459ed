"""Isotropic vision transformers of DeiT's shapes with any token mixer of `attention.TOKEN_MIXERS` in place of softmax attention.

Shapes and the softmax weights: "Training data-efficient image transformers & distillation through attention", arXiv:2012.12877,
https://github.com/facebookresearch/deit (Apache-2.0). The mixers' papers are named in their own files. The network is timm's
`VisionTransformer` (Apache-2.0), so position embeddings that follow the image size, register tokens, pooling, pruning and every ViT
checkpoint that timm reads come with it; this file adds the mixers, the sizes and the names.

Deliberate difference: `pico` (not in the paper) starts from Xavier-uniform weights. At its width the usual truncated normal of 0.02 is so
small that training stays behind (cross entropy .92 against .37 after 1,600 steps of a 64-wide ViT on Fashion-MNIST).

Layout: tokens (B, N, C), prefix tokens first, then patches in row-major order.
"""

from typing import Any, Callable, Dict, Optional, Tuple, Type

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn

from ..attention import TOKEN_MIXERS, TokenMixer
from ._base import imagenet_cfg

__all__ = ["IsotropicViT"]

SIZES: Dict[str, Dict[str, Any]] = {
    "pico": {
        "patch_size": 4,
        "embed_dim": 96,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "weight_init": "jax",
    },
    "tiny": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
}

FAMILIES: Dict[str, str] = {
    "softmax": "effzoo_vit",
}
"""Mixer in TOKEN_MIXERS -> what its models' names start with."""


class IsotropicViT(VisionTransformer):
    """timm's VisionTransformer whose mixers are told what they cannot see in a row of tokens."""

    @torch.jit.ignore
    def place_tokens(self) -> None:
        """Tells the mixers that ask for it how many tokens are prefix tokens and how the patches lie."""
        for module in self.blocks.modules():
            if hasattr(module, "num_prefix_tokens"):
                module.num_prefix_tokens = self.num_prefix_tokens  # type: ignore[assignment]
            if hasattr(module, "grid_size"):
                module.grid_size = tuple(self.patch_embed.grid_size)  # type: ignore[assignment]

    def set_input_size(
        self, img_size: Optional[Tuple[int, int]] = None, patch_size: Optional[Tuple[int, int]] = None
    ) -> None:
        """Changes image or patch size, in pixels, and resamples the position embedding."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self.place_tokens()


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: VisionTransformer) -> Dict[str, torch.Tensor]:
    """Official DeiT keys and those of every ViT checkpoint that timm reads -> ours; ours are unchanged."""
    return vit_checkpoint_filter_fn(state_dict, model, adapt_layer_scale=True)


def _cfg(**overrides: Any) -> Dict[str, Any]:
    return imagenet_cfg(
        pool_size=None,
        fixed_input_size=True,
        first_conv="patch_embed.proj",
        classifier="head",
        license="apache-2.0",
        origin_url="https://github.com/facebookresearch/deit",
        paper_name="Training data-efficient image transformers & distillation through attention",
        paper_ids="arXiv:2012.12877",
        **overrides,
    )


def _cfgs(prefix: str, size: str) -> Dict[str, Dict[str, Any]]:
    name = f"{prefix}_{size}"
    if size == "pico":
        return {name: _cfg(input_size=(3, 32, 32), crop_pct=1.0)}
    if prefix == FAMILIES["softmax"]:
        return {f"{name}.fb_in1k": _cfg(hf_hub_id=f"timm/deit_{size}_patch16_224.fb_in1k")}
    return {name: _cfg()}


default_cfgs = generate_default_cfgs(
    {name: cfg for prefix in FAMILIES.values() for size in SIZES for name, cfg in _cfgs(prefix, size).items()}
)


def build_vit(variant: str, pretrained: bool, model_cls: Type[IsotropicViT] = IsotropicViT, **kwargs: Any) -> nn.Module:
    """timm's factory for `model_cls`; its mixers are placed before weights are loaded."""

    def assemble(**model_kwargs: Any) -> IsotropicViT:
        model = model_cls(**model_kwargs)
        model.place_tokens()
        return model

    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        assemble,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def _register(prefix: str, mixer: Type[TokenMixer], size: str) -> Callable[..., nn.Module]:
    """Registers one model in timm and returns its function, which needs a module-level name of its own to be found and pickled."""
    name = f"{prefix}_{size}"

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_vit(name, pretrained, **{"attn_layer": mixer, **SIZES[size], **kwargs})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"ViT-{size} with {mixer.__name__}."
    return register_model(create)


globals().update(
    {
        f"{prefix}_{size}": _register(prefix, TOKEN_MIXERS[mixer], size)
        for mixer, prefix in FAMILIES.items()
        for size in SIZES
    }
)
