"""ToSA-ViT: every second layer processes only the tokens selected by the preceding layer; the rest bypass it.

"ToSA: Token Selective Attention for Efficient Vision Transformers", arXiv:2406.08816. No official code; `attention.token_select` says what
the paper states and what was decided. DeiT's shapes (arXiv:2012.12877, https://github.com/facebookresearch/deit, Apache-2.0) on timm's
`VisionTransformer` (Apache-2.0): the parameters are those of a ViT and of the selectors, so every ViT checkpoint loads and leaves the
selectors at their initial values. Every layer returns all tokens, as dense prediction needs.

Layers 0, 2, 4, ... are standard, 1, 3, 5, ... token-selective; if their number is odd, the last is standard. At an attention ratio of 1
no selector is evaluated, and the model is the dense one bit for bit; at 0 only class and register tokens enter the ToSA layers.

Layout: tokens (B, L, C), prefix tokens first, then patches in row-major order.
"""

import copy
from typing import Any, ClassVar, Dict, List, Mapping, Optional, Tuple, Type, Union

import torch
import torch.nn.functional as F
from timm.layers import Attention, register_notrace_function
from timm.models import generate_default_cfgs
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
from ._swap import swap_attention
from ._vit import SIZES, IsotropicBlock, IsotropicViT, register_vit, vit_cfgs
from ._vit import checkpoint_filter_fn as vit_checkpoint_filter_fn

__all__ = ["AtRatio", "SelectorLosses", "ToSAViT", "to_dense", "to_tosa"]


