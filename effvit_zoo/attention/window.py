"""Shifted-window attention of Swin: out = softmax(q k^T / sqrt(D) + bias) v inside small windows, shifted in every other block.

"Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv:2103.14030.
Official code: https://github.com/microsoft/Swin-Transformer @ f82860bfb5 (MIT). Own code with timm's parameter names.

Windows are laid out when a map arrives, so one module takes maps of any height and width: along a side shorter than the window, the window
shrinks to that side; along a side not longer than the window, nothing is shifted; other sides are padded at their end to a multiple of the
window. timm (Apache-2.0) fixes the same at construction; both give the same values. As there, the map is rolled before it is padded, and
padding takes part in attention as zero tokens.

Deliberate differences, none in value: no masks or position indices among the buffers (they follow from the size, see `_recording.remember`;
windows differ only in whether they are the last of their row or column, so four masks serve any map); where a window shrinks, its biases
are those of the same offsets, without interpolation; matrix products are 3-D.

Layout: maps (B, H, W, C), windows (M, N, C), heads (M * heads, N, D); B images, M = B * n windows, n windows per image,
N tokens per window, D = C // heads.
"""

from typing import Optional, Tuple

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table, trunc_normal_
from torch import nn

from ._recording import remember

Size = Tuple[int, int]


def naive_window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, size: Size, window: Size, shifted: bool
) -> torch.Tensor:
    """One dense attention over all tokens of a map and its padding, where pairs that share no window are masked; for tests.

    Args:
        q: Queries of the map, padded at its end to a multiple of the window, (B, heads, rows, columns, D).
        k: Keys, likewise.
        v: Values, likewise.
        table: Bias of every offset down and right, (2 wh - 1, 2 ww - 1, heads).
        size: (height, width) of the map before padding.
        window: (wh, ww).
        shifted: Whether the windows are shifted by half their size.
    """
    rows, columns = q.shape[2:4]
    tokens = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).unbind(1)  # row and column of each token
    apart, torn, offsets = torch.tensor(False), torch.tensor(False), []
    for token, length, padded, side in zip(tokens, size, (rows, columns), window, strict=True):
        shift, wide = side // 2 if shifted and length > side else 0, min(side, length)
        place = torch.cat([(torch.arange(length) - shift) % length, torch.arange(length, padded)])[
            token
        ]  # after the roll
        apart = apart | (place[:, None] // wide != place // wide)  # (N, N): not in one window
        torn = torn | (
            (place[:, None] >= padded - shift) != (place >= padded - shift)
        )  # neighbours through the roll only
        offsets.append(place[:, None] % wide - place % wide + side - 1)
    scores = q.flatten(2, 3) @ k.flatten(2, 3).mT * q.shape[-1] ** -0.5 + table[offsets[0], offsets[1]].permute(2, 0, 1)
    scores = (scores - 100.0 * torn).masked_fill(apart, -torch.inf)  # the official mask value
    return (scores.softmax(-1) @ v.flatten(2, 3)).unflatten(2, (rows, columns))


def window_and_shift(height: int, width: int, window: Size, shifted: bool) -> Tuple[int, int, int, int]:
    """(window height, window width, shift down, shift right) that a map of this size gets."""
    down = window[0] // 2 if shifted and height > window[0] else 0
    right = window[1] // 2 if shifted and width > window[1] else 0
    wh = window[0] if height >= window[0] else height  # not min(): under a tracer that would hide the constant
    ww = window[1] if width >= window[1] else width
    return wh, ww, down, right


def _is_zero(number: int) -> bool:
    return isinstance(number, int) and number == 0  # a tracer's symbol is not: the graph must pad by it


def to_windows(x: torch.Tensor, window: Size, shifted: bool) -> torch.Tensor:
    """Map (B, H, W, C) -> windows (B * n, N, C), row by row."""
    B, H, W, C = x.shape
    wh, ww, down, right = window_and_shift(H, W, window, shifted)
    if down > 0 or right > 0:
        x = torch.roll(x, (-down, -right), (1, 2))
    rows, columns = (H + wh - 1) // wh, (W + ww - 1) // ww
    pad_h, pad_w = rows * wh - H, columns * ww - W
    if not _is_zero(pad_h) or not _is_zero(pad_w):
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    x = x.reshape(B, rows, wh, columns, ww, C).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(B * rows * columns, wh * ww, C)


def from_windows(windows: torch.Tensor, like: torch.Tensor, window: Size, shifted: bool) -> torch.Tensor:
    """Windows (B * n, N, C) -> map of the shape of `like`, (B, H, W, C); undoes `to_windows`."""
    B, H, W, C = like.shape
    wh, ww, down, right = window_and_shift(H, W, window, shifted)
    rows, columns = (H + wh - 1) // wh, (W + ww - 1) // ww
    x = windows.reshape(B, rows, columns, wh, ww, C).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(B, rows * wh, columns * ww, C)
    if not _is_zero(rows * wh - H) or not _is_zero(columns * ww - W):
        x = F.pad(x, (0, 0, 0, W - columns * ww, 0, H - rows * wh))
    if down > 0 or right > 0:
        x = torch.roll(x, (down, right), (1, 2))
    return x


def relative_position_index(window: Size, device: Optional[torch.device] = None) -> torch.Tensor:
    """(N, N): the row of a bias table of (2 wh - 1) * (2 ww - 1) offsets for each pair (query, key) of tokens of a window."""
    position = torch.arange(window[0] * window[1], device=device)
    row, column = position // window[1], position % window[1]
    down = row[:, None] - row[None, :] + window[0] - 1
    right = column[:, None] - column[None, :] + window[1] - 1
    return down * (2 * window[1] - 1) + right


def shift_masks(window: Size, device: Optional[torch.device] = None) -> torch.Tensor:
    """(4, N, N): masks to add to the scores of an inner window, the last of a row, the last of a column, and the last of both.

    They separate tokens that are neighbours through the roll only.
    """
    position = torch.arange(window[0] * window[1], device=device)
    wrapped_down = position // window[1] >= window[0] - window[0] // 2  # (N,): rolled over from the map's other end
    wrapped_right = position % window[1] >= window[1] - window[1] // 2
    down = wrapped_down[:, None] != wrapped_down[None, :]
    right = wrapped_right[:, None] != wrapped_right[None, :]
    return torch.stack([torch.zeros_like(down), right, down, down | right]) * -100.0  # the official value


def window_kinds(
    height: int, width: int, window: Size, shifted: bool, device: Optional[torch.device] = None
) -> torch.Tensor:
    """(n,): index of the mask, 0 to 3, of each window of a map."""
    wh, ww, down, right = window_and_shift(height, width, window, shifted)
    row = torch.arange((height + wh - 1) // wh, device=device)
    column = torch.arange((width + ww - 1) // ww, device=device)
    last_row = (row >= row.shape[0] - (1 if down > 0 else 0)).long()
    last_column = (column >= column.shape[0] - (1 if right > 0 else 0)).long()
    return (2 * last_row[:, None] + last_column[None, :]).flatten()


def window_rows(
    height: int, width: int, window: Size, shifted: bool, device: Optional[torch.device] = None
) -> torch.Tensor:
    """(n * N,): the token of the flattened map at each place of the windows, -1 for padding."""
    token = torch.arange(1, height * width + 1, device=device).reshape(1, height, width, 1)
    return to_windows(token, window, shifted).flatten() - 1


def relative_position_bias(table: torch.Tensor, window: Size) -> torch.Tensor:
    """Table ((2 wh - 1) * (2 ww - 1), heads) -> bias (heads, N, N) of the whole window."""
    if torch.jit.is_scripting():
        index = relative_position_index(window, table.device)
    else:
        index = remember(relative_position_index, table, window)
    N = index.shape[0]
    return table[index.flatten()].reshape(N, N, -1).permute(2, 0, 1)


def crop_bias(bias: torch.Tensor, height: int, width: int, window: Size) -> torch.Tensor:
    """Bias (K, heads, N, N) of a whole window -> that of the smaller window that a small map gets."""
    wh, ww = min(height, window[0]), min(width, window[1])
    if wh == window[0] and ww == window[1]:
        return bias
    kinds, heads = bias.shape[0], bias.shape[1]
    bias = bias.reshape(kinds, heads, window[0], window[1], window[0], window[1])
    return bias[:, :, :wh, :ww, :wh, :ww].reshape(kinds, heads, wh * ww, wh * ww)


def attention_bias(table: torch.Tensor, height: int, width: int, window: Size, shifted: bool) -> torch.Tensor:
    """The addend of the scores on a map of this size: (1, heads, N, N), or (n, heads, N, N) where windows wrap around the map."""
    wh, ww, down, right = window_and_shift(height, width, window, shifted)
    bias = crop_bias(relative_position_bias(table, window).unsqueeze(0), height, width, window)
    if down == 0 and right == 0:
        return bias
    if torch.jit.is_scripting():
        masks = shift_masks((wh, ww), table.device)
        kinds = window_kinds(height, width, window, shifted, table.device)
    else:
        masks = remember(shift_masks, table, (wh, ww))
        kinds = remember(window_kinds, table, height, width, window, shifted)
    return bias + masks.to(bias.dtype).index_select(0, kinds).unsqueeze(1)


def bias_by_kind(table: torch.Tensor, window: Size, shifted: bool) -> torch.Tensor:
    """The bias as a constant that serves maps of any size: (1, heads, N, N), or (4, heads, N, N) with each of the four masks."""
    bias = relative_position_bias(table, window).unsqueeze(0)
    return bias + shift_masks(window, table.device).to(bias.dtype).unsqueeze(1) if shifted else bias.contiguous()


def place_bias(by_kind: torch.Tensor, height: int, width: int, window: Size, shifted: bool) -> torch.Tensor:
    """`attention_bias` from the constant of `bias_by_kind`."""
    by_kind = crop_bias(by_kind, height, width, window)
    down, right = window_and_shift(height, width, window, shifted)[2:]
    if down == 0 and right == 0:
        return by_kind[:1]
    if torch.jit.is_scripting():
        kinds = window_kinds(height, width, window, shifted, by_kind.device)
    else:
        kinds = remember(window_kinds, by_kind, height, width, window, shifted)
    return by_kind.index_select(0, kinds)


# Sizes are unknown numbers under torch.fx, so functions that branch on them must be single nodes of its graph.
torch.fx.wrap("to_windows")
torch.fx.wrap("from_windows")
torch.fx.wrap("attention_bias")
torch.fx.wrap("place_bias")


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(scale * q k^T + bias) v inside every window.

    Args:
        q: Queries, (M * heads, N, D), an image's windows together.
        k: Keys, likewise.
        v: Values, likewise.
        bias: (n, heads, N, N) if the windows of an image have different ones, else (1, heads, N, N).
        scale: Usually D ** -0.5; 1 if it is in the queries already.
        dropout: Rate at which attention weights are dropped.

    Returns:
        (M * heads, N, D).
    """
    if scale != 1.0:
        q = q * scale
    scores = torch.bmm(q, k.transpose(1, 2))  # (M * heads, N, N)
    n, heads, N = bias.shape[0], bias.shape[1], bias.shape[2]
    scores = scores.reshape(-1, n, heads, N, N)
    # In place without gradients only: adding to a view costs the backward pass three more tensors of this size.
    scores = scores + bias if torch.is_grad_enabled() else scores.add_(bias)
    # one name, so that the scores are freed: on large maps they are a block's largest tensor
    scores = F.softmax(scores.reshape(-1, N, N), dim=-1)
    if dropout > 0.0:
        scores = F.dropout(scores, dropout)
    return torch.bmm(scores, v)


class WindowAttention(nn.Module):
    """Multi-head attention inside windows of a map, (B, H, W, C) -> (B, H, W, C), with learned relative position bias.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide `dim`.
        window_size: (height, width) of the windows; on smaller maps they shrink.
        shifted: Shift the windows by half their size.
        qkv_bias: Bias in the projection to queries, keys and values.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate after the output projection.

    Raises:
        ValueError: If `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Size = (7, 7),
        shifted: bool = False,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={dim}, num_heads={num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.shifted = shifted
        self.scale = (dim // num_heads) ** -0.5
        offsets = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        self.relative_position_bias_table: Optional[nn.Parameter] = nn.Parameter(torch.empty(offsets, num_heads, **dd))
        self.register_buffer("bias_by_kind", None)  # takes the table's place in the fused form
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal 0.02 bias table; the linear layers have their own."""
        if self.relative_position_bias_table is not None:
            trunc_normal_(self.relative_position_bias_table, std=0.02)

    def set_window_size(self, window_size: Size) -> None:
        """Changes the window and interpolates the bias table as timm does (geometrically spaced bicubic interpolation).

        Raises:
            ValueError: If the module is fused and the window changes: there is no table to interpolate.
        """
        table = self.relative_position_bias_table
        if window_size == self.window_size:
            return
        if table is None:
            raise ValueError(f"a fused WindowAttention keeps its window of {self.window_size}, got {window_size}")
        offsets = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        with torch.no_grad():
            resized = resize_rel_pos_bias_table(table, window_size, (offsets, self.num_heads), self.window_size)
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.window_size = window_size

    def project_qkv(self, windows: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Windows (M, N, C) -> q, k, v, each (M * heads, N, D)."""
        M, N, C = windows.shape
        qkv = self.qkv(windows).reshape(M, N, 3, self.num_heads, C // self.num_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4).reshape(3, M * self.num_heads, N, C // self.num_heads)  # (3, M * heads, N, D)
        q, k, v = qkv.unbind(
            0
        )  # one copy in backward; three subscripts would cost three tensors of zeros and their sums
        return q, k, v

    def join_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Heads (M * heads, N, D) -> windows (M, N, C)."""
        _, N, D = x.shape
        return x.reshape(-1, self.num_heads, N, D).transpose(1, 2).reshape(-1, N, self.num_heads * D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        H, W = x.shape[1], x.shape[2]
        if self.relative_position_bias_table is not None:
            bias = attention_bias(self.relative_position_bias_table, H, W, self.window_size, self.shifted)
        else:
            bias = place_bias(self.bias_by_kind, H, W, self.window_size, self.shifted)
        q, k, v = self.project_qkv(to_windows(x, self.window_size, self.shifted))
        dropout = self.attn_drop.p if self.training else 0.0
        windows = self.join_heads(window_attention(q, k, v, bias, self.scale, dropout))
        windows = self.proj_drop(self.proj(windows))
        return from_windows(windows, x, self.window_size, self.shifted)

    @torch.no_grad()
    def fuse(self) -> "WindowAttention":
        """Folds the scale into the query weights and turns the bias table into a constant. Exact for maps of any size."""
        table = self.relative_position_bias_table
        if table is not None:
            C = self.qkv.in_features
            self.qkv.weight[:C] *= self.scale
            if self.qkv.bias is not None:
                self.qkv.bias[:C] *= self.scale
            self.scale = 1.0
            self.bias_by_kind = bias_by_kind(table, self.window_size, self.shifted)
            self.relative_position_bias_table = None
        return self
