"""What the weights themselves tell of seeds, by samples: their identity, whether they are related, who was first."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import prod
from typing import Final

import numpy as np

from upcycle.checkpoint import ITEM_SIZE, TensorInfo
from upcycle.errors import SeedError
from upcycle.numeric import FLOATS, to_float32
from upcycle.seeds import Seed

SAMPLE_ELEMENTS: Final = 2048
# Specialists of one ancestor are near 1, models trained apart within 0.01 of 0 (see `relatedness`).
MIN_COSINE: Final = 0.2
MAX_ANCESTOR_COSINE: Final = 0.45  # see `find_ancestor`
SPOTS: Final = 4  # matrices of which a seed on the Hub is sampled before it is downloaded


def sample(seed: Seed) -> dict[str, bytes]:
    """The 2048 elements in the middle of every tensor, by name: enough to tell one training from another.

    Of a seed that is not here yet only those of a few matrices: enough to tell whether two share an ancestor.
    """
    names = sorted(seed.tensors)
    if not seed.here:
        matrices = [name for name in names if _is_matrix(name, seed.tensors[name])]
        names = matrices[:: max(1, len(matrices) // SPOTS)][:SPOTS]
    samples = {}
    for name in names:
        info = seed.tensors[name]
        elements, item = prod(info.shape), ITEM_SIZE[info.dtype]
        count = min(SAMPLE_ELEMENTS, elements)
        samples[name] = seed.read(info, (elements - count) // 2 * item, count * item)
    return samples


def _is_matrix(name: str, info: TensorInfo) -> bool:
    return ".layers." in name and len(info.shape) >= 2 and info.dtype in FLOATS


def fingerprint(seed: Seed, samples: Mapping[str, bytes]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and sample: a checkpoint's identity, whatever its sharding."""
    digest = hashlib.sha256()
    for name, info in sorted(seed.tensors.items()):
        digest.update(json.dumps([name, info.dtype, list(info.shape)]).encode())
        digest.update(samples[name])
    return digest.hexdigest()


def relatedness(one: tuple[Seed, Mapping[str, bytes]], other: tuple[Seed, Mapping[str, bytes]]) -> float:
    """Mean cosine between the samples of two seeds' matrices within the layers.

    Specialists of one seed are near 1; models trained apart have independent weights and are near 0.
    """
    cosines = []
    for name, info in one[0].tensors.items():
        match = other[0].tensors.get(name)
        if match is None or not _is_matrix(name, info) or name not in one[1].keys() & other[1].keys():
            continue
        with np.errstate(invalid="ignore"):  # what is no number is refused where it is read
            # In float64, where no product of two floats overflows.
            a = to_float32(one[1][name], info.dtype).astype(np.float64)
            b = to_float32(other[1][name], match.dtype).astype(np.float64)
        scale = float(np.linalg.norm(a) * np.linalg.norm(b))
        if 0 < scale < float("inf"):
            cosines.append(float(a @ b) / scale)
    return sum(cosines) / len(cosines) if cosines else 1.0


def find_ancestor(seeds: Sequence[Seed], samples: Sequence[Mapping[str, bytes]]) -> str | None:
    """The name of the seed that the others were trained from; None if none was, of fewer than four, or not all here.

    Of three, the middle of a chain (base, instruct, instruct further) looks like the ancestor of two.

    Seen from the ancestor, the specialists lie in directions of their own; seen from a specialist, all others lie where
    the ancestor lies. So the largest cosine between the differences to a seed tells: about 0.06 against 0.7 for three
    specialists of 150 steps, and 0.5 for each where the ancestor is not among them. A seed that was hardly trained
    looks like the ancestor.
    """
    if len(seeds) < 4 or not all(seed.here for seed in seeds):
        return None
    products = np.zeros((len(seeds), len(seeds)))
    for name, info in seeds[0].tensors.items():
        if not _is_matrix(name, info):
            continue
        rows = [to_float32(part[name], seed.tensors[name].dtype) for seed, part in zip(seeds, samples, strict=True)]
        vectors = np.stack(rows).astype(np.float64)
        with np.errstate(all="ignore"):  # weights that are no numbers are refused where they are read
            products += vectors @ vectors.T
    cosines = []
    for index in range(len(seeds)):
        others = [other for other in range(len(seeds)) if other != index]
        row = products[index, others]
        differences = products[np.ix_(others, others)] - row - row[:, None] + products[index, index]
        with np.errstate(all="ignore"):  # identical seeds differ by nothing
            lengths = np.sqrt(np.maximum(differences.diagonal(), 0))
            angles = differences / lengths / lengths[:, None]
        cosines.append(float(angles[np.triu_indices(len(others), 1)].max()))
    lowest = int(np.argmin(np.nan_to_num(cosines, nan=1.0)))
    return seeds[lowest].name if cosines[lowest] < MAX_ANCESTOR_COSINE else None


def check_related(seeds: Sequence[Seed], samples: Sequence[Mapping[str, bytes]]) -> None:
    """Refuse seeds that share no ancestor: their hidden units do not correspond, so means and routing are noise.

    Raises:
        SeedError: the two seeds and their cosine.
    """
    for (one, first), (other, second) in combinations(zip(seeds, samples, strict=True), 2):
        cosine = relatedness((one, first), (other, second))
        if cosine < MIN_COSINE:
            raise SeedError(
                f"{one.where} and {other.where} share no ancestor: their sampled weights' cosine is {cosine:.3f}, "
                f"expected above {MIN_COSINE} (specialists of one seed are near 1); --allow-unrelated mixes them anyway"
            )
