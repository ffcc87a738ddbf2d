"""A hub on this machine: the endpoints that huggingface_hub's client uses for adapters, over a dictionary.

Repositories hold commits, and branches name them. Large files come and go as LFS does it; Xet is left out.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

__all__ = ["TOKEN", "Hub", "Repository", "reach"]

TOKEN = "hf_the_token_of_the_tests"


def reach(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path, token: str | None = None) -> None:
    """Points huggingface_hub and transformers at a hub, with an empty cache and no token but the one given."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(cache / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)


@dataclass
class Repository:
    """Its files by commit, and its branches; `gated` ones ask for access."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        before = self.commits.get(self.branches.get(branch) or self.branches.get("main", ""), {})
        sha = hashlib.sha1(f"{len(self.commits)} {branch}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = before | files, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class Refused(Exception):
    """An answer that is no success: a status, and what the hub says in its error headers."""


class Hub:
    """The server.

    Attributes: `repositories` by name; `requests` as (method, path, token) in the order in which they came; `is_full`
    refuses large files.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.large_files: dict[str, bytes] = {}
        self.is_full = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def repository(self, name: str, token: str | None, *, writes: bool = False) -> Repository:
        repository = self.repositories.get(name)
        if writes and token != TOKEN:
            raise Refused(401, "", "Invalid username or password.")
        if repository is None or (repository.private and token != TOKEN):
            raise Refused(404 if token == TOKEN else 401, "RepoNotFound", "Repository not found")
        return repository

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        for pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None:
                if function is not harnesses:
                    self.requests.append((method, path, token))
                return function(self, token, body, *(unquote(group) for group in match.groups()))
        raise AssertionError(f"the stand-in knows no {method} {path}")


def created(hub, token, body):
    asked = json.loads(body)
    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
    if token != TOKEN:
        raise Refused(401, "", "Invalid username or password.")
    status = 409 if name in hub.repositories else 200
    hub.repositories.setdefault(name, Repository(private=asked.get("visibility") == "private"))
    return as_json({"url": f"{hub.url}/{name}", "error": "You already created this model repo"}, status)


def branch(hub, token, body, name, revision):
    repository = hub.repository(name, token, writes=True)
    if revision in repository.branches:
        return as_json({"error": "Reference already exists"}, 409)
    repository.branches[revision] = repository.branches["main"]
    return as_json({})


def info(hub, token, body, name, revision="main"):
    repository = hub.repository(name, token)
    return as_json({"id": name, "sha": commit_of(repository, revision), "private": repository.private, "siblings": []})


def tree(hub, token, body, name, revision):
    repository = hub.repository(name, token)
    entries = []
    for path, content in repository.files(commit_of(repository, revision)).items():
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if is_large(path):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        entries.append(entry)
    return as_json(entries)


def resolved(hub, token, body, name, revision, path):
    repository = hub.repository(name, token)
    if repository.gated:
        raise Refused(403, "GatedRepo", f"Access to model {name} is restricted")
    commit = commit_of(repository, revision)
    content = repository.files(commit).get(path)
    if content is None:
        raise Refused(404, "EntryNotFound", "Entry not found")
    headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
    if is_large(path):
        headers |= {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
    return 200, headers, content


def preupload(hub, token, body, name, revision):
    hub.repository(name, token, writes=True)
    files = [
        {"path": file["path"], "uploadMode": "lfs" if is_large(file["path"]) else "regular", "shouldIgnore": False}
        for file in json.loads(body)["files"]
    ]
    return as_json({"files": files})


def large_files_asked(hub, token, body, name):
    hub.repository(name, token, writes=True)
    objects = [
        entry | {"actions": {"upload": {"href": f"{hub.url}/upload/{entry['oid']}"}}}
        for entry in json.loads(body)["objects"]
    ]
    return as_json({"transfer": "basic", "objects": objects})


def large_file_uploaded(hub, token, body, oid):
    if hub.is_full:
        raise Refused(403, "", "Storage limit reached")
    assert hashlib.sha256(body).hexdigest() == oid
    hub.large_files[oid] = body
    return 200, {}, b""


def committed(hub, token, body, name, revision):
    repository = hub.repository(name, token, writes=True)
    files = {}
    for line in body.splitlines():
        entry = json.loads(line)
        if entry["key"] == "header":
            repository.messages.append(entry["value"]["summary"])
        elif entry["key"] == "file":
            files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        else:
            files[entry["value"]["path"]] = hub.large_files[entry["value"]["oid"]]
    commit_of(repository, revision)
    commit = repository.commit(revision, files)
    return as_json({"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit, "hookOutput": ""})


def card_checked(hub, token, body):
    assert json.loads(body)["content"].startswith("---\n")
    return as_json({"errors": [], "warnings": []})


def harnesses(hub, token, body):
    raise Refused(404, "", "")  # a list for the client's user agent, which it keeps in the user's home if it gets one


MODEL = r"/api/models/([^/]+/[^/]+)"
ROUTES = [
    (r"/api/repos/create", created),
    (r"/api/validate-yaml", card_checked),
    (r"/api/agent-harnesses", harnesses),
    (rf"{MODEL}/branch/(.+)", branch),
    (rf"{MODEL}/revision/(.+)", info),
    (rf"{MODEL}/tree/([^/]+)", tree),
    (rf"{MODEL}/preupload/([^/]+)", preupload),
    (rf"{MODEL}/commit/([^/]+)", committed),
    (MODEL, info),
    (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", large_files_asked),
    (r"/upload/(\w+)", large_file_uploaded),
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolved),
]


def commit_of(repository: Repository, revision: str) -> str:
    commit = repository.branches.get(revision, revision)
    if commit not in repository.commits:
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return commit


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def as_json(value, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self._body()
            bearer = self.headers.get("Authorization")
            token = None if bearer is None else bearer.removeprefix("Bearer ")
            try:
                status, headers, content = hub.answer(self.command, urlsplit(self.path).path, token, body)
            except Refused as refusal:
                status, code, message = refusal.args
                headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
                content = json.dumps({"error": message}).encode()
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def log_message(self, *_) -> None:
            pass

    return Handler
