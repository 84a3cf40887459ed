"""What is known of a model and of the files that were made from it: the record, which goes with every file.

A file holds what all files of the folder have in common and, under "file", what it alone has. The folder's export.json holds the
former once, and the latter for each under "files".

    effvit_zoo            version that wrote it
    architecture, task, num_classes, license
    weights_sha256        of the model folder's model.safetensors, or of what it would be
    labels                names of the classes by which data means them, null where they have none; label_descriptions: names for people
    preprocessing         input_size (C, H, W), interpolation, crop_pct, crop_mode, channel_order, range, mean, std
    trained               what the training recorded of its data, so that validation finds the images that it held out
    file                  name, target, precision, forms, batch (fewest and most images of a call), input (name, dtype, layout, shape),
                          outputs (name, shape of one image), versions, what the conversion says of it, and `agreement`: how it was
                          proven. Its size in bytes is in export.json only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from timm.data import resolve_model_data_config
from torch import nn

from .. import hub
from ..data import MODES
from ..errors import UserError
from ..run_folder import read_json
from ..version import __version__
from .contract import MARK, RECORD, Record

_STEPS = ("interpolation", "crop_pct", "crop_mode", "mean", "std")


def common_record(model: Any) -> dict[str, Any]:
    """What all files of a model have in common. Raises `UserError` for a model that doesn't take images."""
    config = resolve_model_data_config(model)
    size = [*config["input_size"]]
    if size[0] not in MODES:
        raise UserError(f"the model takes {size[0]} channels, images have 3 (RGB) or 1 (grey)")
    cfg, trained = model.pretrained_cfg, getattr(model, "effvit_zoo_record", None) or {}
    known = hub.known_names(model)
    steps = {key: [*value] if isinstance(value := config[key], tuple) else value for key in _STEPS}
    channels = {"channel_order": "RGB" if size[0] == 3 else "grey", "range": [0, 1]}
    return {
        MARK: __version__,
        "architecture": cfg.get("architecture"),
        "task": trained.get("task", "classification"),
        "num_classes": model.num_classes,
        "weights_sha256": weights_sha256(model),
        "license": cfg.get("license"),
        "labels": [*known[0]] if known else None,
        "label_descriptions": [*hub.class_names(model)],
        "preprocessing": {"input_size": size, **channels, **steps},
        "trained": hub.public(trained),
    }


def weights_sha256(model: nn.Module) -> str:
    """The hash of the model.safetensors that `hub.save` writes for the model."""
    tensors = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    return hashlib.sha256(safetensors.torch.save(tensors, metadata={"format": "pt"})).hexdigest()


def read_folder(folder: Path) -> dict[str, Any] | None:
    """The export.json of a folder; None where there is none. Raises `UserError` for a damaged one."""
    path = folder / RECORD
    if not path.is_file():
        return None
    content = read_json(path)
    if not (isinstance(content, dict) and MARK in content and isinstance(content.get("files"), dict)):
        raise UserError(f"{path} is not a record of exported files")
    return content


def folder_record(common: Record, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of export.json."""
    return {**common, "files": dict(files)}


def record_of_file(folder: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The record of one file according to an export.json; None where the folder doesn't know it."""
    if name not in folder["files"]:
        return None
    common = {key: value for key, value in folder.items() if key != "files"}
    return {**common, "file": folder["files"][name]}


def as_config(record: Record) -> dict[str, Any]:
    """A file's record as timm's pretrained_cfg."""
    cfg = {key: tuple(value) if isinstance(value := record["preprocessing"][key], list) else value for key in _STEPS}
    cfg |= {"input_size": tuple(record["preprocessing"]["input_size"]), "num_classes": record["num_classes"]}
    labels: Sequence[str] | None = record["labels"]
    if labels:
        cfg["label_names"] = [*labels]
        if (shown := record["label_descriptions"]) != labels:
            cfg["label_descriptions"] = dict(zip(labels, shown, strict=True))
    return cfg | {"architecture": record["architecture"], "license": record["license"]}
