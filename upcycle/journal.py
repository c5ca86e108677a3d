"""What a merge has written, tensor by tensor, so that the same merge started again goes on after a kill.

A line a finished tensor, with its checksums. Nothing is believed: a tensor counts as written only if its bytes are read
back and have those sums, so that it does not matter what of data and journal reached the disk first.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from upcycle.checkpoint import TensorInfo
from upcycle.staging import empty
from upcycle.version import __version__

JOURNAL: Final = "journal.jsonl"


class Journal:
    """The journal of one staging folder.

    Attributes:
        claimed: the sums of tensors that a former merge says it has written.
        refusal: why what lay in the folder was of no use, or None.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.file = folder / JOURNAL
        former, self.claimed = _read(self.file)
        self.refusal = None if former is None else _difference(former, identity)
        if former is None or self.refusal:
            self.claimed = {}
            empty(folder)
        self._descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        # Before anything else, also behind a line that a kill cut short.
        self._line({"identity": identity} if not self.claimed else {})

    def add(self, name: str, sums: Sequence[str]) -> None:
        """A tensor is written."""
        self._line({"tensor": name, "sums": list(sums)})

    def _line(self, value: Mapping[str, Any]) -> None:
        os.write(self._descriptor, b"\n" + json.dumps(value).encode() + b"\n")

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """All is written."""
        self.file.unlink()


def identity(plan: str, max_shard_size: int, sources: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, Any]:
    """What makes a merge the same one: its plan's digest, the shards, and each source's files as they are now."""
    stamps = {
        name: {
            file.name: list(stamp(file)) for file in sorted({file for info in tensors.values() for file in info.files})
        }
        for name, tensors in sources.items()
    }
    return {"upcycle": __version__, "sources": stamps, "plan": plan, "max_shard_size": max_shard_size}


def stamp(file: Path) -> tuple[int, int, int, int]:
    """What changes when a file does: inode, size, and the times in ns of which nobody can set the latter back."""
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(file: Path) -> tuple[dict[str, Any] | None, dict[str, list[str]]]:
    """The identity that a journal begins with, and the tensors that it names; a line cut short is passed over."""
    former, claimed = None, {}
    if file.is_file() and not file.is_symlink():
        for line in file.read_bytes().splitlines():
            try:
                value = json.loads(line)
                former = value.get("identity", former)
                if "tensor" in value:
                    claimed[str(value["tensor"])] = [str(one) for one in value["sums"]]
            except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
                continue
    return former if isinstance(former, dict) else None, claimed


def _difference(former: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In words, what makes two merges different ones."""
    if former.get("upcycle") != now["upcycle"]:
        return f"it was written by upcycle {former.get('upcycle')}"
    before: Any = former.get("sources")
    for name, files in now["sources"].items():
        if not isinstance(before, dict) or name not in before:
            return f"seed '{name}' is new"
        if before[name] != files:
            return f"a file of seed '{name}' has changed"
    if former.get("plan") != now["plan"]:
        return "the recipe, an option or a seed is another"
    return "--max-shard-size is another" if former.get("max_shard_size") != now["max_shard_size"] else None
