"""The merge against `cat` of the same bytes and against peers, as whole processes: seconds, memory, start-up.

Run by hand:

    python benchmarks/merge.py --json merge.json
    python benchmarks/merge.py --every-recipe --runs 3

Three Llama seeds of about 1 GB each in bf16 are written once to the `--work` folder. Then every command runs `--runs`
times, in turns, so that a busy machine slows all of them alike; the order is drawn anew in each turn, and each ratio is
the median of the ratios within a turn. Before every run its former output is removed, all is synced and, where the
process may, the page cache is dropped. `cat` and the merge end with fsync; peers do not sync, which favours them.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SEEDS = ("code", "law", "math")
CAT, CAT_SAME = "cat", "cat, the merge's bytes"
UNSUMMED = "upcycle merge, without checksums"
SHARD_SIZES = ("5GB", "500MB")
POLL_SECONDS = 0.005
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
LINUX = sys.platform == "linux"


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama whose output head is its input embedding."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocab: int
    head_dim: int = 128

    @property
    def name(self) -> str:
        """A folder's name that tells one shape from another."""
        return "x".join(str(size) for size in asdict(self).values())

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, in the order of the file."""
        query, key_value = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        layer = {
            "input_layernorm": (self.hidden,),
            "mlp.down_proj": (self.hidden, self.inner),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, query),
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
        }
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for index in range(self.layers):
            tensors |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        return {**tensors, "model.norm.weight": (self.hidden,)}

    def config(self) -> dict[str, Any]:
        """The config.json of such a model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "dtype": "bfloat16",
        }


TOY = Shape(hidden=256, inner=1024, layers=4, heads=4, key_value_heads=2, vocab=1024, head_dim=64)


def large(gigabytes: float) -> Shape:
    """A shape of about so many GB, nearly all of them in the layers, as in real models."""
    return Shape(hidden=2048, inner=8192, layers=max(1, round(8 * gigabytes)), heads=16, key_value_heads=4, vocab=8192)


def make_seeds(work: Path, shape: Shape) -> list[Path]:
    """Three seeds of one ancestor: a common base and a little noise each; kept for the next time."""
    root = work / shape.name
    folders = [root / name for name in SEEDS]
    done = root / "done"
    if done.exists():
        return folders
    tensors, handles = shape.tensors(), []
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(shape.config()))
        write_tokenizer(folder, shape.vocab)
        handles.append((folder / "model.safetensors").open("wb"))
        handles[-1].write(safetensors_header(tensors))
    generator = np.random.default_rng(0)
    for sizes in tensors.values():
        base = 0.02 * generator.standard_normal(sizes, np.float32)
        for handle in handles:
            noise = 0.004 * generator.standard_normal(sizes, np.float32)
            handle.write((base + noise).astype(ml_dtypes.bfloat16).tobytes())
    for handle in handles:
        handle.close()
    done.touch()
    return folders


def safetensors_header(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tokenizer(folder: Path, vocab: int) -> None:
    """One word a token; the peers refuse to run without a tokenizer."""
    model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(vocab)}, "unk_token": "w0"}
    table = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(table))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w0", "eos_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@dataclass
class Command:
    """One contestant and what its runs took."""

    name: str
    words: list[str]
    output: Path
    seconds: list[float] = field(default_factory=list)
    nbytes: int = 0  # written
    memory: int = 0  # the peak of all runs, in bytes


def measure(command: Command, log: Path, drop: bool) -> None:
    """Run a command once, from a clean slate, and add what it took to its record."""
    remove(command.output)
    os.sync()
    if drop:
        DROP_CACHES.write_text("3")
    with log.open("wb") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(command.words, stdout=stream, stderr=stream, env=environment(), cwd=log.parent)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            command.memory = max(command.memory, anonymous_memory(process.pid))
            time.sleep(POLL_SECONDS)
        command.seconds.append(time.perf_counter() - began)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{shlex.join(command.words)}\nexited with {process.returncode}:\n{log.read_text()[-3000:]}")
    if not LINUX:
        command.memory = max(command.memory, usage.ru_maxrss)
    files = [command.output] if command.output.is_file() else list(command.output.glob("*.safetensors"))
    command.nbytes = sum(file.stat().st_size for file in files)
    remove(command.output)


