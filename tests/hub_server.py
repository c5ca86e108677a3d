"""A Hugging Face Hub on the loopback for the unchanged `huggingface_hub` to talk to, with faults and a record.

    with HubServer() as hub:
        hub.add_model("org/base", {"config.json": "{}"})
        run_cli("plan", ..., **hub.environment(home=tmp_path, token=hub.WRITE))
        assert hub.repo("org/base").commits

`hub_api.py` says what it answers, `hub_repos.py` what it holds.
"""

import re
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, unquote

from tests.hub_api import ROUTES, Hub
from tests.hub_repos import Answer, Commit, HubError, Request, Token

PIECE = 1 << 16
WAIT = 20


@dataclass
class Record:
    """A request as it was seen, from its first line on; the status is 0 until an answer is sent."""

    method: str
    path: str  # with the query, quoted
    token: str | None
    range: str | None
    status: int = 0
    received: int = 0
    sent: int = 0


@dataclass
class Fault:
    kind: str
    path: re.Pattern[str]
    method: str | None
    times: int | None
    skip: int
    value: Any


class DroppedError(Exception):
    """The connection ends here."""


class HubServer(Hub):
    """A Hub that listens on a free port within its `with` block.

    `alice` of `org` has the tokens `WRITE` and `READ`, `STRANGER` is another user's. Paths of faults and records are
    regular expressions, searched in the quoted path with its query.
    """

    WRITE: ClassVar[str] = "hf_write"
    READ: ClassVar[str] = "hf_read"
    STRANGER: ClassVar[str] = "hf_stranger"

    def __init__(self) -> None:
        super().__init__()
        self.tokens[self.WRITE] = Token("alice", "write", ("org",))
        self.tokens[self.READ] = Token("alice", "read", ("org",))
        self.tokens[self.STRANGER] = Token("stranger", "write")
        self.requests: list[Record] = []
        self.errors: list[str] = []  # tracebacks of the server's own mistakes
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def __enter__(self) -> Self:
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.hub = self
        port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # Another host, as for the real one: the client does not follow a redirect to it when it asks for a file's
        # metadata, and sends it no token.
        self.storage_url = f"http://localhost:{port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        assert kind or not self.errors, "\n".join(self.errors)

    # What a test places

    def add_model(
        self,
        name: str,
        content: Path | str | Mapping[str, bytes | str],
        private: bool = False,
        gated: bool = False,
        branch: str = "main",
    ) -> str:
        """Place a folder's files, or a mapping's, as one commit that holds exactly them; its hash."""
        if isinstance(content, Path | str):
            files = {f.relative_to(content).as_posix(): f.read_bytes() for f in Path(content).rglob("*") if f.is_file()}
        else:
            files = {path: text.encode() if isinstance(text, str) else text for path, text in content.items()}
        with self.lock:
            repo = self.repos.get(name) or self.create(name, private, gated)
            repo.refs.setdefault(f"refs/heads/{branch}", repo.find().oid)
            blobs = {path: self.keep(body, self.in_lfs(path, len(body), body[:512])) for path, body in files.items()}
            repo.lfs |= {blob.sha256 for blob in blobs.values() if blob.sha256}
            commit: Commit = repo.add(f"refs/heads/{branch}", blobs, f"Add {len(files)} files")
        return commit.oid

    def environment(self, home: Path | str, token: str | None = None) -> dict[str, str]:
        """What a client's process needs, over whatever is set here; `home` becomes its HF_HOME."""
        offline = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        homes = {"HF_HOME": str(home), "HF_HUB_CACHE": f"{home}/hub", "HF_TOKEN_PATH": f"{home}/token"}
        plain = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
        # Empty is the same as unset, to the client, and takes effect over a variable that is set.
        tokens = {"HF_TOKEN": token or "", "HUGGING_FACE_HUB_TOKEN": ""}
        return {"HF_ENDPOINT": self.url, **homes, **plain, **offline, **tokens}

    # Faults: the first `skip` matching requests pass, the next `times` (None: all) are struck

    def fail(
        self, path: str, status: int, times: int | None = 1, method: str | None = None, skip: int = 0, **headers: str
    ) -> None:
        """Answer with an error, without doing anything; `Retry_After="0"` sets a header."""
        self._add("fail", path, method, times, skip, HubError(status, f"fault {status}", **headers).answer)

    def cut(
        self,
        path: str,
        after_bytes: int,
        times: int | None = 1,
        method: str | None = None,
        skip: int = 0,
        reset: bool = False,
    ) -> None:
        """Drop the connection within the body of a GET's answer, or of an upload; with `reset` not even politely."""
        self._add("cut", path, method, times, skip, (after_bytes, reset))

    def lose(self, path: str, times: int | None = 1, method: str | None = None, skip: int = 0) -> None:
        """Do what is asked and drop the connection instead of an answer."""
        self._add("lose", path, method, times, skip, None)

    def delay(
        self, path: str, seconds: float, times: int | None = None, method: str | None = None, skip: int = 0
    ) -> None:
        """Wait before a request's body is read."""
        self._add("delay", path, method, times, skip, seconds)

    def when(
        self, path: str, call: Callable[[], object], times: int | None = 1, method: str | None = None, skip: int = 0
    ) -> None:
        """Call a function when a request has come in whole, before it is answered: a commit of another, a kill."""
        self._add("when", path, method, times, skip, call)

    def _add(self, kind: str, path: str, method: str | None, times: int | None, skip: int, value: Any) -> None:
        with self.lock:
            self.faults.append(Fault(kind, re.compile(path), method, times, skip, value))

    def struck(self, kind: str, record: Record) -> list[Any]:
        """The values of the faults of a kind that a request meets."""
        values = []
        with self.lock:
            for fault in self.faults:
                if fault.kind != kind or not fault.path.search(record.path):
                    continue
                # A HEAD has no body to cut: it would use up what is meant for the GET after it.
                if fault.method not in (None, record.method) or (kind, record.method) == ("cut", "HEAD"):
                    continue
                if fault.skip:
                    fault.skip -= 1
                elif fault.times is None or fault.times > 0:
                    fault.times = fault.times and fault.times - 1
                    values.append(fault.value)
        return values

    # Accounting

    def asked(self, path: str = "", method: str | None = None, status: int | None = None) -> list[Record]:
        """The requests so far that match."""
        rows = [r for r in list(self.requests) if re.search(path, r.path) and method in (None, r.method)]
        return [r for r in rows if status in (None, r.status)]

    def sent(self, path: str = "", method: str | None = "GET") -> int:
        """Bytes of the bodies of answers, as far as they went out."""
        return sum(r.sent for r in self.asked(path, method))

    def received(self, path: str = "", method: str | None = "PUT") -> int:
        """Bytes of the bodies of requests, as far as they came in."""
        return sum(r.received for r in self.asked(path, method))

    def wait_for(self, path: str, method: str | None = None, status: int | None = None, count: int = 1) -> None:
        """Until so many matching requests have begun, or with a status: been answered."""
        end = time.monotonic() + WAIT
        while len(self.asked(path, method, status)) < count:
            assert time.monotonic() < end, f"no {method or 'request'} {path} within {WAIT} s: {self.requests}"
            time.sleep(0.01)

    def answer(self, record: Record, body: bytes) -> Answer:
        """Find a request's endpoint, check its token, and do it."""
        path, _, query = record.path.partition("?")
        token = self.tokens.get(record.token) if record.token else None
        try:
            if record.token and token is None:
                raise HubError(401, "Invalid credentials in Authorization header")
            for method, route, endpoint in ROUTES:
                if record.method in method.split("|") and (found := re.fullmatch(route, path)):
                    values = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                    request = Request(record.method, record.path, parse_qs(query), body, token, record.range, values)
                    with self.lock:
                        return endpoint(self, request)
            raise HubError(404, f"the Hub of the tests has no {record.method} {path}")
        except HubError as refused:
            return refused.answer
        except Exception:
            self.errors.append(traceback.format_exc())
            # A status that the client does not retry.
            return Answer({"error": self.errors[-1]}, 501)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def handle_error(self, *_: object) -> None:
        self.hub.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # a client that was killed
            self.close_connection = True

    def exchange(self) -> None:
        hub = self.server.hub
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        record = Record(self.command, self.path, token, self.headers.get("Range"))
        hub.requests.append(record)
        try:
            for seconds in hub.struck("delay", record):
                time.sleep(seconds)
            end, reset = next(iter(hub.struck("cut", record)), (None, False))
            upload = self.command in ("PUT", "POST")
            body = b"".join(self.incoming(record, end if upload else None))
            for call in hub.struck("when", record):
                call()
            answer = next(iter(hub.struck("fail", record)), None) or hub.answer(record, body)
            if hub.struck("lose", record):
                raise DroppedError
            self.outgoing(record, answer, None if upload else end)
        except DroppedError:
            if reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = exchange  # noqa: N815

    def incoming(self, record: Record, end: int | None) -> Iterator[bytes]:
        """The body of a request, of which a cut leaves the first `end` bytes."""
        assert "Transfer-Encoding" not in self.headers, "no client sends a body in chunks, which a storage refuses"
        length = int(self.headers.get("Content-Length", 0))
        while record.received < length:
            piece = self.rfile.read(min(PIECE, (length if end is None else min(length, end)) - record.received))
            if not piece:  # cut, or the client is gone
                raise DroppedError
            record.received += len(piece)
            yield piece

    def outgoing(self, record: Record, answer: Answer, end: int | None) -> None:
        record.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = memoryview(answer.body)[:end]
        for start in range(0, len(body), PIECE):
            self.wfile.write(body[start : start + PIECE])
            record.sent += len(body[start : start + PIECE])
        if end is not None:
            raise DroppedError

    def log_message(self, *_: object) -> None:
        pass
