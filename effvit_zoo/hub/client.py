"""The Hub's client as this package uses it: each failure is one line, each downloaded file is verified once.

`huggingface_hub` compares the size of what it downloads over HTTP, not the content. Its cache names a file by the hash that the Hub
announced (SHA-256, or git's SHA-1 for small files), so the content can be verified at any time, offline too. A file that was verified
is remembered by its size and modification time, and not hashed again when it is loaded.
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, get_session, get_token, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.errors import (
    HTTPError as HTTPError,  # that of the client's HTTP library, whichever its version uses
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from huggingface_hub.utils import logging as hub_logging

from ..errors import UserError, one_line
from ..version import __version__


class MissingFile(UserError):
    """A repository doesn't have a file."""


LIBRARY = "effvit_zoo"
ATTEMPTS = 3
FAILURES = (OSError, HTTPError, HFValidationError, EntryNotFoundError, errors.OfflineModeIsEnabled)
"""What the client raises when a request to the Hub, the network or the disk fails. Bad requests are ValueErrors too."""

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{16,}")
WITHOUT_NETWORK = (
    "without a network use a model folder (copied, or made by `effzoo pull` where there is one), a checkpoint file, a copy of the "
    "cache (HF_HOME says where it is), or no pretrained weights"
)
_HELP = "`hf auth login` or the environment variable HF_TOKEN sets one"

_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (HFValidationError, "that is not a name on the Hub, expected USER/NAME"),
    (errors.LocalTokenNotFoundError, f"there is no token: {_HELP}"),
    (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    (errors.GatedRepoError, "its owner has to grant access first, on its page on the Hub"),
    (errors.RepositoryNotFoundError, "it is not on the Hub, or it is private and needs a token that may see it"),
    (errors.RevisionNotFoundError, "it has no such revision"),
)
_STATUS = {
    401: f"the Hub doesn't accept the token, it may have expired: {_HELP}",
    403: "the token may not do this; it needs write access to that name",
    404: "there is no such thing on the Hub",
    409: "somebody else changed it at the same moment: try again",
    412: "somebody else changed it at the same moment: try again",
    413: "it is too large for the Hub",
    429: "the Hub's rate limit is reached: try again later",
}


def make_api() -> HfApi:
    """The client's API object; it reads the user's token itself."""
    return HfApi(library_name=LIBRARY, library_version=__version__)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turns whatever the client raises inside into a `UserError` that begins with `what`, and silences the client's own warnings
    (retries, rate limits)."""
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
    """Silences the client's warnings, and its progress bars where stderr is not a terminal."""
    level, chosen = hub_logging.get_verbosity(), constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    hide_bars = not (chosen or sys.stderr.isatty() or are_progress_bars_disabled())
    hub_logging.set_verbosity_error()
    if hide_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide_bars:
            enable_progress_bars()
        hub_logging.set_verbosity(level)


def explain(error: BaseException) -> str:
    """One line for a failure of the client, without any token in it."""
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            return f"{explain(cause)}; and it is not in the cache"
        return f"the Hub can't be reached, and it is not in the cache; {WITHOUT_NETWORK}"
    for kind, text in _KINDS:
        if isinstance(error, kind):
            return text
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        known = f"the Hub is unavailable: try again later (HTTP {status})" if status >= 500 else _STATUS.get(status)
        message = error.server_message or ("" if known else str(error))
        message = f" (message: {one_line(message)})" if message else ""
        return scrub(f"{known or f'the Hub refuses with HTTP {status}'}{message}")
    if isinstance(error, HTTPError):
        return scrub(f"the connection to the Hub broke ({one_line(error)})")
    return scrub(one_line(error, limit=300))


def scrub(text: str) -> str:
    """The text with everything that is or looks like a token of the Hub masked."""
    token = get_token()
    return _TOKEN.sub("hf_***", text.replace(token, "hf_***") if token else text)


