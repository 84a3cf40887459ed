"""The documentation of a schema: its settings as help shows them, and its JSON schema."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticUndefined

from ._schema import bare, hints_of, section_of, tagged_of


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting as help shows it.

    Attributes:
        key: Dotted key.
        type: Type as people read it, with bounds, e.g. "float in (0, 1] or null".
        default: Default value; `dataclasses.MISSING` for a required setting.
        choices: Allowed values, empty where there is no fixed list.
        doc: Documentation, one paragraph.
        kind: Kind of the tagged section that has the setting, "" outside of one.
    """

    key: str
    type: str
    default: Any
    choices: tuple[Any, ...]
    doc: str
    kind: str = ""

    @property
    def default_text(self) -> str:
        """The default as in a YAML file; "required" where there is none."""
        return "required" if self.default is dataclasses.MISSING else _shown(self.default)


def settings(schema: Any, prefix: str = "", kind: str = "") -> list[Setting]:
    """All settings of a schema in order, those of every kind of a tagged section included.

    Args:
        schema: A class decorated by `section`.
        prefix: Dotted place of the schema with a final dot.
        kind: Kind of the tagged section that the schema is, or is part of.
    """
    found: list[Setting] = []
    for field in dataclasses.fields(schema):
        key, hint = f"{prefix}{field.name}", hints_of(schema)[field.name]
        inner = bare(hint)
        if tagged := tagged_of(hint):
            for name, member in tagged.table().items():
                found += settings(member, f"{key}.", name)
        elif dataclasses.is_dataclass(inner):
            found += settings(inner, f"{key}.", kind)
        else:
            choices = typing.get_args(inner) if typing.get_origin(inner) is typing.Literal else ()
            found.append(Setting(key, describe(hint), _default(field), choices, _doc(schema, field.name), kind))
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default, given by `dataclasses.field` or pydantic's `Field`; `dataclasses.MISSING` where there is none."""
    if isinstance(field.default, FieldInfo):
        default = field.default.get_default(call_default_factory=True, validated_data={})
        return dataclasses.MISSING if default is PydanticUndefined else default
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def sections(schema: Any) -> dict[str, str]:
    """Name -> documentation of the sections in a schema."""
    inner = {name: section_of(hint, None) for name, hint in hints_of(schema).items()}
    return {name: _doc(schema, name) or inspect.getdoc(cls) or "" for name, cls in inner.items() if cls}


def _doc(schema: type, name: str) -> str:
    """The string below a field, in the class that defines it."""
    infos = (base.__dict__.get("__pydantic_fields__", {}).get(name) for base in schema.__mro__)
    return next((" ".join(info.description.split()) for info in infos if info is not None and info.description), "")


def describe(hint: Any) -> str:
    """A type as people read it, with bounds, e.g. "int >= 1 or null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return "section" if tagged_of(hint) else describe(arguments[0]) + _bounds(arguments[1:])
    if origin is typing.Literal:
        return f"{'one of ' if len(arguments) > 1 else ''}{', '.join(map(str, arguments))}"
    if origin in (typing.Union, types.UnionType):
        *others, last = map(describe, arguments)
        return f"{', '.join(others).replace(' or ', ', ')} or {last}"
    if origin is tuple:
        is_list = arguments[-1] is Ellipsis
        return f"list of {describe(arguments[0])}" if is_list else f"[{', '.join(map(describe, arguments))}]"
    names = {bool: "true or false", str: "text", Any: "anything", types.NoneType: "null", int: "int", float: "float"}
    return "mapping" if origin is dict else names.get(hint, "section")


def _bounds(metadata: Sequence[Any]) -> str:
    limits = [limit for item in metadata for limit in getattr(item, "metadata", [item])]
    bound = {
        name: getattr(limit, name) for limit in limits for name in ("ge", "gt", "le", "lt") if hasattr(limit, name)
    }
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    if len(bound) == 2:
        (low, lowest), (high, highest) = sorted(bound.items())
        return f" in {'[' if low == 'ge' else '('}{lowest:g}, {highest:g}{']' if high == 'le' else ')'}"
    return "".join(f" {signs[name]} {value:g}" for name, value in bound.items())


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


class _UntitledSchema(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema(schema: Any) -> dict[str, Any]:
    """The JSON schema of a section, by which editors complete and check its YAML."""
    dialect = {"$schema": GenerateJsonSchema.schema_dialect}
    return dialect | TypeAdapter(schema).json_schema(schema_generator=_UntitledSchema)
