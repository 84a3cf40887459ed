"""`effzoo completion`: a script by which a shell completes commands, options and model names.

The script holds all names and runs no Python, so a key press costs nothing; it is made anew after an upgrade.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import _index, full_parser

HELP = "print a script that makes a shell complete commands, options and model names"
SHELLS = ("bash", "zsh")
CONFIGS = Path(__file__).parent.parent / "configs"
KINDS = {"like": "model", "filter": "model"}
"""Destination of an argument -> kind of name it takes, where the two differ."""
FOLDERS = ("FOLDER", "DIR", "IMAGES")
"""Metavars of arguments that name folders; other paths are files."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "for bash:  effzoo completion bash > ~/.local/share/bash-completion/completions/effzoo\n"
        'for zsh:   effzoo completion zsh > "${fpath[1]}/_effzoo"\n'
        'or for the running shell:  eval "$(effzoo completion bash)"'
    )


def run(args: argparse.Namespace) -> None:
    print(script(args.shell))


def script(shell: str) -> str:
    """The completion script of a shell in `SHELLS`."""
    import shtab

    parser = full_parser()
    own = _index.models()
    runs = [path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "accelerate"]
    words = {
        "model": [*own, *_index.timm_names()],
        "family": sorted({facts["family"] for facts in own.values()}),
        "config": sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in runs),
    }
    for action in _actions(parser):
        kind = KINDS.get(action.dest, action.dest)
        if kind in words:
            action.complete = dict.fromkeys(SHELLS, f"_effzoo_{kind}")  # type: ignore[attr-defined]
        elif action.metavar in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.dest in ("images", "data"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    functions = "\n".join(_function(shell, kind, known) for kind, known in words.items())
    text = shtab.complete(parser, shell=shell, preamble=functions)
    return re.sub(r"\A(?:# .*\n)+\n", "", text) if shell == "bash" else text


def _function(shell: str, kind: str, words: Sequence[str]) -> str:
    """A shell function that offers words; for models also folders, for configs also files."""
    listed = " ".join(words)
    if shell == "bash":
        paths = {"model": 'compgen -d -- "$1"; ', "config": 'compgen -f -- "$1"; '}
        return f'_effzoo_{kind}() {{ compgen -W "{listed}" -- "$1"; {paths.get(kind, "")}}}'
    paths = {"model": "_files -/; ", "config": "_files; "}
    return f"_effzoo_{kind}() {{ compadd {listed}; {paths.get(kind, '')}}}"


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Arguments of a parser and those of its sub-commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for chosen in action.choices.values():
                yield from _actions(chosen)
