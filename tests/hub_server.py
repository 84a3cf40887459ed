"""A Hub of its own for tests: model repositories over real HTTP on 127.0.0.1, as huggingface_hub and timm speak it, with faults on order.

It keeps repositories with branches and commits in memory, asks for tokens, and stores large files apart, on a second port: the client
takes a redirect within one origin for the file itself and then misses the commit in its headers. Xet, pull requests and data sets are
not in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http as hub_http

USER = "ada"
TOKEN = "hf_WriteTokenOfAdaThatNobodyMaySee01"
READ_TOKEN = "hf_ReadTokenOfAdaThatNobodyMaySee002"
EXPIRED_TOKEN = "hf_ExpiredTokenThatNobodyMaySee00003"
LARGE = (".safetensors", ".bin", ".png")


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches."""

    pattern: str
    kind: str
    """A status code as text, or: reset (before the answer), cut (in the middle of the body), stall (there, for a while),
    corrupt (one byte is another), lost (the request is carried out, the answer never comes)."""
    times: int
    headers: dict[str, str]
    body: dict[str, str]


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.history)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.history.append(sha)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]


class Hub:
    """The state behind the server, for a test to set up, to break and to look into."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.endpoint = self.storage = ""

    def add(self, repo: str, files: dict[str, bytes], *, branch: str = "main", private: bool = False) -> str:
        """A commit from outside: exactly these files."""
        return self.repos.setdefault(repo, Repo(private)).commit(branch, dict(files))

    def fail(
        self,
        pattern: str,
        kind: str | int,
        times: int = 1000,
        headers: dict[str, str] | None = None,
        body: dict[str, str] | None = None,
    ) -> None:
        self.faults.append(Fault(pattern, str(kind), times, headers or {}, body or {}))

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    server: HubServer

    def log_message(self, *args: object) -> None:
        """Tests read the client's output, not ours."""

    def handle_any(self) -> None:
        hub = self.server.hub
        length = int(self.headers.get("Content-Length") or 0)
        self.content = self.rfile.read(length) if length else b""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query, keep_blank_values=True)
        self.fault = hub.fault(f"{self.command} {url.path}")
        kind = self.fault.kind if self.fault else ""
        if kind == "reset":
            self.drop()
        elif kind.isdecimal():
            body = json.dumps(self.fault.body or {"error": "out of order"}).encode()
            self.answer(int(kind), body, self.fault.headers)
        else:
            try:
                self.answer(*self.route(unquote(url.path)))
            except Refused as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
                self.answer(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def drop(self) -> None:
        """Ends the connection as a crash does: with a reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.wfile.close()
        self.connection.close()

    def answer(self, status: int, body: bytes | dict | list = b"", headers: dict[str, str] | None = None) -> None:
        kind = self.fault.kind if self.fault else ""
        if kind == "lost":
            self.drop()
            return
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if status == 200 and body and (start := self.headers.get("Range")):
            status, body = 206, body[int(start.removeprefix("bytes=").rstrip("-")) :]
        if kind == "corrupt" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", (headers or {}).get("X-Size", str(len(body))))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if kind == "stall":
                time.sleep(0.6)
            self.drop()
            return
        self.wfile.write(body)

    def route(self, path: str) -> tuple:
        path = re.sub("^/api/spaces/", "/api/models/spaces/", path)
        for method, pattern, action in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return action(self, **match.groupdict())
        raise Refused(404, "", f"no such endpoint: {self.command} {path}")

    @property
    def may_write(self) -> bool:
        """Whether the request's token may write; tokens that aren't valid end the request."""
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given not in (TOKEN, READ_TOKEN):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return given == TOKEN

    def repo(self, name: str, write: bool = False) -> Repo:
        may_write, known = self.may_write, bool(self.headers.get("Authorization"))
        repo = self.server.hub.repos.get(name)
        if repo is None or (repo.private and not known):
            raise Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        if write and not (may_write and name.removeprefix("spaces/").startswith(f"{USER}/")):
            raise Refused(403, "", "You don't have the required permissions")
        return repo

    def commit_of(self, name: str, revision: str) -> tuple[Repo, str]:
        repo = self.repo(name)
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, sha

    def create(self) -> tuple:
        asked = json.loads(self.content)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not self.headers.get("Authorization"):
            raise Refused(401, "", "Invalid username or password.")
        if not self.may_write or not name.startswith(f"{USER}/"):
            raise Refused(403, "", "You don't have the rights to create a model under this namespace")
        if asked.get("type") == "space":
            if asked.get("sdk") != "static":
                raise Refused(400, "", f"sdk is {asked.get('sdk')!r}")
            name = f"spaces/{name}"
        if name in self.server.hub.repos:
            raise Refused(409, "", "You already created this model repo")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return 200, {"url": f"{self.server.hub.endpoint}/{name}", "name": name, "id": "0"}

    def whoami(self) -> tuple:
        may_write = self.may_write
        role = "write" if may_write else "read"
        return 200, {"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}}

    def branch(self, name: str, branch: str) -> tuple:
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise Refused(409, "", "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return 201, {"success": True}

    def info(self, name: str, revision: str = "main") -> tuple:
        repo, sha = self.commit_of(name, revision or "main")
        siblings = []
        for path, content in repo.commits[sha].items():
            siblings.append({"rfilename": path})
            if "blobs" in self.query:
                siblings[-1] |= {"size": len(content), "blobId": git_hash(content)}
                if path.endswith(LARGE):
                    siblings[-1]["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
        card = repo.commits[sha].get("README.md", b"").decode()
        data = yaml.safe_load(card[4:].partition("\n---")[0]) if card.startswith("---\n") else None
        known = {"_id": "0", "id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings}
        return 200, known | {"tags": [], "downloads": 0, "likes": 0, "cardData": data}

    def tree(self, name: str, revision: str) -> tuple:
        repo, sha = self.commit_of(name, revision)
        entries = []
        for path, content in repo.commits[sha].items():
            entries.append({"type": "file", "path": path, "size": len(content), "oid": git_hash(content)})
            if path.endswith(LARGE):
                entries[-1]["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        return 200, entries

    def resolve(self, name: str, revision: str, path: str) -> tuple:
        repo, sha = self.commit_of(name, revision)
        content = repo.commits[sha].get(path)
        if content is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha}
        if path.endswith(LARGE):
            digest = sha256(content)
            self.server.hub.stored[digest] = content
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            return 302, b"", headers | linked | {"Location": f"{self.server.hub.storage}/stored/{digest}"}
        return 200, content, headers | {"ETag": f'"{git_hash(content)}"'}

    def stored(self, digest: str) -> tuple:
        return 200, self.server.hub.stored[digest]

    def store(self, digest: str) -> tuple:
        if sha256(self.content) != digest:
            raise Refused(400, "", "the content has another hash than announced")
        self.server.hub.stored[digest] = self.content
        return 200, b""

    def preupload(self, name: str, revision: str) -> tuple:
        repo = self.repo(name, write=True)
        present = repo.commits[repo.resolve(revision) or repo.branches["main"]]
        answer = []
        for file in json.loads(self.content)["files"]:
            path, there = file["path"], present.get(file["path"])
            large = path.endswith(LARGE)
            oid = None if there is None else sha256(there) if large else git_hash(there)
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answer}

    def batch(self, name: str) -> tuple:
        self.repo(name, write=True)
        hub, objects = self.server.hub, []
        for asked in json.loads(self.content)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in hub.stored:
                verify = {"href": f"{hub.endpoint}/verify", "header": {}}
                entry["actions"] = {
                    "upload": {"href": f"{hub.storage}/stored/{asked['oid']}", "header": {}},
                    "verify": verify,
                }
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def commit(self, name: str, revision: str) -> tuple:
        repo = self.repo(name, write=True)
        files = dict(repo.files(revision))
        for line in self.content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if (
                entry["key"] == "header"
                and value.get("parentCommit", repo.branches[revision]) != repo.branches[revision]
            ):
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.hub.stored:
                    raise Refused(400, "", f"LFS pointer to a file that was not uploaded: {value['path']}")
                files[value["path"]] = self.server.hub.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(revision, files)
        address = f"{self.server.hub.endpoint}/{name}/commit/{sha}"
        return 200, {"success": True, "commitUrl": address, "commitOid": sha, "hookOutput": ""}

    def validate_card(self) -> tuple:
        content = json.loads(self.content)["content"]
        try:
            yaml.safe_load(content[4:].partition("\n---")[0])
        except yaml.YAMLError as error:
            raise Refused(400, "", str(error)) from error
        return 200, {"errors": [], "warnings": []}

    def nothing(self) -> tuple:
        return 200, {}


NAME = r"(?P<name>(?:spaces/)?[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+(?:/pr/\d+)?)"
ROUTES = [
    ("HEAD GET", "/", Handler.nothing),
    ("POST", "/api/repos/create", Handler.create),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("POST", "/verify", Handler.nothing),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/{REVISION}(?:/.*)?", Handler.tree),
    ("POST", f"/api/models/{NAME}/branch/(?P<branch>.+)", Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("HEAD GET", f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    ("GET HEAD", r"/stored/(?P<digest>\w+)", Handler.stored),
    ("PUT", r"/stored/(?P<digest>\w+)", Handler.store),
]


class HubServer(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections end in the middle here on purpose."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers at `.endpoint` until the block ends."""
    hub = Hub()
    servers = [HubServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for server in servers:
        server.hub = hub
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        hub_http.close_session()
        for server in servers:
            server.shutdown()
            server.server_close()


def use(monkeypatch, endpoint: str, home, token: str | None = TOKEN) -> list[float]:
    """Points this process' client to a server, with a cache and a token of its own. It doesn't wait between its attempts but
    notes in the list that is returned how long it would have."""
    waits: list[float] = []
    clock = SimpleNamespace(**{name: getattr(time, name) for name in dir(time)} | {"sleep": waits.append})
    for module in (hub_http, file_download):
        monkeypatch.setattr(module, "time", clock)
    settings = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "cache"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DOWNLOAD_TIMEOUT": 0.2,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name, value in environment(endpoint, home, token).items():
        monkeypatch.setenv(name, value)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    return waits


def environment(endpoint: str, home, token: str | None = TOKEN) -> dict[str, str]:
    """The same for a process that is yet to start."""
    given = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    return given | ({"HF_TOKEN": token} if token else {})


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
