"""What a plan is made of: each output tensor with its sources, as plain data."""

from dataclasses import dataclass
from math import prod

from upcycle.checkpoint import ITEM_SIZE


@dataclass(frozen=True)
class Source:
    """A region of one source tensor: the group's rows of the part's block of elements, `stride` apart, from `start`."""

    checkpoint: int
    tensor: str
    start: int
    stride: int


@dataclass(frozen=True)
class Perturbation:
    """What makes an expert's weights differ from its source's: noise, or inner units drawn anew.

    Attributes:
        key: of the random numbers; the units drawn anew are chosen by the part of it before the "|", so that gate, up
            and down of one expert lose the same ones.
        axis: of the source's matrix along which the FFN's inner units lie, 0 or 1.
        inner: how many there are.
        noise: standard deviation of the noise, in those of the source tensor.
        drop: share of the units that are drawn anew, normal, with the mean and deviation of what they replace.
    """

    key: str
    axis: int
    inner: int
    noise: float
    drop: float


@dataclass(frozen=True)
class Part:
    """One block of a group's row: the copy of one source, or the weighted mean of several, in fp32 with one cast."""

    block: int
    sources: tuple[Source, ...]
    weights: tuple[float, ...] = (1.0,)
    by_usage: bool = False  # each row's weights are those of the plan's `usage` instead
    equal: bool = False  # all sources must be equal to the bit
    scale: float = 1.0
    perturbation: Perturbation | None = None


@dataclass(frozen=True)
class PlannedGroup:
    """`rows` rows, each the parts' blocks side by side, laid into the output one after another."""

    rows: int
    parts: tuple[Part, ...]

    @property
    def width(self) -> int:
        """Elements of one row."""
        return sum(part.block for part in self.parts)


@dataclass(frozen=True)
class RandomInit:
    """A router's start: normal with this standard deviation (0: zeros), from the plan's random seed and its name.

    Each row stands `repeat` times. With `from_text` it is only what stands there until the router is set from text,
    when all else is written.
    """

    std: float
    from_text: bool = False
    repeat: int = 1


@dataclass(frozen=True)
class Constant:
    """A vector given in the recipe: a router's bias."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor: assembled from groups, or initialised."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    groups: tuple[PlannedGroup, ...] = ()
    init: RandomInit | Constant | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the output file."""
        return prod(self.shape) * ITEM_SIZE[self.dtype]
