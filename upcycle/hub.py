"""The Hugging Face Hub: what a repository holds, read in parts or downloaded, and what its refusals mean.

All talking is `huggingface_hub`'s: its cache, token, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, Xet. Importing that costs 0.3 s,
so it is imported where it is needed.
"""

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeVar

from upcycle.checkpoint import (
    ADAPTER_CONFIG,
    CARD,
    CONFIG,
    COPIED_FILES,
    INDEX,
    MAX_INDEX,
    MODELING_FILES,
    PROVENANCE,
    SUMS,
    WEIGHTS,
    TensorInfo,
    parse_header,
    read_header,
    read_index,
    read_json,
)
from upcycle.errors import CheckpointError, HubError
from upcycle.run_folder import METRICS, RECORD

# Beside the weights; never other layouts of the same weights, nor subfolders.
MODEL_FILES: Final = (CONFIG, INDEX, CARD, *COPIED_FILES, *MODELING_FILES, PROVENANCE, SUMS)
RECORDS: Final = (RECORD, METRICS)
ATTEMPTS: Final = 5
NETWORK_ATTEMPTS: Final = 3  # where there is no answer at all
WORKERS: Final = 4
MAX_REMOTE_CARD: Final = 100_000  # bytes: what a plan downloads of a seed's card, for its licence
GUESS: Final = 64_000  # bytes asked for at once of a file whose header has an unknown length
MAX_FILE: Final = 100_000_000  # bytes of what is not weights; Gemma's tokenizers have 34 MB
SILENCE: Final = 30  # seconds without an answer
PASSING: Final = (408, 429, 500, 502, 503, 504)  # statuses that may be others a moment later
T = TypeVar("T")
TOKEN: Final = re.compile(r"hf_\w+|(?<=Bearer )\S+")


