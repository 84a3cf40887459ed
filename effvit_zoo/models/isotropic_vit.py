"""Isotropic vision transformers of DeiT's shapes with any token mixer of `attention.TOKEN_MIXERS` in place of softmax attention.

Shapes and the softmax weights: "Training data-efficient image transformers & distillation through attention", arXiv:2012.12877,
https://github.com/facebookresearch/deit (Apache-2.0). The mixers' papers are named in their own files. The network is timm's
`VisionTransformer` (Apache-2.0), so position embeddings that follow the image size, register tokens, pooling, pruning and every ViT
checkpoint that timm reads come with it; this file adds the mixers, the sizes and the names.

The mixer may also differ from block to block: `mixers={"sima": [6, 7], "hydra": [-1]}` names the blocks that differ, and `hydra_layers=k`
of the Hydra models uses Hydra in the last k blocks and softmax in the others, as its paper recommends. Both are ordinary construction
arguments, so they are saved with a model, and DeiT's weights load for any value of them.

SimA's models have layer scale, starting from 1.0 as its authors set it for 12 layers, in `pico` too, so that all sizes are one
architecture; the other papers have none. A checkpoint without it loads, and is then the same function with gamma = 1.

Deliberate difference: `pico` and `nano64` (not in the paper), for small images and short runs, are initialised with Xavier-uniform weights
and embed their patches with two overlapping convolutions. Top-1 after 400 steps of 64 images of Fashion-MNIST, one trial each at width 96:
truncated normal weights of 0.02 67.7%, Xavier 69.2%, Xavier and convolutions 77.3%. `models._base.NANO64` says what `nano64` is for.

Layout: tokens (B, N, C), prefix tokens first, then patches in row-major order.
"""

from typing import Any, Dict, Mapping, NamedTuple, Optional, Sequence, Type

from timm.models import generate_default_cfgs

from ..attention import TOKEN_MIXERS
from ._swap import mixers_by_block
from ._vit import SIZES, IsotropicViT, register_vit, vit_cfgs
from ._vit import checkpoint_filter_fn as checkpoint_filter_fn

__all__ = ["HydraViT", "IsotropicViT"]


class HydraViT(IsotropicViT):
    """An IsotropicViT with Hydra attention in its last blocks.

    Args:
        hydra_layers: Number of blocks at the end with Hydra attention, the others have softmax; None for all. `mixers` takes precedence.
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
                raise ValueError(f"hydra_layers: expected 0 to {depth} blocks, got {hydra_layers!r}")
            taken = mixers_by_block(mixers, depth)
            front = [i for i in range(depth - hydra_layers) if i not in taken]
            mixers["softmax"] = [*mixers.get("softmax", []), *front]
        super().__init__(mixers=mixers, depth=depth, **kwargs)


class Family(NamedTuple):
    """The registered models of one mixer: its source, and how they differ from a plain `IsotropicViT`."""

    origin_url: str
    paper_name: str
    paper_ids: str
    model_cls: Type[IsotropicViT] = IsotropicViT
    kwargs: Mapping[str, Any] = {}


FAMILIES: Dict[str, Family] = {
    "softmax": Family(
        "https://github.com/facebookresearch/deit",
        "Training data-efficient image transformers & distillation through attention",
        "arXiv:2012.12877",
    ),
    "elu": Family(
        "https://github.com/idiap/fast-transformers",
        "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        "arXiv:2006.16236",
    ),
    "cosformer": Family(
        "https://github.com/OpenNLPLab/cosFormer",
        "cosFormer: Rethinking Softmax in Attention",
        "arXiv:2202.08791",
    ),
    "hydra": Family(
        "https://arxiv.org/abs/2209.07484",  # the code is in the paper
        "Hydra Attention: Efficient Attention with Many Heads",
        "arXiv:2209.07484",
        model_cls=HydraViT,
    ),
    "sima": Family(
        "https://github.com/UCDvision/sima",
        "SimA: Simple Softmax-free Attention for Vision Transformers",
        "arXiv:2206.08898",
        kwargs={"init_values": 1.0},
    ),
}
"""Mixer in TOKEN_MIXERS -> its models."""


def model_name(mixer: str, size: str) -> str:
    """Name of the registered model with this mixer, a key of `FAMILIES`, of this size, a key of `SIZES`."""
    return f"effzoo_vit_{size}" if mixer == "softmax" else f"effzoo_{mixer}_vit_{size}"


def _cfgs(mixer: str, size: str) -> Dict[str, Dict[str, Any]]:
    origin_url, paper_name, paper_ids = FAMILIES[mixer][:3]
    paper = {"origin_url": origin_url, "paper_name": paper_name, "paper_ids": paper_ids}
    return vit_cfgs(model_name(mixer, size), size, deit_weights=mixer == "softmax", **paper)


default_cfgs = generate_default_cfgs(
    {name: cfg for mixer in FAMILIES for size in SIZES for name, cfg in _cfgs(mixer, size).items()}
)


for _mixer, _family in FAMILIES.items():
    for _size in SIZES:
        _own = {"attn_layer": TOKEN_MIXERS[_mixer], **_family.kwargs}
        register_vit(__name__, model_name(_mixer, _size), _size, f"{_mixer} attention", _family.model_cls, **_own)
