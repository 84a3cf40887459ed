"""HierarchicalBackbone: timm's model contract (1.0.31), implemented once for every stem -> stages -> norm -> head family of this package.

A family subclasses it, builds `stem`, `stages` (an `nn.Sequential` of `Stage`), `norm` and `head` in its constructor and ends with
`finish(dims)`; everything else that timm and its users expect is here, together with the families' build call around timm's factory and the
defaults of a pretrained config. Layers fold by `_fold`.

Own code; the contract (names, arguments, semantics) is timm's, Apache-2.0, https://github.com/huggingface/pytorch-image-models.
Deliberate differences: `forward_intermediates` also gives NHWC, and `init_weights` re-initialises everything after `to_empty`.

Layout: images are (B, C, H, W); features are (B, C, H, W) or (B, H, W, C) as the class attribute `output_fmt` says.
"""

import argparse
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    Dict,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
    TypeVar,
    Union,
)

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import nn

from ..attention._recording import is_traced
from ..errors import unknown_choice_text

BackboneT = TypeVar("BackboneT", bound=nn.Module)

STARTED_RANDOM = "started_random"
"""Attribute of models that were built without weights: tag, licence and classes of published weights are not theirs."""


class Stage(nn.Module):
    """An optional downsampling layer, then blocks, which are recomputed in backward when `grad_checkpointing` is set."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: Optional[nn.Module] = None) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x


class HierarchicalBackbone(nn.Module):
    """Base of the hierarchical families.

    A subclass provides:
      * `stem`, `stages`, `norm` (`nn.Identity()` if there is none) and `head`, then `self.finish(dims)` as the constructor's last line.
      * `head(x, pre_logits=False)`, `head.fc`, `head.num_features` and `head.reset(num_classes, pool_type, reset_other, in_features,
        device, dtype)` as timm's classifier heads have them; otherwise it overrides `get_classifier`, `reset_classifier`, `forward_head`.
      * `init_module(module, name)` if its initialisation is not truncated normal 0.02. A module that owns bare parameters has
        `reset_parameters()` for them, one that owns non-persistent buffers `init_non_persistent_buffers()`.
      * the class attributes below where its values differ.
      * if timm has other names for `stem` and `stages` in this family: `stem_name`, `stages_name` and the two methods that call
        these parts, `forward_stages` and `forward_features` (TorchScript needs literal names).

    Args:
        num_classes: Outputs of the classifier; 0 removes it.
        in_chans: Channels of the image.
        global_pool: One of `pool_types`; "" returns the feature map unpooled.

    Raises:
        ValueError: On an unknown `global_pool`, or by `forward_features` on an image smaller than `min_input_size`.
    """

    output_fmt = "NCHW"
    pool_types: ClassVar[Tuple[str, ...]] = ("", "avg", "max", "avgmax", "catavgmax")
    min_input_size: ClassVar[int] = 1  # pixels; the smallest height and width that all layers support
    stem_name: ClassVar[str] = "stem"
    stages_name: ClassVar[str] = "stages"

    if TYPE_CHECKING:  # hidden from TorchScript, which would take them for attribute types
        stem: nn.Module
        stages: nn.Sequential
        norm: nn.Module
        head: nn.Module

    def __init__(self, num_classes: int, in_chans: int, global_pool: str) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = self.check_pool(global_pool)
        self.output_fmt = type(self).output_fmt  # FeatureGetterNet and TorchScript read it from the instance
        self.feature_info: List[Dict[str, Any]] = []
        self.num_stages = 0
        self.num_features = 0
        self.head_hidden_size = 0

    @torch.jit.ignore
    def check_pool(self, global_pool: str) -> str:
        """The name itself if it is one of `pool_types`, else ValueError."""
        if global_pool not in self.pool_types:
            raise ValueError(unknown_choice_text("global_pool", global_pool, self.pool_types))
        return global_pool

    @torch.jit.ignore
    def finish(self, dims: Sequence[int], first_reduction: int = 4) -> None:
        """Closes a constructor: feature_info and widths from the stages' channels, then initial weights.

        Args:
            dims: Channels of every stage.
            first_reduction: Input pixels per pixel of the first stage's output; every later stage doubles it.
        """
        self.feature_info = [
            {"num_chs": dim, "reduction": first_reduction * 2**i, "module": f"{self.stages_name}.{i}"}
            for i, dim in enumerate(dims)
        ]
        self.num_stages = len(dims)
        self.num_features = dims[-1]
        self.head_hidden_size = getattr(self.head, "num_features", self.num_features)
        self.init_weights(needs_reset=False)

    # initialisation

    @torch.jit.ignore
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialises every parameter and buffer, also after `to_empty` has left them undefined.

        Args:
            mode: "" for the family's own initialisation, "reset" for torch's defaults.
            needs_reset: Start from `reset_parameters` of every module; False right after construction.
        """
        if mode not in ("", "reset"):
            raise ValueError(unknown_choice_text("weight init mode", mode, ("", "reset")))
        for name, module in self.named_modules():
            if needs_reset or mode == "reset":
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
                fill_buffers = getattr(module, "init_non_persistent_buffers", None)
                if fill_buffers is not None:
                    fill_buffers()
            if mode == "":
                self.init_module(module, name)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, name: str) -> None:
        """Initialises one module's own parameters; here truncated normal 0.02 for Conv2d and Linear, zero bias."""
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    # for optimisers and trainers

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of parameters without weight decay, besides biases and norms."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns that order parameters by depth, for layer-wise learning rates; by stage if `coarse`, else by block."""
        stages = rf"^{self.stages_name}\.(\d+)"
        return {
            "stem": f"^{self.stem_name}",
            "blocks": stages
            if coarse
            else [
                (rf"{stages}\.downsample", (0,)),
                (rf"{stages}\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: blocks are recomputed in backward instead of being stored."""
        for stage in getattr(self, self.stages_name):
            stage.grad_checkpointing = enable

    # classifier

    @torch.jit.ignore
    def get_classifier(self) -> Union[nn.Module, Tuple[nn.Module, ...]]:
        """The final linear layer, `nn.Identity` if there is none."""
        return self.head.fc  # type: ignore[return-value]

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None, reset_other: bool = False) -> None:
        """Replaces the classifier by a fresh one on the model's device, in its dtype and mode.

        Args:
            num_classes: Outputs; 0 removes the classifier.
            global_pool: New pooling; None keeps the present one.
            reset_other: Also remove the head's other layers between pooling and classifier.
        """
        if global_pool is not None:
            self.global_pool = self.check_pool(global_pool)
        self.num_classes = num_classes
        self.head.reset(  # type: ignore[operator]
            num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **get_device_dtype(self)
        )
        self.head_hidden_size = self.head.num_features  # type: ignore[assignment]

    # forward

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Features of several stages at once.

        Args:
            x: Image, (B, in_chans, height, width).
            indices: Stages to return: the last n if an int, these if a list, all if None.
            norm: Apply the final norm to the last stage's feature.
            stop_early: Skip the stages after the last requested one.
            output_fmt: Layout of the intermediates, "NCHW" or "NHWC".
            intermediates_only: Return the list only.

        Returns:
            The list of intermediates, or (final features in the model's own layout, intermediates).
        """
        if output_fmt != "NCHW" and output_fmt != "NHWC":
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt}")
        intermediates: List[torch.Tensor] = []
        take_indices, max_index = feature_take_indices(self.num_stages, indices)
        last_index = self.num_stages - 1

        if not torch.jit.is_scripting():
            self.check_input(x)
        reached = max_index if stop_early else last_index
        x, taken = self.forward_stages(x, take_indices, reached)
        for i, y in enumerate(taken):
            if norm and i == len(taken) - 1 and last_index in take_indices:
                y = self.norm(y)  # y is the last stage's
            if self.output_fmt == "NCHW" and output_fmt == "NHWC":
                y = y.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)
            elif self.output_fmt == "NHWC" and output_fmt == "NCHW":
                y = y.permute(0, 3, 1, 2).contiguous()  # (B, C, H, W)
            intermediates.append(y)

        if intermediates_only:
            return intermediates
        if reached == last_index:
            x = self.norm(x)  # sized for the last stage only
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Removes the layers that the given stages' features do not need; returns the stages' indices.

        Removing stages always removes norm and head too, which are sized for the last stage.
        """
        take_indices, max_index = feature_take_indices(self.num_stages, indices)
        cut = max_index < self.num_stages - 1
        self.num_stages = max_index + 1
        setattr(self, self.stages_name, getattr(self, self.stages_name)[: self.num_stages])
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "", reset_other=True)
        return take_indices

    @torch.jit.ignore
    def check_input(self, x: torch.Tensor) -> None:
        """Raises ValueError if the image is smaller than `min_input_size`; no check under a tracer, where shapes are symbols."""
        if is_traced(x):
            return
        height, width = x.shape[-2:]
        if min(height, width) < self.min_input_size:
            raise ValueError(
                f"{type(self).__name__} needs images of at least {self.min_input_size} x {self.min_input_size} pixels, "
                f"got {height} x {width}"
            )

    def forward_stages(self, x: torch.Tensor, take: List[int], last: int) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Image -> (output of stage `last`, outputs of the stages in `take`)."""
        x = self.stem(x)
        taken: List[torch.Tensor] = []
        for i, stage in enumerate(self.stages):
            if i <= last:
                x = stage(x)
                if i in take:
                    taken.append(x)
        return x, taken

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Image (B, in_chans, height, width) -> last feature map, unpooled, in the model's `output_fmt`."""
        if not torch.jit.is_scripting():
            self.check_input(x)
        x = self.stem(x)
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature map -> logits (B, num_classes), or what the classifier would see if `pre_logits`."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


# building and loading


def build(
    model_cls: Callable[..., BackboneT],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[Dict[str, Any], nn.Module], Dict[str, torch.Tensor]],
    sizes: Mapping[str, Any],
    **kwargs: Any,
) -> BackboneT:
    """timm's factory for a four-stage family; `kwargs`, the arguments of the registered function's caller, override `sizes`."""
    # official training checkpoints contain their command line; timm admits it in local files, but not in downloads from a URL
    with torch.serialization.safe_globals([argparse.Namespace]):
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
            **{**sizes, **kwargs},
        )
    return started(model, pretrained)