def ask(what: str, call: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """What the client's `call` returns; tried again where the failure may pass, as the client does for some calls only.

    Raises:
        HubError: `what` failed, why, and what to do.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # Of httpx or, in newer clients, httpx2: the base of network errors and statuses alike.
    http_error: Any = HfHubHTTPError.__bases__[0]
    for attempt in range(1, attempts + 1):
        try:
            with _heard_interrupts():
                return call()
        except Exception as error:
            silent = isinstance(error, http_error) and _status(error) is None  # the network's failure
            allowed = NETWORK_ATTEMPTS if silent else ATTEMPTS if _status(error) in PASSING else 1
            if attempt < min(allowed, attempts):
                time.sleep(min(2 ** (attempt - 1), 8))
                continue
            if isinstance(error, (http_error, EntryNotFoundError, OSError, RuntimeError, ValueError)):
                # Not from it: the client's messages may hold signed addresses.
                raise HubError(f"{what}: {explain(error)}") from None
            raise
    raise AssertionError


@contextmanager
def _heard_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end if it was raised within and got lost.

    What cleans up behind it in the client may fail in its turn, which looks like the network's failure, for which the
    client itself may try again.
    """
    came = False
    handlers: dict[signal.Signals, Any] = {}

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal came
        try:
            handlers[signal.Signals(number)](number, frame)
        except KeyboardInterrupt:
            came = True
            raise

    if threading.current_thread() is threading.main_thread():
        handlers |= {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, hear)
        yield
    except Exception:  # any, as it only covers an interrupt, which is raised below in its place
        if not came:
            raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def explain(error: Exception) -> str:
    """A failure of the client in one sentence, and what to do; never a token."""
    from huggingface_hub import errors

    status = _status(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and it is not in the cache; unset it, or download it first"
    if isinstance(error, errors.GatedRepoError):
        return "it is gated; accept its terms on its page, and log in (hf auth login)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such branch, tag or commit"
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return "there is no such file"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private; check its name, or log in (hf auth login)"
    if status == 401:
        return "the token is not valid; log in again (hf auth login), or unset HF_TOKEN"
    if status == 403:
        return "the token may not do that; take one that may write (hf auth login)"
    if status == 429:
        return "the Hub asks for fewer requests (429); try again in a few minutes"
    if status is not None and status >= 500:
        return f"the Hub answers {status}, and did so {ATTEMPTS} times; try again later"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub refuses: {_first_line(error)}"
    if isinstance(error, errors.LocalEntryNotFoundError) or (status is None and _is_network(error)):
        return (
            f"the Hub cannot be reached ({type(error).__name__}: {_first_line(error)}); check the network; what is in "
            "the cache is used with HF_HUB_OFFLINE=1"
        )
    return f"{type(error).__name__}: {_first_line(error)}"


def _is_network(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError))


def _status(error: BaseException | None) -> int | None:
    """The status of the answer that made the client fail; it wraps some errors in others."""
    for _ in range(5):
        if error is None:
            return None
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return TOKEN.sub("hf_…", text)[:300]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its bytes, and git's name for its content, or SHA-256 for what lies in LFS."""

    size: int
    etag: str


@dataclass(frozen=True)
class Repository:
    """What the Hub says of one commit of a model repository."""

    name: str
    commit: str
    files: Mapping[str, RemoteFile]

    @cached_property
    def folder(self) -> Path:
        """Where the cache keeps this commit's files."""
        return self.get(_main_file(self.files)).parent

    def get(self, file: str) -> Path:
        """The place in the cache of a file that is not weights, downloaded if it is not there.

        Raises:
            HubError: it cannot be had, or is larger than any such file.
        """
        size = self.files[file].size if file in self.files else 0
        if size > MAX_FILE:
            raise HubError(f"Hub repository {self.name}: {file} has {size:,} bytes, expected at most {MAX_FILE:,}")
        return self._download(file, None)

    def _download(self, file: str, bar: Any) -> Path:
        from huggingface_hub import hf_hub_download

        what = f"Hub repository {self.name}, file {file}"
        return Path(ask(what, lambda: hf_hub_download(self.name, file, revision=self.commit, tqdm_class=bar)))

    def download(self, files: Iterable[str], progress: Callable[[int], None] | None = None) -> None:
        """Download files to the cache, several at once; what is there already is not asked for again.

        Raises:
            HubError: one cannot be had, or the disk has no room for them.
        """
        missing = self.missing(files)
        needed = sum(self.files[file].size for file in missing)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise HubError(
                f"Hub repository {self.name}: {needed:,} bytes are to be downloaded, but {self.folder} has only "
                f"{free:,} free; make room, or set HF_HOME to another disk"
            )
        bar = _bar(progress or (lambda _: None))
        with ThreadPoolExecutor(WORKERS) as pool:
            futures = [pool.submit(self._download, file, bar) for file in missing]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def missing(self, files: Iterable[str]) -> list[str]:
        """Those of the files that are not in the cache."""
        return sorted(file for file in files if not (self.folder / file).is_file())

    def read(self, file: str, start: int, count: int) -> bytes:
        """`count` bytes of a file from byte `start`, and no more of it; fewer where the file ends.

        Raises:
            HubError: they cannot be had.
        """
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        def call() -> bytes:
            url = hf_hub_url(self.name, file, revision=self.commit)
            headers = {
                **build_hf_headers(),
                "Range": f"bytes={start}-{start + count - 1}",
                "Accept-Encoding": "identity",
            }
            with get_session().stream("GET", url, headers=headers, timeout=SILENCE, follow_redirects=True) as response:
                if response.status_code >= 400:
                    response.read()
                hf_raise_for_status(response)
                # A server may ignore the range, and send all of the file from its beginning.
                skip, data = (0 if response.status_code == 206 else start), bytearray()
                if skip > MAX_FILE:
                    raise OSError("parts of large files cannot be read there, as ranges are ignored")
                for piece in response.iter_bytes():
                    data += piece
                    if len(data) >= skip + count:
                        break
                return bytes(data[skip : skip + count])

        return ask(f"Hub repository {self.name}, file {file}", call) if count else b""


def _main_file(files: Iterable[str]) -> str:
    """The file by which a repository is known in the cache."""
    return ADAPTER_CONFIG if ADAPTER_CONFIG in files and CONFIG not in files else CONFIG


def is_repository_name(source: str) -> bool:
    """Whether `source` reads like `name`, `org/name` or one with `@revision`."""
    repo, _, revision = source.partition("@")
    named = re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", repo) and not repo.startswith(".") and ".." not in repo
    return bool(named) and (not revision or bool(re.fullmatch(r"[\w./-]{1,250}", revision)))


def find_repository(source: str) -> Repository:
    """Look up `org/name` or `org/name@revision`; a branch is resolved to its commit.

    Raises:
        HubError: there is none, it may not be read, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download

    name, _, revision = source.partition("@")
    what = f"Hub repository {source}"
    info = ask(what, lambda: HfApi().model_info(name, revision=revision or None, files_metadata=True, timeout=SILENCE))
    files = {}
    for sibling in info.siblings or []:
        etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        files[sibling.rfilename] = RemoteFile(sibling.size or 0, etag or "")
    if info.sha is None:
        raise HubError(f"{what}: the Hub names no commit of it")
    main = _main_file(files)
    if main in files and files[main].size <= MAX_FILE and revision != info.sha:
        # By the branch's name, by which the cache finds it again when nobody can be asked.
        ask(what, lambda: hf_hub_download(info.id, main, revision=revision or None))
    return Repository(info.id, info.sha, files)


def look_up(source: str) -> Repository:
    """`find_repository`, for what could have been a folder.

    Raises:
        HubError: it is neither.
    """
    try:
        return find_repository(source)
    except HubError as error:
        raise HubError(f"there is no folder {source}; {error}") from error


def weight_files(repository: Repository) -> list[str]:
    """The safetensors files of a model.

    Raises:
        HubError: it has none.
    """
    if WEIGHTS in repository.files:
        return [WEIGHTS]
    if INDEX in repository.files:
        return [file for file in repository.files if re.fullmatch(r"[\w.-]+\.safetensors", file)]
    pickled = next((file for file in repository.files if file.endswith((".bin", ".pt", ".pth"))), None)
    raise HubError(
        f"Hub repository {repository.name} holds neither {WEIGHTS} nor {INDEX}"
        + (
            f"; its weights are pickled ({pickled}), so convert them first: load them with transformers and "
            "save_pretrained them"
            if pickled
            else f"; it holds {', '.join(sorted(repository.files)[:8]) or 'no file at all'}"
        )
    )


def read_remote_tensors(repository: Repository) -> dict[str, TensorInfo]:
    """Every tensor of a repository's model, as `read_tensors` gives them for its folder, from the headers alone.

    Raises:
        CheckpointError: a damaged index or header.
        HubError: they cannot be had, or there is no model.
    """
    files = weight_files(repository)
    folder = repository.folder
    if files == [WEIGHTS]:
        return read_remote_header(repository, folder / WEIGHTS)
    weight_map = read_json(repository.get(INDEX), MAX_INDEX).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    shards = {name: names.count(name) for name in names if name in files}
    with ThreadPoolExecutor(2 * WORKERS) as pool:
        # A tensor takes some 110 bytes of a header; what a guess lacks is asked for.
        read = {
            folder / name: pool.submit(read_remote_header, repository, folder / name, 500 + 120 * count)
            for name, count in shards.items()
        }
        headers = {file: future.result() for file, future in read.items()}

    def header(file: Path) -> dict[str, TensorInfo]:
        if file not in headers:
            raise CheckpointError(f"{INDEX} names {file.name}, which the Hub repository {repository.name} lacks")
        return headers[file]

    return read_index(folder, header)


def read_remote_header(repository: Repository, file: Path, guess: int = GUESS) -> dict[str, TensorInfo]:
    """A safetensors header, of which some `guess` bytes are asked for at once if the file is not in the cache."""
    if file.is_file():
        return read_header(file)
    data, place = repository.read(file.name, 0, guess), 0

    def read(count: int) -> bytes:
        nonlocal data, place
        if len(data) < place + count:
            data += repository.read(file.name, len(data), place + count - len(data))
        place += count
        return data[place - count : place]

    return parse_header(file, repository.files[file.name].size, read)


def model_folder(
    source: str | Path, progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
) -> Path:
    """The folder of a model given as a folder or by its name on the Hub; downloaded, with its records, if need be.

    What is neither is returned as it is, for its reader to say so. `progress` is opened with a label and the bytes.

    Raises:
        HubError: it cannot be had.
    """
    name = str(source)
    if os.path.lexists(source) or not is_repository_name(name):
        return Path(source)
    if is_offline():
        folder = cached_folder(name)
        if folder is None:
            raise HubError(
                f"there is no folder {name}, and no Hub repository of that name in the cache; as HF_HUB_OFFLINE is "
                "set, nobody was asked"
            )
        return folder
    repository = look_up(name)
    wanted = {*weight_files(repository), *MODEL_FILES, *RECORDS} & {*repository.files}
    files = repository.missing(wanted)
    if files:
        with progress(f"download {name}", sum(repository.files[file].size for file in files)) as advance:
            repository.download(files, advance)
    return repository.folder


def cached_folder(source: str, file: str = CONFIG) -> Path | None:
    """The folder in the cache of a repository of which `file` was downloaded before, or None; asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = source.partition("@")
    found = try_to_load_from_cache(name, file, revision=revision or None)
    return Path(found).parent if isinstance(found, str) else None


def is_offline() -> bool:
    """Whether the user asked that nobody is asked."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _bar(progress: Callable[[int], None]) -> Any:
    """What the client takes for a progress bar, which it tells the bytes that came."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            progress(int(n or 0))
            return None

    return Bar
