"""The attention mechanisms written out pair by pair in float64, from the papers' formulas: the slow truth for `test_attention.py`.

Shares no code and no order of operations with the package: every mechanism is an (N, N) table of weights times v.
Layout: (B, H, N, D), Hydra (B, N, C).
"""

import math

import torch


def weighted_mean(weights, v, floor=0.0, eps=0.0):
    return weights @ v / (weights.sum(-1, keepdim=True).clamp_min(floor) + eps)


def softmax(q, k, v):
    return (
        torch.exp(q @ k.mT / math.sqrt(q.shape[-1]))
        @ v
        / torch.exp(q @ k.mT / math.sqrt(q.shape[-1])).sum(-1, keepdim=True)
    )


def elu_linear(q, k, v, eps=1e-6):
    def phi(x):
        return torch.where(x >= 0, x + 1, torch.exp(x.clamp(max=0)))

    return weighted_mean(phi(q) @ phi(k).mT, v, eps=eps)


def with_prefix(weights, num_prefix_tokens):
    """Adds rows and columns of ones in front."""
    Nq, Nk = (n + num_prefix_tokens for n in weights.shape)
    full = torch.ones(Nq, Nk, dtype=weights.dtype)
    full[num_prefix_tokens:, num_prefix_tokens:] = weights
    return full


def cosformer(q, k, v, eps=1e-6, num_prefix_tokens=0):
    Nq, Nk = q.shape[-2] - num_prefix_tokens, k.shape[-2] - num_prefix_tokens
    distance = torch.arange(Nq, dtype=q.dtype)[:, None] - torch.arange(Nk, dtype=q.dtype)
    weights = with_prefix(torch.cos(math.pi / 2 * distance / max(Nq, Nk)), num_prefix_tokens)
    return weighted_mean(torch.relu(q) @ torch.relu(k).mT * weights, v, floor=eps)


def cosformer_2d(q, k, v, grid_size, form="sum", eps=1e-4, num_prefix_tokens=0):
    rows, columns = grid_size
    weights = torch.empty(rows * columns, rows * columns, dtype=q.dtype)
    for i in range(rows * columns):
        for j in range(rows * columns):
            down = math.cos(math.pi / 2 * (i // columns - j // columns) / rows)
            across = math.cos(math.pi / 2 * (i % columns - j % columns) / columns)
            weights[i, j] = down + across if form == "sum" else down * across
    return weighted_mean(torch.relu(q) @ torch.relu(k).mT * with_prefix(weights, num_prefix_tokens), v, eps=eps)


def hydra(q, k, v):
    """Ordinary linear attention with one head per channel: the head dimension is 1."""
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    q, k, v = (x.mT.unsqueeze(-1) for x in (q, k, v))  # (B, C, N, 1)
    return ((q @ k.mT) @ v).squeeze(-1).mT


def sima(q, k, v, eps=1e-12):
    q, k = (x / x.abs().sum(-2, keepdim=True).clamp_min(eps) for x in (q, k))
    return q @ k.mT @ v


def sima_class(q, k, v, eps=1e-6):
    return sima(q, k, v, eps)[:, :, :1]
