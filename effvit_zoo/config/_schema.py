"""What a schema is: sections, tagged sections, and the strictness of their types."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AllowInfNan, BeforeValidator, ConfigDict, Field, Strict, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError, core_schema
from typing_extensions import dataclass_transform

from ._yaml import ScalarText, plain

Schema = TypeVar("Schema")


def _text(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number or isinstance(value, ScalarText) else value


def _null(value: Any) -> Any:
    """None for a null, where the type has one."""
    return None if isinstance(value, ScalarText) and value.value is None else value


def _number(value: Any) -> Any:
    try:
        return float(value) if type(value) is str else plain(value)
    except ValueError:
        return value


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    """A truth value may stand for the text that YAML 1.1 reads it from, e.g. `no`."""
    if isinstance(value, ScalarText):
        return str(value) if str(value) in choices else value.value
    return "no" if value is False and "no" in choices else value


_LEAVES: dict[Any, tuple[Any, ...]] = {
    int: (Strict(), BeforeValidator(plain)),
    bool: (Strict(), BeforeValidator(plain)),
    float: (Strict(), AllowInfNan(False), BeforeValidator(_number)),
    str: (Strict(), BeforeValidator(_text)),
    Any: (BeforeValidator(plain),),
}
"""What makes pydantic strict about a type, apart from the liberties of `_text` and `_number`."""


def _strict(hint: Any) -> Any:
    """An annotation whose leaves are strict."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is None:
        return Annotated[(hint, *_LEAVES[hint])] if hint in _LEAVES else hint
    if origin is Annotated:
        if tagged_of(hint):
            return hint
        strict = _strict(arguments[0])
        inner, checks = (strict.__origin__, strict.__metadata__) if hasattr(strict, "__metadata__") else (strict, ())
        return Annotated[(inner, *arguments[1:], *checks)]  # bounds first, where the JSON schema keeps them
    if origin is typing.Literal:
        return Annotated[hint, BeforeValidator(functools.partial(_choice, arguments))]
    if origin in (typing.Union, types.UnionType):
        union: Any = typing.Union[tuple(map(_strict, arguments))]  # noqa: UP007
        return Annotated[union, BeforeValidator(_null)] if types.NoneType in arguments else union
    return origin[tuple(map(_strict, arguments))] if origin in (tuple, dict) else hint


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def section(cls: type[Schema]) -> type[Schema]:
    """Class decorator: a frozen, keyword-only dataclass that validates its values, also where it is made in code."""
    hints = typing.get_type_hints(cls, include_extras=True)
    cls.__annotations__ = {name: _strict(hints[name]) for name in inspect.get_annotations(cls)}
    rules = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    return pydantic_dataclass(frozen=True, kw_only=True, config=rules)(cls)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class one_of:  # noqa: N801 - reads as a function: `task: Annotated[Any, one_of(...)]`
    """A section whose keys depend on a kind, which one of its own keys names, or a key of a tagged section before it.

    Attributes:
        table: Gives the known kinds: name -> `section`. Called whenever a value is parsed.
        default: Kind of a section without a tag.
        tag: The key that names the kind.
        by: Name of the section beside this one that has the tag; "" for this one itself.
    """

    table: Callable[[], Mapping[str, type]]
    default: str
    tag: str = "kind"
    by: str = ""

    def field(self) -> Any:
        """A dataclass field of this section whose default is the kind's own defaults."""
        return Field(default_factory=dict, validate_default=True)

    def of(self, value: Any, siblings: Any = None) -> type | None:
        """The schema for a mapping, None where its kind is unknown; `siblings` is the mapping that holds it."""
        tagged = (siblings or {}).get(self.by) if self.by else value
        name = tagged.get(self.tag, self.default) if isinstance(tagged, Mapping) else self.default
        return self.table().get(str(name))

    def _validate(self, value: Any, info: core_schema.ValidationInfo) -> Any:
        if not isinstance(value, Mapping):
            if dataclasses.is_dataclass(value):
                return value  # validated when it was made
            raise PydanticCustomError("dataclass_type", "expected keys")
        beside = (info.data or {}).get(self.by)
        if self.by and beside is None:
            return value  # the section beside this one has an error of its own
        schema = self.table().get(getattr(beside, self.tag)) if self.by else self.of(value)
        if schema is None:
            raise PydanticCustomError("unknown_kind", "unknown kind")
        return TypeAdapter(schema).validate_python(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.with_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        kinds = {name: handler(TypeAdapter(kind).core_schema) for name, kind in self.table().items()}
        untagged = kinds if self.by else {self.default}
        return {
            "anyOf": [kind | ({} if name in untagged else {"required": [self.tag]}) for name, kind in kinds.items()]
        }


def hints_of(schema: Any) -> dict[str, Any]:
    """Name -> annotation of a section's fields, with constraints, also those of a default (`x: float = Field(gt=0)`)."""
    hints = typing.get_type_hints(schema, include_extras=True)
    limits = {field.name: getattr(field.default, "metadata", ()) for field in dataclasses.fields(schema)}
    return {name: Annotated[(hints[name], *given)] if given else hints[name] for name, given in limits.items()}


def tagged_of(hint: Any) -> one_of | None:
    """The `one_of` of a tagged section, else None."""
    return next((item for item in getattr(hint, "__metadata__", ()) if isinstance(item, one_of)), None)


def bare(hint: Any) -> Any:
    """The type without constraints and without None."""
    if typing.get_origin(hint) is Annotated:
        return hint if tagged_of(hint) else bare(hint.__origin__)
    members = [member for member in typing.get_args(hint) if member is not types.NoneType]
    is_optional = typing.get_origin(hint) in (typing.Union, types.UnionType) and len(members) == 1
    return bare(members[0]) if is_optional else hint


def section_of(hint: Any, value: Any, siblings: Any = None) -> type | None:
    """The schema of a section, for a tagged one that of the kind in the value or beside it; None for other types."""
    inner = bare(hint)
    tagged = tagged_of(inner)
    if tagged is not None:
        return tagged.of(value, siblings)
    return inner if dataclasses.is_dataclass(inner) else None  # type: ignore[return-value]