def anonymous_memory(pid: int) -> int:
    """Bytes of memory that belong to a process alone, without mapped files; 0 where only the peak is known."""
    if not LINUX:
        return 0
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def environment() -> dict[str, str]:
    """Compiled modules are kept, as those of an installed package are, and nothing is looked up on the Hub."""
    names = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")
    return {**{key: value for key, value in os.environ.items() if key not in names}, "HF_HUB_OFFLINE": "1"}


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def upcycle(*words: object) -> list[str]:
    return [sys.executable, "-m", "upcycle", *map(str, words)]


def merge_command(seeds: Sequence[Path], recipe: str, shard_size: str, out: Path) -> Command:
    words = upcycle("merge", "--seeds", *seeds, "--recipe", recipe, "--max-shard-size", shard_size, "--out", out)
    return Command(f"upcycle merge, shards of {shard_size}", words, out)


def unsummed_command(seeds: Sequence[Path], recipe: str, shard_size: str, out: Path) -> Command:
    """The same merge with checksums that are never computed: what they cost is the difference."""
    script = (
        "import sys, upcycle.checksums as c; c.TensorSum.update = lambda self, data: None; "
        "from upcycle.cli.main import main; main(sys.argv[1:])"
    )
    words = merge_command(seeds, recipe, shard_size, out).words
    return Command(UNSUMMED, [sys.executable, "-c", script, *words[3:]], out)


def cat_command(name: str, seeds: Sequence[Path], nbytes: int, out: Path) -> Command:
    """`cat` of the first `nbytes` of the seeds' weights into one file, followed by fsync (`sync FILE`)."""
    parts, left = [], nbytes
    for file in (seed / "model.safetensors" for seed in seeds):
        size = min(file.stat().st_size, left)
        parts.append(
            shlex.join(["cat", str(file)] if size == file.stat().st_size else ["head", f"-c{size}", str(file)])
        )
        left -= size
    target = shlex.quote(str(out))
    return Command(name, ["sh", "-c", f"{{ {' && '.join(parts)}; }} > {target} && sync {target}"], out)


def peer_commands(arguments: argparse.Namespace, seeds: Sequence[Path], work: Path, out: Path) -> Iterator[Command]:
    """The peers that are installed; both read YAML, of which JSON is a part."""
    experts = [{"source_model": str(seed)} for seed in seeds]
    mergekit = {"base_model": str(seeds[0]), "gate_mode": "random", "dtype": "bfloat16", "experts": experts}
    kit_experts = [{"expert_name": seed.name, "model_id": str(seed)} for seed in seeds]
    kit_experts[0]["expert_name"] = "base_expert"
    mixturekit = {"moe_method": "traditional", "model_type": "merged", "experts": kit_experts}
    peers = (
        ("mergekit-moe", mergekit_words(arguments.mergekit), mergekit, []),
        ("MixtureKit", mixturekit_words(arguments.mixturekit), mixturekit, ["--output"]),
    )
    for name, words, config, option in peers:
        if not words:
            print(f"{name}: not installed, skipped")
            continue
        file = work / f"{name}-{seeds[0].parent.name}.yaml"
        file.write_text(json.dumps(config))
        yield Command(name, [*words, str(file), *option, str(out)], out)


def mergekit_words(given: str | None) -> list[str]:
    script = shutil.which("mergekit-moe")
    if given:
        return [given] if Path(given).name.startswith("mergekit") else [given, "-m", "mergekit.scripts.moe"]
    return [script] if script else []


def mixturekit_words(given: str | None) -> list[str]:
    if not given and not importlib.util.find_spec("MixtureKit"):
        return []
    return [given or sys.executable, "-m", "MixtureKit.cli", "build"]


