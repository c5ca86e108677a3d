"""Runs a plan: raw bytes from the sources' files to the output's, in constant memory and at the disk's speed.

Two threads take tensors from one list, so that reading, checking and writing overlap. A tensor's bytes are made by jobs
(`assemble.py`), in order. What is made is summed and written; a finished tensor is noted in a journal, by which a
killed merge can go on.
"""

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from upcycle.assemble import Assembler
from upcycle.card import read_card, write_card
from upcycle.checkpoint import (
    CONFIG,
    INDEX,
    MAX_SHARD_SIZE,
    PROVENANCE,
    TOKENIZER_CONFIG,
    Shard,
    index_json,
    plan_shards,
    write_json,
)
from upcycle.checksums import TensorSum, sums_of, write_sums
from upcycle.errors import OutputError, SeedError
from upcycle.journal import JOURNAL, Journal, identity, stamp
from upcycle.numeric import Array
from upcycle.plan import MergePlan
from upcycle.preflight import check_handles, check_place, check_readable_again, check_sources
from upcycle.reader import CHUNK, Buffers, Reader
from upcycle.staging import check_target, remove, staging
from upcycle.vocabulary import extend_tokenizer

THREADS: Final = 2
WRITE_BACK: Final = 16 << 20  # after so many bytes of a file, the kernel is asked to write them to the disk


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote, and how long it took."""

    out: Path
    bytes_written: int
    seconds: float


def merge(
    plan: MergePlan,
    out: Path,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    tell: Callable[[str], None] | None = None,
    finish: Callable[[Path], Mapping[str, list[str]]] | None = None,
) -> MergeResult:
    """Write a plan's checkpoint to `out`, whole or not at all.

    What the same merge wrote before it was killed or interrupted is taken up again, if its checksums are right.

    Args:
        plan: what to write.
        out: the folder to make; nothing is visible there before everything is written.
        max_shard_size: bytes of weights in one file.
        overwrite: replace a former result at `out`.
        progress: called with the number of bytes written since the last call.
        tell: called with a sentence where something is taken up again, or why it is not.
        finish: called with the folder that holds all but the card, before anything of it is visible at `out`; may
            change tensors, whose checksums it gives back. What it does is done anew after an interruption.

    Raises:
        OutputError: the folder exists, the disk is full or cannot be written.
        SeedError: a source holds a NaN or an infinity, or a value that the wanted dtype cannot hold, or it changed
            meanwhile.
        CheckpointError: a source file became shorter or cannot be read.
    """
    began = time.monotonic()
    check = partial(check_target, out, overwrite, [folder for source in plan.sources for folder in source.folders])
    check()
    files = {file: source.name for source in plan.sources for file in source.files}
    check_sources(files | dict.fromkeys(plan.copied.values(), plan.sources[0].name))
    needed = plan.nbytes + sum(file.stat().st_size for file in plan.copied.values())
    check_place(out, needed)
    shards = plan_shards([(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors], max_shard_size)
    check_handles(len(files) + len(shards))
    check_readable_again(plan.sources[0].name, {CONFIG: plan.config, PROVENANCE: plan.provenance})
    former = read_card(out)  # in which people's text stays
    same = identity(plan.digest(), max_shard_size, {source.name: source.tensors for source in plan.sources})
    try:
        with staging(out, check, resumable=True) as folder:
            journal = Journal(folder, same)
            _keep_weights(folder, {shard.name for shard in shards})
            try:
                sums = _write_weights(plan, folder, shards, journal, progress or _ignore, tell or _ignore)
            finally:
                journal.close()
            _write_companions(plan, folder, shards)
            changed = finish(folder) if finish else {}
            write_card(folder, former)
            journal.remove()
            write_sums(folder, {**sums, **changed})
            _check_unchanged(plan, same)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"output {out}: the disk is full; nothing was kept. Free {needed:,} bytes and try again"
            ) from error
        raise OutputError(f"output {out} cannot be written: {error}") from error
    return MergeResult(out, sum(shard.size for shard in shards), time.monotonic() - began)


def _write_companions(plan: MergePlan, folder: Path, shards: Sequence[Shard]) -> None:
    """What lies beside the weights."""
    for name, source in plan.copied.items():
        shutil.copyfile(source, folder / name)
    if plan.tokenizer_config is not None:
        write_json(folder / TOKENIZER_CONFIG, plan.tokenizer_config)
    extend_tokenizer(folder, plan.added_tokens)
    if len(shards) > 1:
        write_json(folder / INDEX, index_json(shards))
    write_json(folder / PROVENANCE, {**plan.provenance, "plan": plan.digest()})
    write_json(folder / CONFIG, plan.config)


def _keep_weights(folder: Path, shards: set[str]) -> None:
    """Remove what a former merge left but its journal and weights: links and such would be written through."""
    for entry in folder.iterdir():
        if entry.name != JOURNAL and not (entry.name in shards and entry.is_file() and not entry.is_symlink()):
            remove(entry)


def _ignore(_: Any) -> None:
    pass


def _check_unchanged(plan: MergePlan, before: Mapping[str, Any]) -> None:
    """Refuse what was made from files that changed while they were read."""
    for source in plan.sources:
        for file in source.files:
            if list(stamp(file)) != before["sources"][source.name][file.name]:
                raise SeedError(
                    f"seed '{source.name}': {file} was changed while it was read; merge again when nobody writes it"
                )


def _write_weights(
    plan: MergePlan,
    folder: Path,
    shards: list[Shard],
    journal: Journal,
    progress: Callable[[int], None],
    tell: Callable[[str], None],
) -> dict[str, list[str]]:
    """Write all tensors that are not there yet; the checksums of all."""
    with ExitStack() as stack:
        assembler = Assembler(plan, Reader(plan, stack))
        targets: dict[str, tuple[int, int]] = {}
        for shard in shards:
            descriptor = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, descriptor)
            os.truncate(descriptor, shard.size)
            os.pwrite(descriptor, shard.header, 0)
            targets |= {name: (descriptor, offset) for name, offset in shard.offsets.items()}
        if journal.refusal:
            tell(f"what an interrupted merge left is not taken up: {journal.refusal}")
        sums = _proven(plan, targets, journal.claimed, progress)
        if sums:
            known = sum(tensor.nbytes for tensor in plan.tensors if tensor.name in sums)
            tell(f"going on after an interrupted merge: {known:,} of {plan.nbytes:,} bytes are written and proven")
        _run(assembler, targets, journal, sums, progress)
        for descriptor in {descriptor for descriptor, _ in targets.values()}:
            os.fsync(descriptor)
        return sums


def _proven(
    plan: MergePlan,
    targets: Mapping[str, tuple[int, int]],
    claimed: Mapping[str, list[str]],
    progress: Callable[[int], None],
) -> dict[str, list[str]]:
    """Of the tensors that are said to be written, those whose bytes have the sums that were noted."""
    proven: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        if tensor.name in claimed:
            descriptor, offset = targets[tensor.name]
            starts = range(offset, offset + tensor.nbytes, CHUNK)
            end = offset + tensor.nbytes
            pieces = (memoryview(os.pread(descriptor, min(CHUNK, end - start), start)) for start in starts)
            if sums_of(pieces) == claimed[tensor.name]:
                proven[tensor.name] = claimed[tensor.name]
                progress(tensor.nbytes)
    return proven


def _run(
    assembler: Assembler,
    targets: Mapping[str, tuple[int, int]],
    journal: Journal,
    sums: dict[str, list[str]],
    progress: Callable[[int], None],
) -> None:
    """Write tensors on a few threads, and add their sums; the first failure, or Ctrl-C, stops all and is raised."""
    lock, stop = threading.Lock(), threading.Event()
    tensors = iter([tensor for tensor in assembler.plan.tensors if tensor.name not in sums])

    def work() -> None:
        buffers = Buffers()
        while True:
            with lock:
                tensor = next(tensors, None)
            if tensor is None:
                return
            total = TensorSum()
            descriptor, offset = targets[tensor.name]
            for job in assembler.jobs(tensor):
                if stop.is_set():
                    return
                data = job(buffers)
                total.update(data.data)
                _write(descriptor, data, offset)
                offset += len(data)
                with lock:
                    progress(len(data))
            with lock:
                sums[tensor.name] = total.finish()
                journal.add(tensor.name, sums[tensor.name])

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            futures = [pool.submit(work) for _ in range(THREADS)]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
        for future in futures:
            future.result()


def _write(descriptor: int, data: Array, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:].data, offset + done)
    end = offset + done
    if offset // WRITE_BACK != end // WRITE_BACK and hasattr(os, "posix_fadvise"):
        # Start writing to the disk now, and let go of what is there. Left to itself the kernel fills the memory with
        # output, then stalls whoever writes, and the final fsync finds everything still to do.
        start = max(0, end - 3 * WRITE_BACK)
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
