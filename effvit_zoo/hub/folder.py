"""Model folders: saving a model, and loading one from a folder, from the Hub or by its name.

A model folder is timm's local-dir format: `config.json` (architecture, its arguments, preprocessing, labels) next to
`model.safetensors`. What `save` writes, `timm.create_model("local-dir:FOLDER", pretrained=True)` reads after `import effvit_zoo`.
The key "effvit_zoo" of config.json holds what timm has no place for, e.g. measured metrics; timm ignores it. Nothing that comes with a
folder or from the Hub is executed: weights are safetensors, or pickles read with weights_only, and a config may not redirect the loader.
"""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import PretrainedCfg, is_model, split_model_name_tag
from timm.models._hub import _parse_model_cfg, save_config_for_hf
from torch import nn

from ..errors import UserError, one_line, unknown_choice
from ..models import STARTED_RANDOM, started
from ..run_folder import BEST, EXTRA_KEY, MODEL_CONFIG, WEIGHTS, read_json, write_json
from .checkpoint import is_checkpoint
from .client import FAILURES, explain, fetch, quiet, require_name
from .config_check import checked_config, known_models
from .labels import label_names as labels_of

LOCAL, HUB, FILE = "local-dir:", "hf-hub:", "file:"
WEIGHTS_FILES = (WEIGHTS, "pytorch_model.bin")  # in the order in which timm looks for them

_CFG_KEYS = {field.name for field in fields(PretrainedCfg)}

_CLAIMS = ("tag", "license", "description", "notes")
"""Keys of timm's pretrained_cfg that speak of published weights, besides the places where these are."""

# What building a model from a foreign config and filling it from foreign weights can raise.
_DAMAGED = (SafetensorError, pickle.UnpicklingError, EOFError)
_BUILD_ERRORS = (*_DAMAGED, RuntimeError, TypeError, ValueError, AssertionError, AttributeError, LookupError)

_log = logging.getLogger(__name__)


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model folder, or replaces one. An interruption leaves the old or the new one, complete, for `load` to find.

    Args:
        model: A model made by `timm.create_model`, in its training form, on any device and in any memory format.
        folder: Where to. An existing model folder is replaced; other files in it are kept.
        label_names: Class names in the order of the logits. None: those of the model, if it has any that fit.
        data_config: Preprocessing that belongs to the weights (input_size (C, H, W), mean, std, crop_pct, interpolation);
            what is left out stays as in the model's own config.
        extra: JSON values to keep under the key "effvit_zoo".

    Returns:
        The folder's absolute path.

    Raises:
        ValueError: The model can't be rebuilt from its config (e.g. a fused model), labels and classes differ in number,
            `extra` is not JSON, or the folder holds something other than a model.
        OSError: The disk is full or not writable; the previous folder is untouched.
    """
    folder = Path(folder).resolve()
    _require_weights(model)
    if not folder.exists() and _previous(folder).is_dir():
        _previous(folder).rename(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / MODEL_CONFIG).is_file() or not any(folder.iterdir()))):
        raise ValueError(f"{folder} exists and is not a model folder: it would be overwritten")
    config = _model_config(model, label_names, extra)
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        save_config_for_hf(model, str(writing / MODEL_CONFIG), model_config=config, data_config=dict(data_config or {}))
        _drop_num_classes_from_model_args(writing / MODEL_CONFIG)
        _refuse_altered(model, writing)
        _write_weights(model, writing, folder)
        _copy_other_files(folder, writing)
        for path in writing.iterdir():
            _sync(path)
        _replace(folder, writing)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return folder


def _require_weights(model: nn.Module) -> None:
    """Raises `ValueError` for a model that timm didn't make, or a deployed form of one."""
    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        raise ValueError(f"expected a model made by timm.create_model, got {type(model).__name__}")
    if not model.state_dict():
        raise ValueError(f"{type(model).__name__} holds no weights: save the model that it was made from")


