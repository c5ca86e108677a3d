"""The bytes of a plan's tensors, made of the sources' in constant memory, by jobs of a few MiB in their order.

A job copies a stretch of bytes, assembles some rows of a strided tensor in a buffer, averages, perturbs, or draws a
router.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Final

import numpy as np
from numpy.random import RandomState

from upcycle.checkpoint import ITEM_SIZE
from upcycle.errors import SeedError
from upcycle.numeric import FLOATS, Array, first_not_finite, to_float32
from upcycle.perturb import Draw, Region, UnitSums
from upcycle.plan import MergePlan
from upcycle.planned import Constant, Part, PlannedGroup, PlannedTensor, RandomInit, Source
from upcycle.reader import CHUNK, Buffers, Reader
from upcycle.vocabulary import usage_of

MEAN_CHUNK: Final = 1 << 20  # bytes of each source that a mean takes at once: its fp32 sums stay in the cache
CONTIGUOUS: Final = 256 << 10  # blocks from this size on are copied by themselves, smaller ones assembled in a buffer
KEPT_SUMS: Final = 16  # FFN matrices

Job = Callable[[Buffers], Array]  # the next bytes of a tensor, in a buffer that the next job uses again


@dataclass(frozen=True)
class Stretch:
    """What a job makes of a part: of so many rows from `first` on, `width` elements from `start` on."""

    first: int
    rows: int
    start: int
    width: int


class Assembler:
    """What makes a plan's tensors; several threads may use one, each with buffers of its own."""

    def __init__(self, plan: MergePlan, reader: Reader) -> None:
        self.plan, self.reader = plan, reader
        self._sums: dict[tuple[object, ...], UnitSums] = {}
        self._lock = threading.Lock()

    def jobs(self, tensor: PlannedTensor) -> Iterator[Job]:
        """What makes a tensor's bytes, each to be done before the next is asked for."""
        if tensor.init:
            yield from _init_jobs(self.plan.random_seed, tensor, tensor.init)
        row = 0  # of the output, where usage counts them
        for group in tensor.groups:
            usage = None if self.plan.usage is None else self.plan.usage[row : row + group.rows]
            yield from self._group_jobs(tensor.dtype, group, usage)
            row += group.rows

    def _group_jobs(self, dtype: str, group: PlannedGroup, usage: Array | None) -> Iterator[Job]:
        item = ITEM_SIZE[dtype]
        # The widest of the output's row and of each source's stride, which all must fit a buffer in up to 4 bytes.
        widest = max(group.width, *(source.stride for part in group.parts for source in part.sources))
        by_usage = any(part.by_usage for part in group.parts)  # whose rows have weights of their own
        long = all(part.block * item >= CONTIGUOUS for part in group.parts)
        if not by_usage and (group.rows == 1 or long or 4 * widest > CHUNK):
            for row in range(group.rows):
                for part in group.parts:
                    yield from self._block_jobs(dtype, part, row)
            return
        step = CHUNK // (4 * widest)
        for first in range(0, group.rows, step):
            yield partial(self._rows, dtype, group, usage, first, min(step, group.rows - first))

    def _block_jobs(self, dtype: str, part: Part, row: int) -> Iterator[Job]:
        """One block, in stretches that fit the buffers."""
        raw = len(part.sources) == 1 and part.perturbation is None
        step = (CHUNK if raw else MEAN_CHUNK) // 4
        for start in range(0, part.block, step):
            stretch = Stretch(row, 1, start, min(step, part.block - start))
            yield partial(self._mix, dtype, part, stretch, part.weights)

    def _rows(
        self, dtype: str, group: PlannedGroup, usage: Array | None, first: int, count: int, buffers: Buffers
    ) -> Array:
        """Some rows of a group, assembled side by side."""
        item = ITEM_SIZE[dtype]
        data = buffers.target[: count * group.width * item]
        rows, column = data.reshape(count, -1), 0
        for part in group.parts:
            width = part.block * item
            weights: tuple[float, ...] | Array = part.weights
            if part.by_usage:
                assert usage is not None, "a plan that was made again without its text cannot be run"
                weights = usage_of(usage[first : first + count], [source.checkpoint for source in part.sources])
            mixed = self._mix(dtype, part, Stretch(first, count, 0, part.block), weights, buffers)
            rows[:, column : column + width] = mixed.reshape(count, width)
            column += width
        return data

    def _mix(
        self, dtype: str, part: Part, stretch: Stretch, weights: tuple[float, ...] | Array, buffers: Buffers
    ) -> Array:
        """A stretch of one source as `dtype`, or of the mean of several: summed in fp32, scaled, cast once; raw bytes.

        Weights are those of the sources, or `[rows, sources]`.
        """
        sources = [
            replace(source, start=source.start + stretch.first * source.stride + stretch.start)
            for source in part.sources
        ]
        if part.equal:
            sources = [self._equal(sources, stretch, buffers)]
        first, draw = sources[0], self._draw(part, sources[0], stretch, buffers)
        as_it_is = len(sources) == 1 and part.scale == 1.0 and self.reader.info(first).dtype == dtype
        try:
            if as_it_is and not (draw and draw.perturbation.noise):
                data = self.reader.rows(first, stretch.width, stretch.rows, buffers)
            else:
                with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found and named by the cast
                    values = self._mean(sources, stretch, weights, buffers)
                    if draw and draw.perturbation.noise:
                        draw.add_noise(values)
                    if part.scale != 1.0:
                        values *= np.float32(part.scale)
                data = self._cast(sources, values, stretch, dtype, buffers)
            if draw and draw.perturbation.drop:
                draw.replace_units(data, dtype, part.scale)
        except OverflowError as error:
            raise SeedError(
                f"{self._named(sources)}: tensor '{first.tensor}' has weights so large that what is drawn like them "
                f"overflows ({error}); take another --dtype"
            ) from error
        return data

    def _equal(self, sources: Sequence[Source], stretch: Stretch, buffers: Buffers) -> Source:
        """The first of several sources, all of which must hold the same numbers there.

        Raises:
            SeedError: the first that differs.
        """
        first, *others = sources
        data = self.reader.rows(first, stretch.width, stretch.rows, buffers)
        expected = to_float32(data.data, self.reader.info(first).dtype)
        for other in others:
            data = self.reader.rows(other, stretch.width, stretch.rows, buffers)
            if not np.array_equal(expected, to_float32(data.data, self.reader.info(other).dtype)):
                one, two = (self.reader.sources[source.checkpoint].name for source in (first, other))
                raise SeedError(
                    f"seed '{two}': tensor '{other.tensor}' differs from that of seed '{one}', and the recipe mixes it "
                    "by 'equal': it was to be frozen while the seeds were trained; mix it by mean, or leave that seed "
                    "out"
                )
        return first

    def _mean(
        self, sources: Sequence[Source], stretch: Stretch, weights: tuple[float, ...] | Array, buffers: Buffers
    ) -> Array:
        """The weighted mean of a stretch of some sources, in fp32; not finite where one of them is not."""

        def share(index: int) -> Array:
            data = self.reader.unchecked_rows(sources[index], stretch.width, stretch.rows, buffers)
            values = to_float32(data.data, self.reader.info(sources[index]).dtype)
            if isinstance(weights, np.ndarray) and len(sources) > 1:
                values *= weights[:, index].astype(np.float32).repeat(stretch.width)
            elif not equal:
                values *= np.float32(weights[index])
            return values

        equal = len(sources) == 1 or (isinstance(weights, tuple) and len(set(weights)) == 1)
        total = share(0)
        for index in range(1, len(sources)):
            total += share(index)
        if len(sources) > 1 and equal:
            total /= np.float32(len(sources))
        return total

    def _cast(self, sources: Sequence[Source], values: Array, stretch: Stretch, dtype: str, buffers: Buffers) -> Array:
        """What was made of some sources in `dtype`; raw bytes.

        Raises:
            SeedError: a source that is not finite, or a number that fp32 or `dtype` cannot hold.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            data = values.astype(FLOATS[dtype], copy=False).view(np.uint8)
        found = first_not_finite(data, dtype, buffers.scratch)
        if found is None:
            return data
        for source in sources:
            self.reader.rows(source, stretch.width, stretch.rows, buffers)  # names what is not finite in a source
        where = f"{self._named(sources)}: tensor '{sources[0].tensor}'"
        if not np.isfinite(values[found]):
            raise SeedError(
                f"{where} has weights so large that fp32, in which they are mixed, cannot hold what they give"
            )
        raise SeedError(
            f"{where} would become {values[found]:g} in the mixture, which {dtype} cannot hold; take another --dtype"
        )

    def _named(self, sources: Sequence[Source]) -> str:
        return f"seed {', '.join(repr(self.reader.sources[source.checkpoint].name) for source in sources)}"

    def _draw(self, part: Part, first: Source, stretch: Stretch, buffers: Buffers) -> Draw | None:
        """What is drawn for a stretch, whose first source begins where `first` says; None where nothing is."""
        if part.perturbation is None:
            return None
        columns = prod(self.reader.info(first).shape[1:])
        number = stretch.first * part.block + stretch.start
        region = Region(first.start, stretch.rows, first.stride, stretch.width, columns, number)
        return Draw(part.perturbation, self._unit_sums(part, buffers), region, self.plan.random_seed)

    def _unit_sums(self, part: Part, buffers: Buffers) -> UnitSums:
        """The sums of the inner units of a part's whole matrix, read once; those of the last few are kept."""
        assert part.perturbation
        axis, inner, shape = part.perturbation.axis, part.perturbation.inner, self.reader.info(part.sources[0]).shape
        columns = prod(shape[1:])
        half = part.sources[0].start // columns // inner if axis == 0 else 0  # of a fused gate and up
        key = (half, part.weights, *((source.checkpoint, source.tensor) for source in part.sources))
        known = self._sums.get(key)
        if known is not None:
            return known
        rows = inner if axis == 0 else shape[0]
        sums, squares = np.zeros(inner), np.zeros(inner)
        step = max(1, MEAN_CHUNK // 4 // columns)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            stretch = Stretch(0, 1, 0, count * columns)
            sources = [replace(source, start=(half * inner + first) * columns) for source in part.sources]
            with np.errstate(over="ignore", invalid="ignore"):
                mean = self._mean(sources, stretch, part.weights, buffers)
            values = self._cast(sources, mean, stretch, "F32", buffers).view(np.float32).reshape(count, columns)
            here = slice(first, first + count) if axis == 0 else slice(None)
            sums[here] += values.sum(1 - axis, dtype=np.float64)
            with np.errstate(over="ignore"):  # drawing with an infinite deviation is refused
                squares[here] += np.square(values).sum(1 - axis, dtype=np.float64)
        found = UnitSums(sums, squares, columns if axis == 0 else shape[0])
        with self._lock:
            while len(self._sums) >= KEPT_SUMS:
                self._sums.pop(next(iter(self._sums)))
            self._sums[key] = found
        return found


def _init_jobs(random_seed: int, tensor: PlannedTensor, init: RandomInit | Constant) -> Iterator[Job]:
    kind = FLOATS[tensor.dtype]
    if isinstance(init, Constant):
        yield lambda _: np.array(init.values, np.float32).astype(kind).view(np.uint8)
        return
    # The legacy generator's stream is frozen by numpy's policy, so the same plan gives the same router anywhere.
    random = RandomState(np.frombuffer(hashlib.sha256(f"{random_seed}:{tensor.name}".encode()).digest(), np.uint32))

    def draw(rows: int, _: Buffers) -> Array:
        values = random.standard_normal((rows, width)) * init.std if init.std else np.zeros((rows, width))
        return values.astype(np.float32).astype(kind).repeat(init.repeat, 0).reshape(-1).view(np.uint8)

    rows, width = tensor.shape[0] // init.repeat, prod(tensor.shape[1:])
    step = max(1, CHUNK // (8 * width * init.repeat))
    for first in range(0, rows, step):
        yield partial(draw, min(step, rows - first))
