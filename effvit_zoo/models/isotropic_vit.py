"""Isotropic vision transformers of DeiT's shapes with any token mixer of `attention.TOKEN_MIXERS` in place of softmax attention.

Shapes and the softmax weights: "Training data-efficient image transformers & distillation through attention", arXiv:2012.12877,
https://github.com/facebookresearch/deit (Apache-2.0). The mixers' papers are named in their own files. The network is timm's
`VisionTransformer` (Apache-2.0), so position embeddings that follow the image size, register tokens, pooling, pruning and every ViT
checkpoint that timm reads come with it; this file adds the mixers, the sizes and the names.

A model may also mix its tokens differently from block to block: `mixers={"sima": [6, 7], "hydra": [-1]}` names the blocks that differ, and
`hydra_layers=k` of the Hydra models gives the last k blocks to Hydra and the others to softmax, as its paper recommends. Both are ordinary
construction arguments, so they come back with a saved model, and DeiT's weights load whatever they say.

SimA's models have layer scale, starting from 1.0 as its authors set it for 12 layers, in `pico` too, so that all sizes are one
architecture; the other papers have none. A checkpoint without it loads, and is then the same function with gamma = 1.

Deliberate difference: `pico` (not in the paper), for small images and short runs, starts from Xavier-uniform weights and cuts its patches
with two overlapping convolutions. After 400 steps of 64 images of Fashion-MNIST, one 96-wide trial each: truncated normal weights of 0.02
67.7% right, Xavier 69.2%, Xavier and convolutions 77.3%.

Layout: tokens (B, N, C), prefix tokens first, then patches in row-major order.
"""

from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Sequence, Type

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..attention import TOKEN_MIXERS, TokenMixer
from ..errors import UserError
from ._swap import mixers_by_block
from ._vit import SIZES, IsotropicViT, build_vit, vit_cfgs
from ._vit import checkpoint_filter_fn as checkpoint_filter_fn

__all__ = ["HydraViT", "IsotropicViT"]


class HydraViT(IsotropicViT):
    """An IsotropicViT with Hydra attention in its last blocks.

    Args:
        hydra_layers: How many blocks at the end have Hydra attention, the others softmax; None for all. `mixers` goes before it.
        mixers: As in `IsotropicViT`.
        depth: Number of blocks.
        kwargs: timm's.

    Raises:
        ValueError: If `hydra_layers` is not a whole number from 0 to `depth`, and as `IsotropicViT`.
    """

    def __init__(
        self,
        *,
        hydra_layers: Optional[int] = None,
        mixers: Optional[Mapping[str, Sequence[int]]] = None,
        depth: int = 12,
        **kwargs: Any,
    ) -> None:
        mixers = dict(mixers or {})
        if hydra_layers is not None:
            if not isinstance(hydra_layers, int) or isinstance(hydra_layers, bool) or not 0 <= hydra_layers <= depth:
                raise UserError(f"hydra_layers: expected 0 to {depth} blocks, got {hydra_layers!r}")
            taken = mixers_by_block(mixers, depth)
            front = [i for i in range(depth - hydra_layers) if i not in taken]
            mixers["softmax"] = [*mixers.get("softmax", []), *front]
        super().__init__(mixers=mixers, depth=depth, **kwargs)


class Family(NamedTuple):
    """What the models of one mixer are called, and where the mixer comes from."""

    prefix: str
    origin_url: str
    paper_name: str
    paper_ids: str
    model_cls: Type[IsotropicViT] = IsotropicViT
    kwargs: Mapping[str, Any] = {}


FAMILIES: Dict[str, Family] = {
    "softmax": Family(
        "effzoo_vit",
        "https://github.com/facebookresearch/deit",
        "Training data-efficient image transformers & distillation through attention",
        "arXiv:2012.12877",
    ),
    "elu": Family(
        "effzoo_elu_vit",
        "https://github.com/idiap/fast-transformers",
        "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        "arXiv:2006.16236",
    ),
    "cosformer": Family(
        "effzoo_cosformer_vit",
        "https://github.com/OpenNLPLab/cosFormer",
        "cosFormer: Rethinking Softmax in Attention",
        "arXiv:2202.08791",
    ),
    "hydra": Family(
        "effzoo_hydra_vit",
        "https://arxiv.org/abs/2209.07484",  # the code is in the paper
        "Hydra Attention: Efficient Attention with Many Heads",
        "arXiv:2209.07484",
        model_cls=HydraViT,
    ),
    "sima": Family(
        "effzoo_sima_vit",
        "https://github.com/UCDvision/sima",
        "SimA: Simple Softmax-free Attention for Vision Transformers",
        "arXiv:2206.08898",
        kwargs={"init_values": 1.0},
    ),
}
"""Mixer in TOKEN_MIXERS -> its models."""


def _cfgs(family: Family, size: str) -> Dict[str, Dict[str, Any]]:
    paper = {"origin_url": family.origin_url, "paper_name": family.paper_name, "paper_ids": family.paper_ids}
    return vit_cfgs(f"{family.prefix}_{size}", size, deit_weights=family is FAMILIES["softmax"], **paper)


default_cfgs = generate_default_cfgs(
    {name: cfg for family in FAMILIES.values() for size in SIZES for name, cfg in _cfgs(family, size).items()}
)


def _register(family: Family, mixer: Type[TokenMixer], size: str) -> Callable[..., nn.Module]:
    """Registers one model in timm and returns its function, which needs a module-level name of its own to be found and pickled."""
    name = f"{family.prefix}_{size}"

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        own = {"attn_layer": mixer, **SIZES[size], **family.kwargs}
        return build_vit(name, pretrained, family.model_cls, **{**own, **kwargs})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"ViT-{size} with {mixer.__name__}."
    return register_model(create)


for _mixer, _family in FAMILIES.items():
    for _size in SIZES:
        globals()[f"{_family.prefix}_{_size}"] = _register(_family, TOKEN_MIXERS[_mixer], _size)
