"""What makes copied experts differ: noise on their weights, or inner units drawn anew (Drop-Upcycling).

Random numbers belong to the plan, not to the way it is run: element e of a part is always drawn from the same place of
a stream named by the plan's random seed and the part's key. The generator's raw words are frozen by numpy's policy, and
each quarter of one picks two normal numbers from a table of 65,536 pairs, so a draw is one look-up and the same
everywhere: a merge that draws every weight of every expert shall not take longer than the disk.
"""

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from math import ceil
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.random import PCG64, RandomState

from upcycle.numeric import FLOATS, Array
from upcycle.planned import Perturbation

LEVELS: Final = 2**16  # a quarter of a generator's word
NUMBERS: Final = 8  # of a word


@dataclass(frozen=True, eq=False)
class UnitSums:
    """Of each inner unit of one FFN matrix the sum of its `each` weights and of their squares, `[I]` in float64."""

    sums: Array
    squares: Array
    each: int

    def moments(self, units: Array | None = None) -> tuple[float, float]:
        """Mean and standard deviation of the weights of some units, or of all."""
        chosen = slice(None) if units is None else units
        sums, squares = self.sums[chosen], self.squares[chosen]
        count = self.each * len(sums)
        if not count:
            return 0.0, 0.0
        mean = float(sums.sum()) / count
        return mean, max(0.0, float(squares.sum()) / count - mean**2) ** 0.5


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


@dataclass(frozen=True)
class Draw:
    """What is drawn for one stretch of a part: `sums` are of its whole matrix, `seed` is the plan's random seed."""

    perturbation: Perturbation
    sums: UnitSums
    region: Region
    seed: int

    def add_noise(self, values: Array) -> None:
        """Add the noise to the stretch's weights, fp32 `[n]`, in place.

        Raises:
            OverflowError: fp32 cannot hold such numbers.
        """
        deviation = self.perturbation.noise * self.sums.moments()[1]
        key = f"{self.seed}:noise:{self.perturbation.key}"
        values += normal(key, self.region.offset, len(values), 0.0, deviation)

    def replace_units(self, data: Array, dtype: str, scale: float) -> None:
        """Draw the weights of the dropped units anew, in place.

        Args:
            data: raw bytes of `n` weights in `dtype`.
            scale: by which the part is multiplied.

        Raises:
            OverflowError: `dtype` cannot hold such numbers.
        """
        units, mean, deviation = _dropped(self.seed, self.perturbation, self.sums)
        bits = np.dtype(f"u{FLOATS[dtype].itemsize}")  # what is moved: numpy is slow with types that are not its own
        weights, key = data.view(bits), f"{self.seed}:drop:{self.perturbation.key}"
        drawn = normal(key, self.region.offset, len(weights), scale * mean, scale * deviation, dtype)
        # Where the mask's bits are set the drawn ones, else the weight's own: three passes, faster than one that asks.
        chosen = drawn.view(bits)
        chosen ^= weights
        chosen &= _of_units(units, self.perturbation.axis, self.region, bits)
        weights ^= chosen


def _of_units(units: Array, axis: int, region: Region, bits: np.dtype[Any]) -> Array:
    """Which elements of a region belong to chosen units, `[n]`: all bits set, or none."""
    units, columns, inner = -units.astype(bits), region.columns, len(units)
    first = region.start % columns
    if axis == 0:  # whole rows are units, and a region has all of them or begins and ends within some
        assert region.rows == 1, "rows of units lie one after another"
        rows = np.arange(region.start // columns, (region.start + region.width - 1) // columns + 1) % inner
        return units[rows].repeat(columns)[first : first + region.width]
    # The same columns of one row after another, or one stretch over several rows.
    return np.tile(np.tile(units, -(-(first + region.width) // columns))[first : first + region.width], region.rows)


@lru_cache(maxsize=4)
def _dropped(seed: int, perturbation: Perturbation, sums: UnitSums) -> tuple[Array, float, float]:
    """Which units of a matrix are drawn anew, and their weights' mean and deviation; kept while it is drawn."""
    units = dropped_units(seed, perturbation.key.partition("|")[0], perturbation.inner, perturbation.drop)
    return units, *sums.moments(units)


def dropped_units(seed: int, key: str, inner: int, share: float) -> Array:
    """Which of `inner` units of an expert's FFN are drawn anew, `[I]`: floor(share * I) of them (arXiv:2502.19261)."""
    chosen = np.zeros(inner, bool)
    count = int(Fraction(str(share)) * inner)  # of the share as it was written: 0.29 * 100 is below 29 in floats
    chosen[RandomState(_words(f"{seed}:units:{key}")).permutation(inner)[:count]] = True
    return chosen


def normal(key: str, start: int, count: int, mean: float = 0.0, deviation: float = 1.0, dtype: str = "F32") -> Array:
    """Normal numbers `[count]`, rounded once to `dtype`, from number `start` of the stream of that name."""
    generator = PCG64(_words(key))
    first = start // NUMBERS
    generator.advance(first)
    words = generator.random_raw(ceil((start + count) / NUMBERS) - first)
    pairs = _pairs(mean, deviation, dtype)
    drawn: Array = np.take(pairs, words.astype("<u8", copy=False).view("<u2"), mode="wrap").view(FLOATS[dtype])
    return drawn[start - first * NUMBERS :][:count]


@lru_cache(maxsize=4)
def _pairs(mean: float, deviation: float, dtype: str) -> Array:
    """`LEVELS` pairs of normal numbers of `dtype`, each as one unsigned integer; kept while a matrix is drawn."""
    with np.errstate(over="ignore", invalid="ignore"):
        table = (_normal_points() * np.float32(deviation) + np.float32(mean)).astype(FLOATS[dtype], copy=False)
    if not np.isfinite(table).all():
        raise OverflowError(f"{dtype} cannot hold normal numbers of mean {mean:g} and deviation {deviation:g}")
    return table.view(f"u{2 * table.itemsize}")[:, 0]


@cache
def _normal_points() -> Array:
    """`LEVELS` points spread evenly over the plane's normal distribution, fp32 `[LEVELS, 2]`.

    They are Hammersley's: each coordinate takes the middle of each of `LEVELS` equally likely stretches once, the
    second in the order of the first's bits reversed; every other of these is turned over, since else the two ends would
    meet themselves, and two extreme numbers each other far too often.
    """
    half = np.array([NormalDist().inv_cdf((level + 0.5) / LEVELS) for level in range(LEVELS // 2, LEVELS)])
    quantiles = np.concatenate([-half[::-1], half])
    axes = (2,) * (LEVELS.bit_length() - 1)  # one for each bit
    order = np.arange(LEVELS).reshape(axes).T.reshape(-1) ^ 0x5555
    points: Array = np.stack([quantiles, quantiles[order]], 1) / quantiles.std()
    return points.astype(np.float32)


def _words(key: str) -> Array:
    return np.frombuffer(hashlib.sha256(key.encode()).digest(), np.uint32)
