"""ToSA, token-selective attention: the map of one layer predicts the map of the next, and only tokens that this one will look at enter it.

"ToSA: Token Selective Attention for Efficient Vision Transformers", arXiv:2406.08816 (CVPR workshops 2024). No code of the authors is
public; this follows the paper's text and says where that is silent. Stated there: layers come in pairs, a standard one and a ToSA one;
a selector between them turns the multi-head q k^T of the first, before its softmax, into the log of the attention map of the second by
two 1-D convolutions with a ReLU between; a token's importance is the column sum of the predicted map of each head; tokens that are not
selected pass by the whole second layer and come back in their places.

Decided here, for want of a word in the paper: q k^T is scaled by 1 / sqrt(D); heads are averaged, so that every image keeps the same number
of tokens; class and register tokens are always kept; the number kept is ceil(ratio * patches), a constant for an image size; the last
convolution has no bias (the softmax over keys would cancel it).

Deliberate difference: a selector may read the rows of every s-th query only (`rows_of_queries`). Importance is a sum over queries, and
a sum over a sample of them orders the tokens nearly alike, at 1 / s of the cost, while the standard layer keeps its fused attention.
1 is the paper's full map.

Layout: tokens (B, L, C), maps (B, H, R, L); B images, L tokens with prefix tokens first, H heads, R queries that were read.
"""

import math

import torch
from torch import nn

from ..errors import UserError
from ._linear import PIECE_ELEMENTS, is_eager_inference

LEAST_ROWS = 32  # fewer at a time cost more in calls than they save


def number_selected(attention_ratio: float, num_patches: int) -> int:
    """ceil(attention_ratio * num_patches), safe against the rounding of the product."""
    return math.ceil(attention_ratio * num_patches - 1e-9)


def rows_of_queries(
    q: torch.Tensor, k: torch.Tensor, scale: float, stride: int, num_prefix_tokens: int
) -> torch.Tensor:
    """scale * q k^T for every `stride`-th patch as a query.

    Args:
        q: Queries, (B, H, L, D).
        k: Keys, likewise.
        scale: Usually D ** -0.5.
        stride: 1 reads all queries, prefix tokens among them; more starts at the first patch, for a prefix token that is always among
            a few queries would weigh too much.
        num_prefix_tokens: Class and register tokens at the front.

    Returns:
        (B, H, R, L), R = L for stride 1, else ceil((L - num_prefix_tokens) / stride).
    """
    start = num_prefix_tokens if stride > 1 else 0
    return (q[:, :, start::stride] * scale) @ k.transpose(-2, -1)


def token_importance(maps: torch.Tensor) -> torch.Tensor:
    """How much each token is looked at: column sums of the attention, averaged over heads.

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
        num_selected: Patches to keep, from 0.
        num_prefix_tokens: Tokens at the front that are always kept.

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

    Two convolutions along the keys with the heads as channels, each query's row by itself, so any number of tokens fits.

    Args:
        num_heads: Heads H.
        kernel_size: Keys that a convolution sees, odd; 1 treats every key alike wherever it stands.
        hidden_ratio: Channels between the convolutions over heads.

    Raises:
        ValueError: For an even or non-positive `kernel_size` or a non-positive `hidden_ratio`.
    """

    def __init__(self, num_heads: int, kernel_size: int = 3, hidden_ratio: int = 4, device=None, dtype=None) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"selector_kernel: expected an odd number from 1, got {kernel_size}")
        if hidden_ratio < 1:
            raise UserError(f"selector_hidden_ratio: expected at least 1, got {hidden_ratio}")
        dd = {"device": device, "dtype": dtype}
        shape, padding, hidden = (1, kernel_size), (0, kernel_size // 2), num_heads * hidden_ratio
        self.conv1 = nn.Conv2d(num_heads, hidden, shape, padding=padding, **dd)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(hidden, num_heads, shape, padding=padding, bias=False, **dd)

    def scores(self, maps: torch.Tensor) -> torch.Tensor:
        """What `forward` normalises, (B, H, R, L) -> (B, H, R, L)."""
        return self.conv2(self.act(self.conv1(maps)))

    def importance(self, maps: torch.Tensor) -> torch.Tensor:
        """Importance of each token in the next layer, (B, H, R, L) -> (B, L); in float32 at least, whatever the maps are in.

        In eager inference some rows at a time: what lies between the convolutions is the widest tensor of the network on large images.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102  # TorchScript leaves out only a block of its own
            if type(maps) is torch.Tensor and is_eager_inference(maps, maps, maps):
                row = maps[:, :1, :1].numel() * self.conv1.out_channels
                parts = maps.split(max(PIECE_ELEMENTS // row, LEAST_ROWS), dim=2)
                return torch.stack([token_importance(self.scores(part).float()) for part in parts]).sum(0)
        return token_importance(self.scores(maps).float())

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.scores(maps).float().log_softmax(dim=-1)
