"""Models as folders: save, load, push to the Hub and pull from it, and what travels with the weights.

A model folder is timm's own local-dir format: `config.json` (architecture and its arguments, preprocessing, class labels)
beside `model.safetensors`. What `save` writes, `timm.create_model("local-dir:FOLDER", pretrained=True)` reads with nothing
but `import effvit_zoo` before it. The key "effvit_zoo" of config.json holds what timm has no place for, e.g. the accuracy
that was reached; timm's loader passes over it. Nothing that comes with a folder or over the wire is run: config.json is checked key by
key, weights are safetensors, or pickles read as weights only.
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
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import PretrainedCfg, is_model, split_model_name_tag
from timm.models._hub import save_config_for_hf
from torch import nn

from ..errors import UserError, unknown_choice
from . import publish
from .client import FAILURES, explain, fetch, first_line, quiet, require_name
from .publish import CONFIG, WEIGHTS
from .publish import require_pushable as require_pushable

EXTRA_KEY = "effvit_zoo"
LOCAL, HUB = "local-dir:", "hf-hub:"
WEIGHTS_FILES = (WEIGHTS, "pytorch_model.bin")  # in the order in which timm looks for them

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

_Kind = tuple[type | tuple[type, ...], str]
_ANYTHING: _Kind = (object, "anything")
_NAME: _Kind = (str, "a name")
_COUNT: _Kind = (int, "a whole number")
_NUMBER: _Kind = ((int, float), "a number")
_MAPPING: _Kind = (dict, "a mapping")
_LABELS: _Kind = ((list, dict), "a list or mapping")
_NAMES: _Kind = ((str, list), "a name or a list of names")

_CONFIG_TYPES: dict[str, _Kind] = {
    "architecture": _NAME,
    "num_classes": _COUNT,
    "num_features": _COUNT,
    "global_pool": _NAME,
    "model_args": _MAPPING,
    "pretrained_cfg": _MAPPING,
    "label_names": _LABELS,
    "labels": _LABELS,
    "label_descriptions": _MAPPING,
    EXTRA_KEY: _MAPPING,
}
_WRITTEN_BY_OTHERS = dict.fromkeys(
    (
        *("architectures", "do_pooling", "dtype", "torch_dtype", "initializer_range", "model_type", "num_labels"),
        *("id2label", "label2id", "problem_type", "transformers_version", "_name_or_path"),
    ),
    _ANYTHING,
)
"""What transformers' `TimmWrapper` adds when it saves; nothing here reads it."""

_CFG_TYPES: dict[str, _Kind] = {
    **dict.fromkeys(("tag", "interpolation", "crop_mode", "architecture", "license", "description"), _NAME),
    **dict.fromkeys(("origin_url", "paper_name", "url", "file", "hf_hub_id", "source", "notes"), _NAMES),
    **dict.fromkeys(("paper_ids", "first_conv", "classifier"), _NAMES),
    **dict.fromkeys(("num_classes", "label_offset"), _COUNT),
    **dict.fromkeys(("crop_pct", "test_crop_pct"), _NUMBER),
    "fixed_input_size": (bool, "true or false"),
    "pool_size": (list, "two numbers"),
    "label_names": _LABELS,
    "label_descriptions": _MAPPING,
}
_OLDER_FORM = ("num_features", "global_pool", "model_args", EXTRA_KEY)
_NOT_FROM_CONFIGS = ("checkpoint_path", "cache_dir")


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
        _tell_classes_once(writing / CONFIG)
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
    path, shown = _config_path(resolved)
    config = _checked_config(path, shown)
    if resolved.startswith(HUB):
        # By commit, so that weights and config belong together whatever is pushed meanwhile.
        repo, commit = _hub_place(resolved)[0], path.parent.name
        resolved = f"{HUB}{repo}@{commit}"
        if pretrained:
            fetch(repo, WEIGHTS_FILES, commit)
    num_classes = kwargs.get("num_classes")
    if pretrained and num_classes is not None and num_classes != config.get("num_classes"):
        # With another head timm loads what fits and is silent about the rest, so first make sure that all of it fits.
        _create(resolved, pretrained, {key: value for key, value in kwargs.items() if key != "num_classes"}, name)
    return _create(resolved, pretrained, kwargs, name)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
    message: str | None = None,
) -> str:
    """Publishes a model folder on the Hub with a card, as one commit. The folder isn't changed.

    Args:
        folder: A model folder, or a run folder, of which `best/` is meant. What the run recorded goes along under `training/`.
        repo_id: USER/NAME; created where it doesn't exist.
        private: Whether the repository shall be private; an existing one must be so already. None: as it is, or the account's default.
        revision: Branch to push to, created where it doesn't exist; None for the main one.
        license: Of the weights, an identifier of the Hub such as "apache-2.0". None: what the card can know, else none is stated.
        message: Of the commit.

    Returns:
        The commit's address.

    Raises:
        UserError: The folder isn't a loadable model in its training form, holds a token, or the Hub refuses; the message says
            what is on the Hub afterwards.
    """
    folder = _model_folder(Path(str(folder).removeprefix(LOCAL)))
    require_name(repo_id)
    with publish.prepared(folder, license) as copy:
        _checked_config(copy / CONFIG, folder / CONFIG)
        try:
            load(copy)
        except UserError as error:
            reason = str(error).replace(str(copy), str(folder))
            raise UserError(f"{reason}; only a whole model in its training form is pushed, not a fused one") from error
        return publish.publish(copy, repo_id, private=private, revision=revision, license=license, message=message)