class ToSABlock(IsotropicBlock):
    """A ViT's block that can also return the scores of its attention, or process some of the tokens only."""

    def forward_tokens(
        self, x: torch.Tensor, index: Optional[torch.Tensor], stride: int, num_prefix_tokens: int
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Applies the block.

        Args:
            x: All tokens, (B, L, C).
            index: Indices of those that enter the block, (B, M), while the others bypass it; None for all.
            stride: Return the scores of every `stride`-th query; 0 for none.
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
    """Placeholder for a block without a ToSA layer after it."""

    def importance(self, maps: torch.Tensor) -> torch.Tensor:
        """Never called; TorchScript needs the method."""
        return maps


class ToSAViT(IsotropicViT):
    """A ViT with token-selective layers.

    Args:
        attention_ratio: Share of the patches that enter a ToSA layer, from 0 (class and register tokens alone) to 1 (all: the dense model).
        selector_kernel: Kernel of the selectors' convolutions, odd.
        selector_hidden_ratio: Channels between a selector's convolutions over heads.
        selector_stride: The selectors read every N-th query; 1 for the paper's full map. The default triple 3, 4, 8 selects best,
            1, 1, 4 is the fastest.
        kwargs: timm's; `mixers` is refused, as the attention must be softmax.

    Raises:
        ValueError: For a ratio outside [0, 1], an impossible selector, or attention of another kind.
    """

    block_cls: ClassVar[Type[Block]] = ToSABlock

    def __init__(
        self,
        *,
        attention_ratio: float = 0.5,
        selector_kernel: int = 3,
        selector_hidden_ratio: int = 4,
        selector_stride: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"attn_layer": SoftmaxAttention, **kwargs})
        dd = {key: kwargs.get(key) for key in ("device", "dtype")}
        self._add_selectors(attention_ratio, selector_kernel, selector_hidden_ratio, selector_stride, **dd)

    @classmethod
    def from_vit(
        cls,
        vit: VisionTransformer,
        attention_ratio: float = 0.5,
        selector_kernel: int = 3,
        selector_hidden_ratio: int = 4,
        selector_stride: int = 8,
    ) -> "ToSAViT":
        """A copy of a ViT as a ToSA-ViT: same weights and new selectors, which have to be trained. Exported as `to_tosa`.

        Works on timm's plain ViTs (DeiT, AugReg, DINOv2 with registers and layer scale, CLIP-like ones with a norm before the blocks,
        with class token or average pooling) and on `effzoo_vit_*`. A copy of the latter, or of timm's DeiT of the same shape, can be saved
        as the `effzoo_tosa_vit_*` of its size.

        Args:
            vit: The model, which is not changed.
            attention_ratio: This and the other arguments are the constructor's.

        Raises:
            ValueError: For another kind of model, block or attention, or arguments that the constructor refuses.
        """
        if type(vit) not in _PLAIN_VITS:
            raise ValueError(f"expected a plain timm VisionTransformer, got {type(vit).__name__}")
        odd = next((block for block in vit.blocks if type(block) not in _PLAIN_BLOCKS), None)
        if odd is not None:
            raise ValueError(f"expected a VisionTransformer of timm's plain blocks, got {type(odd).__name__}")
        if not all(type(block.attn) in (Attention, SoftmaxAttention) for block in vit.blocks):
            raise ValueError("expected a VisionTransformer with softmax attention in every block")
        like = next(vit.parameters())
        model = super().from_vit(swap_attention(copy.deepcopy(vit), "softmax"))
        dd = {"device": like.device, "dtype": like.dtype}
        selection = (attention_ratio, selector_kernel, selector_hidden_ratio, selector_stride)
        model._add_selectors(*selection, **dd)
        _register_as(model, "effzoo_tosa_vit", dict(zip(_SELECTION_ARGS, selection, strict=True)))
        return model

    @torch.jit.ignore
    def _add_selectors(
        self, attention_ratio: float, kernel: int, hidden_ratio: int, stride: int, device=None, dtype=None
    ) -> None:
        self.attention_ratio = _checked_ratio(attention_ratio)
        if stride < 1:
            raise ValueError(f"selector_stride: expected at least 1, got {stride}")
        blocks: List[Any] = list(self.blocks)
        if not all(isinstance(block, ToSABlock) and type(block.attn) is SoftmaxAttention for block in blocks):
            raise ValueError("token selection reads softmax attention: expected blocks of no other kind (no `mixers`)")
        self.selector_stride = stride
        # one per block, so that blocks and selectors can be iterated together; only blocks with a ToSA layer after them select
        self.selectors = nn.ModuleList(
            TokenSelector(block.attn.num_heads, kernel, hidden_ratio, device=device, dtype=dtype)
            if i % 2 == 0 and i + 1 < len(blocks)
            else NoSelector()
            for i, block in enumerate(blocks)
        )

    @torch.jit.ignore
    def set_attention_ratio(self, attention_ratio: float) -> None:
        """Sets the share of the patches that enter a ToSA layer, from 0 to 1; it is saved with the model.

        Raises:
            ValueError: Outside [0, 1].
        """
        self.attention_ratio = _checked_ratio(attention_ratio)
        update_model_args(self, attention_ratio=attention_ratio)

    def forward_layers(
        self, x: torch.Tensor, take: List[int], last: int, attention_ratio: Optional[float] = None
    ) -> Tuple[torch.Tensor, List[torch.Tensor], List[torch.Tensor]]:
        """Embedded tokens through the blocks.

        Args:
            x: (B, L, C).
            take: Blocks whose outputs are returned.
            last: The block to stop after.
            attention_ratio: From 0 to 1; None for the model's own.

        Returns:
            The output of block `last`, (B, L, C); the outputs of the blocks in `take`; and for each ToSA layer up to `last` the indices
            (B, M) of the tokens that entered it.
        """
        ratio = self.attention_ratio if attention_ratio is None else attention_ratio
        taken: List[torch.Tensor] = []
        entered: List[torch.Tensor] = []
        index: Optional[torch.Tensor] = None
        for i, (block, selector) in enumerate(zip(self.blocks, self.selectors)):  # noqa: B905  # TorchScript knows no strict
            if i <= last:
                selects = ratio < 1 and i % 2 == 0 and i < last
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
                    index = _select(importance, ratio, self.num_prefix_tokens)
                if i in take:
                    taken.append(x)
        return x, taken, entered

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> the tokens that enter the first block, (B, L, C)."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def forward_features(
        self,
        x: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
        attention_ratio: Optional[float] = None,
    ) -> torch.Tensor:
        refuse_mask("token selection", attn_mask, is_causal)
        return self.norm(self.forward_layers(self.embed(x), [], len(self.blocks) - 1, attention_ratio)[0])

    def forward_at_ratio(self, x: torch.Tensor, attention_ratio: float) -> torch.Tensor:
        """Logits (B, num_classes) at another attention ratio than the model's own. Raises ValueError outside [0, 1]."""
        return self.forward_head(self.forward_features(x, attention_ratio=_checked_ratio(attention_ratio)))

    def selected_tokens(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Images (B, C, H, W) -> for each ToSA layer the indices (B, M) of the tokens that enter it; none at a ratio of 1."""
        return self.forward_layers(self.embed(x), [], len(self.blocks) - 1)[2]

    @torch.jit.ignore
    def score_pairs(self, x: torch.Tensor, stride: Optional[int] = None) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        """The dense model's attention scores of both layers of each pair.

        Args:
            x: Images (B, C, H, W).
            stride: As `selector_stride`, which is the default.

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

        The network provides the target and gets no gradients, only the selectors do.
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

    def forward(
        self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False
    ) -> torch.Tensor:
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
        """Removes the blocks after the last requested one, and the selectors that then have no layer to select for."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.selectors = self.selectors[: len(self.blocks)]
        if len(self.blocks) % 2:
            self.selectors[-1] = NoSelector()
        return take


class SelectorLosses(nn.Module):
    """The selectors of a ToSA-ViT as a trainable module: images -> `selector_losses`, (pairs,). The ViT is always in eval mode.

    Attributes:
        model: The ViT, with its selectors.
    """

    def __init__(self, vit: ToSAViT) -> None:
        super().__init__()
        self.model = vit.eval()

    def train(self, mode: bool = True) -> "SelectorLosses":
        """Sets this module's own mode; the ViT stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.selector_losses(images)


class AtRatio(nn.Module):
    """A ToSA-ViT as a trainable module at an attention ratio per call: images, ratio -> logits (B, num_classes).

    Attributes:
        model: The ViT.
    """

    def __init__(self, vit: ToSAViT) -> None:
        super().__init__()
        self.model = vit

    def forward(self, images: torch.Tensor, attention_ratio: float) -> torch.Tensor:
        return self.model.forward_at_ratio(images, attention_ratio)


@torch.fx.wrap
@register_notrace_function
def _select(importance: torch.Tensor, attention_ratio: float, num_prefix_tokens: int) -> torch.Tensor:
    """Importance (B, L) -> indices (B, M). A leaf for fx, to which the number of tokens is unknown."""
    patches = importance.shape[1] - num_prefix_tokens
    return select_tokens(importance, number_selected(attention_ratio, patches), num_prefix_tokens)


def _checked_ratio(attention_ratio: Any) -> float:
    number = isinstance(attention_ratio, (int, float)) and not isinstance(attention_ratio, bool)
    if not number or not 0 <= attention_ratio <= 1:
        raise ValueError(f"attention_ratio: expected a number from 0 to 1, got {attention_ratio!r}")
    return float(attention_ratio)


_PLAIN_BLOCKS = (Block, IsotropicBlock, ToSABlock)
_PLAIN_VITS = (VisionTransformer, IsotropicViT, ToSAViT)


to_tosa = ToSAViT.from_vit


def to_dense(model: ToSAViT) -> IsotropicViT:
    """A copy of a ToSA-ViT as the dense ViT that it is at a ratio of 1, without selectors. Raises ValueError for another model."""
    if type(model) is not ToSAViT:
        raise ValueError(f"expected a ToSAViT, got {type(model).__name__}")
    dense: Any = IsotropicViT.from_vit(model)
    for name in ("selectors", "attention_ratio", "selector_stride"):
        delattr(dense, name)
    _register_as(dense, "effzoo_vit", {})
    return dense


_SELECTION_ARGS = ("attention_ratio", "selector_kernel", "selector_hidden_ratio", "selector_stride")
_SIZES = {f"{family}_{size}": size for family in ("effzoo_vit", "effzoo_tosa_vit") for size in SIZES} | {
    f"deit_{size}_patch16_224": size for size in ("tiny", "small", "base")
}
"""Architecture -> size of the registered models of the same shape."""


def _register_as(model: Any, family: str, selection: Mapping[str, Any]) -> None:
    """Gives a copy the name and arguments of the family's model of its shape, so that it can be saved; other shapes keep their name."""
    model_args = {key: value for key, value in getattr(model, "_model_args", {}).items() if key not in _SELECTION_ARGS}
    size = _SIZES.get(getattr(model, "pretrained_cfg", {}).get("architecture", ""))
    if size is not None:
        model.pretrained_cfg = {**model.pretrained_cfg, "architecture": f"{family}_{size}"}
        model.default_cfg = model.pretrained_cfg
        model_args = {**model_args, **selection}
        model_args.pop("mixers", None)
    model._model_args = model_args


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: VisionTransformer) -> Dict[str, torch.Tensor]:
    """Keys of every ViT checkpoint that timm reads, and ours -> ours; without selectors in it, the model keeps its initial ones."""
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
for _size in SIZES:
    register_vit(
        __name__, f"effzoo_tosa_vit_{_size}", _size, "token-selective attention", ToSAViT, checkpoint_filter_fn
    )
