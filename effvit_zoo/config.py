"""Strict YAML to frozen dataclasses: an unknown key, a wrong type or a doubled key is one error that names its place.

The schema is a dataclass whose fields are plain types, Literals, optional values, tuples, mappings and further dataclasses.
Rules on values (ranges, combinations) belong into the dataclass' own `__post_init__`, which raises `ValueError`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import UserError, unknown_choice

Schema = TypeVar("Schema")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping. Raises `UserError` for anything else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {str(path)!r} does not exist")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections with keys, got {type(content).__name__}")
    return content


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets `section.key=value` entries in place; the value is read as YAML, so `1e-3`, `true`, `[1, 2]` and `null` work."""
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise UserError(f"expected section.key=value, got {override!r}")
        try:
            value = yaml.load(text, Loader=_StrictLoader)
        except yaml.YAMLError:
            value = text
        *sections, leaf = key.strip().split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"{override!r}: {section!r} is a value, not a section")
        place[leaf] = value


def parse(schema: type[Schema], content: Mapping[str, Any], where: str = "") -> Schema:
    """Builds a dataclass from a mapping.

    Args:
        schema: The dataclass.
        content: Keys and values; missing keys take the dataclass' defaults.
        where: Dotted place of this mapping, for messages.

    Raises:
        UserError: For an unknown key, a missing one without default, a value of the wrong type or one that the dataclass refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(schema)
    values = {}
    for key, value in content.items():
        if key not in fields:
            raise unknown_choice("config key", f"{where}{key}", [f"{where}{name}" for name in fields])
        values[key] = _convert(hints[key], value, f"{where}{key}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"config key {where}{name!s} is required")
    try:
        return schema(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config {where}{error}") from None


def dump(config: Any) -> str:
    """The YAML text from which `parse` builds the same dataclass again."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def as_dict(config: Any) -> dict[str, Any]:
    """A config as nested mappings and lists, as YAML would hold it."""
    return _plain(dataclasses.asdict(config))


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changed_keys(old: Any, new: Any) -> list[str]:
    """Dotted keys whose values differ between two configs of one schema."""
    before, after = flatten(as_dict(old)), flatten(as_dict(new))
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type; the only liberties taken are int to float, and numbers that YAML reads as text (1e-3)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [choice for choice in arguments if choice is not type(None)]
        for choice in choices:
            try:
                return _convert(choice, value, where)
            except UserError:
                if choice is choices[-1]:
                    if len(choices) == 1:
                        raise
                    raise _mismatch(hint, value, where) from None
    if origin is typing.Literal:
        if value is False and "no" in arguments:
            return "no"  # which YAML reads as a truth value
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise UserError(f"config key {where}: got {value!r}, expected one of {', '.join(map(str, arguments))}")
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"config section {where}: expected keys, got {value!r}")
        return parse(typing.cast(type, hint), value, f"{where}.")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _mismatch(hint, value, where)
        variadic = arguments[-1] is Ellipsis
        if not variadic and len(value) != len(arguments):
            raise _mismatch(hint, value, where)
        kinds = [arguments[0]] * len(value) if variadic else arguments
        return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _mismatch(hint, value, where)
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise _mismatch(hint, value, where) from None
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise _mismatch(hint, value, where)


def _mismatch(hint: Any, value: Any, where: str) -> UserError:
    name = str(hint) if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))
    return UserError(f"config key {where}: got {value!r}, expected {name}")
