"""The bytes of a plan's tensors, made of the sources' in constant memory, by jobs of a few MiB in their order.

A job copies a stretch of bytes, assembles some rows of a strided tensor in a buffer, averages, perturbs, or draws a
router.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import numpy as np
from numpy.random import RandomState

from upcycle.adapters import Factors, read_made
from upcycle.checkpoint import ITEM_SIZE, TensorInfo
from upcycle.errors import CheckpointError, SeedError
from upcycle.numeric import FLOATS, Array, first_not_finite, to_float32
from upcycle.perturb import Region, UnitSums, add_noise, redraw
from upcycle.plan import MergePlan
from upcycle.planned import Constant, Part, PlannedGroup, PlannedTensor, RandomInit, Source
from upcycle.vocabulary import usage_of

CHUNK: Final = 4 << 20  # bytes a job moves
MEAN_CHUNK: Final = 1 << 20  # bytes of each source that a mean takes at once: its fp32 sums stay in the cache
CONTIGUOUS: Final = 256 << 10  # blocks from this size on are copied by themselves, smaller ones assembled in a buffer
KEPT_SUMS: Final = 16  # FFN matrices

Job = Callable[["Buffers"], Array]  # the next bytes of a tensor, in a buffer that the next job uses again


class Buffers:
    """One thread's memory: everything a job needs, allocated once."""

    def __init__(self) -> None:
        # The C library learns from what is freed which sizes to keep: without this it gives every job's arrays back to
        # the system, and half of the time of a merge that computes goes into clearing fresh pages.
        np.empty(4 * CHUNK, np.uint8)
        self.source = np.empty(CHUNK, np.uint8)
        self.scratch = np.empty(CHUNK, np.uint8)
        self.target = np.empty(CHUNK, np.uint8)


