"""ToSA-ViT: a ViT in which every second layer is entered only by the tokens that the layer before it has selected.

"ToSA: Token Selective Attention for Efficient Vision Transformers", arXiv:2406.08816. No official code; `attention.token_select` says what
the paper states and what was decided. DeiT's shapes (arXiv:2012.12877, https://github.com/facebookresearch/deit, Apache-2.0) on timm's
`VisionTransformer` (Apache-2.0): the parameters are a ViT's and the selectors', so every ViT checkpoint loads and leaves the selectors as
they were initialised. All tokens are there behind every layer, which dense prediction needs.

Layers 0, 2, 4, ... are standard, 1, 3, 5, ... token-selective; of an odd number the last is standard. At an attention ratio of 1 there are
no selectors to be asked, and the model is the dense one bit for bit; at 0 only class and register tokens enter the ToSA layers.

Layout: tokens (B, L, C), prefix tokens first, then patches in row-major order.
"""

import copy
import re
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import Attention, register_notrace_function
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from ..attention import SoftmaxAttention, softmax_attention
from ..attention._mixer import refuse_mask
from ..attention.token_select import (
    TokenSelector,
    gather_tokens,
    number_selected,
    rows_of_queries,
    scatter_tokens,
    select_tokens,
)
from ..errors import UserError
from ._swap import swap_attention
from ._vit import SIZES, IsotropicBlock, IsotropicViT, build_vit, vit_cfgs
from ._vit import checkpoint_filter_fn as vit_checkpoint_filter_fn

__all__ = ["ToSAViT", "to_dense", "to_tosa"]


