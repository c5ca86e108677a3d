"""Seeds: dense checkpoints read by their headers, and the checks that they belong together."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from upcycle.checkpoint import CONFIG, COPIED_FILES, ITEM_SIZE, TensorInfo, read_json, read_tensors
from upcycle.dense_config import DenseModel, differences, read_dense
from upcycle.errors import CheckpointError, SeedError
from upcycle.numeric import FLOATS, to_float32

SAMPLE_ELEMENTS: Final = 2048
MAX_SPEC: Final = 1000
MAX_TOKENIZER: Final = 100_000_000  # bytes; Gemma's are 34 MB
MAX_TOKENIZER_VALUES: Final = 4_000_000  # Gemma's have about 2.5 million, merges included
# Specialists of one ancestor are near 1, models trained apart within 0.01 of 0 (see `relatedness`).
MIN_COSINE: Final = 0.2
MAX_ANCESTOR_COSINE: Final = 0.45  # see `find_ancestor`
MAX_CARD: Final = 1_000_000  # characters

# Files that say which id a token has, in the order in which they are asked.
VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Seed:
    """One dense checkpoint: what its config.json and its headers say."""

    name: str
    folder: Path
    revision: str | None
    config: Mapping[str, Any]
    model: DenseModel
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
    if len(spec) > MAX_SPEC or "\0" in spec:
        raise SeedError(f"seed '{spec[:40]}…' is no path: {len(spec)} characters, expected at most {MAX_SPEC}")
    name, equals, source = spec.partition("=")
    if not equals or "/" in name or os.path.exists(spec):
        name, source = "", spec
    if not source:
        raise SeedError(f"seed '{spec}' names no folder; expected path, repo, repo@revision or name=path")
    # The last component as written: what a link points to must not decide the result's bytes.
    name = name or os.path.basename(os.path.abspath(source if os.path.exists(source) else source.partition("@")[0]))
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
    try:
        return _read_seed(name, source)
    except (OSError, CheckpointError) as error:
        raise SeedError(f"seed '{name}': {error}") from error


def _read_seed(name: str, source: str) -> Seed:
    folder, revision = Path(source), None
    if folder.is_file():
        raise SeedError(
            f"seed '{name}': {source} is a file; expected the folder that holds config.json and the weights"
        )
    if not folder.is_dir():
        from upcycle.hub import download_seed  # huggingface_hub costs a second: only where it is needed

        folder, revision = download_seed(name, source)
    where = f"seed '{name}'"
    config, tensors = read_json(folder / CONFIG), read_tensors(folder)
    if config.get("quantization_config"):
        raise SeedError(
            f"{where}: its weights are quantized (config.json has quantization_config); give the full-precision one"
        )
    return Seed(name, folder, revision, config, read_dense(config, where), tensors)


def _check_same_architecture(first: Seed, seed: Seed) -> None:
    if seed.model.model_type != first.model.model_type:
        raise SeedError(
            f"{seed.where} is a {seed.model.model_type} model, {first.where} a {first.model.model_type} model; "
            "only models of one family and one ancestor can be mixed"
        )
    for key, expected, found in differences(first.model, seed.model)[:1]:
        raise SeedError(
            f"{seed.where}: config.json says {key} = {_short(found)}, but {first.where} says {_short(expected)}"
            f"{_tensor_difference(first, seed)}; seeds of one ancestor agree, so leave one out"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _tensor_difference(first: Seed, seed: Seed) -> str:
    for name in sorted({*first.tensors, *seed.tensors}):
        one, other = first.tensors.get(name), seed.tensors.get(name)
        if one is None or other is None:
            holder = first if other is None else seed
            return f" (tensor '{name}' is only in {holder.where})"
        if one.shape != other.shape:
            return f" (tensor '{name}' has shape {list(other.shape)}, expected {list(one.shape)})"
    return ""


def check_tensors(seed: Seed, dense: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Check a seed's tensors against what its architecture has, and return the names of those that are dropped.

    Raises:
        SeedError: a tensor that is missing, that the architecture does not know, of another shape or no float.
    """
    dropped, family = [], seed.model.family
    for name, info in seed.tensors.items():
        if name in dense:
            if info.shape != dense[name]:
                raise SeedError(
                    f"{seed.where}: tensor '{name}' has shape {list(info.shape)}, expected {list(dense[name])} by its "
                    "config.json; the two do not belong together, so save the model anew with save_pretrained"
                )
            if info.dtype not in FLOATS:
                raise SeedError(
                    f"{seed.where}: tensor '{name}' is {info.dtype}, expected one of {', '.join(FLOATS)}; "
                    "quantized or integer weights cannot be mixed"
                )
        elif name.endswith(family.dropped):
            dropped.append(name)
        elif seed.model.tied and name == f"{family.head}.weight":
            _check_tied_head(seed, name)
            dropped.append(name)
        else:
            raise SeedError(
                f"{seed.where}: tensor '{name}' is not part of a {family.architecture}. A model with a head or an "
                "adapter of its own, or saved without its output head, must be loaded as a causal language model "
                "(the adapter merged) and saved anew with save_pretrained"
            )
    for name in dense:
        if name not in seed.tensors:
            raise SeedError(
                f"{seed.where}: tensor '{name}' is missing from its weights; is the download complete? If it is, load "
                "the model and save it anew with save_pretrained"
            )
    return sorted(dropped)


