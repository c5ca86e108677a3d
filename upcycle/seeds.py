"""Seeds: dense checkpoints read by their headers, and the checks that they belong together."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from upcycle import hub
from upcycle.adapters import Adapter, Factors, adapt, last_component, read_adapter, read_made, split_adapter
from upcycle.checkpoint import (
    ADAPTER_CONFIG,
    CARD,
    CONFIG,
    COPIED_FILES,
    ITEM_SIZE,
    TOKENIZER_CONFIG,
    TensorInfo,
    read_json,
    read_tensors,
)
from upcycle.dense_config import DenseModel, differences, read_dense
from upcycle.errors import CheckpointError, HubError, SeedError
from upcycle.hub import Repository
from upcycle.numeric import FLOATS

MAX_SPEC: Final = 1000
MAX_TOKENIZER: Final = 100_000_000  # bytes; Gemma's are 34 MB
MAX_TOKENIZER_VALUES: Final = 4_000_000  # Gemma's have about 2.5 million, merges included
MAX_CARD: Final = 1_000_000  # characters

# Files that say which id a token has, in the order in which they are asked.
VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


# Where a chat template may stand.
CHAT_TEMPLATES: Final = ("chat_template.jinja", "chat_template.json", TOKENIZER_CONFIG)


@dataclass(frozen=True)
class Seed:
    """One dense checkpoint: what its config.json and its headers say.

    Attributes:
        repository, revision: its name on the Hub and the commit, if it comes from there.
        remote: what the Hub says of it; what is not in `folder`, the cache, can be had from there.
        adapter: what changes the weights of the checkpoint in `folder`, as `tensors` say.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    model: DenseModel
    tensors: Mapping[str, TensorInfo]
    repository: str | None = None
    revision: str | None = None
    remote: Repository | None = None
    adapter: Adapter | None = None

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"seed '{self.name}'"

    @property
    def here(self) -> bool:
        """Whether all its weights are on the disk."""
        return not self.remotes or all(file.is_file() for file in self.files)

    @property
    def files(self) -> set[Path]:
        """Every file that its weights are read from."""
        return {file for info in self.tensors.values() for file in info.files}

    @property
    def remotes(self) -> list[Repository]:
        """The repositories that it is read from, its adapter's included."""
        return [remote for remote in (self.remote, self.adapter and self.adapter.remote) if remote]

    def holds(self, file: str) -> bool:
        """Whether the checkpoint has a file of that name, on the disk or on the Hub."""
        return file in self.remote.files if self.remote else (self.folder / file).is_file()

    def get(self, file: str) -> Path:
        """Where a file lies, downloaded if need be."""
        return self.remote.get(file) if self.remote else self.folder / file

    def read(self, info: TensorInfo, start: int, count: int) -> bytes:
        """`count` bytes of a tensor from byte `start`; asked of the Hub if the file is not on the disk."""
        if info.made is None:
            return self._read_stored(info, start, count)
        item = ITEM_SIZE[info.dtype]
        try:
            return read_made(info, start // item, count // item, Factors(self._read_stored)).tobytes()
        except CheckpointError as error:
            raise SeedError(f"{self.where}: {error}") from error

    def _read_stored(self, info: TensorInfo, start: int, count: int) -> bytes:
        if not info.file.is_file():
            for remote in self.remotes:
                if remote.folder == info.file.parent:
                    return remote.read(info.file.name, info.offset + start, count)
        with info.file.open("rb") as handle:
            handle.seek(info.offset + start)
            return handle.read(count)


def read_seeds(specs: Sequence[str], align_vocab: bool = False) -> list[Seed]:
    """Read seeds given as `path`, `repo`, `repo@revision`, two of these as `base+adapter`, or `name=` before it.

    Args:
        specs: one a seed.
        align_vocab: whether they will be aligned (`upcycle.vocabulary`), so that their tokens may differ.

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
        _check_same_architecture(seeds[0], seed, align_vocab)
    _check_tokenizer_files(seeds)
    if not align_vocab:
        _check_same_tokens(seeds)
    return seeds


def download_bytes(seeds: Sequence[Seed]) -> int:
    """How many bytes of seeds on the Hub are not here yet."""
    return sum(remote.files[file].size for remote, files in _missing(seeds) for file in files)


def download(seeds: Sequence[Seed], progress: Callable[[int], None]) -> None:
    """Download to the Hub's cache what a merge needs of seeds that are not here.

    Raises:
        HubError: it cannot be had, or the disk has no room.
    """
    for remote, files in _missing(seeds):
        remote.download(files, progress)


def _missing(seeds: Sequence[Seed]) -> list[tuple[Repository, list[str]]]:
    """What is not here of each repository: the first seed's tokenizer is taken, anyone's chat template may be."""
    wanted: dict[Path, set[str]] = {}  # by folder: several seeds may have one base
    remotes: dict[Path, Repository] = {}
    for seed in seeds:
        for remote in seed.remotes:
            remotes[remote.folder] = remote
            names = wanted.setdefault(remote.folder, {CARD})
            names |= {file.name for file in seed.files if file.parent == remote.folder}
            if remote is seed.remote:
                names |= {*COPIED_FILES} if seed is seeds[0] else {*CHAT_TEMPLATES}
    return [(remote, remote.missing(wanted[folder] & {*remote.files})) for folder, remote in remotes.items()]


def _split_name(spec: str) -> tuple[str, str]:
    if len(spec) > MAX_SPEC or "\0" in spec:
        raise SeedError(f"seed '{spec[:40]}…' is no path: {len(spec)} characters, expected at most {MAX_SPEC}")
    name, equals, source = spec.partition("=")
    if not equals or "/" in name or os.path.exists(spec):
        name, source = "", spec
    base, adapter = split_adapter(source)
    if not base or adapter == "":
        raise SeedError(f"seed '{spec}' names no folder; expected path, repo, repo@revision, base+adapter or name=path")
    # The last component as written: what a link points to must not decide the result's bytes.
    name = name or last_component(adapter or base)
    if not re.fullmatch(r"[\w.+-]*[A-Za-z_][\w.+-]*", name):
        raise SeedError(
            f"seed '{spec}': '{name}' is no name (letters, digits and ._+-, not a number); give one: NAME={source}"
        )
    return name, source


def read_seed(name: str, source: str) -> Seed:
    """Read one seed's config and headers; a `source` (or a part of `base+adapter`) that is no folder is looked up on
    the Hub.

    Raises:
        SeedError: what is missing or wrong, and in which file.
    """
    try:
        base, adapter = split_adapter(source)
        seed = _read_seed(name, base)
        if not adapter:
            return seed
        read = read_adapter(adapter)
        return replace(seed, tensors=adapt(seed.tensors, seed.model, read), adapter=read)
    except (OSError, CheckpointError, HubError) as error:
        raise SeedError(f"seed '{name}': {error}") from error


def _read_seed(name: str, source: str) -> Seed:
    folder = Path(source)
    if folder.is_file():
        raise SeedError(
            f"seed '{name}': {source} is a file; expected the folder that holds config.json and the weights"
        )
    if not folder.is_dir():
        return _read_hub_seed(name, source)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).exists():
        raise SeedError(f"seed '{name}': {folder} holds an adapter alone; give it with its base: BASE+{folder}")
    return _make_seed(name, folder, read_json(folder / CONFIG), read_tensors(folder))


def _read_hub_seed(name: str, source: str) -> Seed:
    if not hub.is_repository_name(source):
        raise SeedError(f"seed '{name}': there is no folder {source}, and that is no name of a Hub repository either")
    if hub.is_offline():
        folder = hub.cached_folder(source)
        if folder is None:
            raise SeedError(
                f"seed '{name}': there is no folder {source}, and no Hub repository of that name in the cache; as "
                "HF_HUB_OFFLINE is set, nobody was asked"
            )
        config, tensors = read_json(folder / CONFIG), read_tensors(folder)
        return _make_seed(name, folder, config, tensors, source.partition("@")[0], folder.name)
    remote = hub.look_up(source)
    if ADAPTER_CONFIG in remote.files and CONFIG not in remote.files:
        raise SeedError(f"seed '{name}': {remote.name} holds an adapter alone; give it with its base: BASE+{source}")
    tensors = hub.read_remote_tensors(remote)
    if CARD in remote.files and remote.files[CARD].size <= hub.MAX_REMOTE_CARD:
        remote.get(CARD)  # for its licence
    return _make_seed(name, remote.folder, read_json(remote.get(CONFIG)), tensors, remote.name, remote.commit, remote)


def _make_seed(
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    repository: str | None = None,
    revision: str | None = None,
    remote: Repository | None = None,
) -> Seed:
    where = f"seed '{name}'"
    if config.get("quantization_config"):
        raise SeedError(
            f"{where}: its weights are quantized (config.json has quantization_config); give the full-precision one"
        )
    return Seed(name, folder, config, read_dense(config, where), tensors, repository, revision, remote)


def _check_same_architecture(first: Seed, seed: Seed, align_vocab: bool) -> None:
    if seed.model.model_type != first.model.model_type:
        raise SeedError(
            f"{seed.where} is a {seed.model.model_type} model, {first.where} a {first.model.model_type} model; "
            "only models of one family and one ancestor can be mixed"
        )
    for key, expected, found in differences(first.model, seed.model):
        if key == "vocab_size" and align_vocab:
            continue
        hint = _align_hint(first, seed) if key == "vocab_size" else ""
        raise SeedError(
            f"{seed.where}: config.json says {key} = {_short(found)}, but {first.where} says {_short(expected)}"
            f"{_tensor_difference(first, seed)}; seeds of one ancestor agree, so leave one out{hint}"
        )


def _align_hint(*seeds: Seed) -> str:
    """What else may be done where tokens differ."""
    aligned = all(seed.holds("tokenizer.json") for seed in seeds)
    return ", or give --align-vocab, which matches rows by their tokens" if aligned else ""


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
    same = one is not None and (one.dtype, one.shape) == (other.dtype, other.shape)
    # Of a seed on the Hub the bytes are compared when they are here.
    if one is None or not same or (seed.here and not _same_bytes(one, other)):
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


def _check_tokenizer_files(seeds: Sequence[Seed]) -> None:
    """Refuse damaged files, and a first seed without a tokenizer where another has one."""
    for seed in (seed for seed in seeds if not seed.remote):
        for file in (*COPIED_FILES, *VOCABULARIES):
            if os.path.lexists(seed.folder / file) and not (seed.folder / file).is_file():
                raise SeedError(
                    f"{seed.where}: {file} is no plain file, or a link to nothing; its tokenizer is damaged"
                )
    having = [seed for seed in seeds if any(seed.holds(file) for file in VOCABULARIES)]
    if having and having[0] is not seeds[0]:
        raise SeedError(
            f"{seeds[0].where} has no tokenizer, {having[0].where} has one; the result takes the first seed's, "
            "so copy it there or name that seed first"
        )


def _check_same_tokens(seeds: Sequence[Seed]) -> None:
    """Refuse seeds whose tokens have different ids: their embeddings would be averaged row by mismatched row."""
    for file in VOCABULARIES:
        holders = [seed for seed in seeds if seed.holds(file)]
        if len(holders) < 2:
            continue
        first, *others = holders
        reference: dict[str, int] | None = None
        for seed in others:
            if same_file(first, seed, file):
                continue
            if not file.endswith(".json"):
                raise SeedError(
                    f"{seed.where}: {file} differs from that of {first.where}, so its tokens may have other ids; "
                    f"seeds need one tokenizer, so leave one out{_align_hint(first, seed)}"
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
        f"so leave one out{_align_hint(first, seed)}"
    )


def same_file(one: Seed, other: Seed, file: str) -> bool:
    """Whether two seeds' files are the same, by what the Hub calls their contents where it can be asked."""
    known = [seed.remote.files[file].etag for seed in (one, other) if seed.remote]
    kind = len(known[0]) if known else 64
    return _content_name(one, file, kind) == _content_name(other, file, kind)


def _content_name(seed: Seed, file: str, length: int) -> str:
    """The Hub's name for a file's content: of 40 characters git's, of 64 its SHA-256."""
    if seed.remote and len(seed.remote.files[file].etag) == length:
        return seed.remote.files[file].etag
    path = seed.get(file)
    try:
        with path.open("rb") as handle:
            if length == 64:
                return hashlib.file_digest(handle, "sha256").hexdigest()
            content = handle.read()
            return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    except OSError as error:
        raise SeedError(f"{path} cannot be read: {error.strerror}") from error


def _token_ids(seed: Seed, file: str) -> dict[str, int]:
    try:
        table = read_json(seed.get(file), MAX_TOKENIZER, MAX_TOKENIZER_VALUES, MAX_TOKENIZER)
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


def adapter_record(adapter: Adapter) -> dict[str, str | None]:
    """What `upcycle.json` says of a seed's adapter."""
    return {
        "name": adapter.name,
        "repository": adapter.repository,
        "revision": adapter.revision,
        "license": read_license(adapter.folder),
    }


def read_license(folder: Path) -> str | None:
    """The licence that a checkpoint's model card (`README.md`) states, or None."""
    card = folder / CARD
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
