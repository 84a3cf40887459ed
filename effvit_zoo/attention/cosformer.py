"""cosFormer: out_i = sum_j s_ij v_j / sum_j s_ij with s_ij = (relu(q_i) . relu(k_j)) w_ij, w_ij the cosine of the distance of i and j.

Linear in the number of tokens, for tokens on a line (`cosformer_attention`) or on a grid (`cosformer_attention_2d`).

"cosFormer: Rethinking Softmax in Attention", arXiv:2202.08791. Official code: OpenNLPLab/cosFormer@8e12da11 (Apache-2.0).
The form for images is its authors' own sequel, "Vicinity Vision Transformer", arXiv:2206.10552; official code:
OpenNLPLab/Vicinity-Vision-Transformer@2c49e0ff (Apache-2.0). Own code.

Derivation. The weight of two places is a product of two short rows of a table, w_ij = t_i . t_j, with
  1-D          t = [sin a, cos a]                                              w = cos(a_i - a_j)
  2-D sum      t = [cos a, sin a, cos b, sin b]                                w = cos(a_i - a_j) + cos(b_i - b_j)
  2-D product  t = [cos a cos b, cos a sin b, sin a cos b, sin a sin b]        w = cos(a_i - a_j) cos(b_i - b_j)
where a = pi/2 index / N on a line, and a = pi/2 row / rows, b = pi/2 column / columns on a grid; all w are >= 0. So s_ij is the product of
two features relu(x) (x) t of R D channels, R the table's width, and the keys can be summed first. Below R D tokens it is cheaper to write
s out; the same table then gives w. Above that the 2-D sum form needs no features either, see `_grid_lines`.

Deliberate differences from both papers: no causal form; sums, angles and tables in float32 whatever the input (half precision merges 784
positions into 398 angles, and 1 / 1e-6 has no float16 value); indices from 0, which leaves differences of angles unchanged. Of Vicinity's
block only the attention: no clipping of intermediate results, no gate on the output, no feature reduction.

Prefix tokens (class, registers) have no place on the line or the grid, and neither paper has any. Taking the class token as index 0 would
favour the top left corner. Here every pair that contains a prefix token has weight 1, as P more features of O(N D) each, and the N of the
angles counts the patches alone. `num_prefix_tokens=0`, the default, is the papers' literal form.

Layout: functions (B, H, N, D) -> (B, H, N, D), modules (B, N, C) -> (B, N, C); B batch, H heads, N tokens, D = C // H, P prefix tokens.
"""

import math
from functools import partial
from typing import Any, Callable, ClassVar, Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function

from ._grid_lines import attend_lines, attend_lines_image
from ._linear import (
    check_heads,
    evaluate,
    map_chunks,
    quadratic_is_cheaper,
    row_dot,
    sum_over_chunks,
    widen,
    without_autocast,
)
from ._mixer import GridMixer, MixerShape, TokenMixer
from ._recording import remember


def naive_cosformer_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6, num_prefix_tokens: int = 0
) -> torch.Tensor:
    """The 1-D formula pair by pair: quadratic, for tests."""
    P = num_prefix_tokens
    i, j = (torch.arange(x.shape[-2] - P, dtype=q.dtype) for x in (q, k))
    cosines = torch.cos(math.pi / 2 * (i[:, None] - j) / max(len(i), len(j)))
    scores = q.relu() @ k.relu().mT  # (B, H, P + Nq, P + Nk)
    scores = torch.cat([scores[..., :P, :], torch.cat([scores[..., P:, :P], scores[..., P:, P:] * cosines], -1)], -2)
    return scores @ v / scores.sum(-1, keepdim=True).clamp_min(eps)