def pull(repo_id: str, folder: str | Path | None = None, *, revision: str | None = None) -> Path:
    """Copies a model from the Hub into a new folder, after everything in it was checked; needs no network for what is cached.

    Args:
        repo_id: USER/NAME, also as `hf-hub:USER/NAME[@REVISION]`.
        folder: Where to; must not exist, or be empty. None: NAME, in the current folder.
        revision: Branch, tag or commit; None for the main branch.

    Returns:
        The folder's absolute path: a model folder with the card and the records of its training, where there are any.

    Raises:
        UserError: The folder exists, there is no such model, it is damaged, malformed or not in the safetensors format,
            or the Hub fails. There is no folder then.
        OSError: A disk fails.
    """
    repo, given = _hub_place(repo_id)
    require_name(repo)
    revision = revision or given
    folder = Path(folder if folder is not None else repo.partition("/")[2]).expanduser().resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already: name another output")
    commit = fetch(repo, [CONFIG], revision).parent.name
    found = publish.download(repo, commit)
    writing = folder.with_name(f".{folder.name}.pulling")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        for name, path in found.items():
            (writing / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, writing / name)
        _checked_config(writing / CONFIG, f"{HUB}{repo}/{CONFIG}")
        try:
            load(writing)
        except UserError as error:
            raise UserError(str(error).replace(str(writing), f"{HUB}{repo}")) from error
        if folder.exists():
            folder.rmdir()
        writing.rename(folder)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return folder


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
    return _checked_config(*_config_path(resolve_name(name)))


def _config_path(resolved: str) -> tuple[Path, str]:
    """Where the config.json of a folder or a model on the Hub lies on this machine, and what to call it in messages."""
    if resolved.startswith(LOCAL):
        path = Path(resolved.removeprefix(LOCAL)) / CONFIG
        return path, str(path)
    if not resolved.startswith(HUB):
        raise UserError(f"expected a model folder or {HUB}USER/NAME, got the model name {resolved}")
    repo, revision = _hub_place(resolved)
    return fetch(repo, [CONFIG], revision), f"{resolved}/{CONFIG}"


def _hub_place(name: str) -> tuple[str, str | None]:
    """Repository and revision of `[hf-hub:]USER/NAME[@REVISION]`. Raises `UserError`."""
    repo, at, revision = name.removeprefix(HUB).partition("@")
    try:
        require_name(repo)
    except UserError:
        raise UserError(f"{name} is not a name on the Hub: expected {HUB}USER/NAME[@REVISION]") from None
    if at and not revision:
        raise UserError(f"{name} names no revision behind the @")
    return repo, revision or None


def _checked_config(path: Path, where: object) -> dict[str, Any]:
    """The content of a config.json after every check that needs no weights. Raises `UserError`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{where}: expected a mapping, got {type(config).__name__}")
    if "pretrained_cfg" in config:
        _check_keys(config, _CONFIG_TYPES | _WRITTEN_BY_OTHERS, "key", where)
    if "architecture" not in config:
        raise UserError(f"{where} names no architecture: it is not a timm model's config")
    if not isinstance(config["architecture"], str):
        raise UserError(f"{where}: architecture is {_short(config['architecture'])}, expected a name")
    if not is_model(config["architecture"]):
        unknown = unknown_choice("architecture", config["architecture"], _known_models(config["architecture"]))
        hint = "" if "did you mean" in str(unknown) else "; a package that defines it has to be imported first"
        raise UserError(f"{where}: {unknown}{hint}")
    names = config.get("label_names")
    if isinstance(names, dict) and not all(key.isdecimal() for key in names):
        raise UserError(f"{where}: label_names is {_short(names)}, expected numbers of classes as its keys")
    if config.get("pretrained_cfg") is not None:
        cfg = config["pretrained_cfg"]
    else:  # timm's older form, in which all is one mapping
        cfg = {key: value for key, value in config.items() if key not in _OLDER_FORM}
    _check_pretrained_cfg(cfg, where)
    args = config.get("model_args") or {}
    for key in args:
        if key.startswith("pretrained") or key in _NOT_FROM_CONFIGS:
            raise UserError(f"{where}: model_args may not hold {key!r}, it decides over what is loaded")
    if "num_classes" in config and args.get("num_classes", config["num_classes"]) != config["num_classes"]:
        raise UserError(f"{where}: num_classes is {config['num_classes']}, in model_args {args['num_classes']}")
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


def _check_keys(content: Mapping[str, Any], table: Mapping[str, _Kind], kind: str, where: object) -> None:
    """Raises `UserError` for keys that aren't in a table and values of another type than it says; null is no value."""
    for key, value in content.items():
        if key not in table:
            raise UserError(f"{where}: {unknown_choice(kind, key, list(table))}")
        types, described = table[key]
        is_other_bool = isinstance(value, bool) and types not in (bool, object)  # True is an int for Python
        if value is not None and (is_other_bool or not isinstance(value, types)):
            raise UserError(f"{where}: {key} is {_short(value)}, expected {described}")


