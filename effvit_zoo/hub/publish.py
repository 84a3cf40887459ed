"""Publishing model folders on the Hub and downloading them: what is published, its card, and one atomic commit.

Next to weights and config, the records of the run that the folder came from are published under `training/`: config, summary, metrics
per epoch, validations and figures. What identifies the machine rather than the model (absolute paths, names of unreadable files) is
removed first, and nothing that looks like a token of the Hub is uploaded.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors, get_token

from .. import run_folder
from ..config import dump_yaml, plain, read_yaml
from ..errors import UserError
from ..run_folder import CARD, CONFIG, EXPORT, EXPORT_RECORD, MODEL_CONFIG, RECORDS, WEIGHTS
from . import card, client
from .client import FAILURES, explain, fetch
from .config_check import checked_config
from .folder import HUB, hub_place, load, model_folder
from .twin import proven_twin

_RECORD_FILES = (CONFIG, run_folder.SUMMARY, run_folder.VALIDATION, run_folder.METRICS)
_PUBLISHED = (MODEL_CONFIG, WEIGHTS, CARD, *(f"{RECORDS}/{name}" for name in _RECORD_FILES))
"""What a push writes and a pull reads, besides the figures that the card shows."""

_PRIVATE_KEYS = ("bad_file_names", "path")
_ABSOLUTE = re.compile(r"^(?P<source>local-dir:)?(?:/|~|[A-Za-z]:[\\/])")
_ABSOLUTE_INSIDE = re.compile(r"(?<![\w.:/\\~-])(?:~?/|[A-Za-z]:[\\/])(?=[^\s/])[^\s'\"<>|,;]*")

_NAMES_OF_CLASSES = ("label_names", "label_descriptions")

_TEXTS = (".json", ".md", ".py", ".txt")

_Content = bytes | Path


class _Outcome(Enum):
    """What a failed push has left on the Hub."""

    UNCHANGED = "is as it was before"
    NEW_BRANCH = "is as it was before, but for the new branch {branch}"
    UNKNOWN = "may have been created, without a model"
    NOT_CREATED = "was not created"
    CREATED = "was created, but holds no model"
    CREATED_WITH_BRANCH = "was created, but holds no model in the branch {branch}"


class _Unclear(UserError):
    """It is not known what is on the Hub now."""


def push(
    folder: str | Path,
    repo_id: str,
    describe: Callable[[Mapping[str, Any]], card.CardFacts],
    *,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
    message: str | None = None,
) -> str:
    """Publishes a model folder on the Hub with a card, as one commit. The folder isn't changed.

    Args:
        folder: A model folder, or a run folder (stands for its `best/`). The run's records are published under `training/`.
        repo_id: USER/NAME; created if missing.
        describe: Content of config.json -> what the card says that depends on the task.
        private: Whether the repository shall be private; an existing one must be so already. None: as it is, or the account's default.
        revision: Branch to push to, created if missing; None for the main one.
        license: Licence of the weights, an identifier of the Hub such as "apache-2.0". None: what the records say, else none is stated.
        message: Commit message.

    Returns:
        The commit's address.

    Raises:
        UserError: The folder isn't a loadable model in its training form, holds a token, or the Hub refuses; the message says
            what is on the Hub afterwards.
    """
    folder = model_folder(folder)
    client.require_name(repo_id)
    if revision is not None and not re.fullmatch(r"\w[\w./-]*", revision):
        raise UserError(f"{revision!r} can't be a branch: expected letters, digits, and . / - between them")
    files, facts = _contents(folder, license, describe)
    what = _require_way(repo_id)
    place = _Place(client.make_api(), repo_id, revision)
    try:
        with client.translated(what):
            place.open(private, what)
            previous = place.previous_card()
            words = card.own_words(previous)
            text = card.make(files, repo_id, facts, revision=revision, license=license, own_words=words)
            files[CARD] = text.encode()
            _refuse_tokens(files)  # also in what somebody wrote into the card, or in the licence
            exported = {name for name in place.present if name.startswith(f"{EXPORT}/")}
            stale = (place.present & {*_PUBLISHED, *card.figures_in(previous), *exported}) - files.keys()
            return _commit(place, files, sorted(stale), message or "Upload a model of effvit_zoo")
    except _Unclear:
        raise
    except UserError as error:
        raise UserError(f"{error}; the repository {place.outcome_after(error)}") from error


def pull(repo_id: str, folder: str | Path | None = None, *, revision: str | None = None) -> Path:
    """Copies a model from the Hub into a new folder after verifying all of it; needs no network for what is cached.

    Args:
        repo_id: USER/NAME, also as `hf-hub:USER/NAME[@REVISION]`.
        folder: Where to; must not exist, or be empty. None: NAME, in the current folder.
        revision: Branch, tag or commit; None for the main branch.

    Returns:
        The folder's absolute path: a model folder with the card and the records of its training, where there are any.

    Raises:
        UserError: The folder exists, or nobody named it and it would be in a checkout; there is no such model, it is damaged,
            malformed or not in the safetensors format, or the Hub fails. No folder is left then.
        OSError: A disk fails.
    """
    repo, given = hub_place(repo_id)
    folder = _pull_folder(repo_id, folder)
    found = _download(repo, revision or given)
    writing = folder.with_name(f".{folder.name}.pulling")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        for name, path in found.items():
            (writing / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, writing / name)
        try:
            load(writing)
        except UserError as error:
            raise UserError(str(error).replace(str(writing), f"{HUB}{repo}")) from error
        if folder.exists():
            folder.rmdir()
        writing.rename(folder)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return folder


def _pull_folder(repo_id: str, folder: str | Path | None) -> Path:
    """Where `pull` writes to. Raises `UserError` where it may not: over something, or into a checkout that nobody named."""
    given = folder
    folder = Path(hub_place(repo_id)[0].partition("/")[2] if given is None else given).expanduser().resolve()
    package = Path(__file__).resolve().parents[1]
    if folder.is_relative_to(package):
        raise UserError(f"{folder} would be inside the package effvit_zoo: name another --output")
    if given is None and ((folder.parent / ".git").exists() or folder.parent == package.parent):
        raise UserError(f"{folder} would be in the checkout {folder.parent}: name a folder by --output")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already: name another output")
    return folder


def require_pushable(repo_id: str) -> None:
    """Raises `UserError` for what is known now to make a later push fail: the name, the token, the network."""
    what = _require_way(repo_id)
    with client.translated(what):
        known = client.make_api().whoami()
    if known.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"{what}: the token may read only; it needs write access to that name")


def _require_way(repo_id: str) -> str:
    """Checks the name and that there are a token and a Hub; returns the beginning of further messages."""
    what = f"cannot push to {client.require_name(repo_id)}"
    if get_token() is None:
        raise UserError(f"{what}: {explain(errors.LocalTokenNotFoundError())}")
    client.require_answer(repo_id)
    return what


@dataclass
class _Place:
    """A branch of a repository, and what this push has done to it so far."""

    api: HfApi
    repo_id: str
    revision: str | None
    outcome: _Outcome = _Outcome.UNCHANGED
    commit: str | None = None
    present: frozenset[str] = frozenset()

    def open(self, private: bool | None, what: str) -> None:
        """Creates the repository and the branch where they are missing, and reads which commit and files are there."""
        try:
            info = self.api.model_info(self.repo_id)
        except errors.RepositoryNotFoundError:
            self.outcome = _Outcome.UNKNOWN
            self.api.create_repo(self.repo_id, private=private)
            self.outcome = _Outcome.CREATED
            info = self.api.model_info(self.repo_id)
        if private is not None and bool(info.private) != private:
            visibility = "private" if info.private else "public"
            raise UserError(f"{what}: it is there already and {visibility}; its settings page changes that")
        if self.revision is not None:
            try:
                info = self.api.model_info(self.repo_id, revision=self.revision)
            except errors.RevisionNotFoundError:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
                created = self.outcome is _Outcome.CREATED
                self.outcome = _Outcome.CREATED_WITH_BRANCH if created else _Outcome.NEW_BRANCH
                info = self.api.model_info(self.repo_id, revision=self.revision)
        self.commit, self.present = info.sha, frozenset(file.rfilename for file in info.siblings or ())

    def outcome_after(self, error: UserError) -> str:
        """What the repository is after an error. An answer of the Hub, even a refusal, leaves no doubt about its creation."""
        refused = self.outcome is _Outcome.UNKNOWN and isinstance(error.__cause__, errors.HfHubHTTPError)
        return (_Outcome.NOT_CREATED if refused else self.outcome).value.format(branch=self.revision)

    def previous_card(self) -> str:
        """The text of the card that is there, "" for none."""
        if CARD not in self.present:
            return ""
        with tempfile.TemporaryDirectory() as temporary:  # not the cache, which would take this for the newest commit
            try:
                path = self.api.hf_hub_download(self.repo_id, CARD, revision=self.commit, local_dir=temporary)
            except errors.EntryNotFoundError:
                return ""
            return Path(path).read_text(encoding="utf-8", errors="replace")


def _commit(place: _Place, files: Mapping[str, _Content], stale: list[str], message: str) -> str:
    """Uploads all files and deletes those of an earlier push that this one doesn't have, as one commit; returns its address."""
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    deleted = [CommitOperationDelete(path_in_repo=name) for name in stale]
    try:
        commit = place.api.create_commit(
            place.repo_id,
            [*added, *deleted],
            commit_message=message,
            revision=place.revision,
            parent_commit=place.commit,
        )
    except FAILURES as error:
        # The answer may have been lost after the commit was made.
        try:
            address = _arrived(place, files)
        except FAILURES:
            text = f"cannot push to {place.repo_id}: {explain(error)}; and whether the commit went through is unknown"
            raise _Unclear(f"{text}: push again later") from error
        if address is None:
            raise
        return address
    except ValueError as error:  # refusals of single files, and of the card's metadata
        raise UserError(f"cannot push to {place.repo_id}: the Hub refuses it: {explain(error)}") from error
    return commit.commit_url


