"""User-facing errors, and the one place that prints them: one line, exit code 2, no traceback.

With EFFZOO_DEBUG=1 in the environment the traceback is printed too.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Collection
from typing import Any, NoReturn

FEW = 20
"""Up to so many known names are all listed in a message."""


class UserError(ValueError):
    """Bad input. The message is one line that names what was got and what was expected."""


def one_line(error: object, limit: int = 200) -> str:
    """A message or an exception's text on one line, cut at `limit` characters; the type's name where there is no text."""
    text = " ".join(str(error).split())
    return text[:limit] if text else type(error).__name__


def printable(text: str) -> str:
    """Text with control characters, line breaks and undecodable bytes of a file's name written as escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def unknown_choice(kind: str, got: str, known: Collection[str]) -> UserError:
    """A `UserError` for a name that is not in a table, see `unknown_choice_text`."""
    return UserError(unknown_choice_text(kind, got, known))


def unknown_choice_text(kind: str, got: str, known: Collection[str]) -> str:
    """The message for a name that is not in a table; names the nearest known ones, or all when there are few.

    Args:
        kind: What the name stands for, e.g. "model" or "config key".
        got: The unknown name.
        known: The names that exist.
    """
    near = nearest(got, known)
    if near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    elif len(known) <= FEW:
        hint = f"known: {', '.join(known) or 'none'}"
    else:
        hint = f"{len(known)} are known, from {min(known)!r} to {max(known)!r}"
    return f"unknown {kind} {got!r}: {hint}"


def nearest(got: str, known: Collection[str]) -> list[str]:
    """The known name that is most like `got`, else the first ones that hold it, at most three."""
    close = difflib.get_close_matches(got, known, n=1, cutoff=0.5)
    within = [name for name in known if len(got) > 2 and got.lower() in name.lower()]
    return close or within[:3]


def whole(low: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `low`."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, got {text!r}")
        return int(text)

    return parse


positive = whole(1)


def number(low: float, high: float, unit: str = "") -> Callable[[str], float]:
    """An argument type: a number from `low` to `high` in a unit, e.g. "percent"."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            expected = f"expected a number from {low:g} to {high:g}{f' ({unit})' if unit else ''}"
            raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
        return value

    return parse


class OneLineParser(argparse.ArgumentParser):
    """ArgumentParser whose complaints are a `UserError`, so that they come out like all others, and name the nearest choice."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; an unknown option's nearest one is named."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = [
                name for text in unknown if text[:1] == "-" for name in nearest(text.partition("=")[0], self._options())
            ]
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f", did you mean {near[0]}?" if near else ""))
        return parsed

    def _options(self) -> list[str]:
        """Option strings of this parser and those of its sub-commands."""
        inner = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(parser for action in inner for parser in action.choices.values())]
        return [name for parser in parsers for name in parser._option_string_actions if name.startswith("--")]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = str(action.metavar or action.dest)
            raise argparse.ArgumentError(action, unknown_choice_text(kind, str(value), [*map(str, action.choices)]))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run_command(command: Callable[[], object]) -> int:
    """Runs a command line's body and turns what the user can mend into one line on stderr.

    Returns:
        The exit code: 0, 2 for bad input or a failing disk or network, 130 for an interrupt.
        Any other exception is a defect of this package and keeps its traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: names of files may hold what can't be encoded
    try:
        command()
    except (UserError, OSError) as error:
        if os.environ.get("EFFZOO_DEBUG", "") not in ("", "0"):
            _print_traceback(error)
        print(f"error: {one_line(error, limit=2000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _print_traceback(error: BaseException) -> None:
    """Prints tracebacks of an error and of all that led to it, those behind a `raise ... from None` too."""
    link: BaseException | None = error
    while link is not None:
        link.__suppress_context__ = False
        link = link.__cause__ or link.__context__
    traceback.print_exception(error)
