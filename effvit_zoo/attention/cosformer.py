"""cosFormer: relu features re-weighted by the cosine of the distance between tokens, linear in the number of tokens.

"cosFormer: Rethinking Softmax in Attention", arXiv:2202.08791. Official code: OpenNLPLab/cosFormer@8e12da11 (Apache-2.0).
The form for images is its authors' own sequel, "Vicinity Vision Transformer", arXiv:2206.10552; official code:
OpenNLPLab/Vicinity-Vision-Transformer@2c49e0ff (Apache-2.0). Own code.

One scheme serves all forms: the weight of two places is a product of two short rows of a table, w_ij = t_i . t_j, with
  1-D          t = [sin a, cos a]                                              w = cos(a_i - a_j)
  2-D sum      t = [cos a, sin a, cos b, sin b]                                w = cos(a_i - a_j) + cos(b_i - b_j)
  2-D product  t = [cos a cos b, cos a sin b, sin a cos b, sin a sin b]        w = cos(a_i - a_j) cos(b_i - b_j)
where a = pi/2 index / N on a line, and a = pi/2 row / rows, b = pi/2 column / columns on a grid; all w are >= 0. So s_ij = (relu(q_i) .
relu(k_j)) w_ij is the product of two features relu(x) (x) t of R D channels, R the table's width, and the keys can be summed first. Below
R D tokens it is cheaper to write s out; the same table then gives w.

Above that the 2-D sum form needs no features either: `_grid_lines`.

Deliberate differences from both: no causal form; sums, angles and tables in float32 whatever the input (half precision merges 784
positions into 398 angles, and 1 / 1e-6 has no float16 value); indices from 0, which a difference of angles does not see. Of Vicinity's
block only the attention: no clipping of intermediate results, no gate on the output, no feature reduction.

Prefix tokens (class, registers) have no place on the line or the grid, and neither paper has any. Taking the class token as index 0 would
favour the top left corner. Here every pair that contains a prefix token has weight 1, as P more features of O(N D) each, and the N of the
angles counts the patches alone. `num_prefix_tokens=0`, the default, is the papers' literal form.

Layout: functions (B, H, N, D) -> (B, H, N, D), modules (B, N, C) -> (B, N, C); B batch, H heads, N tokens, D = C // H, P prefix tokens.
"""

import math
from functools import lru_cache, partial
from typing import Any, Callable, ClassVar, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function

from ._grid_lines import attend_lines, attend_lines_image
from ._linear import (
    attend_in_pieces,
    check_heads,
    empty_heads_like,
    is_eager_inference,
    map_chunks,
    quadratic_is_cheaper,
    row_dot,
    sum_over_chunks,
    widen,
    without_autocast,
)
from ._mixer import TokenMixer


