"""Models as folders: save, load, and what travels with the weights.

A model folder is timm's own local-dir format: `config.json` (architecture and its arguments, preprocessing, class labels)
beside `model.safetensors`. What `save` writes, `timm.create_model("local-dir:FOLDER", pretrained=True)` reads with nothing
but `import effvit_zoo` before it. The key "effvit_zoo" of config.json holds what timm has no place for, e.g. the accuracy
that was reached; timm's loader passes over it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants, get_session, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,  # that of the client's HTTP library, whichever its version uses
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import PretrainedCfg, is_model, split_model_name_tag
from timm.models._hub import save_config_for_hf
from torch import nn

from .errors import UserError, unknown_choice

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EXTRA_KEY = "effvit_zoo"
LOCAL, HUB = "local-dir:", "hf-hub:"

# What building a model from somebody's config and filling it from somebody's weights can raise.
_BUILD_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    AssertionError,
    AttributeError,
    LookupError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)

_CONFIG_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "architecture": (str, "a name"),
    "num_classes": (int, "a whole number"),
    "num_features": (int, "a whole number"),
    "model_args": (dict, "a mapping"),
    "pretrained_cfg": (dict, "a mapping"),
    "label_names": ((list, dict), "a list or mapping"),
    "label_descriptions": (dict, "a mapping"),
    EXTRA_KEY: (dict, "a mapping"),
}


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model folder, or replaces one: at any moment the old or the new one is there, complete.

    Args:
        model: A model made by `timm.create_model`, in its training form, on any device and in any memory format.
        folder: Where to. An existing model folder is replaced; files beside its weights and config are kept.
        label_names: Class names in the order of the logits. None: those that the model came with, if it still has them.
        data_config: Preprocessing that goes with the weights (input_size (C, H, W), mean, std, crop_pct, interpolation);
            what is left out stays as in the model's own config.
        extra: JSON values to keep under the key "effvit_zoo".

    Returns:
        The folder's absolute path.

    Raises:
        ValueError: The model can't be built anew from its config (a deployment form, say), labels and classes differ in
            number, `extra` is not JSON, or the folder holds something else than a model.
        OSError: The disk is full or not writable; the previous folder is untouched.
    """
    folder = Path(folder).resolve()
    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        raise ValueError(f"expected a model made by timm.create_model, got {type(model).__name__}")
    if folder.exists() and not (folder.is_dir() and ((folder / CONFIG).is_file() or not any(folder.iterdir()))):
        raise ValueError(f"{folder} exists and is not a model folder: it would be overwritten")
    config = _model_config(model, label_names, extra)
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        save_config_for_hf(model, str(writing / CONFIG), model_config=config, data_config=dict(data_config or {}))
        _refuse_altered(model, writing)
        # safetensors takes row-major tensors only; of a channels_last model none of the convolutions is
        tensors = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
        try:
            save_file(tensors, writing / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(errno.EIO, f"cannot write {folder / WEIGHTS}: {error}") from error
        _keep_other_files(folder, writing)
        for path in writing.iterdir():
            _sync(path)
        _swap(writing, folder)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return folder


def load(name: str | Path, *, pretrained: bool | None = None, **kwargs: Any) -> nn.Module:
    """Builds a model from a name, a folder or the Hub, or says in one line why it can't.

    Args:
        name: `effzoo_*` or any other timm model (with or without `.tag`), `local-dir:FOLDER`, the plain path of a model
            folder or of a run folder (its `best/` is meant), or `hf-hub:USER/NAME[@REVISION]`.
        pretrained: Whether to load weights. None: yes for folders and the Hub, no for plain names.
        kwargs: Passed on to `timm.create_model`, e.g. `num_classes`, `in_chans`, `img_size`, `device`.

    Raises:
        UserError: Unknown model, arguments it doesn't take, no weights, weights that are damaged or don't fit, a malformed
            config, or no network.
    """
    resolved = resolve_name(name)
    if pretrained is None:
        pretrained = brings_weights(resolved)
    if not resolved.startswith((LOCAL, HUB)):
        return _create(resolved, pretrained, kwargs)
    config = read_config(resolved)
    num_classes = kwargs.get("num_classes")
    if pretrained and num_classes is not None and num_classes != config.get("num_classes"):
        # With another head timm loads what fits and is silent about the rest, so first make sure that all of it fits.
        _create(resolved, pretrained, {key: value for key, value in kwargs.items() if key != "num_classes"})
    return _create(resolved, pretrained, kwargs)


def resolve_name(name: str | Path) -> str:
    """What timm calls it: a registry name, `local-dir:` and an absolute path, or `hf-hub:` and an id.

    Raises:
        UserError: No such model or weights tag, or no model folder there.
    """
    name = str(name)
    if name.startswith((HUB, "hf_hub:")):
        return HUB + name.partition(":")[2]
    if name.startswith(LOCAL):
        return LOCAL + str(_model_folder(Path(name.removeprefix(LOCAL))))
    architecture, tag = split_model_name_tag(name)
    if is_model(architecture):
        tags = [cfg.tag or "" for cfg in timm.models.get_arch_pretrained_cfgs(architecture).values()]
        if tag and tag not in tags:
            raise unknown_choice(f"weights tag of {architecture}", tag, [known for known in tags if known])
        return name
    if Path(name).expanduser().exists() or name.startswith((".", "~", "/")):
        return LOCAL + str(_model_folder(Path(name)))
    if source := re.match(r"[A-Za-z][\w.+-]+:", name):
        raise unknown_choice("model source", source.group(), [LOCAL, HUB])
    if "/" in name or os.sep in name:
        raise UserError(f"there is no folder {name}; if it is a model on the Hub, write {HUB}{name}")
    raise unknown_choice("model", name, _known_models(name))


def brings_weights(name: str | Path) -> bool:
    """Whether weights belong to the name itself: so with folders and the Hub, not with a registry name."""
    return resolve_name(name).startswith((LOCAL, HUB))


def read_config(name: str | Path) -> dict[str, Any]:
    """The checked config.json of a model folder or a model on the Hub.

    Raises:
        UserError: Not there, not JSON, of an unknown architecture, or with values of the wrong kind.
    """
    resolved = resolve_name(name)
    source, colon, place = resolved.partition(":")
    if not colon:
        raise UserError(f"expected a model folder or {HUB}USER/NAME, got the model name {resolved}")
    path = Path(place) / CONFIG if source + colon == LOCAL else _download_config(place)
    where = path if source + colon == LOCAL else f"{resolved}/{CONFIG}"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{where}: expected a mapping, got {type(config).__name__}")
    for key, (kind, described) in _CONFIG_TYPES.items():
        if key in config and (not isinstance(config[key], kind) or isinstance(config[key], bool)):
            raise UserError(f"{where}: {key} is {_short(config[key])}, expected {described}")
    if "architecture" not in config:
        raise UserError(f"{where} names no architecture: it is not a timm model's config")
    if not is_model(config["architecture"]):
        unknown = unknown_choice("architecture", config["architecture"], _known_models(config["architecture"]))
        raise UserError(f"{where}: {unknown}")
    _check_pretrained_cfg(config.get("pretrained_cfg", {}), where)
    return config


def label_names(model_or_cfg: nn.Module | Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names in the order of the logits, or None where the model (or its `pretrained_cfg`) has none that fit it."""
    if isinstance(model_or_cfg, nn.Module):
        cfg = getattr(model_or_cfg, "pretrained_cfg", None) or {}
        num_classes = getattr(model_or_cfg, "num_classes", cfg.get("num_classes"))
    else:
        cfg, num_classes = model_or_cfg, model_or_cfg.get("num_classes")
    names = cfg.get("label_names")
    if isinstance(names, Mapping):  # index -> name, with JSON's string keys
        by_index = {int(index): str(label) for index, label in names.items()}
        names = [by_index.get(index, str(index)) for index in range(num_classes or len(by_index))]
    if not names or (num_classes is not None and len(names) != num_classes):
        return None
    return tuple(map(str, names))


def _known_models(like: str) -> list[str]:
    """Names to suggest from: this package's own for its prefix, else all of timm's registry."""
    return timm.list_models("effzoo_*") if like.startswith("effzoo") else timm.list_models()


def _model_folder(path: Path) -> Path:
    """The model folder meant by a path: itself, or the `best/` of a run folder."""
    path = path.expanduser()
    if not path.is_dir():
        is_file = " a file, not a folder" if path.exists() else " not there"
        raise UserError(f"model folder {path} is{is_file}")
    for folder in (path, path / "best"):
        if (folder / CONFIG).is_file():
            return folder.resolve()
    raise UserError(f"{path} is not a model folder: it has no {CONFIG}")


def _download_config(model_id: str) -> Path:
    repo, _, revision = model_id.partition("@")
    try:
        _require_hub(repo)
        with _quiet_hub():
            return Path(hf_hub_download(repo, CONFIG, revision=revision or None))
    except HFValidationError:
        raise UserError(f"{HUB}{model_id} is not a name on the Hub: expected {HUB}USER/NAME") from None
    except RepositoryNotFoundError:
        raise UserError(f"{HUB}{model_id} is not on the Hub, or it is private and needs a token") from None
    except EntryNotFoundError as error:
        if isinstance(error, FileNotFoundError):  # not in the cache, and the Hub did not answer
            raise UserError(f"cannot reach the Hub for {HUB}{model_id}, and it is not in the cache") from None
        raise UserError(f"{HUB}{model_id} has no {CONFIG}") from None
    except (OSError, HTTPError) as error:
        raise UserError(f"cannot get {HUB}{model_id}: {_first_line(error)}") from None


def _require_hub(repo: str) -> None:
    """Raises `UserError` at once where a repository is not in the cache and the Hub doesn't answer: its client would go
    on trying for most of a minute."""
    if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")).exists():
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo} is not in the Hub's cache, and HF_HUB_OFFLINE is set")
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except (OSError, HTTPError) as error:
        raise UserError(f"cannot reach {constants.ENDPOINT} for {repo}: {_first_line(error)}") from None


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keeps the Hub client's own warnings (retries, rate limits) off stderr: what fails is said once, by us."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


def _check_pretrained_cfg(cfg: dict[str, Any], where: object) -> None:
    known = [field.name for field in fields(PretrainedCfg)]
    for key in cfg:
        if key not in known:
            raise UserError(f"{where}: {unknown_choice('key of pretrained_cfg', key, known)}")
    for key, length in {"input_size": 3, "mean": None, "std": None}.items():
        value = cfg.get(key)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(v, int | float) and v > 0 for v in value):
            raise UserError(f"{where}: {key} is {_short(value)}, expected positive numbers")
        if length and len(value) != length:
            raise UserError(f"{where}: {key} is {_short(value)}, expected {length} numbers")


def _create(resolved: str, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    """`timm.create_model`, each failure as one line."""
    folder = Path(resolved.removeprefix(LOCAL)) if resolved.startswith(LOCAL) else None
    try:
        if pretrained and (repo := _weights_repo(resolved, kwargs)):
            _require_hub(repo)
        with _quiet_hub():
            return timm.create_model(resolved, pretrained=pretrained, **kwargs)
    except UserError:
        raise
    except (OSError, HTTPError) as error:
        raise UserError(f"cannot load {folder or resolved}: {_first_line(error)}") from error
    except _BUILD_ERRORS as error:
        raise UserError(f"cannot load {folder or resolved}: {_explain(error)}") from error


def _weights_repo(resolved: str, kwargs: Mapping[str, Any]) -> str | None:
    """The repository on the Hub that a model's weights come from, if they do."""
    if resolved.startswith(HUB):
        return resolved.removeprefix(HUB).partition("@")[0]
    if resolved.startswith(LOCAL) or kwargs.keys() & {"pretrained_cfg", "pretrained_cfg_overlay"}:
        return None
    cfg = timm.models.get_pretrained_cfg(resolved)
    return cfg.hf_hub_id if cfg and not cfg.file else None


def _explain(error: Exception) -> str:
    """One line for what went wrong while building or filling a model."""
    text = str(error)
    if isinstance(error, SafetensorError):
        return f"the weights file is damaged or incomplete ({text})"
    if "Error(s) in loading state_dict" in text:
        return f"the weights don't fit the model: {_explain_mismatch(text)}"
    if isinstance(error, TypeError) and (unexpected := re.search(r"unexpected keyword argument '(\w+)'", text)):
        return f"the model takes no argument {unexpected.group(1)!r}"
    if isinstance(error, LookupError):
        return f"its config or weights lack {text}"
    return _first_line(error)


def _explain_mismatch(text: str) -> str:
    """The first missing, unexpected and misshapen parameter of torch's report, and how many more there are of each."""
    missing = re.search(r"Missing key\(s\) in state_dict: (.*)", text)
    unexpected = re.search(r"Unexpected key\(s\) in state_dict: (.*)", text)
    shapes = re.findall(
        r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, "
        r"the shape in current model is torch\.Size\((.*?)\)",
        text,
    )
    found = {
        "missing": re.findall(r'"([^"]+)"', missing.group(1)) if missing else [],
        "unexpected": re.findall(r'"([^"]+)"', unexpected.group(1)) if unexpected else [],
        "of another shape": [f"{key} (is {got}, expected {expected})" for key, got, expected in shapes],
    }
    parts = [
        f"{kind} {items[0]}" + (f" and {len(items) - 1} more" if len(items) > 1 else "")
        for kind, items in found.items()
        if items
    ]
    return "; ".join(parts) or " ".join(text.split())[:300]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _model_config(
    model: nn.Module, given: Sequence[str] | None, extra: Mapping[str, Any] | None
) -> dict[str, dict[str, Any] | list[str]]:
    """Top-level keys of config.json beyond those that timm writes."""
    config: dict[str, Any] = {}
    if isinstance(given, str):
        raise ValueError(f"label_names must be a sequence of names, got the text {given!r}")
    if given is not None and len(given) != model.num_classes:
        raise ValueError(f"got {len(given)} label_names for a model of {model.num_classes} classes")
    present = label_names(model)
    names = tuple(given) if given is not None else present
    if names:
        # Here and not in pretrained_cfg: timm drops them there without a word when the number of classes has changed.
        config["label_names"] = list(names)
        kept = {} if names == present else {"label_descriptions": None}
        config["pretrained_cfg"] = {"label_names": None, **kept}
    if extra is not None:
        try:
            json.dumps(extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra must hold JSON values only: {error}") from None
        config[EXTRA_KEY] = dict(extra)
    return config


def _refuse_altered(model: nn.Module, folder: Path) -> None:
    """Raises unless the config just written builds a model with the same parameters and buffers."""
    try:
        fresh = timm.create_model(f"{LOCAL}{folder}", pretrained=False, device="meta")
    except _BUILD_ERRORS as error:
        raise ValueError(f"the model can't be built anew from its config: {_explain(error)}") from error
    expected = {key: tuple(value.shape) for key, value in fresh.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in [*expected, *got]:
        if expected.get(key) != got.get(key):
            raise ValueError(
                f"the model is not in its training form: {key} has shape {got.get(key)}, in a newly built model "
                f"{expected.get(key)}; save it before it is fused or altered"
            )


def _keep_other_files(old: Path, new: Path) -> None:
    """Copies what else lies in the folder to be replaced, e.g. a model card."""
    if not old.is_dir():
        return
    for path in old.iterdir():
        if path.name in (CONFIG, WEIGHTS):
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _sync(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _swap(new: Path, folder: Path) -> None:
    """Puts `new` in the place of `folder`; what was there before ends up at `new`, if anywhere."""
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        # Without an exchange in one step there is a moment without a folder, but never one with a half one.
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two paths in one step where the system can (Linux' renameat2); whether it did."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(current_folder, os.fsencode(one), current_folder, os.fsencode(other), exchange) == 0
