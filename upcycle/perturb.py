"""What makes copied experts differ: noise on their weights, or inner units drawn anew (Drop-Upcycling).

Random numbers belong to the plan, not to the way it is run: element e of a part is always drawn from the same place of
a stream named by the plan's random seed and the part's key. The generator's raw words are frozen by numpy's policy, and
what makes them normal is a table of 65,536 quantiles, so a draw is one look-up and the same everywhere.
"""

import hashlib
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.random import PCG64, RandomState

from upcycle.numeric import FLOATS, Array
from upcycle.planned import Perturbation

LEVELS: Final = 2**16  # a quarter of a generator's word
LANES: Final = 4


@dataclass(frozen=True)
class UnitSums:
    """Of each inner unit of one FFN matrix the sum of its `each` weights and of their squares, `[I]` in float64."""

    sums: Array
    squares: Array
    each: int

    def moments(self, units: Array | None = None) -> tuple[float, float]:
        """Mean and standard deviation of the weights of some units, or of all."""
        chosen = np.ones(len(self.sums), bool) if units is None else units
        count = self.each * int(np.count_nonzero(chosen))
        if not count:
            return 0.0, 0.0
        mean = float(self.sums.sum(where=chosen)) / count
        return mean, max(0.0, float(self.squares.sum(where=chosen)) / count - mean**2) ** 0.5


@dataclass(frozen=True)
class Region:
    """Where a stretch of a part lies in its source's matrix of so many `columns`.

    It has `rows` times `width` elements, `stride` apart, from element `start`; the first is the part's number `offset`.
    """

    start: int
    rows: int
    stride: int
    width: int
    columns: int
    offset: int


def add_noise(values: Array, region: Region, perturbation: Perturbation, sums: UnitSums, seed: int) -> None:
    """Add a stretch's noise to its weights, in place.

    Args:
        values: fp32 `[n]`.
        sums: of the source's units.
        seed: the plan's random seed.
    """
    deviation = perturbation.noise * sums.moments()[1]
    values += normal(f"{seed}:noise:{perturbation.key}", region.offset, len(values), 0.0, deviation)


def redraw(
    data: Array, dtype: str, region: Region, perturbation: Perturbation, sums: UnitSums, scale: float, seed: int
) -> None:
    """Draw the weights of a stretch's dropped units anew, in place.

    Args:
        data: raw bytes of `n` weights in `dtype`.
        scale: by which the part is multiplied.
    """
    units = dropped_units(seed, perturbation.key.partition("|")[0], perturbation.inner, perturbation.drop)
    mean, deviation = sums.moments(units)
    bits = np.dtype(f"u{FLOATS[dtype].itemsize}")  # what is moved: numpy is slow with types that are not its own
    weights, key = data.view(bits), f"{seed}:drop:{perturbation.key}"
    drawn = normal(key, region.offset, len(weights), scale * mean, scale * deviation, dtype)
    # Where the mask's bits are set the drawn ones, else the weight's own: three passes, each faster than one that asks.
    chosen = drawn.view(bits)
    chosen ^= weights
    chosen &= _of_units(units, perturbation.axis, region, bits)
    weights ^= chosen


def _of_units(units: Array, axis: int, region: Region, bits: np.dtype[Any]) -> Array:
    """Which elements of a region belong to chosen units, `[n]`: all bits set, or none."""
    units, columns, inner = -units.astype(bits), region.columns, len(units)
    first = region.start % columns
    if axis == 0:  # whole rows are units, and a region has all of them or begins and ends within some
        assert region.rows == 1, "rows of units lie one after another"
        rows = np.arange(region.start // columns, (region.start + region.width - 1) // columns + 1) % inner
        return units[rows].repeat(columns)[first : first + region.width]
    if region.rows > 1:  # the same columns of one row after another
        return np.tile(units[first : first + region.width], region.rows)
    return np.tile(units, -(-(first + region.width) // columns))[first : first + region.width]


@lru_cache(maxsize=64)
def dropped_units(seed: int, key: str, inner: int, share: float) -> Array:
    """Which of `inner` units of an expert's FFN are drawn anew, `[I]`: floor(share * I) of them (arXiv:2502.19261)."""
    chosen = np.zeros(inner, bool)
    chosen[RandomState(_words(f"{seed}:units:{key}")).permutation(inner)[: int(share * inner)]] = True
    return chosen


def normal(key: str, start: int, count: int, mean: float = 0.0, deviation: float = 1.0, dtype: str = "F32") -> Array:
    """Normal numbers `[count]`, rounded once to `dtype`, from number `start` of the stream of that name."""
    generator = PCG64(_words(key))
    first = start // LANES
    generator.advance(first)
    words = generator.random_raw(ceil((start + count) / LANES) - first)
    lanes = words.astype("<u8", copy=False).view("<u2")[start - first * LANES :][:count]
    with np.errstate(over="ignore", invalid="ignore"):  # who writes it looks whether it is finite
        table = (_quantiles() * np.float32(deviation) + np.float32(mean)).astype(FLOATS[dtype], copy=False)
    drawn: Array = np.take(table.view(f"u{table.itemsize}"), lanes).view(table.dtype)
    return drawn


@cache
def _quantiles() -> Array:
    """The middle of each of `LEVELS` equally likely stretches of the normal distribution, fp32."""
    upper = [NormalDist().inv_cdf((level + 0.5) / LEVELS) for level in range(LEVELS // 2, LEVELS)]
    half = np.array(upper)
    table = np.concatenate([-half[::-1], half])
    scaled: Array = (table / table.std()).astype(np.float32)
    return scaled


def _words(key: str) -> Array:
    return np.frombuffer(hashlib.sha256(key.encode()).digest(), np.uint32)
