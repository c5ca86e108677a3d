"""How sure a mean over documents is: intervals, and the probability that a difference is real.

The Bayesian bootstrap (Rubin 1981, The Annals of Statistics 9): every document gets a random weight, the loss is taken
with those weights, and the spread of many such losses is how sure it is. All models get the same weights, so what
documents are hard for every model cancels out of a difference. Documents are drawn rather than tokens, since the tokens
of one document are alike.
"""

from typing import Final

import numpy as np

from upcycle.numeric import Array

DRAWS: Final = 10_000
MAX_GROUPS: Final = 1000  # of documents: as good as single ones, and bounded in time
FEW: Final = 20  # documents of one length, below which an interval is rough; see `effective_documents`


def draw_losses(sums: Array, sizes: Array, random_seed: int) -> Array | None:
    """Draws of each model's loss, `[DRAWS, models]`, in step with one another; None for a single document.

    Args:
        sums: `[documents, models]`, the summed loss of every document.
        sizes: the same shape; its tokens or bytes, over which the loss is a mean.
        random_seed: the same one draws the same weights; take another for each domain, or their means would swing
            together.
    """
    documents = len(sums)
    if documents < 2:
        return None
    if documents > MAX_GROUPS:
        group = np.random.default_rng(random_seed).permutation(documents) % MAX_GROUPS
        sums, sizes = _grouped(sums, group), _grouped(sizes, group)
        documents = MAX_GROUPS
    weights = np.random.default_rng(random_seed).standard_exponential((DRAWS, documents), np.float32)
    draws = (weights.astype(np.float64) @ sums) / (weights.astype(np.float64) @ sizes)
    mean = sums.sum(0) / sizes.sum(0)
    # The variance of n equal documents' draws is (n - 1) / (n + 1) of what it should be; unequal ones count for fewer.
    effective = np.maximum(1.5, effective_documents(sizes))
    widened: Array = mean + (draws - mean) * np.sqrt((effective + 1) / (effective - 1))
    return widened


def effective_documents(sizes: Array) -> Array:
    """How many documents of one length are worth as much as these of several: (sum of n)^2 / sum of n^2, `[models]`."""
    found: Array = sizes.sum(0) ** 2 / np.square(sizes).sum(0)
    return found


def _grouped(values: Array, group: Array) -> Array:
    summed = np.zeros((MAX_GROUPS, values.shape[1]))
    np.add.at(summed, group, values)
    return summed


def interval(draws: Array) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def probability_below(draws: Array, tie: float = 0.0) -> float:
    """The probability that what was drawn lies below 0; what is within `tie` of it counts half."""
    return float((draws < -tie).mean() + (abs(draws) <= tie).mean() / 2)