def recipe_commands(seeds: Sequence[Path], out: Path) -> Iterator[tuple[Command, int]]:
    """Each recipe that ships, and how many seeds it reads: of three, or of three copies of one, native and as BAM."""
    from upcycle.recipe_file import builtin_recipes

    changes = {"btx-extra": ("experts.extra_from=seed:code",), "flex": ("router.ffn.init=random",)}
    for name, recipe in builtin_recipes().items():
        given: list[str] = [str(seed) for seed in seeds]
        if recipe.copies:
            given = given[:1]
        if name == "flex":  # whose seeds agree in all but the FFN
            given = [f"{one.name}={seeds[0]}" for one in seeds]
        words = upcycle("merge", "--allow-unrelated", "--seeds", *given, "--recipe", name, "--out", out)
        words += ["--num-experts", "3"] if recipe.copies else []
        words += [word for change in changes.get(name, ()) for word in ("--set", change)]
        formats = ["bam"] if recipe.ffn_experts else ["auto"]
        if recipe.ffn_experts and not recipe.attention_experts and recipe.ffn_router.normalize:
            formats += [] if recipe.experts.shared else ["native"]
        for format in formats:
            yield Command(f"{name}, {format}", [*words, "--format", format], out), 1 if name == "flex" else len(given)


def every_recipe(arguments: argparse.Namespace, seeds: Sequence[Path], work: Path, out: Path, drop: bool) -> None:
    """Each recipe's merge beside `cat` of as many bytes as it writes, or reads where those are more, in turns."""
    rows = []
    for merge, count in recipe_commands(seeds, out):
        measure(merge, work / "log.txt", drop)  # untimed: it tells how many bytes there are
        merge.seconds.clear()
        read = sum((seed / "model.safetensors").stat().st_size for seed in seeds[:count])
        cat = cat_command(CAT_SAME, [*seeds, *seeds, *seeds], max(read, merge.nbytes), out)
        race([merge, cat], arguments.runs, work, drop)
        numbers = [f"{statistics.median(merge.seconds):.2f}", f"{ratio(merge, cat):.2f}"]
        numbers += [f"{read / 1e9:.2f}", f"{merge.nbytes / 1e9:.2f}", f"{merge.memory / 1e6:.0f}"]
        rows.append(f"| {merge.name} | {' | '.join(numbers)} |")
    print(
        "\n| recipe | median s | × cat of its bytes | GB read | GB written | peak MB |\n|---|---:|---:|---:|---:|---:|"
    )
    print("\n".join(rows))


def race(commands: Sequence[Command], runs: int, work: Path, drop: bool) -> None:
    """Run all commands in turns, each in another order: a run inherits memory and disk from the one before it."""
    for turn in range(runs):
        for command in random.Random(turn).sample(commands, len(commands)):
            measure(command, work / "log.txt", drop)
            print(f"{turn + 1}/{runs} {command.name}: {command.seconds[-1]:.2f} s", file=sys.stderr, flush=True)


def ratio(command: Command, other: Command) -> float:
    """The median of the ratios within a turn."""
    return statistics.median(a / b for a, b in zip(command.seconds, other.seconds, strict=True))


def show(title: str, commands: Sequence[Command]) -> list[dict[str, Any]]:
    """Print a table in Markdown; where `cat` ran, each time is set against it too."""
    cats = [command for command in commands if command.name in (CAT, CAT_SAME)]
    head = ["command", "median s", "min–max s", *(f"× {cat.name}" for cat in cats), "GB", "GB/s", "peak MB"]
    rows, table = [], []
    for command in commands:
        median = statistics.median(command.seconds)
        ratios = {cat.name: ratio(command, cat) for cat in cats}
        rows.append({**asdict(command), "median": median, "ratios": ratios, "output": command.output.name})
        spread = f"{min(command.seconds):.2f}–{max(command.seconds):.2f}"
        speed = [f"{command.nbytes / 1e9:.2f}", f"{command.nbytes / 1e9 / median:.2f}"] if command.nbytes else ["", ""]
        shares = [f"{share:.2f}" for share in ratios.values()]
        table.append([command.name, f"{median:.2f}", spread, *shares, *speed, f"{command.memory / 1e6:.0f}"])
    print(f"\n{title}\n")
    for row in (head, ["---", *["---:"] * (len(head) - 1)], *table):
        print(f"| {' | '.join(row)} |")
    return rows