def _angles(steps: int, period: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """pi/2 * i / period for i = 0 .. steps - 1, (steps,)."""
    return torch.arange(steps, dtype=dtype, device=device) * (math.pi / 2 / period)


def _line_tables(Nq: int, Nk: int, dtype: torch.dtype, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
    """The 1-D tables of queries and keys, (Nq, 2) and (Nk, 2)."""
    longest = max(Nq, Nk)
    a = _angles(longest, longest, dtype, device)
    table = torch.stack([a.sin(), a.cos()], dim=-1)
    return table[:Nq], table[:Nk]


def _grid_table(rows: int, columns: int, form: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The 2-D table of a row-major grid, (rows * columns, 4)."""
    a = _angles(rows, rows, dtype, device).unsqueeze(1).expand(rows, columns).flatten()
    b = _angles(columns, columns, dtype, device).unsqueeze(0).expand(rows, columns).flatten()
    if form == "sum":
        return torch.stack([a.cos(), a.sin(), b.cos(), b.sin()], dim=-1)
    return torch.stack([a.cos() * b.cos(), a.cos() * b.sin(), a.sin() * b.cos(), a.sin() * b.sin()], dim=-1)


def _grid_tables(
    rows: int, columns: int, form: str, dtype: torch.dtype, device: torch.device
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The 2-D tables of queries and keys, one and the same."""
    table = _grid_table(rows, columns, form, dtype, device)
    return table, table


def _grid_line_tables(
    rows: int, columns: int, prefix: bool, dtype: torch.dtype, device: torch.device
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The tables of a grid's rows and of its columns, (rows, 1, 2) and (columns, 1, 2).

    With `prefix` rows have a third entry, 1, for the pairs in which every place weighs alike.
    """
    a, b = _angles(rows, rows, dtype, device), _angles(columns, columns, dtype, device)
    of_rows = [a.cos(), a.sin(), torch.ones_like(a)] if prefix else [a.cos(), a.sin()]
    return torch.stack(of_rows, dim=-1).unsqueeze(-2), torch.stack([b.cos(), b.sin()], dim=-1).unsqueeze(-2)


def _line_weights(Nq: int, Nk: int, P: int, dtype: torch.dtype, device: torch.device) -> Tuple[torch.Tensor]:
    """The weights of all pairs on a line with P prefix tokens in front, (P + Nq, P + Nk)."""
    q_table, k_table = _line_tables(Nq, Nk, dtype, device)
    return (F.pad(q_table @ k_table.t(), [P, 0, P, 0], value=1.0),)


def _grid_weights(
    rows: int, columns: int, form: str, P: int, dtype: torch.dtype, device: torch.device
) -> Tuple[torch.Tensor]:
    """The weights of all pairs on a grid with P prefix tokens in front, (P + rows * columns, P + rows * columns)."""
    table = _grid_table(rows, columns, form, dtype, device)
    return (F.pad(table @ table.t(), [P, 0, P, 0], value=1.0),)


@lru_cache(maxsize=32)
def _kept(build: Callable[..., Tuple[torch.Tensor, ...]], *sizes: Any) -> Tuple[torch.Tensor, ...]:
    """build(*sizes), kept: in eager inference every block asks for the same. Elsewhere it is a constant of the recorded graph."""
    return build(*sizes)


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
    """Takes the prefix queries' sums out of a summary and puts the prefix keys in their stead, for the queries of places.

    Returns:
        The prefix tokens' output (..., P, D), and the summary (..., R * D + P, D) and (..., 1, R * D + P) to read.
    """
    places = kv.shape[-2] - q_prefix.shape[-2]  # R * D
    scores = q_prefix.relu() @ k_prefix.relu().transpose(-2, -1)  # (..., P, P)
    numerator = kv[..., places:, :] + scores @ v_prefix
    normaliser = k_sum[..., places:].transpose(-2, -1) + scores.sum(-1, keepdim=True)
    kv = torch.cat([kv[..., :places, :], v_prefix], dim=-2)
    k_sum = torch.cat([k_sum[..., :places], torch.ones_like(k_sum[..., places:])], dim=-1)
    return _divide(numerator, normaliser, eps, clamp), kv, k_sum


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
    return _divide(f @ kv, row_dot(f, k_sum), eps, clamp)


def _attend_pairs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor, eps: float, clamp: bool
) -> torch.Tensor:
    """All scores written out, weights (Nq, Nk)."""
    dtype = q.dtype
    q, k, v = widen(q), widen(k), widen(v)
    scores = (q.relu() @ k.relu().transpose(-2, -1)).mul_(weights)  # (B, H, Nq, Nk)
    return _divide(scores @ v, scores.sum(-1, keepdim=True), eps, clamp).to(dtype)


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
        return _read(q, q_table, kv, k_sum, k_prefix, eps, clamp).to(dtype)
    out_prefix, kv, k_sum = _read_prefix(kv, k_sum, q_prefix, k_prefix, v_prefix, eps, clamp)
    return torch.cat([out_prefix, _read(q, q_table, kv, k_sum, k_prefix, eps, clamp)], dim=-2).to(dtype)


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
        out[:, :P], kv, k_sum = _read_prefix(kv, k_sum, q_prefix, k_prefix, v_prefix, eps, clamp)
    read = partial(_read, kv=kv, k_sum=k_sum, k_prefix=k_prefix, eps=eps, clamp=clamp)
    map_chunks(out[:, P:], read, q[:, P:], q_table)


def _evaluate(
    attend: Callable[..., torch.Tensor],
    attend_image: Optional[Callable[..., None]],
    build: Callable[..., Tuple[torch.Tensor, ...]],
    sizes: Tuple[Any, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *options: Any,
) -> torch.Tensor:
    """attend(q, k, v, *constants, *options) with the constants build(*sizes, dtype, device); in pieces in eager inference."""
    sizes = *sizes, _table_dtype(q), q.device
    with without_autocast(q):
        if not is_eager_inference(q, k, v):
            return attend(q, k, v, *build(*sizes), *options)
        given = *_kept(build, *sizes), *options
        in_image = None if attend_image is None else lambda out, q, k, v: attend_image(out, q, k, v, *given)
        return attend_in_pieces(
            lambda q, k, v: attend(q, k, v, *given), in_image, q, k, v, partial(empty_heads_like, q, v)
        )


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
        num_prefix_tokens: How many tokens at the front of q and of k have no place in the order; their pairs have the cosine 1,
            and Nq, Nk in the angle count the others.

    Returns:
        (B, H, Nq, Dv) of q's type.

    Raises:
        ValueError: If the shapes do not fit together or there are fewer tokens than prefix tokens.
    """
    check_heads(q, k, v)
    Nq, Nk = q.shape[-2] - num_prefix_tokens, k.shape[-2] - num_prefix_tokens
    if num_prefix_tokens < 0 or Nq < 1 or Nk < 1:
        raise ValueError(
            f"num_prefix_tokens must be 0 or more and leave a token, got {num_prefix_tokens} of {q.shape[-2]} and {k.shape[-2]}"
        )
    quadratic = quadratic_is_cheaper(q, k, rank=2)
    if torch.jit.is_scripting():
        if quadratic:
            weights = _line_weights(Nq, Nk, num_prefix_tokens, _table_dtype(q), q.device)[0]
            return _attend_pairs(q, k, v, weights, eps, True)
        q_table, k_table = _line_tables(Nq, Nk, _table_dtype(q), q.device)
        return _attend(q, k, v, q_table, k_table, eps, True)
    if quadratic:
        return _evaluate(_attend_pairs, None, _line_weights, (Nq, Nk, num_prefix_tokens), q, k, v, eps, True)
    return _evaluate(_attend, _attend_image, _line_tables, (Nq, Nk), q, k, v, eps, True)


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
        num_prefix_tokens: How many tokens at the front are not on the grid; their pairs have weight 1.

    Returns:
        (B, H, N, Dv) of q's type.

    Raises:
        ValueError: If the shapes do not fit together or to the grid, or the form is unknown.
    """
    check_heads(q, k, v)
    rows, columns = grid_size
    if form != "sum" and form != "product":
        raise ValueError(f"form must be 'sum' or 'product', got '{form}'")
    N = num_prefix_tokens + rows * columns
    if q.shape[-2] != N or k.shape[-2] != N or num_prefix_tokens < 0 or rows < 1 or columns < 1:
        raise ValueError(
            f"expected {num_prefix_tokens} prefix tokens and a grid of {rows} x {columns}, got {q.shape[-2]} queries and {k.shape[-2]} keys"
        )
    quadratic = quadratic_is_cheaper(q, k, rank=4)
    if torch.jit.is_scripting():
        dtype = _table_dtype(q)
        if quadratic:
            weights = _grid_weights(rows, columns, form, num_prefix_tokens, dtype, q.device)[0]
            return _attend_pairs(q, k, v, weights, eps, False)
        if form == "sum":
            of_rows, of_columns = _grid_line_tables(rows, columns, num_prefix_tokens > 0, dtype, q.device)
            return attend_lines(q, k, v, of_rows, of_columns, eps)
        q_table, k_table = _grid_tables(rows, columns, form, dtype, q.device)
        return _attend(q, k, v, q_table, k_table, eps, False)
    if quadratic:
        weighed = rows, columns, form, num_prefix_tokens
        return _evaluate(_attend_pairs, None, _grid_weights, weighed, q, k, v, eps, False)
    if form == "sum":
        lines = rows, columns, num_prefix_tokens > 0
        return _evaluate(attend_lines, attend_lines_image, _grid_line_tables, lines, q, k, v, eps)
    return _evaluate(_attend, _attend_image, _grid_tables, (rows, columns, form), q, k, v, eps, False)


class CosformerAttention(TokenMixer):
    """Multi-head cosFormer over tokens in sequence order, (B, N, C) -> (B, N, C).

    Attributes:
        num_prefix_tokens: Tokens at the front without a place in the order, 0 at first: the papers' literal form. A mixer is built without
            knowledge of the model around it, so the model sets this afterwards.
    """

    __constants__: ClassVar = ["num_prefix_tokens"]  # TorchScript sees class attributes only if they are named
    num_prefix_tokens: int = 0

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cosformer_attention(q, k, v, num_prefix_tokens=self.num_prefix_tokens)


class Cosformer2dAttention(CosformerAttention):
    """Multi-head Vicinity attention over a grid of tokens, (B, N, C) -> (B, N, C).

    Attributes:
        grid_size: (rows, columns) of patches; the model sets it after construction, and again when the image size changes.
        num_prefix_tokens: Tokens at the front that are not on the grid; the model sets it.
        form: "sum" or "product".

    Raises:
        ValueError: In `forward`, if `grid_size` is unset or does not fit the tokens.
    """

    __constants__: ClassVar = ["form", "grid_size", "num_prefix_tokens"]
    grid_size: Tuple[int, int] = (0, 0)
    form: str = "sum"

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cosformer_attention_2d(q, k, v, self.grid_size, form=self.form, num_prefix_tokens=self.num_prefix_tokens)