def _check_pretrained_cfg(cfg: dict[str, Any], where: object) -> None:
    """Raises `UserError` for a pretrained_cfg that timm would stumble over or that reaches for other files than ours."""
    table = {field.name: _CFG_TYPES.get(field.name, _ANYTHING) for field in fields(PretrainedCfg)}
    _check_keys(cfg, table | {"labels": _LABELS}, "key of pretrained_cfg", where)
    for key in ("state_dict", "hf_hub_filename"):  # custom_load counts only with the latter
        if cfg.get(key):
            raise UserError(f"{where}: {key} is {_short(cfg[key])}: weights are read from {WEIGHTS} only")
    for key, length in {"input_size": 3, "test_input_size": 3, "min_input_size": 3, "mean": None, "std": None}.items():
        value = cfg.get(key)
        if value is None:
            continue
        if not isinstance(value, list) or not all(_is_number(v) and v > 0 for v in value):
            raise UserError(f"{where}: {key} is {_short(value)}, expected positive numbers")
        if length and len(value) != length:
            raise UserError(f"{where}: {key} is {_short(value)}, expected {length} numbers")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _create(resolved: str, pretrained: bool, kwargs: Mapping[str, Any], shown: str | Path | None = None) -> nn.Module:
    """`timm.create_model`, each failure as one line that names the model as `shown`."""
    what = f"cannot load {resolved.removeprefix(LOCAL) if shown is None or resolved.startswith(LOCAL) else shown}"
    try:
        if pretrained and not resolved.startswith((LOCAL, HUB)):
            _fetch_published(resolved, kwargs)
        with quiet():
            return timm.create_model(resolved, pretrained=pretrained, **kwargs)
    except UserError:
        raise
    except FAILURES as error:
        raise UserError(f"{what}: {explain(error)}") from error
    except _BUILD_ERRORS as error:
        raise UserError(f"{what}: {_explain(error)}") from error


def _fetch_published(name: str, kwargs: Mapping[str, Any]) -> None:
    """Gets the weights that belong to a registered name from the Hub, if they are there, and checks them."""
    if kwargs.keys() & {"pretrained_cfg", "pretrained_cfg_overlay"}:
        return
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg and cfg.hf_hub_id and not cfg.file:
        repo, _, revision = cfg.hf_hub_id.partition("@")
        fetch(repo, [cfg.hf_hub_filename] if cfg.hf_hub_filename else WEIGHTS_FILES, revision or None)


def _explain(error: Exception) -> str:
    """One line for what went wrong while building or filling a model."""
    text = str(error)
    if isinstance(error, SafetensorError):
        return f"the weights file is damaged or incomplete ({text})"
    if "Error(s) in loading state_dict" in text:
        return f"the weights don't fit the model: {_explain_mismatch(text)}"
    refused = error if isinstance(error, pickle.UnpicklingError) else error.__cause__
    if isinstance(refused, pickle.UnpicklingError):
        asked = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(refused))
        wants = f"asks for {asked.group(1)}" if asked else "holds more than tensors"
        return f"its weights are a pickle that {wants}: refused by weights_only, nothing was run"
    if isinstance(error, TypeError) and (unexpected := re.search(r"unexpected keyword argument '(\w+)'", text)):
        return f"the model takes no argument {unexpected.group(1)!r}"
    if isinstance(error, LookupError):
        return f"its config or weights lack {text}"
    return first_line(error)


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


def _tell_classes_once(path: Path) -> None:
    """Takes num_classes out of a config's model_args: timm has it from beside them, and transformers passes both on, which fails."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
