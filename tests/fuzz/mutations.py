"""What is done to a checkpoint's files: structured damage to headers, indexes and JSON, and to any byte.

A mutation takes a random source and a table of files, and changes the table. A value that is no bytes stands for
something else than a plain file: see `Odd`.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from upcycle.checkpoint import CONFIG, INDEX, ITEM_SIZE, PROVENANCE, SUMS


@dataclass(frozen=True)
class Odd:
    """What lies in a file's place: a link to `target`, or a `folder` or `fifo`."""

    kind: str
    target: str = ""


Files = dict[str, Any]
TARGETS = (
    "nowhere",
    "../precious",
    "/dev/zero",
    "/dev/null",
    "/etc/passwd",
    ".",
    "..",
    "../b/config.json",
    "config.json",
)
NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, -(10**30))
NUMBERS += (0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan"), 1e-320)
TEXTS = ("", "x", "\0", "\ud800", "é" * 300, "x" * 5000, "../../etc/passwd", "[/bold]", "\x1b[2J", "%s{0}", "\n", "a/b")
OTHERS = (None, True, False, [], {}, [[]], [None], {"": None}, [1, "x"], {"a": {"b": []}})
KEYS = ("rope_scaling", "rope_parameters", "layer_types", "head_dim", "sliding_window", "rope_theta", "model_type")
KEYS += (
    "no_rope_layers",
    "quantization_config",
    "auto_map",
    "tie_word_embeddings",
    "attention_bias",
    "partial_rotary_factor",
)
KEYS += ("sliding_window_pattern", "no_rope_layer_interval", "max_window_layers", "original_max_position_embeddings")
# Of mixtures: what only some BAM mixtures have, and what native ones and upcycle.json say.
KEYS += ("granularity", "num_attention_experts", "num_attention_experts_per_tok", "norm_topk_attention", "router_bias")
KEYS += (
    "num_shared_experts",
    "mixed_layers",
    "ffn_scale",
    "num_experts_per_tok",
    "norm_topk_prob",
    "attention_experts",
)
KEYS += ("num_local_experts", "num_experts", "expert_names", "architectures", "mlp_only_layers", "num_hidden_layers")
RECORDED = ("recipe", "experts", "dense_config", "format", "seeds", "routers", "extracted", "plan", "ancestor")
ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "x", None, 3, [], {})
NAMES = ("config.json", "model.safetensors", "model-00001-of-00002.safetensors", INDEX, "tokenizer.json", "vocab.json")
NAMES += (
    "tokenizer_config.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "README.md",
    PROVENANCE,
    SUMS,
)
CARDS = ("{", "license: [", "license: !!timestamp x", "license: !!int ''", "license: !!bool x", "? [a]\n: b", "&a [*a]")
CARDS += (
    "license: 2001-99-99",
    "license: !!python/object:os.system x",
    "- a\n" * 3000,
    "[" * 5000,
    "license: !!float ''",
)
CARDS += ("license: other\nlicense_name: [x]", "license: !!binary x", "<<: 3", "license: '\\ud800'", "\0", "a: *b")
BOMB = "\n".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}" for a, b in zip("abcdefg", "bcdefgh", strict=True))
CARDS += ("a: &a {x: 1}\n" + BOMB,)


def value(draw: random.Random) -> Any:
    """Any value that JSON can say, of the kinds that checks forget."""
    kind = draw.randrange(6)
    if kind < 2:
        return draw.choice(NUMBERS)
    if kind == 2:
        return draw.choice(TEXTS)
    if kind == 3:
        return nested(draw.choice([3, 40, 300, 700, 900, 960, 985, 1100]), draw.random() < 0.5)
    return draw.choice(OTHERS) if kind == 4 else draw.randint(-4, 70)


def nested(depth: int, tables: bool) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = {"a": made} if tables else [made]
    return made


def places(tree: Any, into: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found = [] if into is None else into
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in items:
        found.append((tree, key))
        places(child, found)
    return found


def edit_tree(draw: random.Random, tree: Any, extra: tuple[str, ...] = ()) -> Any:
    """Change, remove, rename, repeat or add something anywhere in a JSON value."""
    found = places(tree)
    if not found or draw.random() < 0.02:
        return value(draw)
    container, key = draw.choice(found)
    what = draw.randrange(7)
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container, dict):
        container[draw.choice(TEXTS)] = container.pop(key)
    elif what == 2 and extra and isinstance(tree, dict):
        tree[draw.choice(extra)] = value(draw)
    elif what == 3 and isinstance(container, list):
        container += container[:]
    elif what == 4:
        other, other_key = draw.choice(found)
        container[key] = json.loads(json.dumps(other[other_key]))
    else:
        container[key] = value(draw)
    return tree


