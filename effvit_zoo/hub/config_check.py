"""Checks of a model folder's config.json: nothing in it may redirect timm's loader, and what is read has the right types.

Keys that nothing here reads are timm's concern: a newer timm may write more of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model

from ..errors import UserError, unknown_choice
from ..run_folder import ARCHITECTURE_KEY, EXTRA_KEY, WEIGHTS, read_json

_log = logging.getLogger(__name__)

_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("architecture", ARCHITECTURE_KEY), (str, "a name")),
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
    config = _without_nulls(config)
    _check_types(config, shown)
    _check_record(config.get(EXTRA_KEY, {}), shown)
    if is_model(config.get(ARCHITECTURE_KEY, "")):
        config["architecture"] = config.pop(ARCHITECTURE_KEY)
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


def _without_nulls(value: Any) -> Any:
    """Null is as if the key weren't there; timm's `pool_size`, `first_conv` and `classifier` mean none by it."""
    if not isinstance(value, dict):
        return value
    kept = ("pool_size", "first_conv", "classifier", "train_split", "val_split")
    return {key: _without_nulls(item) for key, item in value.items() if item is not None or key in kept}


def _check_record(extra: Mapping[str, Any], shown: object) -> None:
    """Raises `UserError` for a value of the wrong kind among what this package reads of `EXTRA_KEY`."""
    data = extra.get("data")
    parts = [(extra, _RECORD)]
    if isinstance(data, dict):
        parts.append((data, _DATA))
        parts += [(data[side], _FINGERPRINT) for side in ("train", "val") if isinstance(data.get(side), dict)]
        if isinstance(data.get("held_out"), dict):
            parts.append((data["held_out"], dict.fromkeys(data["held_out"], (_is_hex, "16 hexadecimal digits"))))
    for content, expected in parts:
        for key, (is_valid, what) in expected.items():
            if content.get(key) is not None and not is_valid(content[key]):
                raise UserError(f"{shown}: {key} in {EXTRA_KEY!r} is {_short(content[key])}, expected {what}")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_hex(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16}", value) is not None


def _is_sketch(value: object) -> bool:
    return isinstance(value, str) and all(map(_is_hex, value.split()))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


_COUNT, _SHARE, _TEXT = (
    (_is_count, "a whole number of at least 0"),
    (_is_share, "a share in [0, 1)"),
    (_is_text, "a text"),
)
_MAPPING = (lambda value: isinstance(value, dict), "a mapping")
_RECORD = {
    **{"task": _TEXT, "converted_from": _TEXT, "seed": _COUNT, "val_fraction": _SHARE},
    "data": (lambda value: isinstance(value, str | dict), "a text or a mapping"),
}
_DATA = {
    **{"root": _TEXT, "path": _TEXT, "train_split": _TEXT, "val_split": _TEXT},
    **{"val_fraction": _SHARE, "split_seed": _COUNT, "held_out": _MAPPING, "train": _MAPPING, "val": _MAPPING},
    "ranked_by": (lambda value: value in ("name", "index"), "name or index"),
}
_FINGERPRINT = {"images": _COUNT, "names": _TEXT, "sketch": (_is_sketch, "16 hexadecimal digits a hash")}
"""What this package reads of a model folder's record: key -> (check, what is expected)."""


def known_models(like: str) -> list[str]:
    """Names to suggest from: this package's own for its prefix, else all of timm's registry."""
    return timm.list_models("effzoo_*") if like.startswith("effzoo") else timm.list_models()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
