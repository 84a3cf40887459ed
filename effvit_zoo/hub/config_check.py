"""Checks of a model folder's config.json: nothing in it may redirect timm's loader, and what is read has the right types.

Keys that nothing here reads are timm's concern: a newer timm may write more of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model

from ..errors import UserError, unknown_choice
from ..run_folder import EXTRA_KEY, WEIGHTS, read_json

_log = logging.getLogger(__name__)

_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "architecture": (str, "a name"),
    "num_classes": (int, "a whole number"),
    "label_names": ((list, dict), "a list or mapping"),
    **dict.fromkeys(("model_args", "pretrained_cfg", "label_descriptions", EXTRA_KEY), (dict, "a mapping")),
    **dict.fromkeys(("input_size", "std"), (list, "positive numbers")),
    "mean": (list, "numbers of at least 0"),
    **dict.fromkeys(("interpolation", "crop_mode"), (str, "a name")),
    "crop_pct": ((int, float), "a number"),
    "classifier": ((str, list), "a name or a list of names"),
}
"""Types of what this package and timm's transforms read from config.json, on its top level or in pretrained_cfg."""


def checked_config(path: Path, shown: object) -> dict[str, Any]:
    """The content of a config.json, checked for what needs no weights. `shown` names it in messages. Raises `UserError`."""
    try:
        config = read_json(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), str(shown))) from None
    if not isinstance(config, dict):
        raise UserError(f"{shown}: expected a mapping, got {type(config).__name__}")
    _check_types(config, shown)
    if config.get("architecture") is None:
        raise UserError(f"{shown} names no architecture: it is not a timm model's config")
    if not is_model(config["architecture"]):
        unknown = unknown_choice("architecture", config["architecture"], known_models(config["architecture"]))
        hint = "" if "did you mean" in str(unknown) else "; a package that defines it has to be imported first"
        raise UserError(f"{shown}: {unknown}{hint}")
    cfg = config.get("pretrained_cfg") or config  # in timm's older form all is one mapping
    _check_types(cfg, shown)
    for key in ("state_dict", "hf_hub_filename"):  # custom_load has an effect only together with the latter
        if cfg.get(key):
            raise UserError(f"{shown}: {key} is {_short(cfg[key])}: weights are read from {WEIGHTS} only")
    args = config.get("model_args") or {}
    for key in args:
        if key.startswith("pretrained") or key in ("checkpoint_path", "cache_dir"):
            raise UserError(f"{shown}: model_args may not hold {key!r}, which decides what is loaded")
    if "num_classes" in config and args.get("num_classes", config["num_classes"]) != config["num_classes"]:
        raise UserError(f"{shown}: num_classes is {config['num_classes']}, in model_args {args['num_classes']}")
    return config


def _check_types(content: Mapping[str, Any], shown: object) -> None:
    """Raises `UserError` for a value of another type than `_TYPES` says. Null is no value; other keys are timm's concern."""
    for key, (types, expected) in _TYPES.items():
        value = content.get(key)
        if value is None:
            continue
        valid = isinstance(value, types) and not isinstance(value, bool)
        if types is list:
            numbers = valid and all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
            valid = numbers and all(item > 0 or (item == 0 and key == "mean") for item in value)
        if not valid:
            raise UserError(f"{shown}: {key} is {_short(value)}, expected {expected}")
    size, names = content.get("input_size"), content.get("label_names")
    if size is not None and len(size) != 3:
        raise UserError(f"{shown}: input_size is {_short(size)}, expected 3 numbers")
    if isinstance(names, dict) and not all(key.isdecimal() for key in names):
        raise UserError(f"{shown}: label_names is {_short(names)}, expected numbers of classes as its keys")
    count = content.get("num_classes")
    if isinstance(names, list) and names and count is not None and len(names) != count:
        _tell(f"{shown}: label_names names {len(names)} classes and the model has {count}: the names are not used")


@cache
def _tell(text: str) -> None:
    """Warns, once for each text."""
    _log.warning(text)


def known_models(like: str) -> list[str]:
    """Names to suggest from: this package's own for its prefix, else all of timm's registry."""
    return timm.list_models("effzoo_*") if like.startswith("effzoo") else timm.list_models()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
