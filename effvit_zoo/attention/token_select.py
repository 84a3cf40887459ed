"""ToSA, token-selective attention: every second layer processes only the tokens that its predicted attention map attends to most.

"ToSA: Token Selective Attention for Efficient Vision Transformers", arXiv:2406.08816 (CVPR workshops 2024). There is no public code of the
authors; this follows the paper's text. Stated there: layers come in pairs, a standard one and a ToSA one; a selector between them turns the
multi-head q k^T of the first, before its softmax, into the log of the attention map of the second by two 1-D convolutions with a ReLU
between; a token's importance is the column sum of the predicted map of each head; tokens that are not selected bypass the whole second
layer and are put back in their places.

Decided here, as the paper does not say: q k^T is scaled by 1 / sqrt(D); heads are averaged, so that every image keeps the same number
of tokens; class and register tokens are always kept; the number kept is ceil(ratio * patches), a constant for an image size; the last
convolution has no bias (the softmax over keys would cancel it).

Deliberate difference: a selector may read every s-th row of the map only (`rows_of_queries`). Importance is a sum over queries, and
a sum over a sample of them ranks the tokens nearly alike, at 1 / s of the cost, while the standard layer keeps its fused attention.
1 is the paper's full map.

Layout: tokens (B, L, C), maps (B, H, R, L); B images, L tokens with prefix tokens first, H heads, R queries that were read.
"""

import math
from typing import List

import torch
from torch import nn

from ._linear import CHUNK_ELEMENTS
from ._recording import is_eager_inference

LEAST_ROWS = 32  # of a chunk; smaller chunks cost more in calls than they save


def naive_selection(scores: torch.Tensor, num_selected: int, num_prefix_tokens: int) -> List[List[int]]:
    """The tokens that enter a layer, for each image, from its scores (B, H, R, L) row by row; for tests."""
    selected = []
    for image in scores.exp().tolist():
        importance = [0.0] * scores.shape[-1]
        for row in (row for head in image for row in head):
            importance = [total + weight / sum(row) for total, weight in zip(importance, row, strict=True)]
        patches = sorted(range(num_prefix_tokens, len(importance)), key=lambda i: -importance[i])
        selected.append([*range(num_prefix_tokens), *patches[:num_selected]])
    return selected


def number_selected(attention_ratio: float, num_patches: int) -> int:
    """ceil(attention_ratio * num_patches), robust to the rounding of the product."""
    return math.ceil(attention_ratio * num_patches - 1e-9)


def rows_of_queries(
    q: torch.Tensor, k: torch.Tensor, scale: float, stride: int, num_prefix_tokens: int
) -> torch.Tensor:
    """scale * q k^T for every `stride`-th patch as a query.

    Args:
        q: Queries, (B, H, L, D).
        k: Keys, likewise.
        scale: Usually D ** -0.5.
        stride: 1 reads all queries, including prefix tokens. Larger strides start at the first patch: a prefix token that is always
            among a few queries would have too much weight.
        num_prefix_tokens: Class and register tokens at the front.

    Returns:
        (B, H, R, L), R = L for stride 1, else ceil((L - num_prefix_tokens) / stride).
    """
    start = num_prefix_tokens if stride > 1 else 0
    return (q[:, :, start::stride] * scale) @ k.transpose(-2, -1)


def token_importance(maps: torch.Tensor) -> torch.Tensor:
    """Attention that each token receives: column sums of the map, averaged over heads.

    Args:
        maps: (B, H, R, L), scores or log-probabilities over the last dimension (a softmax leaves the latter as they are).

    Returns:
        (B, L), summing up to R.
    """
    return maps.softmax(dim=-1).sum(dim=2).mean(dim=1)


def select_tokens(importance: torch.Tensor, num_selected: int, num_prefix_tokens: int) -> torch.Tensor:
    """Indices of the prefix tokens and of the most important patches.

    Args:
        importance: (B, L).
        num_selected: Number of patches to keep, 0 or more.
        num_prefix_tokens: Number of tokens at the front that are always kept.

    Returns:
        (B, num_prefix_tokens + num_selected), prefix tokens first, then patches by falling importance.

    Raises:
        ValueError: If there are fewer patches than `num_selected`.
    """
    B, L = importance.shape
    patches = L - num_prefix_tokens
    if num_selected < 0 or num_selected > patches:
        raise ValueError(f"num_selected: expected 0 to {patches} patches, got {num_selected}")
    prefix = torch.arange(num_prefix_tokens, device=importance.device).expand(B, -1)
    chosen = importance[:, num_prefix_tokens:].topk(num_selected, dim=1).indices + num_prefix_tokens
    return torch.cat([prefix, chosen], dim=1)


def gather_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens (B, L, C) at the indices (B, M) -> (B, M, C)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def scatter_tokens(x: torch.Tensor, index: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Tokens (B, L, C) with those at the indices (B, M) replaced by `selected`, (B, M, C)."""
    return x.scatter(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]), selected.to(x.dtype))


class TokenSelector(nn.Module):
    """Predicts a layer's attention map from the scores of the layer before, (B, H, R, L) -> log-probabilities over keys (B, H, R, L).

    Two convolutions along the keys with the heads as channels, row by row, so any number of tokens fits.

    Args:
        num_heads: Heads H.
        kernel_size: Keys that a convolution sees, odd; with 1 the position of a key has no effect.
        hidden_ratio: Channels between the convolutions over heads.

    Raises:
        ValueError: For an even or non-positive `kernel_size` or a non-positive `hidden_ratio`.
    """

    def __init__(self, num_heads: int, kernel_size: int = 3, hidden_ratio: int = 4, device=None, dtype=None) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"selector_kernel: expected an odd number from 1, got {kernel_size}")
        if hidden_ratio < 1:
            raise ValueError(f"selector_hidden_ratio: expected at least 1, got {hidden_ratio}")
        dd = {"device": device, "dtype": dtype}
        shape, padding, hidden = (1, kernel_size), (0, kernel_size // 2), num_heads * hidden_ratio
        self.conv1 = nn.Conv2d(num_heads, hidden, shape, padding=padding, **dd)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(hidden, num_heads, shape, padding=padding, bias=False, **dd)

    def scores(self, maps: torch.Tensor) -> torch.Tensor:
        """Unnormalised predictions, (B, H, R, L) -> (B, H, R, L)."""
        return self.conv2(self.act(self.conv1(maps)))

    def importance(self, maps: torch.Tensor) -> torch.Tensor:
        """Importance of each token in the next layer, (B, H, R, L) -> (B, L); in float32 at least, whatever the maps' type.

        Eager inference handles some rows at a time: on large images the hidden tensor between the convolutions is the network's largest.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102  # TorchScript skips only a block of its own
            if is_eager_inference(maps):
                row = maps[:, :1, :1].numel() * self.conv1.out_channels
                parts = maps.split(max(CHUNK_ELEMENTS // row, LEAST_ROWS), dim=2)
                return torch.stack([token_importance(self.scores(part).float()) for part in parts]).sum(0)
        return token_importance(self.scores(maps).float())

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.scores(maps).float().log_softmax(dim=-1)
