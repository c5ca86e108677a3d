"""Tiny checkpoints as bytes in memory, made without torch: what faults and mutations are tried on.

A checkpoint is a table from a file's name to its bytes. Its tensors' names and shapes are those of upcycle's layout.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.checkpoint import INDEX, WEIGHTS, plan_shards
from upcycle.dense_config import read_dense
from upcycle.layout import make_layout
from upcycle.numeric import FLOATS
from upcycle.scaling import DENSE

SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
Files = dict[str, bytes]


def config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json of `SIZES`, changed where asked."""
    return {"model_type": model_type, **SIZES, "torch_dtype": "bfloat16", **changes}


def weights(table: Mapping[str, Any], branch: int, dtype: str = "BF16") -> dict[str, bytes]:
    """Random weights; those of two branches are related, as two trainings of one model are."""
    shapes = make_layout(read_dense(table, "a test"), DENSE, 1).dense
    base, noise = np.random.default_rng(0), np.random.default_rng(1 + branch)
    made = {}
    for name, shape in shapes.items():
        values = base.standard_normal(shape, np.float32) + 0.1 * noise.standard_normal(shape, np.float32)
        made[name] = values.astype(FLOATS[dtype]).tobytes()
    return made


def checkpoint(
    table: Mapping[str, Any], branch: int = 0, dtype: str = "BF16", max_shard_size: int = 10**9, extra: str = ""
) -> Files:
    """A whole dense checkpoint with a tokenizer; `extra` names a tensor of four zeros beside the model's."""
    shapes = make_layout(read_dense(table, "a test"), DENSE, 1).dense
    data = weights(table, branch, dtype)
    entries: list[tuple[str, str, Sequence[int]]] = [(name, dtype, shape) for name, shape in shapes.items()]
    if extra:
        entries.append((extra, dtype, (4,)))
        data[extra] = bytes(4 * FLOATS[dtype].itemsize)
    shards = plan_shards([(name, kind, tuple(shape)) for name, kind, shape in entries], max_shard_size)
    files = {shard.name: shard.header + b"".join(data[name] for name in shard.offsets) for shard in shards}
    if WEIGHTS not in files:
        weight_map = {name: shard.name for shard in shards for name in shard.offsets}
        files[INDEX] = as_json({"metadata": {"total_size": 1}, "weight_map": weight_map})
    vocabulary = {f"word{i}": i for i in range(table["vocab_size"])}
    files["config.json"] = as_json(table)
    files["tokenizer.json"] = as_json(
        {"added_tokens": [{"id": 0, "content": "word0"}], "model": {"type": "WordLevel", "vocab": vocabulary}}
    )
    files["tokenizer_config.json"] = as_json({"tokenizer_class": "LlamaTokenizer", "bos_token": "word1"})
    files["generation_config.json"] = as_json({"bos_token_id": 1})
    files["README.md"] = b"---\nlicense: mit\nlicense_name: x\n---\n# A card\n"
    return files


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write a checkpoint as a new folder, in the place of any former one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path) -> Files:
    """A folder's plain files."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
