"""LoRA adapters on a dense checkpoint: what PEFT has saved, checked, and the weights that the two give together.

Nothing is merged ahead: a tensor that an adapter changes is made as it is read, whichever elements are asked for.
"""

import json
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from upcycle import hub
from upcycle.checkpoint import ADAPTER_CONFIG, CARD, ITEM_SIZE, LowRank, Made, TensorInfo, read_header, read_json
from upcycle.dense_config import DenseModel
from upcycle.errors import CheckpointError
from upcycle.hub import Repository
from upcycle.numeric import FLOATS, Array, to_float32

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
HEAD: Final = "lm_head.weight"  # as transformers calls every family's, also where files have another name
MAX_RANK: Final = 2**16
MAX_NAME: Final = 500  # characters
MAX_PATTERNS: Final = 5000
MAX_REPEATS: Final = 3  # in a pattern, each of which may multiply the time that a match takes
RANKS: Final = 32  # summed in one product: 24 + 24 + 5 bits are the 53 of a float64
BITS: Final = 24
CACHE: Final = 128 << 20  # bytes of factors kept

# Settings of an adapter_config.json that do not change what its tensors mean, or that are looked at by themselves.
_SETTINGS: Final = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "modules_to_save"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("auto_mapping", "inference_mode", "runtime_config", "ensure_weight_tying", "velora_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
# Starts of a training that leave the base as it is; others (PiSSA, OLoRA, ...) change it.
_STARTS: Final = (True, False, None, "gaussian", "eva", "orthogonal")
_INSTEAD: Final = "merge it into its base with PEFT (merge_and_unload, save_pretrained), and give that as the seed"

Fetch = Callable[[TensorInfo, int, int], bytes | memoryview]  # so many bytes of a stored tensor from this one on


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: what its adapter_config.json and its header say; `repository` to `remote` as of a seed."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    name: str
    repository: str | None = None
    revision: str | None = None
    remote: Repository | None = None


def split_adapter(source: str) -> tuple[str, str | None]:
    """`base+adapter` in two; what is there under the whole name, or is no such pair, is a base alone."""

    def known(part: str) -> int:
        return 2 if os.path.exists(part) else int(hub.is_repository_name(part))

    if "+" not in source or os.path.exists(source):
        return source, None
    places = [match.start() for match in re.finditer(r"\+", source)]
    pairs = [(source[:place], source[place + 1 :]) for place in places]
    best = max(pairs, key=lambda pair: known(pair[0]) + known(pair[1]))
    return best if known(best[0]) + known(best[1]) >= 2 else (source, None)


def last_component(source: str) -> str:
    """What a folder or a repository is called by default: as written, not what a link points to."""
    return os.path.basename(os.path.abspath(source if os.path.exists(source) else source.partition("@")[0]))


def read_adapter(source: str) -> Adapter:
    """Read an adapter's config and header; a `source` that is no folder is looked up on the Hub.

    Raises:
        CheckpointError, HubError: what is missing or wrong, and in which file.
    """
    folder, name = Path(source), last_component(source)
    if folder.is_file():
        raise CheckpointError(f"{source} is a file; expected the folder that holds {ADAPTER_CONFIG} and the weights")
    if folder.is_dir():
        return Adapter(folder, read_json(folder / ADAPTER_CONFIG), _read_weights(folder), name)
    if not hub.is_repository_name(source):
        raise CheckpointError(
            f"there is no folder '{source}', and that is no name of a Hub repository either; expected an adapter's "
            "after the '+'"
        )
    if hub.is_offline():
        cached = hub.cached_folder(source, ADAPTER_CONFIG)
        if cached is None:
            raise CheckpointError(
                f"there is no folder {source}, and no adapter of that name in the Hub's cache; as HF_HUB_OFFLINE is "
                "set, nobody was asked"
            )
        config, tensors = read_json(cached / ADAPTER_CONFIG), _read_weights(cached)
        return Adapter(cached, config, tensors, name, source.partition("@")[0], cached.name)
    remote = hub.look_up(source)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if file not in remote.files:
            raise CheckpointError(
                f"Hub repository {remote.name} holds no {file}; expected a LoRA adapter as PEFT saves it"
            )
    config = read_json(remote.get(ADAPTER_CONFIG))
    if CARD in remote.files and remote.files[CARD].size <= hub.MAX_REMOTE_CARD:
        remote.get(CARD)  # for its licence
    tensors = hub.read_remote_header(remote, remote.folder / ADAPTER_WEIGHTS)
    return Adapter(remote.folder, config, tensors, name, remote.name, remote.commit, remote)


def _read_weights(folder: Path) -> dict[str, TensorInfo]:
    if not (folder / ADAPTER_WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder} holds its adapter as pickle (adapter_model.bin), which can run code when read; load it with "
            "PEFT, if you trust it, and save_pretrained it anew"
        )
    return read_header(folder / ADAPTER_WEIGHTS)