def naive_cosformer_attention_2d(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid_size: Tuple[int, int],
    form: str = "sum",
    eps: float = 1e-4,
    num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """The 2-D formula pair by pair: quadratic, for tests."""
    P, (rows, columns) = num_prefix_tokens, grid_size
    weights = torch.ones(P + rows * columns, P + rows * columns, dtype=q.dtype)
    for i in range(rows * columns):
        for j in range(rows * columns):
            down = math.cos(math.pi / 2 * (i // columns - j // columns) / rows)
            across = math.cos(math.pi / 2 * (i % columns - j % columns) / columns)
            weights[P + i, P + j] = down + across if form == "sum" else down * across
    scores = q.relu() @ k.relu().mT * weights
    return scores @ v / (scores.sum(-1, keepdim=True) + eps)


def _angles(steps: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """pi/2 * i / steps for i = 0 .. steps - 1, (steps,)."""
    return torch.arange(steps, dtype=dtype, device=device) * (math.pi / 2 / steps)


def _line_table(places: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The 1-D table, (places, 2)."""
    a = _angles(places, dtype, device)
    return torch.stack([a.sin(), a.cos()], dim=-1)


def _grid_table(rows: int, columns: int, form: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The 2-D table of a row-major grid, (rows * columns, 4)."""
    a = _angles(rows, dtype, device).unsqueeze(1).expand(rows, columns).flatten()
    b = _angles(columns, dtype, device).unsqueeze(0).expand(rows, columns).flatten()
    if form == "sum":
        return torch.stack([a.cos(), a.sin(), b.cos(), b.sin()], dim=-1)
    return torch.stack([a.cos() * b.cos(), a.cos() * b.sin(), a.sin() * b.cos(), a.sin() * b.sin()], dim=-1)


def _axis_table(lines: int, prefix: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The table of a grid's rows or columns, (lines, 1, 2); with `prefix` a third entry, 1, for pairs with prefix tokens."""
    a = _angles(lines, dtype, device)
    entries = [a.cos(), a.sin(), torch.ones_like(a)] if prefix else [a.cos(), a.sin()]
    return torch.stack(entries, dim=-1).unsqueeze(-2)


def _line_weights(Nq: int, Nk: int, P: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The weights of all pairs on a line with P prefix tokens in front, (P + Nq, P + Nk)."""
    table = _line_table(max(Nq, Nk), dtype, device)
    return F.pad(table[:Nq] @ table[:Nk].t(), [P, 0, P, 0], value=1.0)


def _grid_weights(rows: int, columns: int, form: str, P: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The weights of all pairs on a grid with P prefix tokens in front, (P + rows * columns, P + rows * columns)."""
    table = _grid_table(rows, columns, form, dtype, device)
    return F.pad(table @ table.t(), [P, 0, P, 0], value=1.0)


def _table_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _features(x: torch.Tensor, table: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """What one side of every pair brings to its score, so that a score is a product of two rows.

    Args:
        x: Queries or keys of places, (..., N, D).
        table: Their table, (N, R).
        prefix: The other side's prefix tokens, (..., P, D).

    Returns:
        (..., N, R * D + P): relu(x) times each entry of the table's row, then the scores with the prefix tokens.
    """
    x = x.relu()
    places = (x.unsqueeze(-2) * table.unsqueeze(-1)).flatten(-2)  # (..., N, R, D) -> (..., N, R * D)
    if prefix.shape[-2] == 0:
        return places
    scores = prefix.relu() @ x.transpose(-2, -1)  # (..., P, N)
    return torch.cat([places, scores.transpose(-2, -1)], dim=-1)


def _summarise(
    k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, q_prefix: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (..., N, D) of places -> sums of f^T v, (..., R * D + P, D), and of the features f, (..., 1, R * D + P)."""
    f = _features(k, table, q_prefix)
    return f.transpose(-2, -1) @ v, f.sum(-2, keepdim=True)


def _divide(numerator: torch.Tensor, normaliser: torch.Tensor, eps: float, clamp: bool) -> torch.Tensor:
    return numerator / (normaliser.clamp_min(eps) if clamp else normaliser + eps)


def _read_prefix(
    kv: torch.Tensor,
    k_sum: torch.Tensor,
    q_prefix: torch.Tensor,
    k_prefix: torch.Tensor,
    v_prefix: torch.Tensor,
    eps: float,
    clamp: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes the prefix queries' sums out of a summary and puts the prefix keys in their place, for the queries on the line or grid.

    Returns:
        The prefix tokens' output (..., P, D), and the summary (..., R * D + P, D) and (..., 1, R * D + P) to read.
    """
    places = kv.shape[-2] - q_prefix.shape[-2]  # R * D
    scores = q_prefix.relu() @ k_prefix.relu().transpose(-2, -1)  # (..., P, P)
    numerator = kv[..., places:, :] + scores @ v_prefix
    normaliser = k_sum[..., places:].transpose(-2, -1) + scores.sum(-1, keepdim=True)
    kv = torch.cat([kv[..., :places, :], v_prefix], dim=-2)
    k_sum = torch.cat([k_sum[..., :places], torch.ones_like(k_sum[..., places:])], dim=-1)
    return _divide(numerator, normaliser, eps, clamp=clamp), kv, k_sum


def _read(
    q: torch.Tensor,
    table: torch.Tensor,
    kv: torch.Tensor,
    k_sum: torch.Tensor,
    k_prefix: torch.Tensor,
    eps: float,
    clamp: bool,
) -> torch.Tensor:
    """Queries (..., N, D) of places against a summary -> (..., N, D)."""
    f = _features(q, table, k_prefix)
    return _divide(f @ kv, row_dot(f, k_sum), eps, clamp=clamp)


def _attend_pairs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor, eps: float, clamp: bool
) -> torch.Tensor:
    """All scores written out, weights (Nq, Nk)."""
    dtype = q.dtype
    q, k, v = widen(q), widen(k), widen(v)
    scores = (q.relu() @ k.relu().transpose(-2, -1)).mul_(weights)  # (B, H, Nq, Nk)
    return _divide(scores @ v, scores.sum(-1, keepdim=True), eps, clamp=clamp).to(dtype)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_table: torch.Tensor,
    k_table: torch.Tensor,
    eps: float,
    clamp: bool,
) -> torch.Tensor:
    """All tokens at once; what q and k have beyond their tables' rows are prefix tokens."""
    dtype = q.dtype
    q, k, v = widen(q), widen(k), widen(v)
    P = q.shape[-2] - q_table.shape[0]
    q_prefix, k_prefix, v_prefix = q[:, :, :P], k[:, :, :P], v[:, :, :P]
    q, k, v = q[:, :, P:], k[:, :, P:], v[:, :, P:]
    kv, k_sum = _summarise(k, v, k_table, q_prefix)
    if P == 0:
        return _read(q, q_table, kv, k_sum, k_prefix, eps, clamp=clamp).to(dtype)
    out_prefix, kv, k_sum = _read_prefix(kv, k_sum, q_prefix, k_prefix, v_prefix, eps, clamp=clamp)
    return torch.cat([out_prefix, _read(q, q_table, kv, k_sum, k_prefix, eps, clamp=clamp)], dim=-2).to(dtype)


def _attend_image(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_table: torch.Tensor,
    k_table: torch.Tensor,
    eps: float,
    clamp: bool,
) -> None:
    P = q.shape[-2] - q_table.shape[0]
    q_prefix, k_prefix, v_prefix = widen(q[:, :P]), widen(k[:, :P]), widen(v[:, :P])
    kv, k_sum = sum_over_chunks(partial(_summarise, q_prefix=q_prefix), k[:, P:], v[:, P:], k_table)
    if P > 0:
        out[:, :P], kv, k_sum = _read_prefix(kv, k_sum, q_prefix, k_prefix, v_prefix, eps, clamp=clamp)
    read = partial(_read, kv=kv, k_sum=k_sum, k_prefix=k_prefix, eps=eps, clamp=clamp)
    map_chunks(out[:, P:], read, q[:, P:], q_table)


@torch.fx.wrap
@register_notrace_function
def cosformer_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6, num_prefix_tokens: int = 0
) -> torch.Tensor:
    """out_i = sum_j s_ij v_j / max(sum_j s_ij, eps) with s_ij = (relu(q_i) . relu(k_j)) cos(pi/2 (i - j) / max(Nq, Nk)).

    A query without a positive channel gives 0.

    Args:
        q: Queries, (B, H, Nq, D).
        k: Keys, (B, H, Nk, D).
        v: Values, (B, H, Nk, Dv).
        eps: Smallest normaliser, 1e-6 as in the official code.
        num_prefix_tokens: Number of tokens at the front of q and of k that have no place in the order; their pairs have the cosine 1,
            and Nq, Nk in the angle count the others.

    Returns:
        (B, H, Nq, Dv) of q's type.

    Raises:
        ValueError: If the shapes do not fit together or there are fewer tokens than prefix tokens.
    """
    check_heads(q, k, v)
    P, dtype = num_prefix_tokens, _table_dtype(q)
    Nq, Nk = q.shape[-2] - P, k.shape[-2] - P
    if P < 0 or Nq < 1 or Nk < 1:
        raise ValueError(
            f"num_prefix_tokens must be 0 or more and leave a token, got {P} of {q.shape[-2]} and {k.shape[-2]}"
        )
    quadratic = quadratic_is_cheaper(q, k, rank=2)
    if torch.jit.is_scripting():
        if quadratic:
            return _attend_pairs(q, k, v, _line_weights(Nq, Nk, P, dtype, q.device), eps, clamp=True)
        table = _line_table(max(Nq, Nk), dtype, q.device)
        return _attend(q, k, v, table[:Nq], table[:Nk], eps, clamp=True)
    with without_autocast(q):
        if quadratic:
            weights = remember(_line_weights, q, Nq, Nk, P, dtype)
            return evaluate(_attend_pairs, None, q, k, v, weights=weights, eps=eps, clamp=True)
        table = remember(_line_table, q, max(Nq, Nk), dtype)
        q_table, k_table = table[:Nq], table[:Nk]
        return evaluate(_attend, _attend_image, q, k, v, q_table=q_table, k_table=k_table, eps=eps, clamp=True)


def _check_grid(q: torch.Tensor, k: torch.Tensor, grid_size: Tuple[int, int], form: str, P: int) -> None:
    rows, columns = grid_size
    if form != "sum" and form != "product":
        raise ValueError(f"form must be 'sum' or 'product', got '{form}'")
    N = P + rows * columns
    if q.shape[-2] != N or k.shape[-2] != N or P < 0 or rows < 1 or columns < 1:
        raise ValueError(
            f"expected {P} prefix tokens and a grid of {rows} x {columns}, got {q.shape[-2]} queries and {k.shape[-2]} keys"
        )


@torch.fx.wrap
@register_notrace_function
def cosformer_attention_2d(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid_size: Tuple[int, int],
    form: str = "sum",
    eps: float = 1e-4,
    num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """Vicinity attention: as `cosformer_attention`, with tokens on a grid of (rows, columns) in row-major order.

    out_i = sum_j s_ij v_j / (sum_j s_ij + eps) with s_ij = (relu(q_i) . relu(k_j)) w_ij, where for row and column distances dr, dc
    w = cos(pi/2 dr / rows) + cos(pi/2 dc / columns) for form="sum", and their product for form="product".

    Args:
        q: Queries, (B, H, N, D) with N = num_prefix_tokens + rows * columns.
        k: Keys, (B, H, N, D).
        v: Values, (B, H, N, Dv).
        grid_size: (rows, columns) of patches.
        form: "sum", the official default, or "product".
        eps: Added to the normaliser, 1e-4 as in the official code.
        num_prefix_tokens: Number of tokens at the front that are not on the grid; their pairs have weight 1.

    Returns:
        (B, H, N, Dv) of q's type.

    Raises:
        ValueError: If the shapes do not fit together or to the grid, or the form is unknown.
    """
    check_heads(q, k, v)
    _check_grid(q, k, grid_size, form, num_prefix_tokens)
    if torch.jit.is_scripting():
        return _attend_grid_scripted(q, k, v, grid_size, form, eps, num_prefix_tokens)
    (rows, columns), P, dtype = grid_size, num_prefix_tokens, _table_dtype(q)
    with without_autocast(q):
        if quadratic_is_cheaper(q, k, rank=4):
            weights = remember(_grid_weights, q, rows, columns, form, P, dtype)
            return evaluate(_attend_pairs, None, q, k, v, weights=weights, eps=eps, clamp=False)
        if form == "sum":
            row_table = remember(_axis_table, q, rows, P > 0, dtype)
            column_table = remember(_axis_table, q, columns, False, dtype)
            return evaluate(attend_lines, attend_lines_image, q, k, v, rows=row_table, columns=column_table, eps=eps)
        table = remember(_grid_table, q, rows, columns, form, dtype)
        return evaluate(_attend, _attend_image, q, k, v, q_table=table, k_table=table, eps=eps, clamp=False)


def _attend_grid_scripted(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid_size: Tuple[int, int], form: str, eps: float, P: int
) -> torch.Tensor:
    """`cosformer_attention_2d` in TorchScript, which knows neither the cache nor the evaluation in pieces."""
    rows, columns = grid_size
    dtype = _table_dtype(q)
    if quadratic_is_cheaper(q, k, rank=4):
        weights = _grid_weights(rows, columns, form, P, dtype, q.device)
        return _attend_pairs(q, k, v, weights, eps, clamp=False)
    if form == "sum":
        row_table = _axis_table(rows, P > 0, dtype, q.device)
        return attend_lines(q, k, v, row_table, _axis_table(columns, False, dtype, q.device), eps)
    table = _grid_table(rows, columns, form, dtype, q.device)
    return _attend(q, k, v, table, table, eps, clamp=False)


class CosformerAttention(TokenMixer):
    """Multi-head cosFormer over tokens in sequence order, (B, N, C) -> (B, N, C).

    Attributes:
        num_prefix_tokens: Number of tokens at the front without a place in the order, initially 0: the papers' literal form. Set by the
            model after construction, as a mixer is built without knowledge of the model around it.
    """

    label = "cosFormer"
    function = staticmethod(cosformer_attention)

    __constants__: ClassVar = ["num_prefix_tokens"]  # TorchScript sees class attributes only if they are named
    num_prefix_tokens: int = 0

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cosformer_attention(q, k, v, num_prefix_tokens=self.num_prefix_tokens)


class Cosformer2dAttention(GridMixer):
    """Multi-head Vicinity attention over a grid of tokens, (B, N, C) -> (B, N, C).

    Attributes:
        form: "sum" or "product".

    Raises:
        ValueError: In `forward`, if `grid_size` is unset or does not fit the tokens.
    """

    label = "cosFormer 2-D"
    __constants__: ClassVar = ["form", "grid_size", "num_prefix_tokens"]
    form: str = "sum"

    @classmethod
    def benchmark_function(cls, shape: MixerShape) -> Callable[..., Any]:
        return partial(cosformer_attention_2d, grid_size=shape.grid)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cosformer_attention_2d(q, k, v, self.grid_size, form=self.form, num_prefix_tokens=self.num_prefix_tokens)