def _arrived(place: _Place, files: Mapping[str, _Content]) -> str | None:
    """The address of a commit that holds exactly these files, if the repository has moved on to one."""
    info = place.api.model_info(place.repo_id, revision=place.revision, files_metadata=True)
    if info.sha == place.commit:
        return None
    there = {file.rfilename: file for file in info.siblings or ()}
    for name, content in files.items():
        file = there.get(name)
        if file is None:
            return None
        theirs, git = (file.lfs.sha256, False) if file.lfs else (file.blob_id, True)
        if theirs != client.content_hash(content, git=git):
            return None
    return f"{place.api.endpoint}/{place.repo_id}/commit/{info.sha}"


def _download(repo: str, revision: str | None) -> dict[str, Path]:
    """Cached paths of all that belongs to a published model, by their names, downloaded where needed and verified.

    Raises:
        UserError: There are no weights in the safetensors format, a content is wrong, or the Hub fails.
    """
    config = fetch(repo, [MODEL_CONFIG], revision, verify=True)
    checked_config(config, f"{HUB}{repo}/{MODEL_CONFIG}")
    commit = config.parent.name
    found = {MODEL_CONFIG: config, WEIGHTS: fetch(repo, [WEIGHTS], commit, verify=True)}
    further = [name for name in _PUBLISHED if name not in found]
    for name in further:
        with suppress(UserError if constants.HF_HUB_OFFLINE else client.MissingFile):
            found[name] = fetch(repo, [name], commit, verify=True)
            if name == CARD:
                further += card.figures_in(found[CARD].read_text(encoding="utf-8", errors="replace"))
    return found


