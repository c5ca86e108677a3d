"""What the Hugging Face Hub of the tests holds: repositories with every commit ever made, contents, rights.

The endpoints on top are in `hub_api.py`, the HTTP, the faults and the accounting in `hub_server.py`.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from types import MappingProxyType
from typing import Any

import yaml  # type: ignore[import-untyped]  # a dependency of huggingface_hub

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.npy", "*.npz", "*.gguf", "*.msgpack", "*.model")
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
CARD = re.compile(r"\A\s*---[\r\n]+(.*?)[\r\n]+---(\r?\n|\Z)", re.DOTALL)
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Blob:
    """A file's content: by git's name for it, or for what lies in LFS by that of its pointer."""

    oid: str
    size: int
    sha256: str | None = None  # of an LFS file only
    pointer: int = 0

    @property
    def key(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    name: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main", "refs/tags/v1", "refs/pr/1"
    commits: list[Commit] = field(default_factory=list)  # all that were ever made, on any branch, oldest first
    granted: set[str] = field(default_factory=set)  # whom a gated repository lets in
    lfs: set[str] = field(default_factory=set)  # what was uploaded whole, committed or not

    def ref(self, revision: str) -> str | None:
        return next((r for r in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}") if r in self.refs), None)

    def find(self, revision: str = "main") -> Commit:
        oid = self.refs[ref] if (ref := self.ref(revision)) else revision
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits that lead to a revision, newest first."""
        commits = [self.find(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.find(parent))
        return commits

    def add(self, ref: str, files: Mapping[str, Blob], title: str, message: str = "", author: str = "nobody") -> Commit:
        parent, number = self.refs.get(ref), len(self.commits)
        date = (EPOCH + timedelta(minutes=number)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        tree = {path: files[path].oid for path in sorted(files)}
        oid = hashlib.sha1(json.dumps([self.name, number, parent, title, tree]).encode()).hexdigest()
        commit = Commit(oid, parent, title, message, author, date, MappingProxyType(dict(files)))
        self.commits.append(commit)
        self.refs[ref] = oid
        return commit


@dataclass(frozen=True)
class Token:
    user: str
    role: str = "write"  # or "read"
    orgs: tuple[str, ...] = ()


@dataclass
class Request:
    """What an endpoint needs to know of a request."""

    method: str
    path: str
    query: dict[str, list[str]]
    body: bytes
    token: Token | None
    range: str | None
    values: dict[str, str] = field(default_factory=dict)  # what its path names

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


class Answer:
    """A status, headers (`X_Some_Name` for X-Some-Name) and a body: bytes, or what becomes JSON."""

    def __init__(self, body: Any = b"", status: int = 200, /, **headers: str) -> None:
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if not isinstance(body, bytes):
            self.headers.setdefault("Content-Type", "application/json; charset=utf-8")


class HubError(Exception):
    """An error as the Hub reports it: a status, a message, and a code from which the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        named = {"X_Error_Code": code} if code else {}
        first = message.partition("\n")[0]
        self.answer = Answer({"error": message}, status, X_Error_Message=first, **named, **headers)


def card_data(text: str) -> dict[str, Any] | None:
    """The metadata of a model card, None without any."""
    if not (found := CARD.match(text)):
        return None
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise HubError(400, f"Invalid metadata in README.md: {error}") from None
    if not isinstance(data, dict):
        raise HubError(400, 'Invalid metadata in README.md: "metadata" must be of type object')
    return data


class Store:
    """All that the Hub knows. Nothing here is locked: the server lets in one request at a time."""

    def __init__(self) -> None:
        self.url = self.storage_url = ""
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}
        self.tokens: dict[str, Token] = {}
        self.contents: dict[str, bytes] = {}
        self.parts: dict[tuple[str, str], dict[int, bytes]] = {}
        self.part_size: int | None = None  # larger LFS files are uploaded in such parts
        self.lfs_above = 10_000_000  # larger files lie in LFS whatever their name

    def repo(self, name: str) -> Repo:
        return self.repos[name]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """A revision as it would be downloaded."""
        return {path: self.contents[blob.key] for path, blob in self.repos[name].find(revision).files.items()}

    def keep(self, content: bytes, lfs: bool = False) -> Blob:
        """Store content under its own name."""
        sha256, text = None, content
        if lfs:
            sha256 = hashlib.sha256(content).hexdigest()
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        oid = hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()
        blob = Blob(oid, len(content), sha256, len(text) if lfs else 0)
        self.contents[blob.key] = content
        return blob

    def in_lfs(self, path: str, size: int, sample: bytes) -> bool:
        named = any(fnmatch(path.rpartition("/")[2], pattern) for pattern in LFS_PATTERNS)
        return size > 0 and (named or size > self.lfs_above or b"\0" in sample)

    def create(self, name: str, private: bool = False, gated: bool = False) -> Repo:
        repo = self.repos[name] = Repo(name, private, gated)
        repo.add("refs/heads/main", {".gitattributes": self.keep(ATTRIBUTES)}, "initial commit")
        return repo

    # Rights

    def member(self, token: Token | None, name: str) -> bool:
        return token is not None and name.split("/")[0] in (token.user, *token.orgs)

    def unknown(self, token: Token | None) -> HubError:
        # Without a token the Hub does not tell whether a repository exists. Over https the client takes any such 401
        # for a missing one; over http it needs the code.
        status, message = (404, "Repository not found") if token else (401, "Invalid username or password.")
        return HubError(status, message, "RepoNotFound")

    def open(self, request: Request, need: str = "see") -> Repo:
        """The repository of a request if its user may `see` it, `read` its files, `propose` changes, `write`."""
        named, token = request.values["name"], request.token
        name = named
        while name not in self.repos and name in self.moved:
            name = self.moved[name]
        repo = self.repos.get(name)
        if repo is None or (repo.private and not self.member(token, name)):
            raise self.unknown(token)
        if name != named and named in request.path:
            location = request.path.replace(named, name, 1)
            raise HubError(307, f"Temporary Redirect. Redirecting to {location}", Location=location)
        if need == "read" and repo.gated and not self.member(token, name):
            restricted = f"Access to model {name} is restricted"
            if token is None:
                raise HubError(401, f"{restricted}. You must be authenticated to access it.", "GatedRepo")
            if token.user not in repo.granted:
                raise HubError(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")
        if need in ("propose", "write"):
            self.check_write(token, name if need == "write" else None)
        return repo

    def check_write(self, token: Token | None, name: str | None) -> Token:
        if token is None:
            raise self.unknown(None)
        if token.role != "write":
            raise HubError(403, "Forbidden: a token with write permissions is required")
        if name is not None and not self.member(token, name):
            message = f"You don't have the rights to write to {name}: pass `create_pr=1` to create a Pull Request"
            raise HubError(403, message)
        return token