def load(name: str | Path, *, pretrained: bool | None = None, **kwargs: Any) -> nn.Module:
    """Builds a model from a name, a folder or the Hub. Each failure is one line.

    Args:
        name: `effzoo_*` or any other timm model (with or without `.tag`), `local-dir:FOLDER`, the plain path of a model
            folder or of a run folder (stands for its `best/`), `hf-hub:USER/NAME[@REVISION]`, or a checkpoint file.
        pretrained: Whether to load weights. None: yes for folders, the Hub and files, no for plain names.
        kwargs: Passed to `timm.create_model`, e.g. `num_classes`, `in_chans`, `img_size`, `device`. For a checkpoint file also
            `architecture` and `key`, see `convert.load_checkpoint`.

    Raises:
        UserError: Unknown model, arguments it doesn't take, no weights, weights that are damaged or don't fit, a malformed
            config, or no network.

    Returns:
        The model. For folders and the Hub, its attribute `effvit_zoo_record` is what `save` was given as `extra`.
    """
    resolved = resolve_name(name)
    if pretrained is None:
        pretrained = resolved.startswith((LOCAL, HUB, FILE))
    if resolved.startswith(FILE):
        from .convert import load_checkpoint  # which is built on this file

        return load_checkpoint(Path(resolved.removeprefix(FILE)), pretrained=pretrained, **kwargs)
    if kwargs.get("architecture") is not None:
        raise UserError(f"architecture belongs to a checkpoint file, {name} has its own")
    if not resolved.startswith((LOCAL, HUB)):
        return started(_create(resolved, pretrained, kwargs), pretrained)
    path, shown = _config_path(resolved)
    config = checked_config(path, shown)
    if resolved.startswith(HUB):
        # By commit, so that weights and config belong together even if somebody pushes meanwhile.
        repo, commit = hub_place(resolved)[0], path.parent.name
        resolved = f"{HUB}{repo}@{commit}"
        if pretrained:
            fetch(repo, WEIGHTS_FILES, commit)
    unknown = sorted((config.get("pretrained_cfg") or {}).keys() - _CFG_KEYS)
    if unknown:
        _log.warning("%s: timm %s ignores %s of pretrained_cfg", shown, timm.__version__, ", ".join(unknown))
    num_classes = kwargs.get("num_classes")
    if pretrained and num_classes is not None and num_classes != config.get("num_classes"):
        # With another head timm loads what fits and is silent about the rest, so first make sure that all of it fits.
        rest = {key: value for key, value in kwargs.items() if key != "num_classes"}
        _create(resolved, pretrained, rest, name, config)
    model: Any = _create(resolved, pretrained, kwargs, name, config)
    model.effvit_zoo_record = config.get(EXTRA_KEY) or {}
    return model


def resolve_name(name: str | Path) -> str:
    """The model's name for timm: a registry name, `local-dir:` and an absolute path, or `hf-hub:` and an id. A checkpoint file is
    `file:` and its absolute path, or the model folder that it is the weights of.

    Raises:
        UserError: No such model or weights tag, or no model folder there.
    """
    name = str(name)
    if name.startswith((HUB, "hf_hub:")):
        return HUB + name.partition(":")[2]
    if name.startswith(LOCAL):
        return LOCAL + str(model_folder(name))
    architecture, tag = split_model_name_tag(name)
    if is_model(architecture):
        tags = [cfg.tag or "" for cfg in timm.models.get_arch_pretrained_cfgs(architecture).values()]
        if tag and tag not in tags:
            raise unknown_choice(f"weights tag of {architecture}", tag, [known for known in tags if known])
        _require_one_meaning(name)
        return name
    if is_checkpoint(name):
        file = Path(name).expanduser().resolve()
        whole = file.name in WEIGHTS_FILES and (file.parent / MODEL_CONFIG).is_file()
        return f"{LOCAL}{file.parent}" if whole else f"{FILE}{file}"
    if Path(name).expanduser().exists() or name.startswith((".", "~", "/")):
        return LOCAL + str(model_folder(name))
    if source := re.match(r"[A-Za-z][\w.+-]+:", name):
        raise unknown_choice("model source", source.group(), [LOCAL, HUB])
    if "/" in name or os.sep in name:
        raise UserError(f"there is no folder {name}; if it is a model on the Hub, write {HUB}{name}")
    raise unknown_choice("model", name, known_models(name))


def _require_one_meaning(name: str) -> None:
    """Raises `UserError` for the name of a registered model that a model or run folder in the current directory has too."""
    if any((Path(name) / inner / MODEL_CONFIG).is_file() for inner in ("", BEST)):
        raise UserError(
            f"{name} is a registered model, and {Path(name).resolve()} is a model folder: write ./{name} for the folder, "
            "or call it otherwise to mean the registered model"
        )


def brings_weights(name: str | Path) -> bool:
    """Whether a name stands for weights too: true for folders, the Hub and files, false for registry names."""
    return resolve_name(name).startswith((LOCAL, HUB, FILE))


