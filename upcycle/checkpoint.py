"""The Hugging Face folder: what is in it, safetensors headers, shards and their index, JSON of bounded size."""

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from upcycle.errors import CheckpointError

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"
PROVENANCE: Final = "upcycle.json"
SUMS: Final = "upcycle.sums.json"
CARD: Final = "README.md"
ADAPTER_CONFIG: Final = "adapter_config.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
# What a result takes over byte for byte, from the first seed.
COPIED_FILES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
# The model's own code, which travels with a mixture.
MODELING_FILES: Final = ("configuration_bam.py", "modeling_bam.py")

# Bytes per element of every dtype that a safetensors header may name.
ITEM_SIZE: Final[Mapping[str, int]] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
MAX_SHARD_SIZE: Final = 5_000_000_000  # bytes of weights in one output file, unless told otherwise
MAX_HEADER: Final = 25_000_000  # real headers stay below 5 MB
MAX_DIMENSIONS: Final = 8
MAX_INDEX: Final = 25_000_000
MAX_JSON: Final = 4_000_000  # a config.json or an upcycle.json
MAX_VALUES: Final = 900_000  # in any of these: 65,000 tensors have as many
MAX_DEPTH: Final = 50
MAX_UNQUOTED: Final = 500_000  # bytes on end without a quotation mark


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes lie: `nbytes` from byte `offset` of `file`, row-major `shape` of `dtype`.

    With `made` it lies nowhere as it is, and `upcycle.adapters` makes it as it is read.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    made: "Made | None" = None

    @property
    def files(self) -> set[Path]:
        """Every file that it is read from."""
        return {self.file} if self.made is None else self.made.files


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a matrix: `scale` times `left`, a column for each rank, times `right`, a row for each.

    Names are those in the adapter's file, where an embedding's two are `transposed`.
    """

    left_name: str
    left: TensorInfo
    right_name: str
    right: TensorInfo
    scale: float
    transposed: bool = False


@dataclass(frozen=True)
class Made:
    """How a tensor is made of what files hold: `stored`, with `lora` added, cast to the tensor's dtype."""

    stored: TensorInfo
    lora: LowRank | None = None

    @property
    def files(self) -> set[Path]:
        """Every file that it is read from."""
        return {self.stored.file} | ({self.lora.left.file, self.lora.right.file} if self.lora else set())