def holds_token(text: str) -> bool:
    """Whether a text contains the user's token or anything that looks like one."""
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
    """Raises `UserError` at once where a repository is not in the cache and the Hub doesn't answer. The client would retry for most
    of a minute."""
    if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")).exists():
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo} is not in the Hub's cache, and HF_HUB_OFFLINE is set; {WITHOUT_NETWORK}")
    require_answer(repo)


def require_answer(purpose: str) -> None:
    """Raises `UserError` if the Hub doesn't answer at all."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{purpose} needs the Hub, and HF_HUB_OFFLINE is set")
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except (OSError, HTTPError) as error:
        reason = f"cannot reach {constants.ENDPOINT} for {purpose}: {one_line(error)}"
        raise UserError(f"{reason}; HF_ENDPOINT names a mirror, {WITHOUT_NETWORK}") from None


def fetch(repo: str, names: Sequence[str], revision: str | None = None, *, verify: bool = False) -> Path:
    """The cached path of the first of some files that a repository has, downloaded if needed, with verified content.

    Args:
        repo: USER/NAME.
        names: File names in order of preference.
        revision: Branch, tag or commit; None for the main branch.
        verify: Hash the file even if it was verified before.

    Returns:
        The path; its parent's name is the commit that the file belongs to.

    Raises:
        MissingFile: The repository has none of them.
        UserError: The Hub can't be reached, or the content differs from what the Hub announced, twice.
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
                return _verified(path, repo, name, verify)
    raise MissingFile(f"{repo} has no {' or '.join(names)}")


def _download(repo: str, name: str, revision: str | None) -> Path:
    """Retries after connections that were reset, which the client gives up on, then falls back to the cache. Where no answer comes
    at all, the client does both itself."""
    download = partial(
        hf_hub_download, repo, name, revision=revision, library_name=LIBRARY, library_version=__version__
    )
    broken: Exception | None = None
    for _ in range(ATTEMPTS):
        try:
            return Path(download())
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError):
                raise
            broken = error
    with suppress(LocalEntryNotFoundError):
        return Path(download(local_files_only=True))
    raise broken or AssertionError


def _verified(path: Path, repo: str, name: str, verify: bool) -> Path:
    """The path if its content has the hash that names it, after a second download if it hasn't."""
    if (not verify and _is_remembered(path)) or is_intact(path):
        return path
    commit = path.parts[-len(Path(name).parts) - 1]
    _forget(path)
    path = _download(repo, name, commit)
    if not is_intact(path):
        _forget(path)
        raise UserError(f"{name} of {repo} arrived twice with another content than the Hub announced: nothing was kept")
    return path


def is_intact(path: Path) -> bool:
    """Whether a cached file's content has the hash that it is filed under; True where the cache keeps no hashes (no symlinks).
    A file that passes is remembered."""
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return True
    if content_hash(blob, git=len(blob.name) == 40) != blob.name:
        return False
    with suppress(OSError):  # a home that can't be written to: the file is hashed again next time
        marker = _marker(blob)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(_stamp(blob), encoding="ascii")
    return True


def _is_remembered(path: Path) -> bool:
    """Whether a cached file was verified before and hasn't been written to since."""
    blob = path.resolve()
    try:
        return _marker(blob).read_text(encoding="ascii") == _stamp(blob)
    except (OSError, UnicodeDecodeError):
        return False


def _marker(blob: Path) -> Path:
    return Path(constants.HF_ASSETS_CACHE) / LIBRARY / "verified" / blob.name


def _stamp(blob: Path) -> str:
    stat = blob.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def content_hash(content: Path | bytes, *, git: bool = False) -> str:
    """SHA-256 of a file or of bytes, in hexadecimal; with `git`, the SHA-1 that git gives it as a blob."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    digest = hashlib.sha1(f"blob {size}\0".encode()) if git else hashlib.sha256()
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _forget(path: Path) -> None:
    """Removes a file from the cache."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
