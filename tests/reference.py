"""What the model tests compare with: the weights and images behind tests/golden, random weights, and distances.

tests/golden/<variant>.npz holds what a paper's official code answers (float64, eval mode, CPU) when its weights and its images are the
functions below: `logits` at its own size for two images, `logits_<size>` (float32) for one image of another size, and for every stage a
summary of the first image: `mean` over pixels and `center` pixel per channel, and `std` over the whole batch. `meta` names the official
repository, commit and builder with its parameter count and MACs; `state_dict` lists the official keys, shapes and types.
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
IMAGE_SEED = 20240613
STRUCTURAL = ("num_batches_tracked", "relative_position_index", "attn_mask")
"""Leaves that no weight is drawn for: they count batches, or follow from the shapes."""


def _normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed=seed)).standard_normal(size=shape)


def weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 tensor that belongs to an official key: offset + scale * noise, the noise seeded by the key's CRC-32.

    Branches that close with a norm start from 0.5 and plain convolutions before a norm gain 1.4, so that the features of networks
    without layer scale neither vanish nor explode.
    """
    noise = _normal(zlib.crc32(key.encode()), shape)
    leaf = key.rpartition(".")[2]
    closes_branch = key.endswith((".point_conv.norm.weight", ".proj.norm.weight", ".conv2.norm.weight"))
    before_norm = key.endswith(".conv.weight") and not key.endswith((".qkv.conv.weight", ".proj.conv.weight"))
    if leaf == "running_var":
        noise = np.abs(noise)
    if leaf in ("running_mean", "bias"):
        offset, scale = 0.0, 0.1
    elif leaf == "running_var":
        offset, scale = 1.0, 0.1
    elif leaf == "relative_position_bias_table":
        offset, scale = 0.0, 0.5
    elif leaf == "w_g":
        offset, scale = 0.0, 1.0
    elif leaf == "temperature":
        offset, scale = 4.0, 0.5
    elif leaf.startswith(("gamma", "layer_scale")) or closes_branch:
        offset, scale = 0.5, 0.1
    elif leaf == "weight" and len(shape) == 1:
        offset, scale = 1.0, 0.1
    elif leaf == "weight":
        offset, scale = 0.0, (1.4 if before_norm else 1.0) / np.sqrt(float(math.prod(shape[1:])))
    else:
        raise KeyError(f"no rule for {key} {shape}")
    return torch.from_numpy(np.ascontiguousarray(offset + scale * noise, dtype=np.float32))


def images(height: int, width: int, batch: int = 2) -> torch.Tensor:
    """Standard normal noise, (batch, 3, height, width)."""
    return torch.from_numpy(_normal(IMAGE_SEED, (batch, 3, height, width)).astype(np.float32))


class Golden:
    """One file of tests/golden: `meta`, `arrays` and the official `state_dict()`."""

    def __init__(self, variant: str) -> None:
        with np.load(GOLDEN / f"{variant}.npz") as file:
            self.arrays = {key: torch.from_numpy(file[key]) for key in file if key not in ("meta", "state_dict")}
            self.meta: dict[str, Any] = json.loads(file["meta"].tobytes())
            self._keys = file["state_dict"].tobytes().decode().splitlines()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The official checkpoint; structural entries are zero, as a converter has to do without their values."""
        tensors = {}
        for line in self._keys:
            key, size, dtype = line.split()
            shape = tuple(int(n) for n in size.split("x") if n != "-")
            if key.endswith(STRUCTURAL):
                tensors[key] = torch.zeros(shape, dtype=getattr(torch, dtype))
            else:
                tensors[key] = weight(key, shape)
        return tensors

    def stages(self) -> Iterator[str]:
        """Names of the summarised stages, in order of execution."""
        return (key.removesuffix(".std") for key in self.arrays if key.endswith(".std"))

    def other_sizes(self) -> Iterator[tuple[str, int, int]]:
        """(array, height, width) of the logits at other sizes than the variant's own."""
        for key in self.arrays:
            if key.startswith("logits_"):
                size = [int(n) for n in key.removeprefix("logits_").split("x")]
                yield key, size[0], size[-1]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def centred_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """`relative_error` of what distinguishes the images of a batch: what all have in common would hide a mistake."""
    got, expected = got.double(), expected.double()
    return relative_error(got - got.mean(0), expected - expected.mean(0))


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights under which every part of a network shows in its output: no tiny layer scales, no zero heads, no unit norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.squeeze().ndim > 1:
            value = noise / math.sqrt(parameter[0].numel())
        elif name.endswith("weight") or "gamma" in name:
            value = 1 + 0.1 * noise
        else:
            value = 0.1 * noise
        parameter.copy_(value)
    return model


@torch.no_grad()
def calibrate_batch_norm(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Sets every BatchNorm's statistics to those of `x`, so that images keep their differences through the network; leaves eval mode on."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
