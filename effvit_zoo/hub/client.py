"""The Hub's client as this package uses it: each failure is one line, each file is checked against the hash that names it.

`huggingface_hub` compares the size of what it downloads over HTTP, not the content. Its cache keeps a file under the name of the
hash that the Hub announced (SHA-256, or git's SHA-1 for small files), so a wrong content is found at any time, offline too.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # that of the client's HTTP library, whichever its version uses
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from huggingface_hub.utils import logging as hub_logging

from ..errors import UserError
from ..version import __version__


class MissingFile(UserError):
    """A repository doesn't have a file."""


LIBRARY = "effvit_zoo"
ATTEMPTS = 3
FAILURES = (OSError, HTTPError, HFValidationError, EntryNotFoundError, OfflineModeIsEnabled)
"""What the client raises when the Hub, the network or the disk doesn't do what is asked. Its bad requests are ValueErrors too."""

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{16,}")
_HELP = "`hf auth login` or the environment variable HF_TOKEN sets one"

_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (HFValidationError, "that is not a name on the Hub, expected USER/NAME"),
    (LocalTokenNotFoundError, f"there is no token: {_HELP}"),
    (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    (GatedRepoError, "its owner has to grant access first, on its page on the Hub"),
    (RepositoryNotFoundError, "it is not on the Hub, or it is private and needs a token that may see it"),
    (RevisionNotFoundError, "it has no such revision"),
)
_STATUS = {
    401: f"the Hub doesn't accept the token, it may have expired: {_HELP}",
    403: "the token may not do this; it needs write access to that name",
    404: "there is no such thing on the Hub",
    409: "somebody else changed it at the same moment: try again",
    412: "somebody else changed it at the same moment: try again",
    413: "it is too large for the Hub",
    429: "the Hub takes no more requests for now: try again later",
}


def make_api() -> HfApi:
    """The client's API object; it finds the user's token by itself and never gives it to us."""
    return HfApi(library_name=LIBRARY, library_version=__version__)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turns whatever the client raises within into a `UserError` that begins with `what`, and keeps the client quiet:
    its own warnings (retries, rate limits) would come on top of the one line."""
    try:
        with quiet():
            yield
    except UserError:
        raise
    except FAILURES as error:
        raise UserError(f"{what}: {explain(error)}") from error
    except RuntimeError as error:  # of the client's threads, or of its Xet library
        cause = error.__cause__ if isinstance(error.__cause__, FAILURES) else error
        raise UserError(f"{what}: {explain(cause)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the client's warnings off stderr, and its progress bars where nobody watches them."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    bars = (
        constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not sys.stderr.isatty() and not are_progress_bars_disabled()
    )
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            enable_progress_bars()
        hub_logging.set_verbosity(level)


def explain(error: BaseException) -> str:
    """One line for a failure of the client, without any token in it."""
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            return f"{explain(cause)}; and it is not in the cache"
        return "the Hub can't be reached, and it is not in the cache"
    for kind, text in _KINDS:
        if isinstance(error, kind):
            return text
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        known = f"the Hub is out of order: try again later (HTTP {status})" if status >= 500 else _STATUS.get(status)
        said = error.server_message if known else error.server_message or first_line(error)
        said = f" (it says: {first_line(said)})" if said else ""
        return scrub(f"{known or f'the Hub refuses with HTTP {status}'}{said}")
    if isinstance(error, HTTPError):
        return scrub(f"the connection to the Hub broke ({first_line(error)})")
    return scrub(first_line(error))


def first_line(error: object) -> str:
    """The first line of a message, cut at 300 characters; the type's name where there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def scrub(text: str) -> str:
    """The text with whatever is or looks like a token of the Hub blanked out."""
    token = get_token()
    return _TOKEN.sub("hf_***", text.replace(token, "hf_***") if token else text)


def holds_token(text: str) -> bool:
    """Whether a text holds the user's token, or anything of the form of one."""
    return scrub(text) != text


def require_name(repo: str) -> str:
    """The name itself if it has the form USER/NAME. Raises `UserError`."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if repo.count("/") != 1:
        raise UserError("expected USER/NAME as the name on the Hub")
    return repo


def require_reachable(repo: str) -> None:
    """Raises `UserError` at once where a repository is not in the cache and the Hub doesn't answer: its client would go
    on trying for most of a minute."""
    if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")).exists():
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo} is not in the Hub's cache, and HF_HUB_OFFLINE is set")
    require_answer(repo)


def require_answer(purpose: str) -> None:
    """Raises `UserError` where the Hub doesn't answer at all."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{purpose} needs the Hub, and HF_HUB_OFFLINE is set")
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except (OSError, HTTPError) as error:
        raise UserError(f"cannot reach {constants.ENDPOINT} for {purpose}: {first_line(error)}") from None


def fetch(repo: str, names: Sequence[str], revision: str | None = None) -> Path:
    """The cached path of the first of some files that a repository has, downloaded if need be, its content checked.

    Args:
        repo: USER/NAME.
        names: File names in order of preference.
        revision: Branch, tag or commit; None for the main branch.

    Returns:
        The path; its parent's name is the commit that the file belongs to.

    Raises:
        MissingFile: The repository has none of them.
        UserError: The Hub can't be reached, or the content is not what the Hub announced, twice.
    """
    require_reachable(repo)
    with translated(f"cannot get {names[0]} of {repo}{f'@{revision}' if revision else ''}"):
        for name in names:
            try:
                path = _download(repo, name, revision)
            except LocalEntryNotFoundError:
                if name == names[-1] or not constants.HF_HUB_OFFLINE:
                    raise
            except EntryNotFoundError:
                continue
            else:
                return _checked(path, repo, name)
    raise MissingFile(f"{repo} has no {' or '.join(names)}")


def _download(repo: str, name: str, revision: str | None) -> Path:
    """The client itself tries again, or takes what is in the cache, where no answer comes at all; it gives up on connections
    that are reset after they were made."""
    download = partial(
        hf_hub_download, repo, name, revision=revision, library_name=LIBRARY, library_version=__version__
    )
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return Path(download())
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError):
                raise
            if attempt == ATTEMPTS:
                with suppress(LocalEntryNotFoundError):
                    return Path(download(local_files_only=True))
                raise
    raise AssertionError("the last attempt returns or raises")


def _checked(path: Path, repo: str, name: str) -> Path:
    """The path if its content has the hash that names it, after a second download if it hasn't."""
    if is_intact(path):
        return path
    commit = path.parts[-len(Path(name).parts) - 1]
    _forget(path)
    path = _download(repo, name, commit)
    if not is_intact(path):
        _forget(path)
        raise UserError(f"{name} of {repo} arrived twice with another content than the Hub announced: nothing was kept")
    return path


def is_intact(path: Path) -> bool:
    """Whether a cached file's content has the hash that it is filed under; True where the cache keeps no hashes (no symlinks)."""
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return True
    return content_hash(blob, git=len(blob.name) == 40) == blob.name


def content_hash(path: Path, *, git: bool = False) -> str:
    """SHA-256 of a file in hexadecimal; with `git`, the SHA-1 that git gives it as a blob."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode()) if git else hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _forget(path: Path) -> None:
    """Takes a file out of the cache."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