def _check_tied_head(seed: Seed, head: str) -> None:
    """A head beside tied embeddings is redundant only if it is the embedding; transformers unties the two otherwise."""
    table = f"{seed.model.family.base}.{seed.model.family.embedding}.weight"
    one, other = seed.tensors.get(table), seed.tensors[head]
    if one is None or (one.dtype, one.shape) != (other.dtype, other.shape) or not _same_bytes(one, other):
        raise SeedError(
            f"{seed.where}: config.json ties the embeddings, but tensor '{head}' differs from '{table}'; "
            'set "tie_word_embeddings": false in its config.json (and that of the other seeds)'
        )


def _same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for start in range(0, one.nbytes, 1 << 20):
            size = min(1 << 20, one.nbytes - start)
            if first.read(size) != second.read(size):
                return False
    return True


def _check_same_tokens(seeds: Sequence[Seed]) -> None:
    """Refuse seeds whose tokens have different ids: their embeddings would be averaged row by mismatched row."""
    for seed in seeds:
        for file in (*COPIED_FILES, *VOCABULARIES):
            if os.path.lexists(seed.folder / file) and not (seed.folder / file).is_file():
                raise SeedError(
                    f"{seed.where}: {file} is no plain file, or a link to nothing; its tokenizer is damaged"
                )
    having = [seed for seed in seeds if any((seed.folder / file).is_file() for file in VOCABULARIES)]
    if having and having[0] is not seeds[0]:
        raise SeedError(
            f"{seeds[0].where} has no tokenizer, {having[0].where} has one; the result takes the first seed's, "
            "so copy it there or name that seed first"
        )
    for file in VOCABULARIES:
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
                    f"{seed.where}: {file} differs from that of {first.where}, so its tokens may have other ids; "
                    "seeds need one tokenizer, so leave one out"
                )
            reference = reference or _token_ids(first, file)
            _compare_tokens(first, seed, file, reference, _token_ids(seed, file))


def _compare_tokens(first: Seed, seed: Seed, file: str, expected: Mapping[str, int], found: Mapping[str, int]) -> None:
    if expected == found:
        return
    token = min(token for token in {*expected, *found} if expected.get(token) != found.get(token))
    raise SeedError(
        f"{seed.where}: {file} gives token {token!r} the id {found.get(token)}, "
        f"but {first.where} gives it {expected.get(token)}; rows of their embeddings mean different tokens, "
        "so leave one out"
    )


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise SeedError(f"{path} cannot be read: {error.strerror}") from error


def _token_ids(seed: Seed, file: str) -> dict[str, int]:
    try:
        table = read_json(seed.folder / file, MAX_TOKENIZER, MAX_TOKENIZER_VALUES, MAX_TOKENIZER)
        if file == "vocab.json":
            return {token: int(index) for token, index in table.items()}
        vocabulary = table["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: [token, score] in the order of ids
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in table.get("added_tokens") or []}
        return {str(token): int(index) for token, index in (vocabulary | added).items()}
    except CheckpointError as error:
        raise SeedError(f"{seed.where}: {error}") from error
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise SeedError(f"{seed.where}: no vocabulary can be read from {file} ({error!r})") from error


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
        with np.errstate(invalid="ignore"):  # what is no number is refused where it is read
            # In float64, where no product of two floats overflows.
            a = to_float32(one[1][name], info.dtype).astype(np.float64)
            b = to_float32(other[1][name], match.dtype).astype(np.float64)
        scale = float(np.linalg.norm(a) * np.linalg.norm(b))
        if 0 < scale < float("inf"):
            cosines.append(float(a @ b) / scale)
    return sum(cosines) / len(cosines) if cosines else 1.0


def find_ancestor(seeds: Sequence[Seed], samples: Sequence[Mapping[str, bytes]]) -> str | None:
    """The name of the seed that the others were trained from, or None if none was, or for fewer than four seeds.

    Of three, the middle of a chain (base, instruct, instruct further) looks like the ancestor of two.

    Seen from the ancestor, the specialists lie in directions of their own; seen from a specialist, all others lie where
    the ancestor lies. So the largest cosine between the differences to a seed tells: about 0.06 against 0.7 for three
    specialists of 150 steps, and 0.5 for each where the ancestor is not among them. A seed that was hardly trained
    looks like the ancestor.
    """
    if len(seeds) < 4:
        return None
    products = np.zeros((len(seeds), len(seeds)))
    for name, info in seeds[0].tensors.items():
        if ".layers." not in name or len(info.shape) < 2 or info.dtype not in FLOATS:
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


def read_license(folder: Path) -> str | None:
    """The licence that a checkpoint's model card (`README.md`) states, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        with card.open(encoding="utf-8") as file:
            text = file.read(MAX_CARD)
    except (OSError, ValueError):
        return None
    front = text.split("\n---", 1)[0] if text.startswith("---\n") else ""
    # Two plain lines of its metadata: a YAML reader could be kept busy for hours by the others.
    found = dict(re.findall(r"^(license|license_name): *[\"']?([\w.+-]{1,100})[\"']? *(?:#.*)?$", front, re.MULTILINE))
    license_name = found.get("license")
    return found.get("license_name", license_name) if license_name == "other" else license_name


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