class Reader:
    """The sources' files, opened once, and checked reads from them."""

    def __init__(self, plan: MergePlan, stack: ExitStack) -> None:
        self.sources = plan.sources
        self.descriptors: dict[Path, int] = {}
        for file in sorted({file for source in plan.sources for file in source.files}):
            self.descriptors[file] = stack.enter_context(file.open("rb", buffering=0)).fileno()
        self.sums: dict[tuple[int, str, int], UnitSums] = {}
        self.lock = threading.Lock()
        self.factors = Factors(lambda info, start, count: self._fill(info, start, np.empty(count, np.uint8)).data)

    def info(self, source: Source) -> TensorInfo:
        return self.sources[source.checkpoint].tensors[source.tensor]

    def read(self, source: Source, start: int, count: int, into: Array) -> Array:
        """Read `count` elements from element `start` of the source's tensor; raw bytes."""
        info = self.info(source)
        item = ITEM_SIZE[info.dtype]
        data = into[: count * item]
        if info.made is None:
            return self._fill(info, start * item, data)
        try:
            data[:] = read_made(info, start, count, self.factors)
        except CheckpointError as error:
            raise SeedError(f"seed '{self.sources[source.checkpoint].name}': {error}") from error
        return data

    def _fill(self, info: TensorInfo, start: int, data: Array) -> Array:
        """Fill `data` with what a file holds of a tensor from byte `start`."""
        done = 0
        while done < len(data):
            got = os.preadv(self.descriptors[info.file], [data[done:].data], info.offset + start + done)
            if not got:
                raise CheckpointError(f"{info.file} ends before its tensors do; it became shorter meanwhile")
            done += got
        return data

    def rows(self, source: Source, block: int, first: int, count: int, buffers: "Buffers") -> Array:
        """Read `count` rows of `block` elements, checked to be finite; raw bytes, one row after another."""
        data = self.unchecked_rows(source, block, first, count, buffers)
        self._check_finite(source, data, buffers.scratch, source.start + first * source.stride, block)
        return data

    def unchecked_rows(self, source: Source, block: int, first: int, count: int, buffers: "Buffers") -> Array:
        """As `rows`, for who checks what becomes of them."""
        info = self.info(source)
        item = ITEM_SIZE[info.dtype]
        start = source.start + first * source.stride
        if count == 1 or source.stride == block:
            return self.read(source, start, count * block, buffers.source)
        span = (count - 1) * source.stride + block
        raw = self.read(source, start, span, buffers.source)
        shape, strides = (count, block * item), (source.stride * item, 1)
        return np.lib.stride_tricks.as_strided(raw, shape, strides).reshape(-1)  # copies: rows side by side

    def _check_finite(self, source: Source, data: Array, scratch: Array, start: int, block: int) -> None:
        info = self.info(source)
        found = first_not_finite(data, info.dtype, scratch)
        if found is None:
            return
        element = start + found // block * source.stride + found % block
        index = [int(i) for i in np.unravel_index(element, info.shape)]
        value = to_float32(data.tobytes(), info.dtype)[found]
        name = self.sources[source.checkpoint].name
        raise SeedError(
            f"seed '{name}': tensor '{source.tensor}' holds {value} at {index}, expected finite numbers; "
            "the training of this seed diverged, or the file is damaged"
        )

    def unit_sums(self, source: Source, axis: int, inner: int, buffers: "Buffers") -> UnitSums:
        """The sums of an FFN matrix's inner units, read once; those of the last few matrices are kept."""
        info = self.info(source)
        columns = prod(info.shape[1:])
        half = source.start // columns // inner if axis == 0 else 0  # of a fused gate and up
        key = (source.checkpoint, source.tensor, half)
        known = self.sums.get(key)
        if known is not None:
            return known
        rows = inner if axis == 0 else info.shape[0]
        sums, squares = np.zeros(inner), np.zeros(inner)
        step = max(1, MEAN_CHUNK // 4 // columns)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            part = Source(source.checkpoint, source.tensor, (half * inner + first) * columns, 0)
            data = self.rows(part, count * columns, 0, 1, buffers)
            values = to_float32(data.data, info.dtype).reshape(count, columns)
            here = slice(first, first + count) if axis == 0 else slice(None)
            sums[here] += values.sum(1 - axis, dtype=np.float64)
            with np.errstate(over="ignore"):  # drawing with an infinite deviation is refused
                squares[here] += np.square(values).sum(1 - axis, dtype=np.float64)
        found = UnitSums(sums, squares, columns if axis == 0 else info.shape[0])
        with self.lock:
            while len(self.sums) >= KEPT_SUMS:
                self.sums.pop(next(iter(self.sums)))
            self.sums[key] = found
        return found


def jobs(plan: MergePlan, reader: Reader, tensor: PlannedTensor) -> Iterator[Job]:
    """What makes a tensor's bytes, in their order."""
    if tensor.init:
        yield _init_job(plan.random_seed, tensor, tensor.init)
    row = 0  # of the output, where usage counts them
    for group in tensor.groups:
        usage = None if plan.usage is None else plan.usage[row : row + group.rows]
        yield from _group_jobs(plan, reader, tensor.dtype, group, usage)
        row += group.rows


def _group_jobs(plan: MergePlan, reader: Reader, dtype: str, group: PlannedGroup, usage: Array | None) -> Iterator[Job]:
    item = ITEM_SIZE[dtype]
    # The widest of the output's row and of each source's stride, which all must fit a buffer in up to 4 bytes.
    widest = max(group.width, *(source.stride for part in group.parts for source in part.sources))
    by_usage = any(part.by_usage for part in group.parts)  # whose rows have weights of their own
    large = 4 * widest > CHUNK or all(part.block * item >= CONTIGUOUS for part in group.parts)
    if (group.rows == 1 or large) and not by_usage:
        for row in range(group.rows):
            for part in group.parts:
                yield from _block_jobs(plan, reader, dtype, part, row)
        return
    step = CHUNK // (4 * widest)
    for first in range(0, group.rows, step):
        yield _rows_job(plan, reader, dtype, group, first, min(step, group.rows - first), usage)


@dataclass(frozen=True)
class Stretch:
    """What a job makes of a part: of so many rows from `first` on, `width` elements from `start` on."""

    first: int
    rows: int
    start: int
    width: int


def _block_jobs(plan: MergePlan, reader: Reader, dtype: str, part: Part, row: int) -> Iterator[Job]:
    """One block, in stretches that fit the buffers."""
    raw = len(part.sources) == 1 and part.perturbation is None
    step = (CHUNK if raw else MEAN_CHUNK) // 4

    def job(start: int) -> Job:
        stretch = Stretch(row, 1, start, min(step, part.block - start))
        return lambda buffers: _mix(plan, reader, dtype, part, stretch, part.weights, buffers)

    for start in range(0, part.block, step):
        yield job(start)


def _rows_job(
    plan: MergePlan, reader: Reader, dtype: str, group: PlannedGroup, first: int, count: int, usage: Array | None
) -> Job:
    """Some rows of a group, assembled side by side."""
    item = ITEM_SIZE[dtype]

    def run(buffers: Buffers) -> Array:
        data = buffers.target[: count * group.width * item]
        rows, column = data.reshape(count, -1), 0
        for part in group.parts:
            width = part.block * item
            weights: tuple[float, ...] | Array = part.weights
            if part.by_usage:
                assert usage is not None, "a plan that was made again without its text cannot be run"
                weights = usage_of(usage[first : first + count], [source.checkpoint for source in part.sources])
            mixed = _mix(plan, reader, dtype, part, Stretch(first, count, 0, part.block), weights, buffers)
            rows[:, column : column + width] = mixed.reshape(count, width)
            column += width
        return data

    return run


def _mix(
    plan: MergePlan,
    reader: Reader,
    dtype: str,
    part: Part,
    stretch: Stretch,
    weights: tuple[float, ...] | Array,
    buffers: Buffers,
) -> Array:
    """A stretch of one source as `dtype`, or the mean of several: summed in fp32, scaled once, cast once; raw bytes.

    Weights are those of the sources, or `[rows, sources]`.
    """
    sources = [
        Source(s.checkpoint, s.tensor, s.start + stretch.first * s.stride + stretch.start, s.stride)
        for s in part.sources
    ]
    if part.equal:
        sources = [_equal(reader, sources, stretch, buffers)]
    perturbation, source = part.perturbation, sources[0]
    if perturbation is not None:
        sums = reader.unit_sums(part.sources[0], perturbation.axis, perturbation.inner, buffers)
        columns, begin = prod(reader.info(source).shape[1:]), stretch.first * part.block + stretch.start
        region = Region(source.start, stretch.rows, source.stride, stretch.width, columns, begin)
    noisy = perturbation is not None and perturbation.noise > 0
    try:
        if len(sources) == 1 and part.scale == 1.0 and not noisy and reader.info(source).dtype == dtype:
            data = reader.rows(source, stretch.width, 0, stretch.rows, buffers)
        else:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found and named by the cast
                values = _mean(reader, sources, stretch, weights, buffers)
                if perturbation is not None and noisy:
                    add_noise(values, region, perturbation, sums, plan.random_seed)
                if part.scale != 1.0:
                    values *= np.float32(part.scale)
            data = _cast(reader, sources, values, stretch, dtype, buffers)
        if perturbation is not None and perturbation.drop:
            redraw(data, dtype, region, perturbation, sums, part.scale, plan.random_seed)
    except OverflowError as error:
        name = reader.sources[source.checkpoint].name
        raise SeedError(
            f"seed '{name}': tensor '{source.tensor}' has weights so large that what is drawn like them overflows "
            f"({error}); take another --dtype"
        ) from error
    return data


def _equal(reader: Reader, sources: Sequence[Source], stretch: Stretch, buffers: Buffers) -> Source:
    """The first of several sources, all of which must hold the same numbers there.

    Raises:
        SeedError: the first that differs.
    """
    first, *others = sources
    data = reader.rows(first, stretch.width, 0, stretch.rows, buffers)
    expected = to_float32(data.data, reader.info(first).dtype)
    for other in others:
        data = reader.rows(other, stretch.width, 0, stretch.rows, buffers)
        if not np.array_equal(expected, to_float32(data.data, reader.info(other).dtype)):
            one, two = (reader.sources[source.checkpoint].name for source in (first, other))
            raise SeedError(
                f"seed '{two}': tensor '{other.tensor}' differs from that of seed '{one}', and the recipe mixes it by "
                "'equal': it was to be frozen while the seeds were trained; mix it by mean, or leave that seed out"
            )
    return first


def _mean(
    reader: Reader,
    sources: Sequence[Source],
    stretch: Stretch,
    weights: tuple[float, ...] | Array,
    buffers: Buffers,
) -> Array:
    """The weighted mean of a stretch of some sources, in fp32; not finite where one of them is not."""
    if len(sources) == 1:
        data = reader.unchecked_rows(sources[0], stretch.width, 0, stretch.rows, buffers)
        return to_float32(data.data, reader.info(sources[0]).dtype)
    by_row = isinstance(weights, np.ndarray)
    equal = not by_row and len(set(weights)) == 1
    total: Array | None = None
    for index, source in enumerate(sources):
        data = reader.unchecked_rows(source, stretch.width, 0, stretch.rows, buffers)
        values = to_float32(data.data, reader.info(source).dtype)
        if isinstance(weights, np.ndarray):
            values *= weights[:, index].astype(np.float32).repeat(stretch.width)
        elif not equal:
            values *= np.float32(weights[index])
        if total is None:
            total = values
        else:
            total += values
    assert total is not None
    if equal:
        total /= np.float32(len(sources))
    return total


def _cast(
    reader: Reader, sources: Sequence[Source], values: Array, stretch: Stretch, dtype: str, buffers: Buffers
) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        data = values.astype(FLOATS[dtype], copy=False).view(np.uint8)
    found = first_not_finite(data, dtype, buffers.scratch)
    if found is not None:
        for source in sources:
            reader.rows(source, stretch.width, 0, stretch.rows, buffers)  # names what is not finite in a source
        names = ", ".join(f"'{reader.sources[source.checkpoint].name}'" for source in sources)
        raise SeedError(
            f"seed {names}: tensor '{sources[0].tensor}' holds {values[found]:g}, which {dtype} cannot hold; "
            "take another --dtype"
        )
    return data


def _init_job(random_seed: int, tensor: PlannedTensor, init: RandomInit | Constant) -> Job:
    def run(_: Buffers) -> Array:
        if isinstance(init, Constant):
            return np.array(init.values, np.float32).astype(FLOATS[tensor.dtype]).view(np.uint8)
        if init.std == 0:
            return np.zeros(tensor.nbytes, np.uint8)
        rows, width = tensor.shape[0] // init.repeat, prod(tensor.shape[1:])
        # The legacy generator's stream is frozen by numpy's policy, so the same plan gives the same router anywhere.
        words = np.frombuffer(hashlib.sha256(f"{random_seed}:{tensor.name}".encode()).digest(), np.uint32)
        values = RandomState(words).standard_normal((rows, width)) * init.std
        values = values.repeat(init.repeat, 0).reshape(-1)
        return values.astype(np.float32).astype(FLOATS[tensor.dtype]).view(np.uint8)

    return run