@dataclass(frozen=True)
class _Settings:
    """What an adapter_config.json says of the size of its product."""

    rank: int
    alpha: float
    rank_stabilized: bool
    ranks: Mapping[re.Pattern[str], int]
    alphas: Mapping[re.Pattern[str], float]

    def of(self, module: str) -> tuple[int, float]:
        """A module's rank and scale: of each table the first pattern that matches its name, or the end of it."""
        rank = next((rank for pattern, rank in self.ranks.items() if pattern.match(module)), self.rank)
        alpha = next((alpha for pattern, alpha in self.alphas.items() if pattern.match(module)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def _read_settings(adapter: Adapter) -> _Settings:
    """Check an adapter_config.json, of which everything must be plain LoRA."""
    config, file = adapter.config, adapter.folder / ADAPTER_CONFIG

    def refuse(key: str, expected: str) -> CheckpointError:
        value = json.dumps(config.get(key))
        return CheckpointError(f"{file} says {key} = {value[:80]}, expected {expected}")

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", f'"LORA", the one kind of adapter that is taken; {_INSTEAD}')
    if config.get("bias", "none") != "none":
        raise refuse("bias", f'"none"; {_INSTEAD}')
    start = config.get("init_lora_weights")
    if isinstance(start, (dict, list)) or start not in _STARTS:
        raise refuse("init_lora_weights", f"a start that leaves the base's weights as they are; {_INSTEAD}")
    for key, value in config.items():
        # Other kinds of LoRA (DoRA, transposed weights, trained tokens, ...), also those that PEFT will think of.
        if key not in _SETTINGS and (value is True or (isinstance(value, (dict, list)) and value)):
            raise refuse(key, f"none: that is not plain LoRA; {_INSTEAD}")
    if not isinstance(config.get("use_rslora", False), bool):
        raise refuse("use_rslora", "true or false")
    if not _is_rank(config.get("r")):
        raise refuse("r", f"a whole number from 1 to {MAX_RANK}")
    if not _is_finite(config.get("lora_alpha")):
        raise refuse("lora_alpha", "a number")
    tables = []
    for key, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_finite)):
        table = config.get(key) or {}
        whole = isinstance(table, dict) and len(table) <= MAX_PATTERNS
        if not whole or not all(_is_pattern(name) and fits(value) for name, value in table.items()):
            raise refuse(key, f"a table from names of modules, or simple patterns of them, to numbers; {_INSTEAD}")
        tables.append({re.compile(rf"(.*\.)?({name})$"): value for name, value in table.items()})
    return _Settings(config["r"], config["lora_alpha"], config.get("use_rslora", False), *tables)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2.0**60


def _is_pattern(key: str) -> bool:
    """Whether a regular expression compiles and cannot be busy for long: few repetitions, and none of a group."""
    plain = key.replace("(?:", "(")
    if len(key) > MAX_NAME or len(re.findall(r"[*+?{]", plain)) > MAX_REPEATS:
        return False
    if re.search(r"\)[*+{]|\\[1-9]|\(\?", plain):  # a group again and again, a reference, a look ahead
        return False
    try:
        re.compile(f"({key})")
    except re.error:
        return False
    return True


