"""What a push to the Hugging Face Hub consists of: files and the card, what is there already, what it replaces."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from upcycle.card import is_handwritten, make_card, read_card, title
from upcycle.card_metadata import split_card
from upcycle.checkpoint import (
    CARD,
    CONFIG,
    COPIED_FILES,
    INDEX,
    MAX_JSON,
    MODELING_FILES,
    PROVENANCE,
    SUMS,
    WEIGHTS,
    parse_json,
    read_json,
    read_tensors,
)
from upcycle.errors import CheckpointError, HubError
from upcycle.hub import RECORDS, RemoteFile, Repository
from upcycle.hub_account import Target
from upcycle.licenses import check_licenses
from upcycle.run_folder import RECORD
from upcycle.version import __version__

PICTURES: Final = "report-pictures"
CHUNK: Final = 4 << 20  # bytes read at once
# Beside the files that every result has: what a loader reads, and what would be read in place of what is pushed.
_OF_A_MODEL: Final = re.compile(
    r"(pytorch_|adapter_)?model[\w.-]*\.(safetensors|bin)(\.index\.json)?|adapter_config\.json|tf_model\.h5|"
    r"flax_model\.msgpack|consolidated[\w.-]*\.safetensors|(configuration|modeling|tokenization)_\w+\.py"
)
_WEIGHTS: Final = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack)")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Push:
    """What a push will do.

    Attributes:
        files: what the repository holds of us afterwards, by its path there: a file, or the made card's bytes.
        unchanged: those of the files that are there already.
        deleted: files of the former model that go.
        left_out: what lies in the folder and is not uploaded.
        replaces: in words, the other model that would be replaced; None if there is none.
    """

    folder: Path
    target: Target
    title: str
    files: Mapping[str, Path | bytes]
    unchanged: frozenset[str]
    deleted: Sequence[str]
    left_out: Sequence[str]
    replaces: str | None

    @property
    def card(self) -> str:
        """The made README.md."""
        content = self.files[CARD]
        return content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8")

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {name: _size(content) for name, content in self.files.items()}

    @property
    def changed(self) -> list[str]:
        """Files that the commit adds or changes, large ones last."""
        sizes = self.sizes
        return sorted({*self.files} - self.unchanged, key=lambda name: (sizes[name], name))


def read_provenance(folder: Path) -> dict[str, Any]:
    """A result's upcycle.json.

    Raises:
        CheckpointError: there is none, so upcycle did not make the folder; or it is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG}; expected the folder of a checkpoint")
    if not (folder / PROVENANCE).is_file():
        raise CheckpointError(
            f"{folder} holds no {PROVENANCE}: it was not made by upcycle; upload it with the Hub's own "
            "command, hf upload"
        )
    return read_json(folder / PROVENANCE)


def plan_push(
    folder: Path,
    target: Target,
    license: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    progress: Progress = lambda _: None,
) -> Push:
    """Compare a folder with what the Hub has; writes nothing anywhere.

    Args:
        license: of the result, where those of its seeds do not settle it.
        evaluation: what `upcycle eval --json` printed, for the card.
        progress: called with the bytes compared since the last call, of all files but the card.

    Raises:
        CheckpointError, OutputError, HubError: the folder, its licences, or what the repository holds.
    """
    provenance = read_provenance(folder)
    check_licenses(provenance, license)
    files: dict[str, Path | bytes] = {**result_files(folder)}
    pictures = sorted(name for name in files if name.startswith(f"{PICTURES}/"))
    left_out = _left_out(folder, files)
    card = make_card(
        folder,
        existing=_existing_card(folder, target.head),
        repository=target.name,
        license=license,
        evaluation=evaluation,
        pictures=pictures,
    )
    there = target.head.files if target.head else {}
    unchanged = {name for name, content in files.items() if is_same(content, there.get(name), progress)}
    files[CARD] = card.encode()
    if is_same(files[CARD], there.get(CARD)):
        unchanged.add(CARD)
    return Push(
        folder=folder,
        target=target,
        title=f"Upload {title(provenance, RECORD in files)}, by upcycle {__version__}",
        files=files,
        unchanged=frozenset(unchanged),
        deleted=[name for name in sorted(there) if is_of_a_model(name) and name not in files],
        left_out=left_out,
        replaces=replaced_model(target, provenance, RECORD in files),
    )


