"""The order in which a training sees its sequences: seeded, exact shares of each domain, a position that is saved."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from upcycle.data import Domain
from upcycle.errors import DataError
from upcycle.numeric import Array

MAX_EPOCHS: Final = 4.0  # repeating more often costs as much as it gives (arXiv:2305.16264)


@dataclass(frozen=True)
class Batch:
    """Sequences for one optimizer step.

    Attributes:
        tokens: int64 `[sequences, length + 1]`: inputs, and targets one place further.
        counted: bool `[sequences, length]`: the targets that the loss counts, or None for all.
        domains: the number of each sequence's domain.
    """

    tokens: Array
    counted: Array | None
    domains: Sequence[int]


class TokenStream:
    """Batches of sequences of several domains, the same for the same seed.

    A domain is cut into windows of `sequence_length` targets that overlap by the one token from which the first target
    is predicted, so every token is learned once an epoch. Each epoch draws the windows in an order of its own, which
    the random seed, the domain's name and the epoch's number decide. The next sequence comes from the domain that is
    furthest behind its share, so shares are exact at every step; within a batch the sequences are shuffled.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        shares: Mapping[str, float],
        sequence_length: int,
        batch_size: int,
        random_seed: int,
    ) -> None:
        self.domains, self.length, self.batch_size = domains, sequence_length, batch_size
        self.random_seed = random_seed
        self.shares = [shares[domain.name] for domain in domains]
        self.windows = [(domain.tokens.size - 1) // sequence_length for domain in domains]
        for domain, windows in zip(domains, self.windows, strict=True):
            if windows < 1:
                raise DataError(
                    f"domain '{domain.name}' ({domain.source}) holds {domain.tokens.size} tokens, but one sequence "
                    f"needs {sequence_length + 1}; give more text or a shorter --sequence-length"
                )
        self.drawn = [0] * len(domains)
        self._orders: dict[int, tuple[int, Array]] = {}

    def next_batch(self) -> Batch:
        """The next sequences; the position moves on."""
        picked = [self._pick() for _ in range(self.batch_size)]
        order = np.random.default_rng([self.random_seed, sum(self.drawn)]).permutation(self.batch_size)
        picked = [picked[index] for index in order]
        starts = [(domain, window * self.length) for domain, window in picked]
        tokens = [self.domains[domain].tokens[start : start + self.length + 1] for domain, start in starts]
        counted = None
        if any(domain.counted is not None for domain in self.domains):
            counted = np.stack([self._counted(domain, start) for domain, start in starts])
        return Batch(np.stack(tokens).astype(np.int64), counted, [domain for domain, _ in picked])

    def _counted(self, domain: int, start: int) -> Array:
        marks = self.domains[domain].counted
        return np.ones(self.length, np.bool_) if marks is None else marks[start + 1 : start + self.length + 1]

    def _pick(self) -> tuple[int, int]:
        """The domain furthest behind its share, and its next window."""
        due = sum(self.drawn) + 1
        domain = max(range(len(self.shares)), key=lambda index: self.shares[index] * due - self.drawn[index])
        epoch, place = divmod(self.drawn[domain], self.windows[domain])
        known = self._orders.get(domain)
        if known is None or known[0] != epoch:
            key = [self.random_seed, zlib.crc32(self.domains[domain].name.encode()), epoch]
            known = self._orders[domain] = (epoch, np.random.default_rng(key).permutation(self.windows[domain]))
        self.drawn[domain] += 1
        return domain, int(known[1][place])

    def epochs(self, sequences: int) -> dict[str, float]:
        """How often each domain will have been seen after so many sequences in all."""
        return {
            domain.name: sequences * share / windows
            for domain, share, windows in zip(self.domains, self.shares, self.windows, strict=True)
        }

    def state(self) -> dict[str, Any]:
        """The position, as plain data."""
        return {"drawn": list(self.drawn)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a position that `state` gave."""
        self.drawn = list(state["drawn"])