def adapt(tensors: Mapping[str, TensorInfo], model: DenseModel, adapter: Adapter) -> dict[str, TensorInfo]:
    """A base's tensors as the adapter changes them; every tensor of the adapter is used.

    Raises:
        CheckpointError: a setting that is not plain LoRA, or a tensor that does not fit, by its name.
    """
    settings = _read_settings(adapter)
    head = f"{model.family.head}.weight"
    renamed = {HEAD: head} if head in tensors and HEAD not in tensors else {}
    full, factors = _sort(adapter, renamed)
    _check_saved_modules(adapter, full)
    _check_tied(model, adapter, {name: key for name, (key, _) in full.items()} | _one_key(factors))
    adapted = dict(tensors)
    for name, (key, info) in full.items():
        base = _base_tensor(tensors, adapter, key, name)
        if info.shape != base.shape:
            raise _wrong_shape(info, key, list(base.shape), f"that of the base's '{name}'")
        adapted[name] = info if info.dtype == base.dtype else _made(base, info, None)
    for name, sides in factors.items():
        base = _base_tensor(tensors, adapter, next(iter(sides.values()))[0], name)
        current = adapted[name]  # the base's, or a whole one that PEFT has saved beside the product
        stored = current.made.stored if current.made else current
        adapted[name] = _made(base, stored, _low_rank(adapter, settings, name, base, sides))
    return adapted


def _made(base: TensorInfo, stored: TensorInfo, lora: LowRank | None) -> TensorInfo:
    return replace(base, file=stored.file, offset=stored.offset, made=Made(stored, lora))


_Named = tuple[str, TensorInfo]  # a tensor of the adapter, with its name there


def _sort(adapter: Adapter, renamed: Mapping[str, str]) -> tuple[dict[str, _Named], dict[str, dict[str, _Named]]]:
    """An adapter's tensors by the base's that they change: whole ones, and the sides of products."""
    full: dict[str, _Named] = {}
    factors: dict[str, dict[str, _Named]] = {}

    def put(table: dict[str, _Named], place: str, key: str, info: TensorInfo) -> None:
        if place in table:
            raise CheckpointError(f"{info.file}: tensors '{table[place][0]}' and '{key}' are for the same one")
        table[place] = (key, info)

    for key, info in adapter.tensors.items():
        if not key.startswith(PREFIX) or len(key) > MAX_NAME:
            raise CheckpointError(
                f"{info.file}: tensor '{key[:MAX_NAME]}' is not an adapter's: those begin with {PREFIX}"
            )
        if info.dtype not in FLOATS:
            raise CheckpointError(f"{info.file}: tensor '{key}' is {info.dtype}, expected one of {', '.join(FLOATS)}")
        name = key.removeprefix(PREFIX)
        side = re.fullmatch(r"(.+)\.lora_(?:([AB])(?:\.default)?\.weight|(embedding_[AB])(?:\.default)?)", name)
        if side:
            weight = f"{side[1]}.weight"
            put(factors.setdefault(renamed.get(weight, weight), {}), side[2] or side[3], key, info)
        else:  # of a module that was trained whole, or of embeddings that PEFT saves beside their product
            whole = re.fullmatch(r"(.+?)(?:\.modules_to_save(?:\.default)?|\.base_layer)?\.(\w+)", name)
            weight = f"{whole[1]}.{whole[2]}" if whole else name
            put(full, renamed.get(weight, weight), key, info)
    if not full and not factors:
        raise CheckpointError(f"{adapter.folder / ADAPTER_WEIGHTS} holds no tensor; expected an adapter's")
    return full, factors


def _one_key(factors: Mapping[str, Mapping[str, _Named]]) -> dict[str, str]:
    return {name: key for name, sides in factors.items() for key, _ in sides.values()}