def read_config(name: str | Path) -> dict[str, Any]:
    """The checked config.json of a model folder or a model on the Hub; empty for a checkpoint file, which has none.

    Raises:
        UserError: Not there, not JSON, of an unknown architecture, or with values of the wrong type.
    """
    resolved = resolve_name(name)
    return {} if resolved.startswith(FILE) else checked_config(*_config_path(resolved))


def hub_place(name: str) -> tuple[str, str | None]:
    """Repository and revision of `[hf-hub:]USER/NAME[@REVISION]`. Raises `UserError`."""
    repo, at, revision = name.removeprefix(HUB).partition("@")
    try:
        require_name(repo)
    except UserError:
        raise UserError(f"{name} is not a name on the Hub: expected {HUB}USER/NAME[@REVISION]") from None
    if at and not revision:
        raise UserError(f"{name} names no revision behind the @")
    return repo, revision or None


def model_folder(name: str | Path) -> Path:
    """The absolute path of the model folder that a path stands for: itself, or the `best/` of a run folder. Raises `UserError`."""
    path = Path(str(name).removeprefix(LOCAL)).expanduser()
    for folder in (path, path / BEST, _previous(path), _previous(path / BEST)):
        if (folder / MODEL_CONFIG).is_file():
            return folder.resolve()
    if not path.is_dir():
        raise UserError(f"model folder {path} is{' a file, not a folder' if path.exists() else ' not there'}")
    raise UserError(f"{path} is not a model folder: it has no {MODEL_CONFIG}")


def listed(found: Mapping[str, Sequence[str]]) -> str:
    """ "missing head.weight and 1 more; unexpected gate": the first item of each kind and the number of others. "" for none."""
    return "; ".join(
        f"{kind} {items[0]}{f' and {len(items) - 1} more' if len(items) > 1 else ''}"
        for kind, items in found.items()
        if items
    )


def _config_path(resolved: str) -> tuple[Path, str]:
    """The local path of the config.json of a folder or a model on the Hub, and its name in messages."""
    if resolved.startswith(LOCAL):
        path = Path(resolved.removeprefix(LOCAL)) / MODEL_CONFIG
        return path, str(path)
    if not resolved.startswith(HUB):
        raise UserError(f"expected a model folder or {HUB}USER/NAME, got the model name {resolved}")
    repo, revision = hub_place(resolved)
    return fetch(repo, [MODEL_CONFIG], revision), f"{resolved}/{MODEL_CONFIG}"


def _create(
    resolved: str,
    pretrained: bool,
    kwargs: Mapping[str, Any],
    shown: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """`timm.create_model`, each failure as one line that names the model as `shown`.

    `config`: the checked config.json of a folder or a model on the Hub. It is what the model is built from, not the file: nulls are
    gone, keys that this version of timm refuses are left out, and the architecture is this package's where it has one.
    """
    what = f"cannot load {resolved.removeprefix(LOCAL) if shown is None or resolved.startswith(LOCAL) else shown}"
    try:
        given = dict(kwargs)
        if config is not None:
            source, _, place = resolved.partition(":")
            weights = {"source": source, ("file" if resolved.startswith(LOCAL) else "hf_hub_id"): place}
            cfg, resolved, args = _parse_model_cfg(copy.deepcopy(dict(config)), weights)
            given = {"pretrained_cfg": {key: value for key, value in cfg.items() if key in _CFG_KEYS}}
            given |= {"pretrained_model_args": dict(args), **args}
            given |= {key: value for key, value in kwargs.items() if value is not None}
        elif pretrained:
            _fetch_published(resolved, kwargs)
        with quiet():
            return timm.create_model(resolved, pretrained=pretrained, **given)
    except UserError:
        raise
    except FAILURES as error:
        raise UserError(f"{what}: {explain(error)}") from error
    except _BUILD_ERRORS as error:
        raise UserError(f"{what}: {_explain(error)}") from error


def _fetch_published(name: str, kwargs: Mapping[str, Any]) -> None:
    """Downloads and verifies the weights that belong to a registered name, where they are on the Hub."""
    if kwargs.keys() & {"pretrained_cfg", "pretrained_cfg_overlay"}:
        return
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg and cfg.hf_hub_id and not cfg.file:
        repo, _, revision = cfg.hf_hub_id.partition("@")
        fetch(repo, [cfg.hf_hub_filename] if cfg.hf_hub_filename else WEIGHTS_FILES, revision or None)


def _explain(error: Exception) -> str:
    """One line for a failure to build or fill a model."""
    text = str(error)
    if isinstance(error, SafetensorError):
        return f"the weights file is damaged or incomplete ({text})"
    if "Error(s) in loading state_dict" in text:
        return f"the weights don't fit the model: {_explain_mismatch(text)}"
    refused = error if isinstance(error, pickle.UnpicklingError) else error.__cause__
    if isinstance(refused, pickle.UnpicklingError):
        requested = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(refused))
        reason = f"asks for {requested.group(1)}" if requested else "holds more than tensors"
        return f"its weights are a pickle that {reason}: refused by weights_only, nothing was run"
    if isinstance(error, TypeError) and (unexpected := re.search(r"unexpected keyword argument '(\w+)'", text)):
        return f"the model takes no argument {unexpected.group(1)!r}"
    if isinstance(error, LookupError):
        return f"its config or weights lack {text}"
    return one_line(error, limit=300)


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
    return listed(found) or one_line(text, limit=300)


