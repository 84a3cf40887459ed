"""Prediction on images: preprocessing, batches and output as the model's own config and task have them."""

from __future__ import annotations

import os
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
from tqdm import tqdm

from .. import hub
from ..data import MODES, BadImage, decode, decoding, find_images, open_image, validation_transform
from ..errors import UserError
from ..models.tosa_vit import ToSAViT
from ..tasks import Task, task_of
from .device import pick_device

READERS = 4  # decoding threads; Pillow releases the interpreter lock
PATIENCE = 5.0  # seconds after which progress is shown

Picture = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""What `predict` takes for an image, or for a folder or a batch of them."""


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Attributes:
        image: The file; None for an image that was given otherwise.
        rows: The task's rows, best first, e.g. rank, label, index and probability of a class.
    """

    image: Path | None
    rows: list[dict[str, Any]]


def predict(
    model: nn.Module | str | Path,
    images: Picture | Iterable[Picture],
    *,
    topk: int = 5,
    task: Task | None = None,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    on_bad: Callable[[BadImage], None] | None = None,
    progress: bool = False,
) -> list[Prediction]:
    """Runs a model on images: files are decoded as in training, validation and `effzoo predict`.

    Args:
        model: A timm model, a deployed one, or what `effvit_zoo.hub.load` takes: a name (its published weights are used), a model
            folder or run folder, `hf-hub:USER/NAME`. A module is moved to the device and put into eval mode.
        images: One or several of: an image file, a folder of them, a PIL image, an array (H, W[, C]) or tensor ([C, ]H, W), or a
            batch of these with another axis in front. Arrays and tensors are of uint8, of uint16, or of floats from 0 to 1; what
            has been prepared for the model already is for the model itself.
        topk: Largest number of rows per image.
        task: The model's task. None: the recorded one, else classification.
        batch_size: Images per forward pass.
        device: Device to compute on; None for a GPU where there is one. Deployed models compute on the CPU.
        on_bad: Called with the error of each unreadable image, which is then left out; None raises it.
        progress: Show a bar if it takes more than five seconds.

    Returns:
        The predictions, in the order of the images.

    Raises:
        UserError: The model can't be loaded or can't do its task (e.g. it has no classifier), or a number is out of range.
        BadImage: An unreadable image, where there is no `on_bad`.
    """
    if topk < 1:
        raise UserError(f"topk must be at least 1, got {topk}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    net: Any = model if isinstance(model, nn.Module) else hub.load(model, pretrained=True)
    task = task or task_of(net)
    place = pick_device("cpu" if device is None and next(net.parameters(), None) is None else device)
    net = net.to(place).eval()
    listed = tqdm([*_listed(images, on_bad)], unit="image", leave=False, delay=PATIENCE, disable=not progress)
    found: list[Prediction] = []
    for paths, batch in _batches(listed, partial(_read, *preprocessing(net)), batch_size, on_bad):
        with torch.inference_mode():
            output = net(batch.to(place))
        found += map(Prediction, paths, task.predict(output, topk))
    return found


def _batches(
    items: Iterable[tuple[Path | None, Any]],
    read: Callable[[tuple[Path | None, Any]], Tensor | BadImage],
    batch_size: int,
    on_bad: Callable[[BadImage], None] | None,
) -> Iterator[tuple[list[Path | None], Tensor]]:
    """Files and prepared images (B, C, H, W) of those that are readable."""
    remaining = iter(items)
    with ThreadPoolExecutor(READERS) as readers:
        while batch := list(islice(remaining, batch_size)):
            good: list[tuple[Path | None, Tensor]] = []
            for (path, _), result in zip(batch, readers.map(read, batch), strict=True):
                if isinstance(result, Tensor):
                    good.append((path, result))
                elif on_bad is None:
                    raise result
                else:
                    on_bad(result)
            if good:
                yield [path for path, _ in good], torch.stack([image for _, image in good])


def _listed(images: Any, on_bad: Callable[[BadImage], None] | None) -> Iterator[tuple[Path | None, Any]]:
    """Each image with its file, None for one that is not a file; folders are searched and batches taken apart."""
    if isinstance(images, str | os.PathLike):
        try:
            yield from ((path, path) for path in find_images([Path(images)]))
        except BadImage as error:
            if on_bad is None:
                raise
            on_bad(error)
    elif isinstance(images, Image.Image):
        yield None, images
    elif isinstance(images, np.ndarray | Tensor):
        yield from ((None, image) for image in (images if images.ndim == 4 else [images]))
    elif isinstance(images, Iterable):
        for image in images:
            yield from _listed(image, on_bad)
    else:
        raise UserError(f"expected images, e.g. paths, PIL images or arrays, got {type(images).__name__}")


def _read(transform: Callable[[Image.Image], Tensor], mode: str, item: tuple[Path | None, Any]) -> Tensor | BadImage:
    path, image = item
    try:
        if path is not None:
            return transform(open_image(path, mode=mode))
        with decoding(f"given as {type(image).__name__}"):
            return transform(decode(_channels_last(image) if isinstance(image, Tensor) else image, mode))
    except BadImage as error:
        return error


def _channels_last(image: Tensor) -> np.ndarray:
    """A tensor (C, H, W) or (H, W) as an array. Raises `ValueError`."""
    if image.ndim == 3 and image.shape[0] not in (1, 3, 4):
        raise ValueError(f"expected a tensor (C, H, W) of 1, 3 or 4 channels, got {tuple(image.shape)}")
    image = image.detach().cpu()
    image = image.float() if image.is_floating_point() else image
    return (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy()


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