def dump(draw: random.Random, tree: Any) -> bytes:
    """JSON of a value, now and then with a key twice, not in UTF-8, or with something after it."""
    data = json.dumps(tree).encode()
    odd = draw.randrange(30)
    if odd == 0 and data.startswith(b"{") and len(data) > 2:
        data = data[:-1] + b", " + data[1:]
    elif odd == 1:
        data = data.decode().encode("utf-16")
    elif odd == 2:
        data += draw.choice([b"x", b"\0", b" " * 1000, b"{}", b"\xff"])
    elif odd == 3:
        data = data.replace(b"a", b"\xe9", 1)
    return data


def json_file(*names: str, extra: tuple[str, ...] = ()) -> Callable[[random.Random, Files], None]:
    """A mutation of the JSON of one of these files."""

    def mutate(draw: random.Random, files: Files) -> None:
        held = [name for name in names if isinstance(files.get(name), bytes)]
        if not held:
            return
        name = draw.choice(held)
        try:
            tree = json.loads(files[name])
        except (ValueError, RecursionError):
            return
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            tree = edit_tree(draw, tree, extra)
        files[name] = dump(draw, tree)

    return mutate


def rope(draw: random.Random, files: Files) -> None:
    """Rotary positions of any kind, whole or not."""
    if isinstance(files.get(CONFIG), bytes):
        table = json.loads(files[CONFIG])
        made = {"rope_type": draw.choice(ROPES), "factor": value(draw)}
        if draw.random() < 0.3:
            made = {"full_attention": made, "sliding_attention": draw.choice([made, {}, None, value(draw)])}
        if isinstance(table, dict):
            table[draw.choice(["rope_scaling", "rope_parameters"])] = made
            files[CONFIG] = dump(draw, table)


def weight_file(draw: random.Random, files: Files) -> str | None:
    held = [name for name, data in files.items() if name.endswith(".safetensors") and isinstance(data, bytes)]
    return draw.choice(held) if held else None


def header(draw: random.Random, files: Files) -> None:
    """Offsets, shapes, dtypes and names in a safetensors header."""
    name = weight_file(draw, files)
    if not name:
        return
    data = files[name]
    length = int.from_bytes(data[:8], "little")
    try:
        tree, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
        tensors = [key for key in tree if key != "__metadata__"]
        entry, other = tree[draw.choice(tensors)], tree[draw.choice(tensors)]
        kind = draw.randrange(10)
        if kind == 0:
            entry["data_offsets"] = other["data_offsets"]
        elif kind == 1:
            entry["data_offsets"][draw.randrange(2)] = draw.choice(NUMBERS)
        elif kind == 2:
            entry["shape"] = draw.choice([entry["shape"][::-1], [*entry["shape"], 1], [], [0], [2**40] * 2, [1] * 20])
        elif kind == 3:
            entry["dtype"] = draw.choice([*ITEM_SIZE, "F4", "F8_E8M0", "C64", "f32", None, 3, ["F32"]])
        elif kind == 4:  # the same bytes under another type of that size
            entry["dtype"] = draw.choice(["F16", "I16", "U16", "BF16"])
        elif kind == 5:
            odd = [
                *TEXTS,
                "score.weight",
                "model.layers.0.self_attn.rotary_emb.inv_freq",
                "lm_head.weight",
                "__metadata__",
            ]
            tree[draw.choice(odd)] = tree.pop(draw.choice(tensors))
        elif kind == 6:
            size = len(rest)
            tree[draw.choice(["lm_head.weight", "x", "x" * 3000, "\ud800.inv_freq"])] = {
                "dtype": "BF16",
                "shape": [draw.choice([2, 0])],
                "data_offsets": [size, size + 4],
            }
            rest += bytes(4)
        elif kind == 7:
            tree["__metadata__"] = value(draw)
        else:
            tree = edit_tree(draw, tree)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return  # it was damaged before
    text = dump(draw, tree)
    size = draw.choice([len(text)] * 12 + [0, 7, len(text) + 1, 2**63, 2**64 - 1, 25_000_001])
    files[name] = size.to_bytes(8, "little") + text + rest


