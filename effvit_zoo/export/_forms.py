"""Forms of a model's graph: equal results by operations that suit a runtime better. The one step that rewrites a fused model for a target.

A form is a function that changes a model in eval mode in place; a target's row names those that suit its runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ..errors import unknown_choice


def explicit_attention(model: nn.Module) -> None:
    """Attention as two matrix products and a softmax instead of torch's scaled_dot_product_attention, whose decomposition brings
    masks that some runtimes compute one by one."""
    for module in model.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            setattr(module, "fused_attn", False)  # noqa: B010  # which mypy takes for a tensor


FORMS: dict[str, Callable[[nn.Module], None]] = {"explicit_attention": explicit_attention}
"""Name, as records have it -> what puts a fused model into that form."""


def transform(model: nn.Module, forms: Sequence[str]) -> nn.Module:
    """Puts a fused model of the caller's own into several forms, one after the other, and returns it. Raises `UserError`."""
    for name in forms:
        if name not in FORMS:
            raise unknown_choice("form", name, list(FORMS))
        FORMS[name](model)
    return model
