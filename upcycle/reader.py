"""Checked reads of a plan's sources, in buffers that are allocated once."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np

from upcycle.adapters import Factors, read_made
from upcycle.checkpoint import ITEM_SIZE, TensorInfo
from upcycle.errors import CheckpointError, SeedError
from upcycle.numeric import Array, first_not_finite, to_float32
from upcycle.plan import MergePlan
from upcycle.planned import Source

CHUNK: Final = 4 << 20  # bytes that are read at once


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

    def rows(self, source: Source, block: int, count: int, buffers: Buffers) -> Array:
        """Read `count` rows of `block` elements, checked to be finite; raw bytes, one row after another."""
        data = self.unchecked_rows(source, block, count, buffers)
        info = self.info(source)
        found = first_not_finite(data, info.dtype, buffers.scratch)
        if found is None:
            return data
        element = source.start + found // block * source.stride + found % block
        index = [int(i) for i in np.unravel_index(element, info.shape)]
        value = to_float32(data.tobytes(), info.dtype)[found]
        name = self.sources[source.checkpoint].name
        raise SeedError(
            f"seed '{name}': tensor '{source.tensor}' holds {value} at {index}, expected finite numbers; "
            "the training of this seed diverged, or the file is damaged"
        )

    def unchecked_rows(self, source: Source, block: int, count: int, buffers: Buffers) -> Array:
        """As `rows`, for who checks what becomes of them."""
        if count == 1 or source.stride == block:
            return self.read(source, source.start, count * block, buffers.source)
        raw = self.read(source, source.start, (count - 1) * source.stride + block, buffers.source)
        item = ITEM_SIZE[self.info(source).dtype]
        shape, strides = (count, block * item), (source.stride * item, 1)
        return np.lib.stride_tricks.as_strided(raw, shape, strides).reshape(-1)  # copies: rows side by side
