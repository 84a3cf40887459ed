"""Eight-bit images and what timm's transforms make of them, in both directions and without loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .contract import Record


def to_pixels(images: Tensor, record: Record) -> np.ndarray:
    """Normalised images (B, C, H, W), made from eight-bit ones, as uint8 (B, H, W, C) again."""
    mean, std = _scaling(record)
    pixels = (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def to_images(pixels: np.ndarray, record: Record) -> Tensor:
    """uint8 (B, H, W, C) as float32 images (B, C, H, W), normalised."""
    mean, std = _scaling(record)
    images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float().div(255)
    return images.sub(mean).div(std).contiguous()


def _scaling(record: Record) -> tuple[Tensor, Tensor]:
    steps = record["preprocessing"]
    mean, std = (torch.tensor(steps[key], dtype=torch.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    return mean, std