def started(model: BackboneT, pretrained: bool) -> BackboneT:
    """The model, marked where it starts from random weights."""
    if not pretrained:
        setattr(model, STARTED_RANDOM, True)
    return model


def imagenet_cfg(*, license: str, origin_url: str, paper_name: str, paper_ids: str, **overrides: Any) -> Dict[str, Any]:
    """One entry of a family's `default_cfgs`: ImageNet-1k at 224 px with ImageNet's mean and std unless `overrides` say otherwise.

    `hf_hub_id` must be the full name: timm completes "timm/" with the name of our architecture, which is not on the Hub.
    """
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": license,
        "origin_url": origin_url,
        "paper_name": paper_name,
        "paper_ids": paper_ids,
        **overrides,
    }


NANO64: Dict[str, Any] = {"input_size": (3, 64, 64), "pool_size": (2, 2), "crop_pct": 1.0, "num_classes": 10}
"""What the configs of the size `nano64` have in common.

`nano64` is this package's own size, in no paper: one model of every kind with about 0.8 M parameters and 54 M multiply-accumulates for
an image of 64 pixels (within 15 %), so that kinds can be compared, exported and quantised with weights that a CPU trains in half an hour.
The isotropic ones see 64 patches of 8 pixels. The hierarchical ones have fewer blocks than the smallest of their papers, and channels that
grow less from stage to stage, because the later maps of so small an image have few pixels: at equal cost, narrow early stages behind a
stem of half the stride learned less (SwiftFormer: 82.1 against 86.5 % of 4,000 held-out training images of Fashion-MNIST after 2 epochs of
8,192, one trial each). The name carries the image size because "nano" alone is taken: the Conv2Former-N of the paper has 15 M parameters.
"""


def unwrap_state_dict(checkpoint: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """The tensors of a training checkpoint that nests them (averaged weights first), or the dict itself."""
    for key in ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    return checkpoint
