"""Exported files as classifiers: `.onnx` by ONNX Runtime, `.xml` by OpenVINO, `.pte` by ExecuTorch.

What an exported file doesn't hold, preprocessing and labels, is read from the config.json beside it (`save` of `effvit_zoo.hub`
writes one) or from a model that is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import hub
from ..errors import UserError, unknown_choice
from ..run_folder import MODEL_CONFIG
from .runtimes import Opened, need, open_onnx, open_openvino


def _open_executorch(path: Path, threads: int) -> Opened:
    runtime = need("executorch.runtime", "executorch").Runtime.get()
    method = runtime.load_program(str(path)).load_method("forward")
    shape: list[int | None] = list(method.metadata.input_tensor_meta(0).sizes())
    return lambda images: method.execute([images])[0], shape


EXPORTED: dict[str, Callable[[Path, int], Opened]] = {
    ".onnx": open_onnx,
    ".xml": open_openvino,
    ".pte": _open_executorch,
}
"""Suffix of a file -> what opens it with a number of threads."""


class ExportedModel(nn.Module):
    """An exported file with the surface that validation needs of a timm model.

    Args:
        path: The file.
        config: Content of a model folder's config.json.
        threads: That the runtime may use.

    Raises:
        UserError: The runtime isn't installed, or the file is damaged or no classifier.
    """

    def __init__(self, path: Path, config: dict[str, Any], threads: int) -> None:
        super().__init__()
        try:
            self.runner, self.shape = EXPORTED[path.suffix](path, threads)
        except UserError:
            raise
        except Exception as error:  # every runtime has its own for damaged files
            raise UserError(f"cannot open {path}: {' '.join(str(error).split())[:200]}") from error
        if len(self.shape) != 4:
            raise UserError(f"{path} takes {len(self.shape)} dimensions, expected images (B, C, H, W)")
        cfg: dict[str, Any] = dict(config.get("pretrained_cfg", {}))
        if config.get("label_names"):
            cfg["label_names"] = config["label_names"]
        sides = zip(self.shape[1:], cfg.get("input_size", (3, 224, 224)), strict=True)
        cfg["input_size"] = tuple(own or usual for own, usual in sides)
        logits = self.forward(torch.zeros(1, *cfg["input_size"]))
        if logits.ndim != 2:
            raise UserError(f"{path} gives an output of shape {tuple(logits.shape)}, expected logits (B, classes)")
        self.num_classes = cfg["num_classes"] = int(logits.shape[1])
        self.pretrained_cfg = cfg

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, num_classes), in parts where the file was made for fewer images at once."""
        batch = self.shape[0]
        if batch is None or batch == len(images):
            return self.runner(images.contiguous())
        parts = []
        for part in images.split(batch):
            missing = batch - len(part)
            padded = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part
            parts.append(self.runner(padded.contiguous())[: len(part)].clone())
        return torch.cat(parts)


def load_exported(name: str, like: str | None = None, threads: int = 1) -> ExportedModel:
    """An exported file with the preprocessing and labels of the model folder that it lies in.

    Args:
        name: The file.
        like: A model (folder, `hf-hub:` or registered name) to take preprocessing and labels from instead.
        threads: That the runtime may use.

    Raises:
        UserError: Not there, an unknown suffix, no runtime for it, or nothing says how images are to be prepared.
    """
    path = Path(name)
    if path.suffix not in EXPORTED:
        raise unknown_choice("kind of exported file", path.suffix, list(EXPORTED))
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    return ExportedModel(path, _config_for(path, like), threads)


def _config_for(path: Path, like: str | None) -> dict[str, Any]:
    if like is not None and not hub.brings_weights(like):
        model: Any = hub.load(like, pretrained=False, device="meta")
        return {"pretrained_cfg": dict(model.pretrained_cfg)}
    if like is not None:
        return hub.read_config(like)
    places: Sequence[Path] = (path.parent, path.with_suffix(""), path.parent.parent)
    for folder in places:
        if (folder / MODEL_CONFIG).is_file():
            return hub.read_config(f"{hub.LOCAL}{folder}")
    raise UserError(
        f"nothing says how {path} wants its images: put its model's {MODEL_CONFIG} beside it, or name it by --like MODEL"
    )