class ToSABlock(IsotropicBlock):
    """A ViT's block that can also give the scores of its attention, or take some of the tokens through."""

    def forward_tokens(
        self, x: torch.Tensor, index: Optional[torch.Tensor], stride: int, num_prefix_tokens: int
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Takes tokens through the block.

        Args:
            x: All tokens, (B, L, C).
            index: Which of them enter the block, (B, M), while the others stay as they are; None for all.
            stride: 0, or the scores of every `stride`-th query are wanted.
            num_prefix_tokens: Class and register tokens at the front.

        Returns:
            All tokens, (B, L, C), and the scores (B, H, R, L) or None.
        """
        if index is not None:
            return scatter_tokens(x, index, self._call(gather_tokens(x, index))), None
        if stride == 0:
            return self._call(x), None
        q, k, v = self.attn.project_qkv(self.norm1(x))  # type: ignore[operator]
        scores = rows_of_queries(q, k, self.attn.scale, stride, num_prefix_tokens)  # type: ignore[arg-type]
        x = x + self.drop_path1(self.ls1(self.attn.project_out(softmax_attention(q, k, v))))  # type: ignore[operator]
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), scores

    def _call(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x) if torch.jit.is_scripting() else self(x)  # hooks belong to the call


class NoSelector(nn.Module):
    """Stands where a block has no ToSA layer after it."""

    def importance(self, maps: torch.Tensor) -> torch.Tensor:
        """Never asked; scripting wants the method."""
        return maps


class ToSAViT(IsotropicViT):
    """A ViT with token-selective layers.

    Args:
        attention_ratio: Share of the patches that enter a ToSA layer, from 0 (class and register tokens alone) to 1 (all: the dense model).
        selector_kernel: Kernel of the selectors' convolutions, odd.
        selector_hidden_ratio: Channels between a selector's convolutions over heads.
        selector_stride: The selectors read every so many queries; 1 for the paper's full map. The default triple 3, 4, 8 selects best,
            1, 1, 4 is the fastest.
        kwargs: timm's, and `mixers` of no use here: the attention is softmax.

    Raises:
        ValueError: For a ratio outside [0, 1], an impossible selector, or attention of another kind.
    """

    def __init__(
        self,
        *,
        attention_ratio: float = 0.5,
        selector_kernel: int = 3,
        selector_hidden_ratio: int = 4,
        selector_stride: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"block_fn": ToSABlock, "attn_layer": SoftmaxAttention, **kwargs})
        dd = {key: kwargs.get(key) for key in ("device", "dtype")}
        self.add_selectors(attention_ratio, selector_kernel, selector_hidden_ratio, selector_stride, **dd)

    @torch.jit.ignore
    def add_selectors(
        self, attention_ratio: float, kernel: int, hidden_ratio: int, stride: int, device=None, dtype=None
    ) -> None:
        """Makes new selectors, and pairs of the blocks."""
        self.attention_ratio = _checked_ratio(attention_ratio)
        if stride < 1:
            raise UserError(f"selector_stride: expected at least 1, got {stride}")
        blocks: List[Any] = list(self.blocks)
        if not all(isinstance(block, ToSABlock) and type(block.attn) is SoftmaxAttention for block in blocks):
            raise UserError("token selection reads softmax attention: expected blocks of no other kind (no `mixers`)")
        self.selector_stride = stride
        self.gives_selector_losses = False
        # one place per block, so that blocks and selectors can be walked side by side; only what has a partner selects
        self.selectors = nn.ModuleList(
            TokenSelector(block.attn.num_heads, kernel, hidden_ratio, device=device, dtype=dtype)
            if i % 2 == 0 and i + 1 < len(blocks)
            else NoSelector()
            for i, block in enumerate(blocks)
        )

    @torch.jit.ignore
    def set_attention_ratio(self, attention_ratio: float) -> None:
        """Sets the share of the patches that enter a ToSA layer, from 0 to 1, for good: it is saved with the model.

        Raises:
            ValueError: Outside [0, 1].
        """
        self.attention_ratio = _checked_ratio(attention_ratio)
        update_model_args(self, attention_ratio=attention_ratio)

    @torch.jit.ignore
    @contextmanager
    def at_ratio(self, attention_ratio: float) -> Iterator[None]:
        """Another attention ratio for a while. Raises ValueError outside [0, 1]."""
        kept, self.attention_ratio = self.attention_ratio, _checked_ratio(attention_ratio)
        try:
            yield
        finally:
            self.attention_ratio = kept

    def forward_layers(
        self, x: torch.Tensor, take: List[int], last: int
    ) -> Tuple[torch.Tensor, List[torch.Tensor], List[torch.Tensor]]:
        """Embedded tokens through the blocks.

        Args:
            x: (B, L, C).
            take: Blocks whose outputs are wanted.
            last: The block to stop after.

        Returns:
            The tokens behind block `last`, (B, L, C); those behind the blocks in `take`; and for each ToSA layer on the way
            the indices (B, M) of the tokens that entered it.
        """
        taken: List[torch.Tensor] = []
        entered: List[torch.Tensor] = []
        index: Optional[torch.Tensor] = None
        for i, (block, selector) in enumerate(zip(self.blocks, self.selectors)):  # noqa: B905  # TorchScript knows no strict
            if i <= last:
                selects = self.attention_ratio < 1 and i % 2 == 0 and i < last
                stride = self.selector_stride if selects else 0
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x, scores = checkpoint(block.forward_tokens, x, index, stride, self.num_prefix_tokens)
                else:
                    x, scores = block.forward_tokens(x, index, stride, self.num_prefix_tokens)  # type: ignore[operator]
                if index is not None:
                    entered.append(index)
                index = torch.jit.annotate(Optional[torch.Tensor], None)
                if scores is not None:
                    with torch.no_grad():  # only their own loss trains the selectors
                        importance = selector.importance(scores)  # type: ignore[operator]
                    index = _select(importance, self.attention_ratio, self.num_prefix_tokens)
                if i in take:
                    taken.append(x)
        return x, taken, entered

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> the tokens that the first block gets, (B, L, C)."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def forward_features(
        self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False
    ) -> torch.Tensor:
        refuse_mask("token selection", attn_mask, is_causal)
        return self.norm(self.forward_layers(self.embed(x), [], len(self.blocks) - 1)[0])

    def selected_tokens(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Images (B, C, H, W) -> for each ToSA layer the indices (B, M) of the tokens that enter it; none at a ratio of 1."""
        return self.forward_layers(self.embed(x), [], len(self.blocks) - 1)[2]

    @torch.jit.ignore
    def score_pairs(self, x: torch.Tensor, stride: Optional[int] = None) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        """The dense model's attention scores of both layers of each pair.

        Args:
            x: Images (B, C, H, W).
            stride: Queries that are read, as `selector_stride`; None for it.

        Returns:
            Per pair (B, H, R, L) of the standard layer, which a selector reads, and of the ToSA layer, whose softmax it should predict.
        """
        x = self.embed(x)
        scores = []
        blocks: List[Any] = list(self.blocks)
        for block in blocks:
            x, score = block.forward_tokens(x, None, stride or self.selector_stride, self.num_prefix_tokens)
            scores.append(score)
        return list(zip(scores[::2], scores[1::2], strict=False))

    @torch.jit.ignore
    def selector_losses(self, x: torch.Tensor) -> torch.Tensor:
        """KL(true map of the next layer || predicted map) in nats, mean over images, heads and queries, for each selector; (pairs,).

        The network is the target and isn't trained by it: gradients reach the selectors alone.
        """
        with torch.no_grad():
            pairs = self.score_pairs(x)
        losses = []
        for (before, after), selector in zip(pairs, self.token_selectors(), strict=True):
            predicted, target = selector(before), after.float().log_softmax(dim=-1)
            losses.append(F.kl_div(predicted, target, reduction="none", log_target=True).sum(-1).mean())
        return torch.stack(losses)

    @torch.jit.ignore
    def token_selectors(self) -> List[Any]:
        """The selectors, one per pair."""
        return [selector for selector in self.selectors if isinstance(selector, TokenSelector)]

    @torch.jit.ignore
    @contextmanager
    def giving_selector_losses(self) -> Iterator[None]:
        """Calls of the model give `selector_losses` instead of logits for a while: a wrapper of the model knows only its call."""
        self.gives_selector_losses = True
        try:
            yield
        finally:
            self.gives_selector_losses = False

    def forward(
        self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False
    ) -> torch.Tensor:
        if self.gives_selector_losses:
            return self.selector_losses(x)
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's `forward_intermediates`: the full grid behind any block, (B, C, rows, columns) or (B, rows * columns, C)."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected NCHW or NLC, got {output_fmt!r}")
        refuse_mask("token selection", attn_mask, is_causal)
        take, max_index = feature_take_indices(len(self.blocks), indices)
        height, width = x.shape[-2:]
        x, taken, _ = self.forward_layers(self.embed(x), take, max_index if stop_early else len(self.blocks) - 1)
        taken = [self.norm(tokens) if norm else tokens for tokens in taken]
        prefixes = [tokens[:, : self.num_prefix_tokens] for tokens in taken]
        patches = [tokens[:, self.num_prefix_tokens :] for tokens in taken]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size((height, width))
            patches = [tokens.transpose(1, 2).unflatten(2, grid).contiguous() for tokens in patches]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: Dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else {**result, "image_features": self.norm(x)}
        found = list(zip(patches, prefixes, strict=True)) if with_prefix else patches
        return found if intermediates_only else (self.norm(x), found)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Drops the blocks behind the last one asked for, and the selectors that then have no layer to select for."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.selectors = self.selectors[: len(self.blocks)]
        if len(self.blocks) % 2:
            self.selectors[-1] = NoSelector()
        return take


@torch.fx.wrap
@register_notrace_function
def _select(importance: torch.Tensor, attention_ratio: float, num_prefix_tokens: int) -> torch.Tensor:
    """Importance (B, L) -> indices (B, M). A leaf for fx, to which the number of tokens is unknown."""
    patches = importance.shape[1] - num_prefix_tokens
    return select_tokens(importance, number_selected(attention_ratio, patches), num_prefix_tokens)


def _checked_ratio(attention_ratio: Any) -> float:
    number = isinstance(attention_ratio, (int, float)) and not isinstance(attention_ratio, bool)
    if not number or not 0 <= attention_ratio <= 1:
        raise UserError(f"attention_ratio: expected a number from 0 to 1, got {attention_ratio!r}")
    return float(attention_ratio)


_PLAIN_BLOCKS = (Block, IsotropicBlock, ToSABlock)
_PLAIN_VITS = (VisionTransformer, IsotropicViT, ToSAViT)


def to_tosa(
    vit: VisionTransformer,
    attention_ratio: float = 0.5,
    selector_kernel: int = 3,
    selector_hidden_ratio: int = 4,
    selector_stride: int = 8,
) -> ToSAViT:
    """A copy of a ViT as a ToSA-ViT: same weights, new selectors, which have to be trained.

    Works on timm's plain ViTs (DeiT, AugReg, DINOv2 with registers and layer scale, CLIP-like ones with a norm before the blocks, with
    class token or average pooling) and on `effzoo_vit_*`. A copy of the latter, or of timm's DeiT of the same shape, can be saved as the
    `effzoo_tosa_vit_*` of its size.

    Args:
        vit: The model; it isn't changed.
        attention_ratio: As in `ToSAViT`, and likewise the rest.

    Raises:
        ValueError: For another kind of model, block or attention, or arguments that `ToSAViT` refuses.
    """
    if type(vit) not in _PLAIN_VITS:
        raise UserError(f"expected a plain timm VisionTransformer, got {type(vit).__name__}")
    odd = next((block for block in vit.blocks if type(block) not in _PLAIN_BLOCKS), None)
    if odd is not None:
        raise UserError(f"expected a VisionTransformer of timm's plain blocks, got {type(odd).__name__}")
    if not all(type(block.attn) in (Attention, SoftmaxAttention) for block in vit.blocks):
        raise UserError("expected a VisionTransformer with softmax attention in every block")
    like = next(vit.parameters())
    model: Any = swap_attention(copy.deepcopy(vit), "softmax")
    model.__class__ = ToSAViT
    for block in model.blocks:
        block.__class__ = ToSABlock  # it has methods that timm's has not, and nothing else
    model.add_selectors(
        attention_ratio, selector_kernel, selector_hidden_ratio, selector_stride, device=like.device, dtype=like.dtype
    )
    _rename(
        model,
        "effzoo_tosa_vit_",
        attention_ratio=attention_ratio,
        selector_kernel=selector_kernel,
        selector_hidden_ratio=selector_hidden_ratio,
        selector_stride=selector_stride,
    )
    return model


def to_dense(model: ToSAViT) -> IsotropicViT:
    """A copy of a ToSA-ViT as the dense ViT that it is at a ratio of 1, without selectors. Raises ValueError for another model."""
    if type(model) is not ToSAViT:
        raise UserError(f"expected a ToSAViT, got {type(model).__name__}")
    dense: Any = copy.deepcopy(model)
    for name in ("selectors", "attention_ratio", "selector_stride", "gives_selector_losses"):
        delattr(dense, name)
    dense.__class__ = IsotropicViT
    for block in dense.blocks:
        block.__class__ = IsotropicBlock
    dense._model_args = {
        key: value for key, value in getattr(dense, "_model_args", {}).items() if key not in _SELECTION_ARGS
    }
    _rename(dense, "effzoo_vit_")
    return dense


_SELECTION_ARGS = ("attention_ratio", "selector_kernel", "selector_hidden_ratio", "selector_stride")
_SAME_SHAPE = re.compile(r"(?:effzoo_(?:tosa_)?vit_|deit_)(pico|tiny|small|base)(?:_patch16_224)?$")


def _rename(model: Any, prefix: str, **model_args: Any) -> None:
    """Gives a copy the name of the registered model that has its shape, so that it can be saved; others keep theirs."""
    named = _SAME_SHAPE.match(model.pretrained_cfg.get("architecture", ""))
    if named:
        model.pretrained_cfg = {**model.pretrained_cfg, "architecture": prefix + named.group(1)}
        model.default_cfg = model.pretrained_cfg
        kept = {key: value for key, value in getattr(model, "_model_args", {}).items() if key != "mixers"}
        model._model_args = {**kept, **model_args}


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: VisionTransformer) -> Dict[str, torch.Tensor]:
    """Every ViT checkpoint that timm reads, and ours; where there are no selectors, the model's initial ones stay."""
    converted = vit_checkpoint_filter_fn(state_dict, model)
    own = {key: value for key, value in model.state_dict().items() if key.startswith("selectors.")}
    if not any(key.startswith("selectors.") for key in converted):
        converted.update(own)
    return converted