def heavy_imports(words: Sequence[str], out: Path) -> list[str]:
    """Which of torch and transformers a command imports, by the interpreter's own account."""
    remove(out)
    command = [words[0], "-X", "importtime", *words[1:]]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "upcycle" in modules, "the import times were not found"
    return sorted(modules & {"torch", "transformers"})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir()) / "upcycle-benchmark"
    parser.add_argument("--work", type=Path, default=default, help="where seeds and outputs lie (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of one seed (default: %(default)s)")
    parser.add_argument("--recipe", default="bam", help="(default: %(default)s)")
    parser.add_argument("--every-recipe", action="store_true", help="each recipe against cat of its bytes, no more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument(
        "--mergekit", metavar="PYTHON", help="interpreter that has mergekit, or its mergekit-moe script"
    )
    parser.add_argument("--mixturekit", metavar="PYTHON", help="interpreter that has MixtureKit")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    return arguments


def main() -> None:
    arguments = parse_arguments()
    work, out = arguments.work, arguments.work / "out"
    work.mkdir(parents=True, exist_ok=True)
    drop = os.access(DROP_CACHES, os.W_OK)
    print(f"page cache dropped before each run: {'yes' if drop else 'no (only root may, on Linux)'}")
    print(f"peak memory: {'anonymous (RssAnon), polled' if LINUX else 'resident, with mapped files (ru_maxrss)'}")

    seeds, toys = make_seeds(work, large(arguments.gigabytes)), make_seeds(work, TOY)
    if arguments.every_recipe:
        every_recipe(arguments, seeds, work, out, drop)
        return
    merges = [merge_command(seeds, arguments.recipe, size, out) for size in SHARD_SIZES]
    first = merge_command(seeds, arguments.recipe, SHARD_SIZES[0], out)
    measure(first, work / "log.txt", drop)  # untimed: it compiles the modules, and tells how many bytes a merge writes
    whole = sum((seed / "model.safetensors").stat().st_size for seed in seeds)
    cats = [cat_command(CAT, seeds, whole, out), cat_command(CAT_SAME, seeds, first.nbytes, out)]
    merges.append(unsummed_command(seeds, arguments.recipe, SHARD_SIZES[0], out))
    commands = [*cats, *merges, *peer_commands(arguments, seeds, work, out)]
    race(commands, arguments.runs, work, drop)

    toy = merge_command(toys, arguments.recipe, SHARD_SIZES[0], out)
    small = [Command("upcycle --help", upcycle("--help"), out), toy, *peer_commands(arguments, toys, work, out)]
    race(small, arguments.runs, work, drop=False)

    title = f"3 seeds of {whole / 3e9:.2f} GB, recipe {arguments.recipe}, {arguments.runs} runs in turns"
    report = {"large": show(title, commands), "toy": show("3 seeds of 8 MB, warm", small)}
    print(f"\nchecksums: a merge takes {ratio(merges[0], merges[-1]):.3f} of one without them")
    imports = {command.name: heavy_imports(command.words, out) for command in small[:2]}
    remove(out)
    print()
    for name, heavy in imports.items():
        print(f"{name} imports {' and '.join(heavy) or 'neither torch nor transformers'}")
    if arguments.json:
        machine = {"platform": platform.platform(), "processors": os.cpu_count(), "load": os.getloadavg()}
        about = {"machine": machine, "python": platform.python_version(), "caches_dropped": drop, "imports": imports}
        arguments.json.write_text(json.dumps({**about, **report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