def _check_saved_modules(adapter: Adapter, full: Mapping[str, _Named]) -> None:
    wanted = adapter.config.get("modules_to_save") or []
    names = {*full, *(key.removeprefix(PREFIX) for key, _ in full.values())}
    modules = {name.rpartition(".")[0] for name in names}
    for entry in wanted if isinstance(wanted, list) else [wanted]:
        if not isinstance(entry, str) or not any(module.endswith(entry) for module in modules):
            raise CheckpointError(
                f"{adapter.folder / ADAPTER_CONFIG} says that module {str(entry)[:80]!r} was trained whole "
                f"(modules_to_save), but {ADAPTER_WEIGHTS} holds no tensor of it; it was not saved completely"
            )


def _check_tied(model: DenseModel, adapter: Adapter, changed: Mapping[str, str]) -> None:
    """Refuse a change of one of two that are tied: PEFT computes with two tensors then, and the config says one."""
    ends = (f"{model.family.base}.{model.family.embedding}.weight", f"{model.family.head}.weight")
    for name in ends if model.tied else ():
        if name in changed:
            raise CheckpointError(
                f"{adapter.folder / ADAPTER_WEIGHTS}: tensor '{changed[name]}' changes '{name}', but the base ties "
                "its output head to its embeddings, which are then no longer the same; untie the base "
                '("tie_word_embeddings": false, and both tensors), train without it, or leave this adapter out'
            )


def _base_tensor(tensors: Mapping[str, TensorInfo], adapter: Adapter, key: str, name: str) -> TensorInfo:
    file = adapter.folder / ADAPTER_WEIGHTS
    if name not in tensors:
        raise CheckpointError(
            f"{file}: tensor '{key}' has no place in the base, which has no tensor '{name}'; this is an adapter of "
            f"another model, or no plain LoRA; {_INSTEAD}"
        )
    if tensors[name].dtype not in FLOATS:
        raise CheckpointError(
            f"{file}: tensor '{key}' changes '{name}', which is {tensors[name].dtype} in the base, expected one of "
            f"{', '.join(FLOATS)}"
        )
    return tensors[name]


def _low_rank(
    adapter: Adapter, settings: _Settings, name: str, base: TensorInfo, sides: Mapping[str, _Named]
) -> LowRank:
    key, info = next(iter(sides.values()))
    if {*sides} not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
        raise CheckpointError(
            f"{info.file}: tensor '{key}' stands alone; expected a lora_A and a lora_B for the base's '{name}'"
        )
    if len(base.shape) != 2 or not prod(base.shape):
        raise _wrong_shape(info, key, list(base.shape), f"as the base's '{name}' is no matrix")
    rank, scale = settings.of(key.removeprefix(PREFIX).partition(".lora_")[0])
    rows, columns = base.shape
    transposed = "embedding_A" in sides
    (a_key, a), (b_key, b) = (sides[side] for side in sorted(sides))
    if transposed:
        rows, columns = columns, rows
    for tensor, tensor_key, expected in ((a, a_key, [rank, columns]), (b, b_key, [rows, rank])):
        if list(tensor.shape) != expected:
            why = f"by rank {rank} of {ADAPTER_CONFIG} and shape {list(base.shape)} of the base's '{name}'"
            raise _wrong_shape(tensor, tensor_key, expected, why)
    # An embedding's rows are tokens, which lie in A.
    left, right = ((a_key, a), (b_key, b)) if transposed else ((b_key, b), (a_key, a))
    return LowRank(*left, *right, scale, transposed)


def _wrong_shape(info: TensorInfo, key: str, expected: list[int], why: str) -> CheckpointError:
    return CheckpointError(f"{info.file}: tensor '{key}' has shape {list(info.shape)}, expected {expected}, {why}")


