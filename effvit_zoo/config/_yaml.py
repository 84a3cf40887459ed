"""YAML with the text of its scalars kept, and `section.key=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, one_line


class ScalarText(str):
    """A number or truth value as it was typed, e.g. "007", "1e3" or "on": a text field takes the text, any other one `value`. In an
    override `null` is one too."""

    value: bool | int | float | None

    def __new__(cls, text: str, value: bool | int | float | None) -> ScalarText:
        scalar = super().__new__(cls, text)
        scalar.value = value
        return scalar


class _Loader(yaml.SafeLoader):
    """SafeLoader with names for keys, `ScalarText` for numbers and truth values, text for dates, and no duplicate keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the base class's attribute
        first: [(tag, pattern) for tag, pattern in rows if not tag.endswith(":timestamp")]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                key.tag = "tag:yaml.org,2002:str"
                if key.value in seen:
                    raise UserError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return ScalarText(node.value, value) if is_plain and isinstance(value, int | float) else value


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):  # 1e-3 is a number, as in YAML 1.2
    _exponent = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$")
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _exponent, list("-+.0123456789"))
yaml.SafeDumper.add_representer(ScalarText, lambda dumper, scalar: dumper.represent_data(scalar.value))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, to be parsed (see `ScalarText`); an empty file is an empty mapping.

    Raises:
        UserError: The file doesn't exist, is not valid YAML or holds no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {str(path)!r} does not exist")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    if plain(content) is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections with keys, got {type(plain(content)).__name__}")
    return content


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets `section.key=value` entries in place; the value is read as YAML, so `1e-3`, `true`, `[1, 2]` and `null` work.

    A text is taken as it was typed: what would be a comment in a file (`photos #2`) belongs to it, quotes around it don't.
    """
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise UserError(f"expected section.key=value, got {override!r}")
        try:
            value = yaml.load(text, Loader=_Loader)
        except UserError as error:
            raise UserError(f"{override!r}: {error}") from None
        except (yaml.YAMLError, ValueError):
            value = text
        value = _as_typed(text.strip(), value)
        *sections, leaf = key.strip().split(".")
        place = content
        for name in sections:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise UserError(f"{override!r}: {name!r} is a value, not a section")
        place[leaf] = value


def _as_typed(text: str, value: Any) -> Any:
    """The value of an override with the whole text that was typed for it, unless that is quoted or a list or mapping."""
    if not text or text[0] in "'\"!" or isinstance(value, list | dict):
        return value
    return text if type(value) is str else ScalarText(text, plain(value))


def plain(value: Any) -> Any:
    """A value without `ScalarText`: numbers and truth values as such."""
    if isinstance(value, ScalarText):
        return value.value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def dump_yaml(content: Any) -> str:
    """YAML text of plain values, which `read_yaml` reads as the same."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
