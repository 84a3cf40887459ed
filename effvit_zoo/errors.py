"""User-facing errors, and the one place that prints them: one line, exit code 2, no traceback.

With EFFZOO_DEBUG=1 in the environment the traceback is printed too.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn


class UserError(ValueError):
    """Bad input. The message is one line that names what was got and what was expected."""


def one_line(error: object, limit: int = 200) -> str:
    """A message or an exception's text on one line, cut at `limit` characters; the type's name where there is no text."""
    text = " ".join(str(error).split())
    return text[:limit] if text else type(error).__name__


def printable(text: str) -> str:
    """Text with control characters, line breaks and undecodable bytes of a file's name written as escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def unknown_choice(kind: str, got: str, known: Sequence[str]) -> UserError:
    """A `UserError` for a name that is not in a table, see `unknown_choice_text`."""
    return UserError(unknown_choice_text(kind, got, known))


def unknown_choice_text(kind: str, got: str, known: Sequence[str]) -> str:
    """The message for a name that is not in a table; names the nearest known one, or all when there are few.

    Args:
        kind: What the name stands for, e.g. "model" or "config key".
        got: The unknown name.
        known: The names that exist.
    """
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {near[0]!r}?"
    elif len(known) <= 12:
        hint = f"known: {', '.join(known)}"
    else:
        hint = f"{len(known)} are known, none is close"
    return f"unknown {kind} {got!r}: {hint}"


def check_positive(args: argparse.Namespace, *options: str) -> None:
    """Raises `UserError` for an option, or one of its values, that is below 1; `None` passes."""
    for option in options:
        given = getattr(args, option)
        for value in given if isinstance(given, list | tuple) else [given]:
            if value is not None and value < 1:
                raise UserError(f"--{option.replace('_', '-')} must be at least 1, got {value}")


class OneLineParser(argparse.ArgumentParser):
    """ArgumentParser whose complaints are a `UserError`, so that they come out like all others."""

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
