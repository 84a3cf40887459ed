"""Strict YAML to frozen dataclasses: an unknown key, a wrong type or a duplicate key is a one-line error that names its place.

A schema is a class decorated by `section`. Its fields are plain types, Literals, optional values, tuples, mappings, further sections
and tagged sections (`one_of`); the string below a field is its documentation. Bounds are pydantic's (`Annotated[int, Field(ge=1)]`);
a rule on several fields belongs in `__post_init__`, which raises `ValueError`.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from ..errors import UserError, unknown_choice
from ._schema import Schema, bare, hints_of, one_of, section, section_of, tagged_of
from ._settings import Setting, describe, json_schema, sections, settings
from ._yaml import ScalarText, apply_overrides, dump_yaml, plain, read_yaml

__all__ = [
    "ScalarText", "Setting", "apply_overrides", "as_dict", "changed_keys", "dump", "flatten", "json_schema", "one_of", "parse", "plain",
    "read_yaml", "section", "sections", "settings",
]  # fmt: skip


def parse(schema: type[Schema], content: Mapping[str, Any], where: str = "") -> Schema:
    """Builds a section from a mapping; missing keys take their defaults.

    Args:
        schema: A class decorated by `section`.
        content: Keys and values, from `read_yaml` or plain ones.
        where: Dotted place of this mapping with a final dot, for messages.

    Raises:
        UserError: The first of: an unknown key, a missing key without default, a value of the wrong type or out of bounds.
    """
    try:
        return TypeAdapter(schema).validate_python(dict(content))
    except ValidationError as error:
        errors = sorted(error.errors(), key=lambda item: item["type"] != "unexpected_keyword_argument")
        raise _explain(schema, content, errors[0], where) from None


def _explain(schema: Any, content: Any, error: Mapping[str, Any], where: str) -> UserError:
    """pydantic's error as one line, with the place as in the YAML."""
    key, owner, hint, value, siblings = where.rstrip("."), schema, schema, content, None
    for step in error["loc"]:
        if (inner := section_of(hint, value, siblings)) is not None:
            owner, hint = inner, hints_of(inner).get(str(step))
            key = f"{key}.{step}".lstrip(".")
            value, siblings = (value.get(step), value) if isinstance(value, Mapping) else (None, None)
        elif typing.get_origin(bare(hint)) is tuple and isinstance(step, int) and step < len(value):
            arguments = typing.get_args(bare(hint))
            hint, value = arguments[0 if arguments[-1] is Ellipsis else step], value[step]
        else:  # the members of a union have their places too
            break
    got, reason = repr(plain(value)), error.get("ctx", {}).get("error")
    if isinstance(reason, UserError):
        return reason
    if error["type"] == "unexpected_keyword_argument":
        prefix = key[: key.rfind(".") + 1]
        beside = [f"{prefix}{name}" for name in hints_of(owner)]
        return unknown_choice("config key", key, _homes(schema, key, where) or beside)
    if error["type"] == "unknown_kind" and (tagged := tagged_of(hint)):
        return unknown_choice(key.rpartition(".")[2], str(value[tagged.tag]), list(tagged.table()))
    if error["type"] == "missing" and key.endswith(str(error["loc"][-1])):  # and not an item of a tuple
        return UserError(f"config key {key} is required")
    if error["type"] == "dataclass_type":
        return UserError(f"config section {key}: expected keys, got {got}")
    if reason is not None and section_of(hint, value, siblings) is not None:  # from a section's `__post_init__`
        return UserError(f"config {key}{'.' if key else ''}{reason}")
    return UserError(f"config key {key}: got {got}, {reason or f'expected {describe(hint)}'}")


def _homes(schema: Any, key: str, where: str) -> list[str]:
    """Keys in any section whose last part is that of an unknown key, which may just stand in the wrong section."""
    paths = [setting.key.split(".") for setting in settings(schema, where)]
    leaf = key.rpartition(".")[2]
    return sorted({".".join(path[: path.index(leaf) + 1]) for path in paths if leaf in path})


def dump(config: Any) -> str:
    """The YAML text from which `parse` builds the same section again."""
    return dump_yaml(as_dict(config))


def as_dict(config: Any) -> dict[str, Any]:
    """A config as nested mappings and lists, as YAML would hold it."""
    return to_jsonable_python(config)


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def changed_keys(old: Any, new: Any) -> list[str]:
    """Dotted keys whose values differ between two configs of one schema."""
    before, after = flatten(as_dict(old)), flatten(as_dict(new))
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
