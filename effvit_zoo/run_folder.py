"""Names and formats of the files in run folders and model folders, and how files are written. The one owner of both.

A run folder holds what one training produced:

    config.yaml  summary.json  metrics.csv  curves.png  report.html  validation.json  data.json.gz  tensorboard/
    probe/  best/  last/             model folders: the linear probe where the run begins with one, the best and the last epoch
    checkpoints/step-00000500/       resumable state

A model folder is timm's local-dir format: config.json and model.safetensors. A published one also holds README.md (the card) and,
under training/, the records of the run. Every writer here replaces a file by a complete new one or leaves it as it was.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError

CONFIG, SUMMARY, METRICS, VALIDATION = "config.yaml", "summary.json", "metrics.csv", "validation.json"
DATA = "data.json.gz"
"""Names of the images that a run was started with; they stay on the machine."""
FEATURES = "features.safetensors"
"""What a linear probe is solved on, until the first checkpoint."""
CURVES, REPORT = "curves.png", "report.html"
PROBE, BEST, LAST, CHECKPOINTS, STATE, LOCK = "probe", "best", "last", "checkpoints", "state.json", ".lock"
RESULTS = (SUMMARY, METRICS, PROBE, BEST, LAST, f"{CHECKPOINTS}/step-*")
"""What a run has to lose, as patterns: a new run doesn't start where one of these is."""

MODEL_CONFIG, WEIGHTS, CARD, RECORDS = "config.json", "model.safetensors", "README.md", "training"
EXTRA_KEY = "effvit_zoo"
"""Key of a model folder's config.json for what timm has no place for: task, measured metrics, epoch, data."""
ARCHITECTURE_KEY = "effvit_zoo_architecture"
"""Key of a published config.json for this package's name of the architecture, where `architecture` is timm's name of the same."""


def is_taken(folder: Path) -> bool:
    """Whether a folder holds results of a run. One that failed before its first checkpoint leaves none."""
    return any(True for pattern in RESULTS for _ in folder.glob(pattern))


def require_writable(folder: Path) -> None:
    """Raises `UserError` where the folder can't be made or written to, before hours are spent on what it is for."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"output {folder}: {there} is a file, expected a folder or nothing")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output {folder}: {there} is read-only, name another --output")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Creates a run folder and holds it for this process; a folder without content doesn't stay.

    Raises:
        UserError: Another process holds it.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    with lock.open("w") as file:
        try:
            _lock(file)
        except BlockingIOError:
            raise UserError(f"another process is training in {folder}: name another --output") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            for path in created:
                with suppress(OSError):  # not empty
                    path.rmdir()


def _lock(file: Any) -> None:
    """Locks an open file for this process and not for those that it forks; where files have no locks, none is taken."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from error


def run_of(model_folder: Path) -> Path | None:
    """The run folder that a model folder belongs to, or None."""
    inside = model_folder.name in (PROBE, BEST, LAST) and (model_folder.parent / CONFIG).is_file()
    return model_folder.parent if inside else None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error."""
    writing = path.with_name(f".{path.name}.writing")
    try:
        yield writing
        open_up(writing)
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)


def open_up(path: Path) -> None:
    """Gives a file, or all files in a folder, the mode of new files: some libraries write theirs for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in (each for each in (path, *path.rglob("*")) if each.is_file()):
        file.chmod(0o666 & ~umask)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, creating its folder. Bytes of file names that are no UTF-8 become escapes, those of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as writing:
        writing.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, indented."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `UserError` where it is not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV. Columns are all keys in order of appearance; lists are joined by spaces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: " ".join(map(str, v)) if isinstance(v, list | tuple) else v for key, v in row.items()})
    return text.getvalue()
