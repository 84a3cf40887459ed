"""Whether operations are recorded or executed, and the one cache of constants that follow from sizes.

Tracers (torch.fx, torch.jit.trace, torch.export, torch.compile, fake tensors) see shapes as symbols and keep what they are shown, so every
decision by size, every shortcut in place and every cached tensor asks here first.
"""

from typing import Any, Callable, Dict, Tuple

import torch
import torch.fx
from torch import nn

_CACHE: Dict[Tuple[Any, ...], torch.Tensor] = {}
MAX_ENTRIES = 256  # Swin has eight per image size
MAX_BYTES = 2**26  # the largest constant of a 1024 px image takes 4 MB


@torch.jit.ignore
def is_traced(x: torch.Tensor) -> bool:
    """Whether operations on x are being traced (fx, jit, export, compile)."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_compiling()


def is_eager(*tensors: torch.Tensor) -> bool:
    """Whether operations on these tensors are executed, not traced, and none is a fake tensor or another subclass."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(type(x) in (torch.Tensor, nn.Parameter) for x in tensors)


def is_eager_inference(*tensors: torch.Tensor) -> bool:
    """Whether operations on these tensors are executed on the CPU without recording gradients."""
    if not is_eager(*tensors) or tensors[0].device.type != "cpu":
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def remember(build: Callable[..., torch.Tensor], like: torch.Tensor, *args: Any) -> torch.Tensor:
    """build(*args, like.device), cached for later calls with the same arguments; the result is shared and must not be written to.

    Args:
        build: Module-level function whose result follows from its arguments alone, never from weights, so models may share it.
        like: The tensor that the constant is for; under a tracer the constant is built anew, as a part of what is traced.
        args: Hashable arguments, sizes mostly.
    """
    if not is_eager(like):
        return build(*args, like.device)
    key = (build, like.device, *args)
    constant = _CACHE.get(key)
    if constant is None:
        with torch.inference_mode(False), torch.no_grad():  # a tensor made in inference mode could not be trained with
            constant = build(*args, like.device)
        while len(_CACHE) >= MAX_ENTRIES or _cached_bytes() + constant.nbytes > MAX_BYTES:
            if not _CACHE:
                return constant
            _CACHE.pop(next(iter(_CACHE)))
        _CACHE[key] = constant
    return constant


def _cached_bytes() -> int:
    return sum(constant.nbytes for constant in _CACHE.values())
