"""The mechanism of each block of a ViT: chosen at construction, or swapped afterwards with the weights kept.

Hydra attention's paper (arXiv:2209.07484) replaces softmax by a linear mechanism this way, the last layers first, and fine-tunes
afterwards. All mixers share the names and shapes of q, k, v and output projection, so those weights are reused unchanged.
"""

from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Type

from timm.layers import Attention, PatchDropout
from timm.models._input import update_model_args
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..attention import TOKEN_MIXERS, TokenMixer
from ..errors import unknown_choice_text

SHARED = ("qkv", "q_norm", "k_norm", "norm", "proj", "proj_drop")
"""Submodules that every mixer has; they move from the old to the new one."""


def swap_attention(
    model: VisionTransformer, mechanism: str, layers: Optional[Iterable[int]] = None
) -> VisionTransformer:
    """Replaces the attention of a ViT in place; projections, norms, their device, type, mode and `requires_grad` are kept.

    The new mechanism's other parameters (a temperature, a convolution) are newly initialised, and the outputs change: fine-tune afterwards.
    Layer scale is neither added nor removed.

    The model's construction arguments then name the mechanism of every block as `mixers`, so a saved `effzoo_*vit_*` model is rebuilt
    with the same mixers. timm's own ViTs take no such argument: saving one that was swapped is refused. Load its weights into the
    `effzoo_vit_*` of its size instead. A timm model whose image size changes afterwards has to be swapped again if the mechanism uses the
    grid.

    Args:
        model: Any `VisionTransformer` of timm's or this package's: with or without class token, registers, qk_norm, layer scale.
        mechanism: A name in `attention.TOKEN_MIXERS`.
        layers: Indices of blocks, negative ones from the end; None for all.

    Returns:
        The same model.

    Raises:
        ValueError: Unknown mechanism or block; a model or a block's attention of another kind; an argument that the mechanism can't
            honour; no fixed grid of patches where the mechanism needs one. The model is then unchanged.
    """
    mixer_cls = _mixer_class(mechanism)
    blocks = _blocks(model)
    chosen = range(len(blocks)) if layers is None else block_indices(layers, len(blocks))
    if hasattr(mixer_cls, "grid_size"):
        _grid_size(model)
    mixers = {i: _convert(blocks[i].attn, mixer_cls, i) for i in chosen if type(blocks[i].attn) is not mixer_cls}
    for i, mixer in mixers.items():
        blocks[i].attn = mixer
    place_tokens(model)
    update_model_args(model, mixers=_named(blocks))
    return model


def block_indices(layers: Iterable[int], depth: int) -> List[int]:
    """Sorted indices from 0, negative ones counted from the end. Raises ValueError for an index out of range or no int."""
    found = set()
    for i in layers:
        if not isinstance(i, int) or isinstance(i, bool) or not -depth <= i < depth:
            raise ValueError(f"expected indices of {depth} blocks, {-depth} to {depth - 1}, got {i!r}")
        found.add(i % depth)
    return sorted(found)


def mixers_by_block(mixers: Mapping[str, Sequence[int]], depth: int) -> Dict[int, Type[TokenMixer]]:
    """`{"sima": [6, 7], "hydra": [-1]}` -> the mixer's class for each block named.

    Raises:
        ValueError: For anything but a mapping, an unknown mechanism, anything but a list of indices (the only form a config can hold), or
            a block named twice.
    """
    if not isinstance(mixers, Mapping):
        raise ValueError(f"mixers: expected a mapping of mechanisms to lists of blocks, got {mixers!r}")
    classes: Dict[int, Type[TokenMixer]] = {}
    for mechanism, layers in mixers.items():
        mixer_cls = _mixer_class(mechanism)
        if not isinstance(layers, (list, tuple)):
            raise ValueError(f"mixers: expected a list of block indices for {mechanism!r}, got {layers!r}")
        for i in block_indices(layers, depth):
            if i in classes:
                raise ValueError(f"mixers: block {i} is given to two mechanisms, expected one")
            classes[i] = mixer_cls
    return classes