def result_files(folder: Path) -> dict[str, Path]:
    """The files of a result that are pushed, by their path in the repository; the card is made anew.

    Raises:
        CheckpointError: there are no weights, or they are damaged.
    """
    weights = {info.file.name for info in read_tensors(folder).values()}
    index = set() if weights == {WEIGHTS} else {INDEX}
    beside = {CONFIG, PROVENANCE, SUMS, *COPIED_FILES, *MODELING_FILES, *RECORDS}
    names = sorted({*weights, *index, *(name for name in beside if (folder / name).is_file())})
    pictures = sorted(path for path in (folder / PICTURES).glob("*.png") if not path.name.startswith("."))
    return {name: folder / name for name in names} | {f"{PICTURES}/{path.name}": path for path in pictures}


def _left_out(folder: Path, files: Iterable[str]) -> list[str]:
    known = {CARD, *files}
    found = []
    for path in sorted(folder.iterdir()):
        if path.name == PICTURES and path.is_dir():
            inside = (f"{PICTURES}/{one.name}" for one in sorted(path.iterdir()))
            found += [name for name in inside if name not in known]
        elif path.name not in known:
            found.append(f"{path.name}/" if path.is_dir() else path.name)
    return found


def is_of_a_model(name: str) -> bool:
    """Whether a repository's file is part of a model, and goes when another takes its place."""
    ours = (CONFIG, INDEX, PROVENANCE, SUMS, *COPIED_FILES, *MODELING_FILES, *RECORDS)
    return name in ours or bool(_OF_A_MODEL.fullmatch(name))


def _existing_card(folder: Path, head: Repository | None) -> str:
    """The card with what people wrote: the folder's, else the repository's."""
    own = read_card(folder)
    return own if is_handwritten(own) else read_remote(head, CARD).decode(errors="replace")


def stated_license(folder: Path) -> str | None:
    """The licence that the folder's own card states, as its people wrote it or as all seeds have it.

    Raises:
        DataError: the card's metadata cannot be read.
    """
    metadata, _ = split_card(read_card(folder))
    stated = metadata.get("license_name") or metadata.get("license")
    return stated if isinstance(stated, str) else None


def read_remote(head: Repository | None, name: str) -> bytes:
    """A small file of a repository; nothing where it has none.

    Raises:
        HubError: it cannot be had.
    """
    if head is None or name not in head.files:
        return b""
    return head.read(name, 0, min(head.files[name].size, MAX_JSON))


def replaced_model(target: Target, provenance: Mapping[str, Any], trained: bool) -> str | None:
    """In words, the model on the target's branch that a push would replace; None if it is the same, or there is none.

    The same is one of the same plan, merged or trained; but a merged one in the place of a trained one is not.

    Raises:
        HubError: what is there cannot be read.
    """
    head = target.head
    if head is None or not any(name in (CONFIG, PROVENANCE) or _WEIGHTS.fullmatch(name) for name in head.files):
        return None
    if PROVENANCE not in head.files:
        shown = [name for name in sorted(head.files) if name == CONFIG or _WEIGHTS.fullmatch(name)]
        return f"a model that upcycle did not make ({', '.join(shown[:3])}{', …' if len(shown) > 3 else ''})"
    try:
        there = parse_json(read_remote(head, PROVENANCE))
    except (ValueError, RecursionError):
        return f"a model whose {PROVENANCE} is damaged"
    if not isinstance(there, dict):
        return f"a model whose {PROVENANCE} is damaged"
    was_trained = RECORD in head.files
    if there.get("plan") == provenance.get("plan") and (trained or not was_trained):
        return None
    return describe(there, was_trained)


def describe(provenance: Mapping[str, Any], trained: bool) -> str:
    """A result in a few words, and which plan it is."""
    return f"{title(provenance, trained)} (plan {str(provenance.get('plan'))[:12]}…)"


def check_replacing(target: Target, replaces: str | None, ours: str, pull_request: bool = False) -> None:
    """Refuse to replace another model; a branch without a commit of its own and a pull request replace none.

    Raises:
        HubError: what is there, what would be pushed, and what to do.
    """
    if replaces and not pull_request and not target.is_fresh:
        raise HubError(
            f"Hub repository {target.name}, branch {target.branch}, holds another model: {replaces}; to be pushed is "
            f"{ours}. --yes replaces it (its history stays); or choose another repository or --branch, or propose it "
            "with --create-pr"
        )


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def is_same(content: Path | bytes, remote: RemoteFile | None, progress: Progress = lambda _: None) -> bool:
    """Whether a file's bytes are what the Hub has: by SHA-256 in LFS, else by git's name for them."""
    size = _size(content)
    if remote is None or remote.size != size:
        progress(size)
        return False
    state = hashlib.sha256() if len(remote.etag) == 64 else hashlib.sha1(b"blob %d\0" % size)
    for piece in [content] if isinstance(content, bytes) else _pieces(content):
        state.update(piece)
        progress(len(piece))
    return state.hexdigest() == remote.etag


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as handle:
        while piece := handle.read(CHUNK):
            yield piece