class Factors:
    """The right factors of the products that are being computed; the latest `CACHE` bytes are kept. Safe in threads."""

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch
        self._kept: OrderedDict[TensorInfo, Array] = OrderedDict()
        self._lock = threading.Lock()

    def right(self, lora: LowRank) -> Array:
        """`[rank, columns]` in float64, rounded for exact products."""
        with self._lock:
            found = self._kept.pop(lora.right, None)
            if found is None:
                data = self.fetch(lora.right, 0, lora.right.nbytes)
                values = _finite(data, lora.right, lora.right_name).reshape(lora.right.shape)
                found = np.ascontiguousarray(_rounded(values.T if lora.transposed else values, 0))
            self._kept[lora.right] = found
            while len(self._kept) > 1 and sum(factor.nbytes for factor in self._kept.values()) > CACHE:
                self._kept.popitem(last=False)
            return found


def read_made(info: TensorInfo, start: int, count: int, factors: Factors) -> Array:
    """`count` elements, from element `start`, of a tensor that an adapter changes; raw bytes of its dtype.

    The product is added in fp32, and the sum cast once.

    Raises:
        CheckpointError: a number of the adapter that is not finite.
    """
    assert info.made
    stored, lora = info.made.stored, info.made.lora
    item = ITEM_SIZE[stored.dtype]
    values = to_float32(factors.fetch(stored, start * item, count * item), stored.dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is named by whoever reads
        if lora:
            values += _product(info.shape[1], lora, start, count, factors)
        return values.astype(FLOATS[info.dtype], copy=False).view(np.uint8)


def _product(columns: int, lora: LowRank, start: int, count: int, factors: Factors) -> Array:
    """The part of a product that belongs to some elements, in fp32.

    Each factor is rounded to 24 bits of its largest number in 32 ranks, so that a float64 holds the product of these
    exactly: its bits depend neither on which elements are asked for nor on the order in which a machine adds.
    """
    first, end = start // columns, (start + count - 1) // columns + 1
    begin = start - first * columns
    left, right = _rounded(_left(lora, first, end - first, factors.fetch), 1), factors.right(lora)
    if end - first == 1:
        right, begin = right[:, begin : begin + count], 0
    total = left[:, :RANKS] @ right[:RANKS]
    for rank in range(RANKS, len(right), RANKS):
        total += left[:, rank : rank + RANKS] @ right[rank : rank + RANKS]
    total *= lora.scale
    return total.astype(np.float32).reshape(-1)[begin : begin + count]


def _left(lora: LowRank, first: int, rows: int, fetch: Fetch) -> Array:
    """Some rows of a left factor, `[rows, rank]`."""
    info, item = lora.left, ITEM_SIZE[lora.left.dtype]
    if not lora.transposed:
        width = info.shape[1] * item
        return _finite(fetch(info, first * width, rows * width), info, lora.left_name).reshape(rows, -1)
    rank, length = info.shape
    parts = [fetch(info, (row * length + first) * item, rows * item) for row in range(rank)]
    return np.stack([_finite(part, info, lora.left_name) for part in parts], axis=1)


def _finite(data: bytes | memoryview, info: TensorInfo, name: str) -> Array:
    """Raw bytes in float64, refused where a number is not finite."""
    values = to_float32(data, info.dtype).astype(np.float64)
    if not np.isfinite(values).all():
        found = values[~np.isfinite(values)][0]
        raise CheckpointError(
            f"{info.file}: tensor '{name}' holds {found}, expected finite numbers; the training of this adapter "
            "diverged, or the file is damaged"
        )
    return values


def _rounded(values: Array, axis: int) -> Array:
    """Numbers along the ranks (`axis`) to `BITS` bits below the largest of each `RANKS` of them."""
    rounded = np.empty(values.shape)
    for rank in range(0, values.shape[axis], RANKS):
        part = (slice(None),) * axis + (slice(rank, rank + RANKS),)
        _, exponents = np.frexp(np.abs(values[part]).max(axis=axis, keepdims=True))
        rounded[part] = np.ldexp(np.rint(np.ldexp(values[part], BITS - exponents)), exponents - BITS)
    return rounded