def place_tokens(model: VisionTransformer) -> None:
    """Sets the number of prefix tokens and the grid of patches in the mixers that need them.

    Raises:
        ValueError: If a mixer needs the grid of patches and the model has no fixed one.
    """
    for module in model.blocks.modules():
        if hasattr(module, "num_prefix_tokens"):
            module.num_prefix_tokens = model.num_prefix_tokens  # type: ignore[assignment]
        if hasattr(module, "grid_size"):
            module.grid_size = _grid_size(model)  # type: ignore[assignment]


def _mixer_class(mechanism: str) -> Type[TokenMixer]:
    if mechanism not in TOKEN_MIXERS:
        raise ValueError(unknown_choice_text("attention mechanism", str(mechanism), list(TOKEN_MIXERS)))
    return TOKEN_MIXERS[mechanism]


def _blocks(model: nn.Module) -> Any:
    """The blocks of a ViT. Raises ValueError on any other model."""
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"expected a timm VisionTransformer, got {type(model).__name__}")
    return model.blocks


def _grid_size(model: VisionTransformer) -> Tuple[int, int]:
    """(rows, columns) of patches. Raises ValueError where the size varies or patches are dropped."""
    grid = model.patch_embed.grid_size
    if model.dynamic_img_size or grid is None:
        raise ValueError("the mechanism needs a fixed grid of patches, got dynamic_img_size=True: use set_input_size")
    if isinstance(model.patch_drop, PatchDropout):
        raise ValueError("the mechanism needs every patch of the grid, got patch_drop_rate > 0, expected 0")
    return int(grid[0]), int(grid[1])


def _convert(attn: Optional[nn.Module], mixer_cls: Type[TokenMixer], index: int) -> TokenMixer:
    """A mixer of the given class with another attention's projections and norms. Raises ValueError if it lacks the usual ones."""
    qkv, proj = getattr(attn, "qkv", None), getattr(attn, "proj", None)
    usual = type(attn) is Attention or isinstance(attn, TokenMixer)
    if not usual or not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear):
        raise ValueError(
            f"block {index}: expected timm's Attention or a TokenMixer with one qkv Linear, got {type(attn).__name__}"
        )
    dim = qkv.in_features
    if qkv.out_features != 3 * dim or proj.in_features != dim or proj.out_features != dim:
        raise ValueError(f"block {index}: expected heads of {dim} channels in all, got {qkv.out_features // 3}")
    if getattr(attn, "gate", None) is not None:
        raise ValueError(f"block {index}: expected an output without a gate, got gated=True")
    old: Any = attn
    norms = [norm for norm in (old.q_norm, old.norm) if not isinstance(norm, nn.Identity)]
    mixer = mixer_cls(
        dim,
        num_heads=old.num_heads,
        qkv_bias=qkv.bias is not None,
        qk_norm=not isinstance(old.q_norm, nn.Identity),
        scale_norm=not isinstance(old.norm, nn.Identity),
        proj_bias=proj.bias is not None,
        attn_drop=old.attn_drop.p,
        norm_layer=type(norms[0]) if norms else None,
        device=qkv.weight.device,
        dtype=qkv.weight.dtype,
    ).train(old.training)
    for name in SHARED:
        setattr(mixer, name, getattr(old, name))
    return mixer


def _named(blocks: Sequence[Any]) -> Dict[str, List[int]]:
    """Mechanism -> its blocks, without those that are not in the table."""
    names = {mixer_cls: name for name, mixer_cls in TOKEN_MIXERS.items()}
    mixers: Dict[str, List[int]] = {}
    for i, block in enumerate(blocks):
        name = names.get(type(getattr(block, "attn", None)))  # type: ignore[arg-type]
        if name is not None:
            mixers.setdefault(name, []).append(i)
    return mixers
