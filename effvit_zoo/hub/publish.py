"""A model folder's way to the Hub: what goes along, the card, and one commit that is there as a whole or not at all.

Beside weights and config travel the records of the run that the folder came from, under `training/`: the config, the summary, the
metrics per epoch and the figures. What would tell more of the machine than of the model (absolute paths, names of unreadable files)
is cut down first, and nothing that looks like a token of the Hub leaves.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..config import read_yaml
from ..errors import UserError
from . import card
from .client import (
    FAILURES,
    MissingFile,
    content_hash,
    explain,
    fetch,
    holds_token,
    make_api,
    require_answer,
    require_name,
    translated,
)

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
RECORDS = "training"
RECORD_FILES = (
    *("config.yaml", "summary.json", "validation.json", "benchmark.json"),
    *("metrics.csv", "curves.png", "confusion_matrix.png"),
)
PUBLISHED = (CONFIG, WEIGHTS, CARD, *(f"{RECORDS}/{name}" for name in RECORD_FILES))
"""All that a push writes, and all that a pull reads."""

_PRIVATE_KEYS = ("bad_file_names",)
_ABSOLUTE = re.compile(r"^(?P<source>local-dir:)?(?:/|~|[A-Za-z]:[\\/])")


@contextmanager
def prepared(folder: Path, license: str | None = None) -> Iterator[Path]:
    """A temporary copy of a model folder as it is to be published, without the card. The folder itself stays as it is.

    Args:
        folder: A model folder. Its records are looked for in its own `training/`, else beside it where it lies in a run folder.
        license: What the config shall name as the weights' licence; None to leave that as it is.
    """
    with tempfile.TemporaryDirectory(prefix="effzoo-push-") as temporary:
        copy = Path(temporary) / folder.name
        copy.mkdir()
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"{folder} has no {name}: only models in the safetensors format are published")
            shutil.copyfile(folder / name, copy / name)
        config = _read_json(copy / CONFIG)
        if license is not None:
            config.setdefault("pretrained_cfg", {})["license"] = license
        if "effvit_zoo" in config:
            config["effvit_zoo"] = _public(config["effvit_zoo"])
        _write_json(copy / CONFIG, config)
        if (records := _records(folder)) is not None:
            _copy_records(records, copy / RECORDS)
        _refuse_tokens(copy)
        yield copy


def publish(
    copy: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
    message: str | None = None,
) -> str:
    """Uploads what `prepared` made, with a card, as one commit; creates the repository or branch where there is none.

    Returns:
        The commit's address.

    Raises:
        UserError: Whatever goes wrong on the way; the message says what is on the Hub afterwards.
    """
    if revision is not None and not re.fullmatch(r"\w[\w./-]*", revision):
        raise UserError(f"{revision!r} can't be a branch: expected letters, digits, and . / - between them")
    what = _require_way(repo_id)
    api, state = make_api(), "is as it was before"
    try:
        with translated(what):
            try:
                before = api.model_info(repo_id)
            except RepositoryNotFoundError:
                state = "may have been created, without a model"
                api.create_repo(repo_id, private=private)
                state = "was created, but holds no model"
                before = api.model_info(repo_id)
            if private is not None and bool(before.private) != private:
                is_now = "private" if before.private else "public"
                raise UserError(f"{what}: it is there already and {is_now}; its settings page changes that")
            if revision is not None:
                try:
                    before = api.model_info(repo_id, revision=revision)
                except RevisionNotFoundError:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                    state += (
                        f", but for the new branch {revision}" if "before" in state else f" in the branch {revision}"
                    )
                    before = api.model_info(repo_id, revision=revision)
            present = {file.rfilename for file in before.siblings or ()}
            own_words = _own_words(api, repo_id, before.sha, present)
            text = card.make(copy, repo_id, revision=revision, license=license, own_words=own_words)
            (copy / CARD).write_text(text, encoding="utf-8")
            _refuse_tokens(copy)  # also in what somebody wrote into the card, or in the licence
            return _commit(api, copy, repo_id, revision, present, before.sha, message or "Upload a model of effvit_zoo")
    except _Unclear:
        raise
    except UserError as error:
        if state.startswith("may") and isinstance(error.__cause__, HfHubHTTPError):
            state = "was not created"
        raise UserError(f"{error}; the repository {state}") from error


def download(repo: str, commit: str) -> dict[str, Path]:
    """Cached paths of all that belongs to a published model, by their names, downloaded where needed and checked.

    Raises:
        UserError: There are no weights in the safetensors format, a content is wrong, or the Hub fails.
    """
    found = {name: fetch(repo, [name], commit) for name in (CONFIG, WEIGHTS)}
    for name in PUBLISHED:
        if name not in found:
            with suppress(UserError if constants.HF_HUB_OFFLINE else MissingFile):
                found[name] = fetch(repo, [name], commit)
    return found


def require_pushable(repo_id: str) -> None:
    """Raises `UserError` for what would keep a later push from working and can be known now: the name, the token, the network."""
    what = _require_way(repo_id)
    with translated(what):
        known = make_api().whoami()
    if known.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"{what}: the token may read only; it needs write access to that name")


def _require_way(repo_id: str) -> str:
    """Checks the name and that there are a token and a Hub; the beginning of further messages."""
    what = f"cannot push to {require_name(repo_id)}"
    if get_token() is None:
        raise UserError(f"{what}: {explain(LocalTokenNotFoundError())}")
    require_answer(repo_id)
    return what


class _Unclear(UserError):
    """It is not known what is on the Hub now."""


def _commit(
    api: HfApi, copy: Path, repo_id: str, revision: str | None, present: set[str], parent: str | None, message: str
) -> str:
    """Sends all files, and takes away those of an earlier push that this one doesn't have."""
    files = {path.relative_to(copy).as_posix(): path for path in sorted(copy.rglob("*")) if path.is_file()}
    stale = sorted((present & set(PUBLISHED)) - files.keys())
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    try:
        commit = api.create_commit(
            repo_id,
            [*operations, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
            commit_message=message,
            revision=revision,
            parent_commit=parent,
        )
    except FAILURES as error:
        # The answer may have got lost behind a commit that was made.
        try:
            address = _arrived(api, files, repo_id, revision, parent)
        except FAILURES:
            text = "neither does it tell whether the commit arrived: push again later"
            raise _Unclear(f"cannot push to {repo_id}: {explain(error)}; {text}") from error
        if address is None:
            raise
        return address
    except ValueError as error:  # refusals of single files, and of the card's metadata
        raise UserError(f"cannot push to {repo_id}: the Hub refuses it: {explain(error)}") from error
    return commit.commit_url


def _arrived(
    api: HfApi, files: Mapping[str, Path], repo_id: str, revision: str | None, parent: str | None
) -> str | None:
    """The address of a commit that holds exactly these files, if the repository has moved on to one."""
    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    if info.sha == parent:
        return None
    there = {file.rfilename: file for file in info.siblings or ()}
    for name, path in files.items():
        file = there.get(name)
        if file is None:
            return None
        theirs, git = (file.lfs.sha256, False) if file.lfs else (file.blob_id, True)
        if theirs != content_hash(path, git=git):
            return None
    return f"{api.endpoint}/{repo_id}/commit/{info.sha}"


def _own_words(api: HfApi, repo_id: str, commit: str | None, present: set[str]) -> str:
    """What people wrote into the repository's card themselves."""
    if CARD not in present:
        return ""
    with tempfile.TemporaryDirectory() as temporary:  # not the cache, which would believe to know the newest commit
        try:
            path = api.hf_hub_download(repo_id, CARD, revision=commit, local_dir=temporary)
        except EntryNotFoundError:
            return ""
        return card.own_words(Path(path).read_text(encoding="utf-8", errors="replace"))


def _records(folder: Path) -> Path | None:
    """Where the records of the run lie that a model folder came from."""
    if (folder / RECORDS / "config.yaml").is_file():
        return folder / RECORDS
    if folder.name in ("best", "last") and (folder.parent / "config.yaml").is_file():
        return folder.parent
    return None


def _copy_records(source: Path, target: Path) -> None:
    target.mkdir()
    for name in RECORD_FILES:
        if not (source / name).is_file():
            continue
        if name.endswith(".json"):
            _write_json(target / name, _public(_read_json(source / name)))
        elif name.endswith(".yaml"):
            text = yaml.safe_dump(_public(read_yaml(source / name)), sort_keys=False, allow_unicode=True)
            (target / name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(source / name, target / name)


def _public(value: Any) -> Any:
    """The value without what concerns only the machine it was written on: of absolute paths the last part stays."""
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items() if key not in _PRIVATE_KEYS}
    if isinstance(value, list | tuple):
        return [_public(item) for item in value]
    if isinstance(value, str) and (match := _ABSOLUTE.match(value)):
        return (match["source"] or "") + PurePosixPath(value.replace("\\", "/")).name
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refuse_tokens(copy: Path) -> None:
    for path in sorted(copy.rglob("*")):
        if path.suffix in (".json", ".yaml", ".md", ".csv") and holds_token(path.read_text(encoding="utf-8")):
            raise UserError(
                f"{path.relative_to(copy).as_posix()} holds what looks like a token of the Hub: not uploaded"
            )
