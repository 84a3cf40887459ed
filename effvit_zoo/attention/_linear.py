"""Shared parts of the linear mechanisms: argument checks, exact accumulation, and evaluation in chunks that fit the cache.

A linear mechanism first sums over the keys' tokens, then maps the queries' tokens one by one. Both steps can therefore run chunk by chunk,
with temporaries that stay in the processor's cache and whose size depends neither on the number of tokens nor on the batch. `evaluate`
does so in eager inference on a CPU; training, tracing, export and scripting apply the same functions to all tokens at once.

Layout: the token axis is the last but one of every tensor: (B, H, N, D) and (H, N, D) with heads, (B, N, C) and (N, C) without.
"""

import contextlib
from typing import Any, Callable, ContextManager, Iterator, Optional, Tuple

import torch

from ._recording import is_eager_inference

# Elements of a chunk: 1,024 tokens of 3 heads with 64 channels, 0.8 MB in float32; the caches hold a handful of these
CHUNK_ELEMENTS = 1024 * 3 * 64


def check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises ValueError unless q is (B, H, Nq, D), k is (B, H, Nk, D) and v is (B, H, Nk, Dv).

    The batch is left unread, so that it may be dynamic in an exported graph.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"expected q, k, v of (B, H, N, D), got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    if q.shape[1] != k.shape[1] or k.shape[1] != v.shape[1] or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(
            "expected q, k of equal heads and head dim, k, v of equal heads and tokens, "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )


def widen(x: torch.Tensor) -> torch.Tensor:
    """float16 and bfloat16 -> float32; float32 and float64 as they are. Sums over tokens overflow or stall in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def quadratic_is_cheaper(q: torch.Tensor, k: torch.Tensor, rank: int = 1) -> bool:
    """Whether (q k^T) v takes no more multiplications than q (k^T v) when features are `rank` times as wide as the heads.

    Nq Nk (D + Dv) against rank D Dv (Nq + Nk), for Dv = D; for Nq = Nk = N that is N <= rank D. Reads no batch size.
    """
    Nq, Nk, D = q.shape[-2], k.shape[-2], q.shape[-1]
    return 2 * Nq * Nk <= rank * D * (Nq + Nk)


def row_dot(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """x @ row^T for one row: (..., N, D), (..., 1, D) -> (..., N, 1).

    Measured on a CPU, the batched product with a single column takes 2 to 8 times as long.
    """
    return (x * row).sum(-1, keepdim=True)


def inverse_norm(norm: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / max(norm, eps) as in `F.normalize`, but 0 where the norm is exactly 0.

    A zero vector stays zero either way; its gradient becomes 0 instead of 1 / eps, which no half precision type can hold.
    """
    return (norm > 0).to(norm.dtype) / norm.clamp_min(eps)


def without_autocast(x: torch.Tensor) -> ContextManager:
    """A context in which matrix products on x's device keep their input's precision.

    A no-op unless autocast is on: entering `torch.autocast` for nothing would leave its mark in exported graphs.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def exceeds_chunk(elements: int, *tensors: torch.Tensor) -> bool:
    """Whether eager inference on tensors with this many elements per image should run in chunks of tokens."""
    return is_eager_inference(*tensors) and elements > CHUNK_ELEMENTS


def evaluate(
    attend: Callable[..., torch.Tensor],
    attend_image: Optional[Callable[..., None]],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """The one place that decides how a mechanism runs: on all tokens at once, or in eager inference in pieces that fit the cache.

    Args:
        attend: `attend(q, k, v, **options)` -> result, for any number of images.
        attend_image: `attend_image(out, q, k, v, **options)` writes the result of one image, without the batch axis, through
            `sum_over_chunks` and `map_chunks`. None if an image is never split, as where all scores are written out.
        q: Queries, (B, H, Nq, D) or (B, Nq, C).
        k: Keys, (B, H, Nk, D) or (B, Nk, C).
        v: Values, (B, H, Nk, Dv) or (B, Nk, C).
        options: Passed on; tensors among them have no batch axis.
    """
    if not is_eager_inference(q, k, v):
        return attend(q, k, v, **options)  # without a look at the batch size, which may be dynamic in an exported graph
    B = q.shape[0]
    image_elements = max(q.numel(), k.numel()) // max(B, 1)
    if attend_image is not None and image_elements > CHUNK_ELEMENTS:
        out = _empty_result(q, v)
        for i in range(B):
            attend_image(out[i], q[i], k[i], v[i], **options)
        return out
    images = max(CHUNK_ELEMENTS // max(image_elements, 1), 1)  # that fit one chunk
    if images >= B:
        return attend(q, k, v, **options)
    out = _empty_result(q, v)
    for i in range(0, B, images):
        out[i : i + images] = attend(q[i : i + images], k[i : i + images], v[i : i + images], **options)
    return out


def _empty_result(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """An empty result of q's type. With heads its memory is (B, Nq, H, Dv), so that joining them afterwards copies nothing."""
    if q.dim() == 3:
        return q.new_empty(q.shape)
    B, H, N, _ = q.shape
    return q.new_empty(B, N, H, v.shape[-1]).transpose(1, 2)  # (B, H, N, Dv)


def chunks(*tensors: torch.Tensor, axis: int = -2) -> Iterator[Tuple[torch.Tensor, ...]]:
    """Yields chunks along `axis`, widened, of tensors that are equally long there; the first one's elements set the chunk length."""
    N = tensors[0].shape[axis]
    step = max(CHUNK_ELEMENTS * N // max(tensors[0].numel(), 1), 1)
    for start in range(0, N, step):
        yield tuple(widen(x.narrow(axis, start, min(step, N - start))) for x in tensors)


def sum_over_chunks(
    summarise: Callable[..., Tuple[torch.Tensor, ...]], *tensors: torch.Tensor, axis: int = -2
) -> Tuple[torch.Tensor, ...]:
    """The sums over all chunks of the tensors that `summarise(*chunk)` returns."""
    total: Tuple[torch.Tensor, ...] = ()
    for chunk in chunks(*tensors, axis=axis):
        part = summarise(*chunk)
        total = tuple(t.add_(p) for t, p in zip(total, part, strict=True)) if total else part
    return total


def map_chunks(
    out: torch.Tensor,
    read: Callable[..., torch.Tensor],
    *tensors: torch.Tensor,
    axis: int = -2,
    factor: Optional[torch.Tensor] = None,
) -> None:
    """Writes `read(*chunk)`, times a factor if there is one, into the part of `out` that the chunk covers."""
    start = 0
    for chunk in chunks(*tensors, axis=axis):
        length = chunk[0].shape[axis]
        part = out.narrow(axis, start, length)
        if factor is None:
            part.copy_(read(*chunk))
        else:
            torch.mul(read(*chunk), factor, out=part)
        start += length
