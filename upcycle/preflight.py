"""What must be there before a merge's first byte: sources to read, a place to write, room, files to open."""

import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from upcycle.checkpoint import MAX_JSON, json_bytes, parse_json
from upcycle.errors import OutputError, SeedError
from upcycle.staging import allocated_bytes, free_bytes, partial_folder

MARGIN: Final = 64 << 20  # bytes of disk to leave free beside the output
HANDLES: Final = 64  # open files of everything else


def check_sources(files: Mapping[Path, str]) -> None:
    """Refuse files that may not be read; by file the name of its seed.

    Raises:
        SeedError: the first of them.
    """
    for file, name in files.items():
        if not os.access(file, os.R_OK):
            raise SeedError(f"seed '{name}': {file} may not be read by this user; chmod it, or run as its owner")


def check_place(out: Path, nbytes: int) -> None:
    """Refuse a place that may not be written or that has no room; what a former merge left there counts as room.

    Raises:
        OutputError: and how much is needed and free.
    """
    parent = out.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {out}: {parent} may not be written by this user; choose another --out")
    free, needed = free_bytes(parent), nbytes + MARGIN
    if free + allocated_bytes(partial_folder(out)) < needed:
        raise OutputError(
            f"output {out} needs {needed:,} bytes ({nbytes:,} and a margin), but only {free:,} are free on that disk; "
            "free some, or choose another --out"
        )


def check_readable_again(seed: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to write JSON so large that it would be refused when read: a seed's config may hold anything.

    Raises:
        SeedError: the first of these files.
    """
    for name, value in files.items():
        data = json_bytes(value)
        try:
            if len(data) > MAX_JSON:
                raise ValueError(f"{len(data):,} bytes, expected at most {MAX_JSON:,}")
            parse_json(data)
        except (ValueError, RecursionError) as error:
            raise SeedError(
                f"seed '{seed}': with its config.json the result's {name} could not be read again: {error}; it holds "
                "something large that is no setting of the model, so remove that"
            ) from error


def check_handles(count: int) -> None:
    """Make sure that so many files may be open at once; the limit is raised as far as this user may.

    Raises:
        OutputError: it may not be raised that far.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + HANDLES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise OutputError(
            f"this merge opens {count} files at once, and this user may open {hard}; raise the limit (ulimit -n "
            f"{needed}), or take a larger --max-shard-size"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