PAPER = {
    "origin_url": "https://arxiv.org/abs/2406.08816",  # there is no code
    "paper_name": "ToSA: Token Selective Attention for Efficient Vision Transformers",
    "paper_ids": "arXiv:2406.08816",
}

default_cfgs = generate_default_cfgs(
    {
        name: cfg
        for size in SIZES
        for name, cfg in vit_cfgs(f"effzoo_tosa_vit_{size}", size, deit_weights=True, **PAPER).items()
    }
)


def _create(size: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_vit(f"effzoo_tosa_vit_{size}", pretrained, ToSAViT, checkpoint_filter_fn, **{**SIZES[size], **kwargs})


@register_model
def effzoo_tosa_vit_pico(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ToSA-ViT-pico, for 32 x 32 pixels and patches of 4 x 4."""
    return _create("pico", pretrained, **kwargs)


@register_model
def effzoo_tosa_vit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ToSA-ViT in DeiT-Ti's shape."""
    return _create("tiny", pretrained, **kwargs)


@register_model
def effzoo_tosa_vit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ToSA-ViT in DeiT-S' shape."""
    return _create("small", pretrained, **kwargs)


@register_model
def effzoo_tosa_vit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ToSA-ViT in DeiT-B's shape."""
    return _create("base", pretrained, **kwargs)