def _model_config(
    model: nn.Module, given: Sequence[str] | None, extra: Mapping[str, Any] | None
) -> dict[str, dict[str, Any] | list[str]]:
    """Top-level keys of config.json beyond those that timm writes."""
    config: dict[str, Any] = {}
    if isinstance(given, str):
        raise ValueError(f"label_names must be a sequence of names, got the text {given!r}")
    if given is not None and len(given) != model.num_classes:
        raise ValueError(f"got {len(given)} label_names for a model of {model.num_classes} classes")
    present = labels_of(model)
    names = tuple(given) if given is not None else present
    if getattr(model, STARTED_RANDOM, False):
        config["pretrained_cfg"] = dict.fromkeys(_CLAIMS)
    if names:
        # Here and not in pretrained_cfg, where timm drops them silently when the number of classes has changed.
        config["label_names"] = list(names)
        kept = {} if names == present else {"label_descriptions": None}
        config.setdefault("pretrained_cfg", {}).update({"label_names": None, **kept})
    if extra is not None:
        try:
            json.dumps(extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra must hold JSON values only: {error}") from None
        config[EXTRA_KEY] = dict(extra)
    return config


def _drop_num_classes_from_model_args(path: Path) -> None:
    """config.json names the number of classes on its top level too; transformers passes both to timm, which then fails."""
    config = read_json(path)
    config.get("model_args", {}).pop("num_classes", None)
    write_json(path, config)


def _refuse_altered(model: nn.Module, folder: Path) -> None:
    """Raises unless the config just written builds a model with the same parameters and buffers."""
    try:
        fresh = timm.create_model(f"{LOCAL}{folder}", pretrained=False, device="meta")
    except _BUILD_ERRORS as error:
        raise ValueError(f"the model can't be rebuilt from its config: {_explain(error)}") from error
    expected = {key: tuple(value.shape) for key, value in fresh.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in [*expected, *got]:
        if expected.get(key) != got.get(key):
            raise ValueError(
                f"the model is not in its training form: {key} has shape {got.get(key)}, in a newly built model "
                f"{expected.get(key)}; save it before it is fused or altered"
            )


def _write_weights(model: nn.Module, writing: Path, folder: Path) -> None:
    tensors, seen = {}, set()
    for key, value in model.state_dict().items():
        # safetensors takes row-major tensors only; the convolutions of a channels_last model aren't
        tensors[key] = value.detach().contiguous()
        place = tensors[key].untyped_storage().data_ptr()
        if place in seen:  # layers that share weights: each name gets its copy, so that all of timm's loaders find it
            tensors[key] = tensors[key].clone()
        seen.add(place)
    try:
        save_file(tensors, writing / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, f"cannot write {folder / WEIGHTS}: {error}") from error
    shutil.copymode(writing / MODEL_CONFIG, writing / WEIGHTS)  # safetensors gives its files to their owner only


def _copy_other_files(old: Path, new: Path) -> None:
    """Copies everything else from the folder to be replaced, e.g. a model card."""
    if not old.is_dir():
        return
    for path in old.iterdir():
        if path.name in (MODEL_CONFIG, WEIGHTS):
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


def _previous(folder: Path) -> Path:
    """Where the replaced folder is for a moment. A crash in that moment leaves it there: `load` reads it, `save` moves it back."""
    return folder.with_name(f".{folder.name}.old")


def _replace(folder: Path, new: Path) -> None:
    """Puts `new` in the place of `folder`."""
    old = _previous(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
