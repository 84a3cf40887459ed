"""Publishing a page for browsers as a static Space of the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, errors, get_token

from ..config import dump_yaml
from ..errors import UserError
from ..run_folder import CARD, read_json
from . import client
from .client import explain

ISOLATION = {
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "cross-origin",
}
"""Headers under which browsers give a page threads."""


def push_page(folder: str | Path, repo_id: str, *, private: bool | None = None, message: str | None = None) -> str:
    """Publishes a page that `effzoo export --to web` wrote, as one commit that replaces what the Space held.

    Args:
        folder: The page. It isn't changed.
        repo_id: USER/NAME of the Space; created if missing.
        private: Whether a new Space is private; None for the account's default.
        message: Commit message.

    Returns:
        The Space's address.

    Raises:
        UserError: The folder is no page, or the Hub refuses.
    """
    folder = Path(folder)
    files = _files(folder)
    what = f"cannot push to the Space {client.require_name(repo_id)}"
    if get_token() is None:
        raise UserError(f"{what}: {explain(errors.LocalTokenNotFoundError())}")
    client.require_answer(repo_id)
    api = client.make_api()
    with client.translated(what):
        try:
            info = api.space_info(repo_id)
        except errors.RepositoryNotFoundError:
            api.create_repo(repo_id, repo_type="space", space_sdk="static", private=private)
            info = api.space_info(repo_id)
        stale = {file.rfilename for file in info.siblings or ()} - {*files, ".gitattributes"}
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
        deleted = [CommitOperationDelete(path_in_repo=name) for name in sorted(stale)]
        api.create_commit(
            repo_id,
            [*added, *deleted],
            commit_message=message or "Upload a page of effvit_zoo",
            repo_type="space",
            parent_commit=info.sha,
        )
    return f"{api.endpoint}/spaces/{repo_id}"


def _files(folder: Path) -> dict[str, bytes | str]:
    """What is uploaded of a page, by name in the Space. Raises `UserError` for a folder that is no page."""
    for name in ("index.html", "page.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}, expected a page written by: effzoo export MODEL --to web --output {folder}"
            )
    page = read_json(folder / "page.json")
    about = {"title": page["title"], "sdk": "static", "app_file": "index.html", "custom_headers": ISOLATION}
    if page.get("license"):
        about["license"] = page["license"]
    card = f"---\n{dump_yaml(about)}---\n\nThe model runs on the visitor's device. Made with effvit_zoo.\n"
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files: dict[str, bytes | str] = {path.relative_to(folder).as_posix(): str(path) for path in found}
    return {**files, CARD: card.encode()}