def read_json(
    path: Path, limit: int = MAX_JSON, values: int = MAX_VALUES, unquoted: int = MAX_UNQUOTED
) -> dict[str, Any]:
    """Read a JSON object of at most `limit` bytes, about so many `values`, and not too much `unquoted` on end.

    Raises:
        CheckpointError: the file is missing, no plain file, too large, no UTF-8, no JSON or no object.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no plain file; expected a JSON file")
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, expected at most {limit}")
        value = parse_json(path.read_bytes(), values, unquoted)
        if not _is_shallow(value):
            raise ValueError(f"tables in tables, more than {MAX_DEPTH} deep")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_json(data: bytes, limit: int = MAX_VALUES, unquoted: int = MAX_UNQUOTED, **options: Any) -> Any:
    """JSON of so few values that they fit into memory: 25 MB have room for some that would take a gigabyte."""
    values = data.count(b",") + data.count(b":") + data.count(b"[") + data.count(b"{")
    if values > limit:
        raise ValueError(f"about {values:,} values, expected at most {limit:,}")
    # One string of 25 MB takes 100 MB with a single character beyond U+FFFF in it, and as much again in each message.
    for start in range(0, len(data) - unquoted, unquoted):
        if data.find(b'"', start, start + unquoted) < 0:
            raise ValueError(f"{unquoted:,} bytes from byte {start:,} hold no quotation mark; one value is too large")
    text = data.decode("utf-8-sig")
    del data  # of a text in four bytes a character the parser needs the memory
    return json.loads(text, **options)


def _is_shallow(value: Any) -> bool:
    """Whether tables and lists lie at most `MAX_DEPTH` deep within one another, so that recursion may walk them."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inside = [one for table in level for one in (table.values() if isinstance(table, dict) else table)]
        level = [one for one in inside if isinstance(one, (dict, list))]
        if not level:
            return True
    return False


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint by name, from the headers alone; single file, or shards with their index.

    Raises:
        CheckpointError: no safetensors, a missing or truncated shard, a damaged header or index.
    """
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    return read_index(folder, read_header)


def read_index(folder: Path, header: Callable[[Path], dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Every tensor that the index names, by the `header` of the shard it lies in.

    Raises:
        CheckpointError: a damaged index, or one that its shards contradict.
    """
    weight_map = read_json(folder / INDEX, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: 'weight_map' is missing or empty")
    tensors: dict[str, TensorInfo] = {}
    headers: dict[str, dict[str, TensorInfo]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: '{name}' lies in {shard!r}, expected a file name in the same folder"
            )
        if shard not in headers:
            headers[shard] = header(folder / shard)
        if name not in headers[shard]:
            raise CheckpointError(f"{folder / INDEX}: '{name}' should lie in {shard}, which does not hold it")
        tensors[name] = headers[shard][name]
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, its header checked against the file's size.

    Raises:
        CheckpointError: the file and what was expected of and found in it.
    """
    try:
        if file.exists() and not file.is_file():
            raise CheckpointError(f"{file} is no plain file; expected a safetensors file")
        with file.open("rb") as handle:
            return parse_header(file, os.fstat(handle.fileno()).st_size, handle.read)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be a file's
        raise CheckpointError(f"{file}: the header cannot be read: {error}") from error


def parse_header(file: Path, size: int, read: Callable[[int], bytes]) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file of `size` bytes, of which `read` gives the next ones, from the first on.

    Raises:
        CheckpointError: the file and what was expected of and found in it.
    """
    length = int.from_bytes(read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise CheckpointError(
            f"{file}: a header of {length} bytes is announced, but the file has {size} bytes "
            f"and a header at most {MAX_HEADER}; it is truncated or no safetensors file"
        )
    try:
        header = parse_json(read(length), MAX_VALUES, MAX_UNQUOTED, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is no JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise CheckpointError(
                f"{file}: '{name}' begins at byte {info.offset}, expected {end}; the header is damaged"
            )
        end += info.nbytes
    if end != size:
        raise CheckpointError(
            f"{file}: the header describes {end} bytes, the file has {size}; it is truncated or damaged"
        )
    return tensors


def read_header_bytes(file: Path) -> bytes:
    """The first bytes of a safetensors file: its header's length, and its header as far as `read_header` takes one."""
    with file.open("rb") as handle:
        prefix = handle.read(8)
        return prefix + handle.read(min(int.from_bytes(prefix, "little"), MAX_HEADER))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _tensor_info(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{file}: the header's entry for '{name}' is damaged")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise CheckpointError(
            f"{file}: '{name}' has dtype {dtype!r}, which is not known; known: {', '.join(ITEM_SIZE)}"
        )
    if len(shape) > MAX_DIMENSIONS or prod(shape) * ITEM_SIZE[dtype] != end - begin:
        raise CheckpointError(
            f"{file}: '{name}' has shape {list(shape[:MAX_DIMENSIONS])} of {dtype}, which are not the "
            f"{end - begin} bytes that the header gives it"
        )
    return TensorInfo(dtype, shape, file, base + begin, end - begin)


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if not pickles:
        return f"{folder} holds neither {WEIGHTS} nor {INDEX}; it is no Hugging Face checkpoint with weights"
    return (
        f"{folder} holds its weights as pickle ({pickles[0]}), which can run code when read. Convert it once, if you "
        'trust it:\n  python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\"\n"
        "and copy its tokenizer files beside the result"
    )


@dataclass(frozen=True)
class Shard:
    """One output file: its header's bytes, and the absolute byte offset of each of its tensors."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def plan_shards(tensors: Sequence[tuple[str, str, tuple[int, ...]]], max_shard_size: int) -> list[Shard]:
    """Lay (name, dtype, shape) out in files of at most `max_shard_size` bytes of weights; a tensor is never split."""
    parts: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        nbytes = prod(shape) * ITEM_SIZE[dtype]
        if parts[-1] and filled + nbytes > max_shard_size:
            parts.append([])
            filled = 0
        parts[-1].append((name, dtype, shape))
        filled += nbytes
    total = len(parts)
    names = [WEIGHTS] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    return [_shard(name, part) for name, part in zip(names, parts, strict=True)]


def _shard(file: str, tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> Shard:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + prod(shape) * ITEM_SIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    base = 8 + len(text)
    offsets = {name: base + header[name]["data_offsets"][0] for name, _, _ in tensors}
    return Shard(file, len(text).to_bytes(8, "little") + text, offsets, base + end)


def index_json(shards: Sequence[Shard]) -> dict[str, Any]:
    """The index of a sharded checkpoint, as transformers writes it."""
    total = sum(shard.size - len(shard.header) for shard in shards)
    weight_map = {name: shard.name for shard in shards for name in shard.offsets}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON, the same bytes for the same object."""
    path.write_bytes(json_bytes(value))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """An object as `write_json` writes it."""
    text = io.StringIO()  # json.dumps would hold every piece of a large one at once
    json.dump(value, text, indent=2, sort_keys=True)
    text.write("\n")
    return text.getvalue().encode("ascii")
