"""Models outside eager torch with the surface of a timm model, so that prediction and validation take them as they are.

Preprocessing and labels come from the record that `export_model` wrote into the file; for a file of another origin from the config.json in
its folder (written by `effvit_zoo.hub.save`), or from a model that is named.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError, one_line, unknown_choice
from ..run_folder import BEST, EXTRA_KEY, MODEL_CONFIG
from . import TARGETS, target_of
from ._graph import make_graph
from ._pixels import to_pixels
from ._record import as_config, read_folder, record_of_file
from .contract import Opened, Record, Target

TensorRunner = Callable[[Tensor], Any]
"""float32 images (B, C, H, W) on the CPU, in any memory format -> output (B, ...), or several, that later calls don't overwrite."""

RUNTIMES = {name: row for name, row in TARGETS.items() if row.any_batch and row.package != "torch"}
"""Targets in which a model runs faster here, for any number of images."""


class Deployed(nn.Module):
    """A function of images as an inference-only module: float32 on the CPU, and without parameters, whatever computes it.

    Args:
        run: Computes the outputs.
        shape: Its input's (B, C, H, W), None where any size will do.
        pretrained_cfg: Preprocessing, number of classes and labels under timm's keys; num_classes is required.
    """

    def __init__(self, run: TensorRunner, shape: list[int | None], pretrained_cfg: Mapping[str, Any]) -> None:
        super().__init__()
        self._run: TensorRunner = partial(run)  # a module that is assigned itself would bring its parameters
        self.shape = shape
        self.pretrained_cfg = dict(pretrained_cfg)
        self.num_classes: int = self.pretrained_cfg["num_classes"]
        self.effvit_zoo_record: Mapping[str, Any] = {}
        self.eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> outputs (B, ...), in parts where `run` takes a fixed number of images."""
        batch = self.shape[0]
        images = images.detach()
        if batch is None or batch == len(images):
            return self._run(images)
        parts = []
        for part in images.split(batch):
            missing = batch - len(part)
            padded = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part
            parts.append(self._run(padded)[: len(part)])
        return torch.cat(parts)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """As of timm models: the size of images to come. Raises `UserError` where the file was exported for another size."""
        size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
        if any(own not in (None, side) for own, side in zip(self.shape[2:], size, strict=True)):
            raise UserError(f"it was exported for {self.shape[2]} x {self.shape[3]} pixels, got {size[0]} x {size[1]}")
        self.pretrained_cfg["input_size"] = (self.pretrained_cfg["input_size"][0], *size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Deployed:
        """`to`, `cuda`, `half` and their like all come here; only those that leave the device and the dtype are possible."""
        try:
            probe = fn(torch.zeros(1))
            stays = probe.device.type == "cpu" and probe.dtype == torch.float32
        except (RuntimeError, AssertionError, NotImplementedError):  # a device that this host doesn't have
            stays = False
        if not stays:
            raise UserError(f"{type(self).__name__} computes in float32 on the CPU and can't be moved or converted")
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} can't be pickled or copied: make it again where it is needed")


def open_exported(path: str | Path, threads: int = 1, like: str | None = None) -> Deployed:
    """An exported file as a model: images as timm prepares them in, outputs out, whatever input and runtime the file has.

    Preprocessing and labels come from the record in the file, where there is one, else from the config.json of the model folder or run
    folder that the file lies in. `effvit_zoo.predict` takes the result for a model.

    Args:
        path: The file.
        threads: Number of threads for the runtime.
        like: A model (folder, `hf-hub:` or registered name) to take preprocessing and labels from instead.

    Raises:
        UserError: No such file, an unknown suffix, no runtime for it, a damaged file, or no preprocessing config.
    """
    path = Path(path)
    target = target_of(path)
    if target is None:
        raise unknown_choice("kind of exported file", path.suffix, [target.suffix for target in TARGETS.values()])
    if not path.exists():
        raise UserError(f"there is no file {path}")
    record = record_in(path)
    if record is not None and like is None:
        return _deployed(path, target, as_config(record), record["trained"], threads, record["file"]["batch"][0])
    config = config_of(path, like)
    cfg: dict[str, Any] = dict(config.get("pretrained_cfg", {}))
    if config.get("label_names"):
        cfg["label_names"] = config["label_names"]
    return _deployed(path, target, cfg, config.get(EXTRA_KEY) or {}, threads)


def record_in(path: Path) -> Record | None:
    """The record inside an exported file, or of the export.json beside it; None where there is neither. Raises `UserError`."""
    target = target_of(path)
    assert target is not None
    beside = read_folder(path.parent)
    try:
        return target.read(path) or (record_of_file(beside, path.name) if beside else None)
    except UserError:
        raise
    except target.errors() as error:
        raise UserError(f"cannot open {path}: {one_line(error)}") from error


def _deployed(
    path: Path, target: Target, cfg: dict[str, Any], trained: Mapping[str, Any], threads: int, batch: int = 1
) -> Deployed:
    """A file with preprocessing and labels, tried on an image. Raises `UserError`."""
    try:
        opened = target.open(path, threads)
        if len(opened.shape) != 4:
            raise UserError(f"{path} takes {len(opened.shape)} dimensions, expected images (B, C, H, W)")
        run, shape = _on_tensors(opened, cfg)
        sides = zip(shape[1:], cfg.get("input_size", (3, 224, 224)), strict=True)
        cfg["input_size"] = tuple(own or usual for own, usual in sides)
        output = run(torch.zeros(shape[0] or batch, *cfg["input_size"]))
    except UserError:
        raise
    except target.errors() as error:
        raise UserError(f"cannot open {path}: {one_line(error)}") from error
    if not isinstance(output, Tensor) or output.ndim < 2:
        gives = f"an output of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"{len(output)} outputs"
        raise UserError(f"{path} gives {gives}, expected (B, classes) or (B, classes, H, W)")
    deployed = Deployed(run, shape, cfg | {"num_classes": int(output.shape[1])})
    deployed.effvit_zoo_record = trained
    return deployed


def _on_tensors(opened: Opened, cfg: Mapping[str, Any] | None = None) -> tuple[TensorRunner, list[int | None]]:
    """A file as a function of float32 images (B, C, H, W), normalised as `cfg` says, and the shape that it takes of these."""
    shape, dtype = opened.shape, np.dtype(opened.dtype)
    as_pixels = dtype == np.uint8
    if as_pixels:
        assert cfg is not None
        shape = [shape[0], shape[3], shape[1], shape[2]]

    def run(images: Tensor) -> Any:
        wrong = [got for got, own in zip(images.shape, shape, strict=True) if own not in (None, got)]
        if wrong:
            raise ValueError(f"expected images of shape {tuple(shape)}, got {tuple(images.shape)}")
        array = to_pixels(images, {"preprocessing": cfg}) if as_pixels and cfg else images.contiguous().numpy()
        outputs = [torch.from_numpy(output) for output in opened.run(array.astype(dtype, copy=False))]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return run, shape


def run_in(target: str, model: nn.Module, sample: Tensor, threads: int = 1) -> TensorRunner:
    """A model as a function of float32 images (B, C, H, W) of the sample's size, computed by another runtime.

    Args:
        target: A name in `RUNTIMES`.
        model: In eval mode.
        sample: Images (B, C, H, W).
        threads: Number of threads for the runtime.

    Raises:
        UserError: An unknown target, or one that isn't installed.
    """
    if target not in RUNTIMES:
        raise unknown_choice("runtime", target, list(RUNTIMES))
    row = RUNTIMES[target]
    row.require()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / f"model{row.suffix}"
        row.convert(make_graph(model, sample.shape[1:], row.forms)).save(path, {})
        return _on_tensors(row.open(path, threads))[0]


def training_of(path: Path, like: str | None = None) -> Mapping[str, Any]:
    """What training recorded of the model that a file was made from: empty where nothing is known. Raises `UserError`."""
    if not path.exists():
        return {}
    record = record_in(path)
    return record["trained"] if record is not None else config_of(path, like).get(EXTRA_KEY) or {}


def config_of(path: Path, like: str | None = None) -> dict[str, Any]:
    """What a config.json says for an exported file: that of a model named by `like`, else that of the model folder or run folder that
    the file lies in. What training recorded is taken from the latter in any case: the file was made from that model.

    Raises:
        UserError: There is neither.
    """
    from .. import hub  # not at the top: `import effvit_zoo` comes here and needs no Hub client

    around = (path.parent, path.with_suffix(""), path.parent.parent)
    folders = (folder / inner for folder in around for inner in ("", BEST) if (folder / inner / MODEL_CONFIG).is_file())
    folder = next(folders, None)
    own = hub.read_config(f"{hub.LOCAL}{folder}") if folder else None
    if like is None and own is None:
        raise UserError(
            f"no preprocessing config found for {path}: put its model's {MODEL_CONFIG} into its folder, or name the model by "
            "--like MODEL"
        )
    if like is None:
        return own or {}
    if hub.brings_weights(like):
        config = hub.read_config(like)
    else:
        model: Any = hub.load(like, pretrained=False, device="meta")
        config = {"pretrained_cfg": dict(model.pretrained_cfg)}
    return config if own is None else {**config, EXTRA_KEY: own.get(EXTRA_KEY)}
