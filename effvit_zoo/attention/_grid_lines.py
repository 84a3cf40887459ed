"""The sum form of cosFormer on a grid, line by line: the same result as with features, at half the multiply-adds.

The weight of a pair is cos(a_i - a_j) + cos(b_i - b_j), with the angles of rows and columns (`cosformer`). The first term is the same
for all places of two rows, the second for all of two columns. So the keys are summed to one matrix k^T v per line, and the lines' matrices
are weighted by their table [cos, sin] and added up; the queries of a line share the matrix that its table makes of these sums. That is
twice 2 N D^2 multiply-adds, once along the rows and once along the columns, where features of 4 D channels take 8 N D^2 and extra memory.

Prefix tokens, whose pairs have weight 1, are one more entry of the rows' table, 1 for every row: prefix queries read the keys' sum of this
entry, and all other queries read the prefix keys' own sum in its place.

Layout: functions (B, H, P + N, D) -> (B, H, P + N, Dv), P prefix tokens and N = rows * columns places in row-major order; inside lines are
(..., G, L, D): G lines of L places, tables (G, 1, R) of R entries.
"""

from typing import Tuple

import torch

from ._linear import map_chunks, row_dot, sum_over_chunks, widen


def _sum_lines(k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Summary of G lines of L places each, per entry of their table.

    Args:
        k: Keys after relu, (..., G, L, D).
        v: Values, (..., G, L, Dv).
        table: (G, 1, R).

    Returns:
        Sums over lines of table times k^T v, (..., R, D * Dv), and of table times k, (..., R, D).
    """
    table = table.squeeze(-2).t()
    return table @ (k.transpose(-2, -1) @ v).flatten(-2), table @ k.sum(-2)


def _read_lines(q: torch.Tensor, table: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Queries after relu (..., G, L, D) against sums (..., R, D * Dv) -> (..., G, L, Dv), not divided yet."""
    D = q.shape[-1]
    return q @ (table.squeeze(-2) @ kv).unflatten(-1, [D, kv.shape[-1] // D])


def _line_normaliser(q: torch.Tensor, k_sum: torch.Tensor, other_k_sum: torch.Tensor) -> torch.Tensor:
    """Queries (..., G, L, D), key sums of their line (..., G, D) and of the line across (..., L, D) -> (..., G, L, 1)."""
    return (q * (k_sum.unsqueeze(-2) + other_k_sum.unsqueeze(-3))).sum(-1, keepdim=True)


def _read_prefix(
    kv: torch.Tensor,
    k_sum: torch.Tensor,
    q_prefix: torch.Tensor,
    k_prefix: torch.Tensor,
    v_prefix: torch.Tensor,
    eps: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The prefix queries' results from the rows' sums, and these sums with the prefix keys' in the place of the last entry.

    Args:
        kv: (..., 3, D * Dv).
        k_sum: (..., 3, D).
        q_prefix: (..., P, D), before relu, as the keys.
        k_prefix: (..., P, D).
        v_prefix: (..., P, Dv).
        eps: Added to the normaliser.

    Returns:
        (..., P, Dv), (..., 3, D * Dv), (..., 3, D).
    """
    D = q_prefix.shape[-1]
    q_prefix, k_prefix = q_prefix.relu(), k_prefix.relu()
    own_kv = (k_prefix.transpose(-2, -1) @ v_prefix).flatten(-2).unsqueeze(-2)  # (..., 1, D * Dv)
    own_sum = k_prefix.sum(-2, keepdim=True)  # (..., 1, D)
    numerator = q_prefix @ (kv[..., 2, :] + own_kv.squeeze(-2)).unflatten(-1, [D, kv.shape[-1] // D])
    out = numerator / (row_dot(q_prefix, k_sum[..., 2:, :] + own_sum) + eps)
    return out, torch.cat([kv[..., :2, :], own_kv], dim=-2), torch.cat([k_sum[..., :2, :], own_sum], dim=-2)


def attend_lines(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, eps: float
) -> torch.Tensor:
    """The 2-D sum form, line by line of the grid; q, k, v (B, H, P + N, D), tables as `cosformer._axis_table` makes them."""
    dtype, grid = q.dtype, [rows.shape[0], columns.shape[0]]
    q, k, v = widen(q), widen(k), widen(v)
    P = q.shape[-2] - grid[0] * grid[1]
    # (B, H, rows, columns, D)
    q_grid = q[:, :, P:].relu().unflatten(-2, grid)
    k_grid, v_grid = k[:, :, P:].relu().unflatten(-2, grid), v[:, :, P:].unflatten(-2, grid)
    kv, k_sum = _sum_lines(k_grid, v_grid, rows)
    across_kv, across_k_sum = _sum_lines(k_grid.transpose(-3, -2), v_grid.transpose(-3, -2), columns)
    out_prefix = q[:, :, :0]
    if P > 0:
        out_prefix, kv, k_sum = _read_prefix(kv, k_sum, q[:, :, :P], k[:, :, :P], v[:, :, :P], eps)
    numerator = _read_lines(q_grid, rows, kv)
    numerator = numerator + _read_lines(q_grid.transpose(-3, -2), columns, across_kv).transpose(-3, -2)
    normaliser = _line_normaliser(q_grid, rows.squeeze(-2) @ k_sum, columns.squeeze(-2) @ across_k_sum)
    out = (numerator / (normaliser + eps)).flatten(-3, -2)
    return (torch.cat([out_prefix, out], dim=-2) if P > 0 else out).to(dtype)


def _dense_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x) in memory of its own without gaps, in one pass; `Tensor.relu` keeps x's order of axes, which costs a product another copy."""
    return torch.clamp(x, min=0, out=x.new_empty(x.shape))


def attend_lines_image(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    eps: float,
) -> None:
    """`attend_lines` for one image in eager inference, into `out`, with temporaries that stay in the cache; no batch axis."""
    grid = [rows.shape[0], columns.shape[0]]
    P = q.shape[-2] - grid[0] * grid[1]
    q_grid, k_grid, v_grid, out_grid = (x[:, P:].unflatten(-2, grid) for x in (q, k, v, out))  # (H, rows, columns, D)

    def summarise(k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        return _sum_lines(_dense_relu(k), v.contiguous(), table)

    kv, k_sum = sum_over_chunks(summarise, k_grid, v_grid, rows, axis=-3)
    if P > 0:
        out[:, :P], kv, k_sum = _read_prefix(kv, k_sum, widen(q[:, :P]), widen(k[:, :P]), widen(v[:, :P]), eps)
    # the rows' part is kept in float32 until the columns' part is added
    numerator = out_grid if widen(out_grid).dtype == out_grid.dtype else torch.empty_like(out_grid, dtype=torch.float32)
    map_chunks(numerator, lambda q, table: _read_lines(_dense_relu(q), table, kv), q_grid, rows, axis=-3)
    q_grid, k_grid, v_grid, out_grid, numerator = (
        x.transpose(-3, -2) for x in (q_grid, k_grid, v_grid, out_grid, numerator)
    )
    across_kv, across_k_sum = sum_over_chunks(summarise, k_grid, v_grid, columns, axis=-3)
    row_sums = rows.squeeze(-2) @ k_sum

    def finish(q: torch.Tensor, numerator: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        q = _dense_relu(q)
        numerator = _read_lines(q, table, across_kv).add_(numerator)
        return numerator.div_(_line_normaliser(q, table.squeeze(-2) @ across_k_sum, row_sums).add_(eps))

    map_chunks(out_grid, finish, q_grid, numerator, columns, axis=-3)
