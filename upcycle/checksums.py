"""Checksums of a checkpoint, made while it is written: xxh3 of each tensor's stretches and of every other file.

A tensor's bytes are summed by stretches of 16 MiB from its beginning, so that a reader knows which part of which tensor
is damaged, and needs no second pass to know that nothing is. They find damage, not forgery: whoever can change the
weights can change the sums.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import xxhash

from upcycle.checkpoint import SUMS, read_header_bytes, read_json, write_json
from upcycle.errors import CheckpointError

ALGORITHM: Final = "xxh3_64"
STRETCH: Final = 16 << 20  # bytes
FORMAT_VERSION: Final = 1
MAX_SUMS: Final = 100_000_000  # bytes of the file: a sum for each 16 MiB and each tensor stays far below
UNCOVERED: Final = (SUMS, "README.md")  # people edit the card


class TensorSum:
    """The sums of one tensor, whose bytes are given in their order."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._state = xxhash.xxh3_64()
        self._room = STRETCH

    def update(self, data: memoryview) -> None:
        """Take the next bytes."""
        while len(data) >= self._room:
            self._state.update(data[: self._room])
            data = data[self._room :]
            self._done.append(self._state.hexdigest())
            self._state.reset()
            self._room = STRETCH
        self._state.update(data)
        self._room -= len(data)

    def finish(self) -> list[str]:
        """The sums of all stretches, the last one shorter; none of an empty tensor."""
        return self._done if self._room == STRETCH else [*self._done, self._state.hexdigest()]


def write_sums(folder: Path, tensors: Mapping[str, Sequence[str]]) -> None:
    """Write the checksums of a folder's files beside them; those of tensors are known already.

    Weights' files are not read again but for their headers; every other file is small.
    """
    covered = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in UNCOVERED]
    files = {path.name: file_sum(path) for path in covered}
    content = {
        "format_version": FORMAT_VERSION,
        "algorithm": ALGORITHM,
        "stretch": STRETCH,
        "files": files,
        "tensors": {name: list(sums) for name, sums in tensors.items()},
    }
    write_json(folder / SUMS, {**content, "digest": digest(content)})


def file_sum(file: Path) -> dict[str, Any]:
    """A file's size and its sum: of a safetensors file that of its header alone, as its tensors have their own."""
    if file.suffix == ".safetensors":
        return {"size": file.stat().st_size, "header": xxhash.xxh3_64_hexdigest(read_header_bytes(file))}
    data = file.read_bytes()
    return {"size": len(data), "sum": xxhash.xxh3_64_hexdigest(data)}


def digest(content: Mapping[str, Any]) -> str:
    """The sum of the sums."""
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def read_sums(folder: Path) -> dict[str, Any] | None:
    """What `write_sums` wrote, checked against its own digest; None where there is none.

    Raises:
        CheckpointError: it is damaged, or of a version that is not known.
    """
    file = folder / SUMS
    if not file.exists():
        return None
    content = read_json(file, MAX_SUMS)
    found = content.pop("digest", None)
    if found != digest(content):
        raise CheckpointError(f"{file}: its own digest is {found!r}, expected {digest(content)!r}; it is damaged")
    known = (content.get("format_version"), content.get("algorithm"), content.get("stretch"))
    if known != (FORMAT_VERSION, ALGORITHM, STRETCH):
        raise CheckpointError(f"{file}: version, algorithm and stretch {known} are not known to this upcycle")
    return content


def sums_of(pieces: Iterable[memoryview]) -> list[str]:
    """The sums of a tensor whose bytes come in pieces."""
    tensor = TensorSum()
    for piece in pieces:
        tensor.update(piece)
    return tensor.finish()
