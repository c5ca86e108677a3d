"""Seeds: dense checkpoints read by their headers, and the checks that they belong together."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from upcycle.checkpoint import CONFIG, ITEM_SIZE, TensorInfo, read_json, read_tensors
from upcycle.dense_config import Sizes, config_values, decisive_values, find_family, read_sizes
from upcycle.errors import CheckpointError, SeedError
from upcycle.families import Family
from upcycle.numeric import FLOATS, to_float32

SAMPLE_ELEMENTS: Final = 2048
# Specialists of one ancestor are near 1, models trained apart within 0.01 of 0 (see `relatedness`).
MIN_COSINE: Final = 0.2

# What a result takes over byte for byte, from the first seed.
COPIED_FILES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
# Files that say which id a token has, in the order in which they are asked.
_VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Seed:
    """One dense checkpoint: what its config.json and its headers say, and samples of its weights."""

    name: str
    folder: Path
    revision: str | None
    config: Mapping[str, Any]
    family: Family
    sizes: Sizes
    values: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"seed '{self.name}'"


def read_seeds(specs: Sequence[str]) -> list[Seed]:
    """Read seeds given as `path`, `repo`, `repo@revision` or `name=` before one of these.

    Raises:
        SeedError: a seed that cannot be read, two of one name, or seeds that do not belong together.
    """
    named = [_split_name(spec) for spec in specs]
    for (first, one), (second, other) in combinations(named, 2):
        if first == second:
            raise SeedError(
                f"seeds '{one}' and '{other}' are both named '{first}'; name them: --seeds {first}={one} NAME={other}"
            )
    seeds = [read_seed(name, source) for name, source in named]
    for seed in seeds[1:]:
        _check_same_architecture(seeds[0], seed)
    _check_same_tokens(seeds)
    return seeds


def _split_name(spec: str) -> tuple[str, str]:
    name, equals, source = spec.partition("=")
    if not equals or "/" in name or Path(spec).exists():
        name, source = "", spec
    if not source:
        raise SeedError(f"seed '{spec}' names no folder; expected path, repo, repo@revision or name=path")
    name = name or Path(source.partition("@")[0] if not Path(source).exists() else source).resolve().name
    if not re.fullmatch(r"[\w.+-]*[A-Za-z_][\w.+-]*", name):
        raise SeedError(
            f"seed '{spec}': '{name}' is no name (letters, digits and ._+-, not a number); give one: NAME={source}"
        )
    return name, source


def read_seed(name: str, source: str) -> Seed:
    """Read one seed's config and headers; a `source` that is no folder is looked up on the Hub.

    Raises:
        SeedError: what is missing or wrong, and in which file.
    """
    folder, revision = Path(source), None
    if folder.is_file():
        raise SeedError(
            f"seed '{name}': {source} is a file; expected the folder that holds config.json and the weights"
        )
    if not folder.is_dir():
        from upcycle.hub import download_seed  # huggingface_hub costs a second: only where it is needed

        folder, revision = download_seed(name, source)
    where = f"seed '{name}'"
    try:
        config, tensors = read_json(folder / CONFIG), read_tensors(folder)
    except CheckpointError as error:
        raise SeedError(f"{where}: {error}") from error
    if config.get("quantization_config"):
        raise SeedError(
            f"{where}: its weights are quantized (config.json has quantization_config); give the full-precision one"
        )
    family = find_family(config, where)
    sizes = read_sizes(family, config, where)
    return Seed(name, folder, revision, config, family, sizes, config_values(family, config), tensors)


def _check_same_architecture(first: Seed, seed: Seed) -> None:
    if seed.family is not first.family:
        raise SeedError(
            f"{seed.where} is a {seed.config['model_type']} model, {first.where} a {first.config['model_type']} model; "
            "only models of one family and one ancestor can be mixed"
        )
    found = decisive_values(seed.values)
    for key, value in decisive_values(first.values).items():
        if found.get(key) != value:
            raise SeedError(
                f"{seed.where}: config.json says {key} = {json.dumps(found.get(key))}, but {first.where} says "
                f"{json.dumps(value)}{_tensor_difference(first, seed)}; seeds of one ancestor agree, so leave one out"
            )


def _tensor_difference(first: Seed, seed: Seed) -> str:
    for name in sorted({*first.tensors, *seed.tensors}):
        one, other = first.tensors.get(name), seed.tensors.get(name)
        if one is None or other is None:
            holder = first if other is None else seed
            return f" (tensor '{name}' is only in {holder.where})"
        if one.shape != other.shape:
            return f" (tensor '{name}' has shape {list(other.shape)}, expected {list(one.shape)})"
    return ""


def check_tensors(seed: Seed, dense: Mapping[str, tuple[int, ...]], tied: bool) -> list[str]:
    """Check a seed's tensors against what its architecture has, and return the names of those that are dropped.

    Raises:
        SeedError: a tensor that is missing, that the architecture does not know, of another shape or no float.
    """
    dropped = []
    for name, info in seed.tensors.items():
        if name in dense:
            if info.shape != dense[name]:
                raise SeedError(
                    f"{seed.where}: tensor '{name}' has shape {list(info.shape)}, "
                    f"expected {list(dense[name])} by its config.json"
                )
            if info.dtype not in FLOATS:
                raise SeedError(
                    f"{seed.where}: tensor '{name}' is {info.dtype}, expected one of {', '.join(FLOATS)}; "
                    "quantized or integer weights cannot be mixed"
                )
        elif name.endswith(seed.family.dropped) or (tied and name == f"{seed.family.head}.weight"):
            dropped.append(name)
        else:
            raise SeedError(
                f"{seed.where}: tensor '{name}' is not part of a {seed.family.architecture}; is it a fine-tune with a "
                "head or adapter of its own? Merge the adapter or remove the tensor first"
            )
    for name in dense:
        if name not in seed.tensors:
            raise SeedError(f"{seed.where}: tensor '{name}' is missing from its weights")
    return sorted(dropped)


def _check_same_tokens(seeds: Sequence[Seed]) -> None:
    """Refuse seeds whose tokens have different ids: their embeddings would be averaged row by mismatched row."""
    for file in _VOCABULARIES:
        holders = [seed for seed in seeds if (seed.folder / file).is_file()]
        if len(holders) < 2:
            continue
        first, *others = holders
        digest = _file_hash(first.folder / file)
        reference: dict[str, int] | None = None
        for seed in others:
            if _file_hash(seed.folder / file) == digest:
                continue
            if not file.endswith(".json"):
                raise SeedError(
                    f"{seed.where}: {file} differs from that of {first.where}; the tokens may have other ids"
                )
            reference = reference or _token_ids(first.folder / file)
            _compare_tokens(first, seed, file, reference, _token_ids(seed.folder / file))


def _compare_tokens(first: Seed, seed: Seed, file: str, expected: Mapping[str, int], found: Mapping[str, int]) -> None:
    if expected == found:
        return
    token = min(token for token in {*expected, *found} if expected.get(token) != found.get(token))
    raise SeedError(
        f"{seed.where}: {file} gives token {token!r} the id {found.get(token)}, "
        f"but {first.where} gives it {expected.get(token)}; row by row their embeddings mean different tokens"
    )


def _file_hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _token_ids(path: Path) -> dict[str, int]:
    table = read_json(path)
    if path.name == "vocab.json":
        return table
    try:
        vocabulary = table["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: [token, score] in the order of ids
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in table.get("added_tokens", [])}
        return {**vocabulary, **added}
    except (KeyError, TypeError, ValueError) as error:
        raise SeedError(f"{path}: no vocabulary can be read from it ({error!r})") from error


def sample(seed: Seed) -> dict[str, bytes]:
    """The 2048 elements in the middle of every tensor, by name: enough to tell one training from another."""
    samples = {}
    for name, info in sorted(seed.tensors.items()):
        elements, item = prod(info.shape), ITEM_SIZE[info.dtype]
        count = min(SAMPLE_ELEMENTS, elements)
        with info.file.open("rb") as handle:
            handle.seek(info.offset + (elements - count) // 2 * item)
            samples[name] = handle.read(count * item)
    return samples


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
        if match is None or ".layers." not in name or len(info.shape) < 2 or info.dtype not in FLOATS:
            continue
        a, b = to_float32(one[1][name], info.dtype), to_float32(other[1][name], match.dtype)
        scale = float(np.linalg.norm(a) * np.linalg.norm(b))
        if 0 < scale < float("inf"):
            cosines.append(float(a @ b) / scale)
    return sum(cosines) / len(cosines) if cosines else 1.0


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