def _contents(
    folder: Path, license: str | None, describe: Callable[[Mapping[str, Any]], card.CardFacts]
) -> tuple[dict[str, _Content], card.CardFacts]:
    """What is published of a model folder, by name in the repository, without the card; and the card's facts.

    Args:
        folder: A model folder. Its records are those in its own `training/`, else those of the run folder that it lies in.
        license: Licence of the weights to write into the config; None to leave that as it is.
        describe: As in `push`.

    Raises:
        UserError: It is not a loadable model, or holds a token.
    """
    for name in (MODEL_CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: only models in the safetensors format are published")
    config = checked_config(folder / MODEL_CONFIG, folder / MODEL_CONFIG)
    if license is not None:
        config.setdefault("pretrained_cfg", {})["license"] = license
    config = public(config)
    try:
        model = load(folder)
    except UserError as error:
        raise UserError(f"{error}; only a whole model in its training form is pushed, not a fused one") from error
    if (timms := proven_twin(model, config)) is not None:
        config |= {"architecture": timms, run_folder.ARCHITECTURE_KEY: config["architecture"]}
    facts = describe(config)
    files: dict[str, _Content] = {MODEL_CONFIG: _as_json(config), WEIGHTS: folder / WEIGHTS}
    own = (folder / RECORDS / CONFIG).is_file()
    if (records := folder / RECORDS if own else run_folder.run_of(folder)) is not None:
        files |= {f"{RECORDS}/{name}": content for name, content in _records(records, None if own else folder.name)}
        files |= {f"{RECORDS}/{name}": records / name for name in facts.figures if (records / name).is_file()}
    files |= _exported(folder)
    _refuse_tokens(files)
    return files, facts


def _exported(folder: Path) -> dict[str, _Content]:
    """The folder of files for other runtimes that was made from a model folder, in it or in its run folder. Raises `UserError` for one
    that was made from other weights."""
    places = (place / EXPORT for place in (folder, run_folder.run_of(folder)) if place is not None)
    found = next((place for place in places if (place / EXPORT_RECORD).is_file()), None)
    if found is None:
        return {}
    made_from = run_folder.read_json(found / EXPORT_RECORD).get("weights_sha256")
    if made_from != client.content_hash(folder / WEIGHTS, git=False):
        raise UserError(f"{found} has files of other weights than {folder}: export again, or delete it")
    inside = sorted(path for path in found.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {
        f"{EXPORT}/{path.relative_to(found).as_posix()}": path.read_bytes() if path.suffix in _TEXTS else path
        for path in inside
    }


def _records(folder: Path, model: str | None) -> Iterator[tuple[str, bytes]]:
    """Name and public content of each record in a folder. `model` is "best" or "last": of the other one nothing is published."""
    run = public(plain(read_yaml(folder / CONFIG)))
    run.pop("hub", None)  # where its author uploaded to
    yield CONFIG, dump_yaml(run).encode()
    other = {run_folder.BEST: run_folder.LAST, run_folder.LAST: run_folder.BEST}.get(model or "")
    for name in (run_folder.SUMMARY, run_folder.VALIDATION):
        if (folder / name).is_file():
            content = run_folder.read_json(folder / name)
            if name == run_folder.VALIDATION and other and isinstance(content, list):
                content = [row for row in content if not (isinstance(row, dict) and _is_of(row, other))]
            yield name, _as_json(public(content))
    if (folder / run_folder.METRICS).is_file():
        yield run_folder.METRICS, (folder / run_folder.METRICS).read_bytes()


def _is_of(row: Mapping[str, Any], model: str) -> bool:
    return Path(str(row.get("model", ""))).name == model


def public(value: Any) -> Any:
    """The value without what concerns only the machine it was written on; absolute paths are cut to their last part."""
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if key not in _PRIVATE_KEYS}
        return {key: item if key in _NAMES_OF_CLASSES else public(item) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if isinstance(value, str) and (match := _ABSOLUTE.match(value)):
        return (match["source"] or "") + _last_part(value)
    if isinstance(value, str):
        return _ABSOLUTE_INSIDE.sub(lambda match: _last_part(match[0]), value)
    return value


def _last_part(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name


def _as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _refuse_tokens(files: Mapping[str, _Content]) -> None:
    for name, content in sorted(files.items()):
        if isinstance(content, bytes) and client.holds_token(content.decode(errors="replace")):
            raise UserError(f"{name} holds what looks like a token of the Hub: not uploaded")
