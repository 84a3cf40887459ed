"""Rows of results as CSV, JSON and console tables, and how numbers are formatted in tables and pages."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import run_folder
from ..errors import UserError, printable

if TYPE_CHECKING:
    from rich.console import Console

Rows = Sequence[Mapping[str, Any]]

_PLAIN: dict[str, Any] = {"markup": False, "emoji": False}
"""Of rich's consoles: names with [brackets] or :colons: are printed as they are."""


def check_output(path: Path | None, option: str = "--output") -> None:
    """Raises `UserError` for an output file that is neither CSV nor JSON. None, no file, is fine."""
    if path is not None and path.suffix not in (".csv", ".json"):
        raise UserError(f"{option} {path}: expected a name that ends in .csv or .json")


def write_rows(rows: Rows, path: Path) -> None:
    """Writes rows, whose keys may differ, as CSV or JSON, by the suffix of the path. Creates the folder."""
    _emit(_as_text(rows, as_json=path.suffix == ".json"), path)


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --json, --csv and --output to a command that prints rows."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print as JSON")
    form.add_argument("--csv", action="store_true", help="print as CSV")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to a file instead of printing")


def print_rows(rows: Rows, as_json: bool, output: Path | None = None) -> None:
    """Prints rows as JSON or CSV, or writes them to a file of any name."""
    _emit(_as_text(rows, as_json), output)


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = (), output: Path | None = None
) -> None:
    """Prints an aligned table, or writes it to a file. It is wrapped to the width of a terminal, and nowhere else.

    Args:
        head: Column titles; empty for a table of names and values.
        rows: Text cells.
        right: Indices of right-aligned columns.
        output: File to write to instead of printing.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=bool(head), header_style="bold", padding=(0, 3, 0, 0))
    for index in range(max([len(head), *map(len, rows)])):
        justify = "right" if index in right else "left"
        style = "cyan" if index == 0 else None
        table.add_column(head[index] if head else "", justify=justify, style=style, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text("\n".join(map(printable, cell.split("\n")))) for cell in row))
    if output is None and sys.stdout.isatty():
        Console(**_PLAIN).print(table)
        return
    text = io.StringIO()
    Console(file=text, width=10_000, **_PLAIN).print(table)
    _emit("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()), output)


def make_console(width: int = 200) -> Console:
    """The terminal; without a terminal, a console of `width` columns, so that tables are not wrapped."""
    from rich.console import Console

    console = Console(**_PLAIN)
    return console if console.is_terminal else Console(width=width, **_PLAIN)


def figures(value: float) -> str:
    """A size with two decimals, three below 1."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def shown(value: Any) -> str:
    """A cell's text: thousands separated, two decimals below 1,000, sizes as "3 x 32 x 32", "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _as_text(rows: Rows, as_json: bool) -> str:
    """JSON, or CSV without values that are nested deeper than a list."""
    if as_json:
        return json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n"
    return run_folder.as_csv([{key: value for key, value in row.items() if not _is_nested(value)} for row in rows])


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(item, Mapping) for item in value))


def _emit(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(text)
    elif output.exists() and not output.is_file():  # a device or a pipe must not be replaced
        output.write_text(text, encoding="utf-8")
    else:
        run_folder.write_text(output, text)
