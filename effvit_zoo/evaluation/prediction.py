"""From picture files to ranked classes: preprocessing, batches and names as the model's own config has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from ..data.images import BadImage, open_image
from ..errors import UserError
from ..hub import class_names as class_names
from ..models.tosa_vit import ToSAViT

READERS = 4  # threads that decode; Pillow leaves the interpreter lock while it does


@dataclass(frozen=True)
class Prediction:
    """The best classes of one picture, best first."""

    image: Path
    indices: tuple[int, ...]
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    """Softmax over all classes; sums to 1 only if all of them are listed."""


def predict(
    model: nn.Module,
    paths: Iterable[Path],
    *,
    topk: int = 5,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    on_bad: Callable[[BadImage], None] | None = None,
) -> Iterator[Prediction]:
    """Classifies pictures, in order.

    Args:
        model: A timm classifier; it is moved to the device and put into eval mode.
        paths: Picture files.
        topk: Classes per picture, at most as many as the model has.
        batch_size: Pictures per forward pass.
        device: Where to compute.
        on_bad: Called with the error of each unreadable file, which is then left out; None raises it.

    Raises:
        UserError: The model has no classifier, or a number is out of range.
        BadImage: An unreadable file, where there is no `on_bad`.
    """
    if not getattr(model, "num_classes", 0):
        raise UserError("the model has no classifier to predict with (num_classes is 0)")
    if topk < 1:
        raise UserError(f"topk must be at least 1, got {topk}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    data_config = resolve_model_data_config(model)
    transform = create_transform(**data_config, is_training=False)
    mode = {1: "L", 3: "RGB"}.get(data_config["input_size"][0])
    if mode is None:
        raise UserError(f"the model takes {data_config['input_size'][0]} channels, pictures have 3 or 1")
    names = class_names(model)
    model = model.to(device).eval()

    def read(path: Path) -> Tensor | BadImage:
        try:
            return transform(open_image(path).convert(mode))
        except BadImage as error:
            return error

    with ThreadPoolExecutor(READERS) as readers:
        for batch in _batches(paths, batch_size):
            good: list[Path] = []
            tensors: list[Tensor] = []
            for path, result in zip(batch, readers.map(read, batch), strict=True):
                if isinstance(result, Tensor):
                    good.append(path)
                    tensors.append(result)
                elif on_bad is None:
                    raise result
                else:
                    on_bad(result)
            if tensors:
                yield from _classify(model, good, torch.stack(tensors).to(device), names, topk)


def token_maps(model: nn.Module, path: Path) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """What a ToSA-ViT looks at in a picture.

    Args:
        model: A ToSA-ViT, on the CPU.
        path: A picture file.

    Returns:
        The picture as the model sees it, and for each ToSA layer a map (rows, columns) of the patches that entered it.

    Raises:
        UserError: The model selects no tokens: it is another one, or its attention ratio is 1.
        BadImage: An unreadable file.
    """
    if not isinstance(model, ToSAViT):
        raise UserError(f"expected a ToSA-ViT (effzoo_tosa_vit_*), which selects tokens, got {type(model).__name__}")
    if model.attention_ratio >= 1:
        raise UserError("the model's attention ratio is 1: every token enters every layer, there is nothing to show")
    data_config = resolve_model_data_config(model)
    channels = data_config["input_size"][0]
    transform = create_transform(**data_config, is_training=False)
    tensor = transform(open_image(path).convert({1: "L"}.get(channels, "RGB")))
    model.eval()
    with torch.inference_mode():
        entered = model.selected_tokens(tensor.unsqueeze(0))
    rows, columns = model.patch_embed.dynamic_feat_size(tuple(tensor.shape[1:]))
    maps = {}
    for pair, index in enumerate(entered):
        kept = np.zeros(model.num_prefix_tokens + rows * columns, dtype=bool)
        kept[index[0].numpy()] = True
        maps[f"layer {2 * pair + 2}"] = kept[model.num_prefix_tokens :].reshape(rows, columns)
    mean, std = (torch.tensor(data_config[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    pixels = (255 * (tensor * std + mean)).round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()), maps


def _classify(
    model: nn.Module, paths: list[Path], images: Tensor, names: tuple[str, ...], topk: int
) -> Iterator[Prediction]:
    """Images (B, C, H, W), one per path."""
    with torch.inference_mode():
        probabilities = model(images).float().softmax(dim=1)
    values, indices = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
    for path, row, best in zip(paths, values.tolist(), indices.tolist(), strict=True):
        yield Prediction(path, tuple(best), tuple(names[index] for index in best), tuple(row))


def _batches(paths: Iterable[Path], size: int) -> Iterator[list[Path]]:
    batch: list[Path] = []
    for path in paths:
        batch.append(path)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