def numbers(draw: random.Random, files: Files) -> None:
    """NaN, infinities or the largest numbers among the weights."""
    name = weight_file(draw, files)
    if name and len(files[name]) > 3000:
        data = bytearray(files[name])
        where = draw.randrange(2500, len(data) - 2)
        data[where : where + 2] = draw.choice([b"\xff\xff", b"\x80\x7f", b"\x7f\x7f", b"\x00\x7c"])
        files[name] = bytes(data)


def random_bytes(draw: random.Random, files: Files) -> None:
    """A few bytes of any file, most often near its beginning."""
    name = draw.choice(sorted(files))
    if isinstance(files[name], bytes) and files[name]:
        data = bytearray(files[name])
        limit = draw.choice([len(data), min(len(data), 1500), min(len(data), 16)])
        for _ in range(draw.choice([1, 1, 2, 8, 60])):
            data[draw.randrange(limit)] = draw.randrange(256)
        files[name] = bytes(data)


def length(draw: random.Random, files: Files) -> None:
    """A file cut short, made longer, or moved within itself."""
    name = draw.choice(sorted(files))
    if isinstance(files[name], bytes):
        data, cut = files[name], draw.randrange(len(files[name]) + 1)
        more = draw.choice([1, 2, 8, 4096])
        choices = [data[:cut], data[cut:], data + bytes(more), data[:cut] + bytes(more) + data[cut:], data[:-1], b""]
        files[name] = draw.choice(choices)


def file_itself(draw: random.Random, files: Files) -> None:
    """A file that is missing, a link, a folder, a pipe, under another name, or another file's copy."""
    name, kind = draw.choice([*sorted(files), *NAMES]), draw.randrange(6)
    if kind == 0:
        files.pop(name, None)
    elif kind == 1 and name in files:
        files[draw.choice(NAMES)] = files.pop(name)
    elif kind == 2 and name in files:
        files[draw.choice(NAMES)] = files[name]
    else:
        files[name] = draw.choice([Odd("folder"), Odd("fifo"), *(Odd("link", target) for target in TARGETS)])


def index(draw: random.Random, files: Files) -> None:
    """Where an index says that tensors lie."""
    if not isinstance(files.get(INDEX), bytes):
        return
    table = json.loads(files[INDEX])
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        return
    outside = ["../b/model.safetensors", "/etc/passwd", "..", ".", "", "x.bin", "\0.safetensors", "\ud800.safetensors"]
    outside += ["x" * 300 + ".safetensors", "precious.safetensors", "./model-00001-of-00002.safetensors", 3, None, []]
    name = draw.choice(sorted(weight_map))
    if draw.random() < 0.6:
        weight_map[name] = draw.choice([*outside, *map(str, weight_map.values())])
    else:
        weight_map[draw.choice(TEXTS)] = weight_map.pop(name)
    files[INDEX] = dump(draw, table)


def card(draw: random.Random, files: Files) -> None:
    """A model card whose front matter is no good YAML, or too good."""
    files["README.md"] = b"---\n" + draw.choice(CARDS).encode() + b"\n---\n"


def vocabulary(draw: random.Random, files: Files) -> None:
    """A vocab.json or a unigram vocabulary, so that tokens are compared."""
    table = {f"word{i}": draw.choice([i, i, i, value(draw)]) for i in range(draw.choice([3, 24]))}
    if draw.random() < 0.5:
        files["vocab.json"] = dump(draw, table)
    else:
        unigram = [[word, value(draw)][: draw.choice([2, 2, 2, 1])] for word in table]
        files["tokenizer.json"] = dump(draw, {"model": {"vocab": draw.choice([unigram, table, value(draw)])}})


EVERY = (
    header,
    header,
    random_bytes,
    length,
    file_itself,
    numbers,
    index,
    json_file(CONFIG, extra=KEYS),
    json_file(INDEX),
)
SEED = (
    *EVERY,
    rope,
    card,
    vocabulary,
    json_file("tokenizer.json", "tokenizer_config.json"),
    json_file(CONFIG, extra=KEYS),
)
MIXTURE = (*EVERY, json_file(PROVENANCE, extra=RECORDED), json_file(SUMS), json_file(CONFIG), rope)


def mutate(draw: random.Random, files: Files, mixture: bool) -> list[str]:
    """Do one to three things to a checkpoint; their names."""
    chosen = draw.choices(MIXTURE if mixture else SEED, k=draw.choice([1, 1, 1, 2, 3]))
    for one in chosen:
        try:
            one(draw, files)
        except (ValueError, RecursionError):  # what an earlier one left cannot be read as JSON
            continue
    return [getattr(one, "__qualname__", "").split(".")[0] for one in chosen]
