"""Prediction on image files: preprocessing, batches and output as the model's own config and task have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..data import MODES, BadImage, open_image, validation_transform
from ..errors import UserError
from ..models.tosa_vit import ToSAViT
from ..tasks import Task, task_of

READERS = 4  # decoding threads; Pillow releases the interpreter lock


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Attributes:
        image: The file.
        rows: The task's rows, best first, e.g. rank, label, index and probability of a class.
    """

    image: Path
    rows: list[dict[str, Any]]


def predict(
    model: nn.Module,
    paths: Iterable[Path],
    *,
    task: Task | None = None,
    topk: int = 5,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    on_bad: Callable[[BadImage], None] | None = None,
) -> Iterator[Prediction]:
    """Runs a model on image files, in order.

    Args:
        model: A timm model or a deployed one; it is moved to the device and put into eval mode.
        paths: Image files.
        task: The model's task. None: the recorded one, else classification.
        topk: Largest number of rows per image.
        batch_size: Images per forward pass.
        device: Device to compute on.
        on_bad: Called with the error of each unreadable file, which is then skipped; None raises it.

    Raises:
        UserError: The model can't do its task (e.g. it has no classifier), or a number is out of range.
        BadImage: An unreadable file, where there is no `on_bad`.
    """
    task = task or task_of(model)
    if topk < 1:
        raise UserError(f"topk must be at least 1, got {topk}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    read = partial(_read, *preprocessing(model))
    model = model.to(device).eval()
    remaining = iter(paths)
    with ThreadPoolExecutor(READERS) as readers:
        while batch := list(islice(remaining, batch_size)):
            good: list[tuple[Path, Tensor]] = []
            for path, result in zip(batch, readers.map(read, batch), strict=True):
                if isinstance(result, Tensor):
                    good.append((path, result))
                elif on_bad is None:
                    raise result
                else:
                    on_bad(result)
            if good:
                with torch.inference_mode():
                    output = model(torch.stack([image for _, image in good]).to(device))
                for (path, _), rows in zip(good, task.predict(output, topk), strict=True):
                    yield Prediction(path, rows)


def _read(transform: Callable[[Image.Image], Tensor], mode: str, path: Path) -> Tensor | BadImage:
    try:
        return transform(open_image(path, mode=mode))
    except BadImage as error:
        return error


def preprocessing(model: nn.Module) -> tuple[Callable[[Image.Image], Tensor], str]:
    """The evaluation transform of a model's own config, and Pillow's mode for its input channels. Raises `UserError`."""
    data_config = resolve_model_data_config(model)
    channels = data_config["input_size"][0]
    if channels not in MODES:
        raise UserError(f"the model takes {channels} channels, images have 3 (RGB) or 1 (grey)")
    return validation_transform(data_config), MODES[channels]


def token_maps(model: nn.Module, path: Path) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """The tokens that enter the layers of a ToSA-ViT for an image.

    Args:
        model: A ToSA-ViT, on the CPU.
        path: An image file.

    Returns:
        The preprocessed image, and for each ToSA layer a map (rows, columns) of the patches that entered it.

    Raises:
        UserError: The model selects no tokens: it is another one, or its attention ratio is 1.
        BadImage: An unreadable file.
    """
    if not isinstance(model, ToSAViT):
        raise UserError(f"expected a ToSA-ViT (effzoo_tosa_vit_*), which selects tokens, got {type(model).__name__}")
    if model.attention_ratio >= 1:
        raise UserError("the model's attention ratio is 1: every token enters every layer, there is nothing to show")
    transform, mode = preprocessing(model)
    tensor = transform(open_image(path, mode=mode))
    model.eval()
    with torch.inference_mode():
        entered = model.selected_tokens(tensor.unsqueeze(0))
    rows, columns = model.patch_embed.dynamic_feat_size(tuple(tensor.shape[1:]))
    maps = {}
    for pair, index in enumerate(entered):
        kept = np.zeros(model.num_prefix_tokens + rows * columns, dtype=bool)
        kept[index[0].numpy()] = True
        maps[f"layer {2 * pair + 2}"] = kept[model.num_prefix_tokens :].reshape(rows, columns)
    data_config = resolve_model_data_config(model)
    mean, std = (torch.tensor(data_config[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    pixels = (255 * (tensor * std + mean)).round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()), maps
