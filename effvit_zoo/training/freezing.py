"""What keeps a trained backbone's weights from being destroyed: frozen first epochs, and BatchNorms that keep their statistics."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from .config import RunConfig

SMALL_BATCH = 128
"""Images from which on a batch's statistics may take the place of those of trained weights."""


def fixed_norms(model: nn.Module, config: RunConfig) -> list[_BatchNorm]:
    """BatchNorms that keep their statistics while the model is trained, as `train.batchnorm` says; put them into eval mode.

    Those that have none yet, of layers that the trained weights didn't have, are not among them.
    """
    small = config.starts_trained and config.train.batch_size < SMALL_BATCH
    if config.train.batchnorm == "train" or (config.train.batchnorm is None and not small):
        return []
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None and bool(norm.running_mean.any())]


class FrozenBackbone:
    """Freezes all but the classifier of a timm model up to an optimizer step.

    Create it after the optimizer, which needs all parameters; what was frozen before stays frozen.

    Args:
        model: A model with `get_classifier`.
        until_step: The first step that trains all of it.
        wrapped: The model is wrapped for several processes; gradients are then computed and dropped, since the wrapper expects all of them.

    Raises:
        UserError: The model has no classifier.
    """

    def __init__(self, model: nn.Module, until_step: int, wrapped: bool) -> None:
        classifier: Any = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
        heads = [head for head in (classifier if isinstance(classifier, tuple) else (classifier,)) if head is not None]
        own = {id(parameter) for head in heads for parameter in head.parameters()}
        if not own:
            raise UserError(f"train.freeze_epochs: {type(model).__name__} has no classifier to train alone, expected 0")
        self.until_step, self.wrapped = until_step, wrapped
        self.parameters = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
        self.norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]

    def before_step(self, step: int) -> None:
        """Call it when the model is in training mode."""
        frozen = step < self.until_step
        if not self.wrapped:
            for parameter in self.parameters:
                parameter.requires_grad_(not frozen)
        if frozen:
            for norm in self.norms:
                norm.eval()

    def after_backward(self, step: int) -> None:
        if step < self.until_step:
            for parameter in self.parameters:
                parameter.grad = None
