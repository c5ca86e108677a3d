"""Mutated checkpoints through everything that reads one: `python -m tests.fuzz --count 20000 --random-seed 0`.

Each input must end in success or an UpcycleError within `LIMIT` seconds, and touch no file but its output. A merge that
succeeds must verify. Prints what was seen; exits with 1 at any other exception, and says which input to run again with
`--only`.
"""

import argparse
import contextlib
import faulthandler
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upcycle.cli.main import main as command_line

from tests.fuzz import mutations
from tests.fuzz.checkpoints import Files, checkpoint, config, read, write
from upcycle.card import make_card
from upcycle.errors import UpcycleError
from upcycle.families import FAMILIES
from upcycle.inspect import inspect_checkpoint
from upcycle.merge import merge
from upcycle.mixture import plan_extract, read_mixture
from upcycle.plan import MergePlan, plan_merge
from upcycle.recipe_file import builtin_recipes, load_recipe
from upcycle.seeds import read_seeds
from upcycle.verify import verify

LIMIT = 5  # seconds for one input
MEMORY = 600 << 20  # bytes of address space beyond what the imports take
MESSAGE = 20_000  # characters; the command line shows 2,000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# What recipes need where there is no text, and no ancestor among two unrelated seeds.
UNAIDED = {
    "flex": ("router.ffn.init=random", "mix.default=mean"),
    "btx-extra": ("experts.extra_from=mean",),
}
# Of what mixtures are made.
MADE = (
    ("bam",),
    ("btx",),
    ("bam",),
    ("average",),
    ("btx",),
    ("bam", "experts.granularity=2", "layers.mix=every 2"),
    ("btx", "experts.granularity=2"),
    ("btx", "experts.extra=1", "experts.extra_from=mean"),
    ("bam", "experts.extra=1", "experts.extra_from=mean", "experts.granularity=2"),
    ("shared-expert",),
    ("top-k-attention",),
    ("flex", *UNAIDED["flex"], "router.ffn.bias.a=-1.0"),
)
CHANGES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.utime",
)


class HangError(BaseException):
    """An input took too long; no handler of ours may take it for something else."""


class Watch:
    """What the process changes or connects to while an input is tried, seen by Python's audit events."""

    def __init__(self, root: Path) -> None:
        self.root, self.active, self.found = root, False, list[str]()
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open" and arguments[2] & WRITING:
            self.check(event, arguments[0])
        elif event in CHANGES:
            # Within a removed tree paths are relative to an open folder.
            relative = isinstance(arguments[-1], int) and arguments[-1] >= 0 and event in ("os.remove", "os.rmdir")
            for path in () if relative else arguments[: 2 if event == "os.rename" else 1]:
                self.check(event, path)
        elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "exec"):
            self.found.append(event) if event != "exec" else None

    def check(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        place = os.path.join(os.getcwd(), os.fsdecode(path))
        if event == "os.mkdir" and os.path.isdir(place):
            return  # it only makes sure that it is there
        if not place.startswith((f"{self.root}/out", f"{self.root}/.out")):
            self.found.append(f"{event} {place}")


def seed_pairs() -> Iterator[tuple[Files, Files]]:
    """Two related seeds of every family, and what else a checkpoint may be."""
    for name in FAMILIES:
        table = config(name)
        if name == "gpt_neox":
            del table["num_key_value_heads"]
        yield checkpoint(table, 0), checkpoint(table, 1)
    table = config()
    yield checkpoint(table, 0, max_shard_size=2000), checkpoint(table, 1, max_shard_size=3000)
    yield checkpoint(table, 0, "F32"), checkpoint(table, 1, "F32")
    yield checkpoint(table, 0, max_shard_size=2000), checkpoint(table, 1, extra="model.layers.0.rotary_emb.inv_freq")
    table = config(tie_word_embeddings=True, num_hidden_layers=2)
    yield checkpoint(table, 0), checkpoint(table, 1)


def link(folder: Path, files: dict[str, Any]) -> None:
    """Write a mutated checkpoint, whatever lies in the files' places."""
    write(folder, {name: data for name, data in files.items() if isinstance(data, bytes)})
    for name, odd in files.items():
        if not isinstance(odd, mutations.Odd):
            continue
        if odd.kind == "folder":
            (folder / name).mkdir()
        elif odd.kind == "fifo":
            os.mkfifo(folder / name)
        else:
            (folder / name).symlink_to(odd.target)


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every file that is not the output, with what changes when it does."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(("out", ".out"))]
        for name in files:
            status = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


class Fuzzer:
    def __init__(self, root: Path, random_seed: int) -> None:
        self.root, self.random_seed = root, random_seed
        self.out = root / "out"
        self.pairs = list(seed_pairs())
        (root / "precious").write_text("years of work")
        self.mixtures = list(self.make_mixtures())
        self.watch = Watch(root)
        self.results, self.messages, self.longest = Counter[str](), Counter[str](), 0
        self.failures: dict[str, list[int]] = {}
        self.slowest = (0.0, -1)

    def seeds(self, pair: tuple[Files, Files]) -> list[str]:
        return [str(write(self.root / name, files)) for name, files in zip("ab", pair, strict=True)]

    def make_mixtures(self) -> Iterator[tuple[tuple[Files, Files], Files]]:
        """A mixture of each pair, with different recipes and shards; of the last one those of every kind."""
        made = [(pair, MADE[number % 5]) for number, pair in enumerate(self.pairs)]
        made += [(self.pairs[-1], recipe) for recipe in MADE[5:]]
        for number, (pair, (name, *overrides)) in enumerate(made):
            plan = plan_merge(load_recipe(name, overrides), read_seeds(self.seeds(pair)))
            merge(plan, self.out, max_shard_size=(10**9, 4000)[number % 2])
            yield pair, read(self.out)
            shutil.rmtree(self.out)

    def prepare(self, draw: random.Random) -> bool:
        """Write the input; whether it is a mixture."""
        mixture = draw.random() < 0.35
        if mixture:
            pair, files = draw.choice(self.mixtures)
            mutated: dict[str, Any] = dict(files)
            mutations.mutate(draw, mutated, True)
            self.seeds(pair)
            link(self.root / "m", mutated)
            return True
        pair = draw.choice(self.pairs)
        self.seeds(pair)
        chosen = draw.randrange(2)
        mutated = dict(pair[chosen])
        mutations.mutate(draw, mutated, False)
        link(self.root / "ab"[chosen], mutated)
        if draw.random() < 0.5:  # the same for both, so that what reads a single one is reached
            same = {name: data for name, data in mutated.items() if not name.endswith(".safetensors")}
            link(self.root / "ab"[1 - chosen], {**pair[1 - chosen], **same})
        return False

    def run(self, number: int) -> None:
        """One input: prepared, tried, and what it left looked at."""
        draw = random.Random(f"{self.random_seed}:{number}")
        mixture = self.prepare(draw)
        before, began = snapshot(self.root), time.monotonic()
        faulthandler.dump_traceback_later(20 * LIMIT, exit=True)
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        self.watch.active = True
        try:
            self.try_mixture(draw) if mixture else self.try_seeds(draw)
        except UpcycleError as error:
            self.refused(number, error)
        except BaseException as error:
            self.failed(number, error)
        else:
            self.results["mixture read" if mixture else "merged and verified"] += 1
        finally:
            self.watch.active = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.slowest = max(self.slowest, (time.monotonic() - began, number))
        if self.watch.found or snapshot(self.root) != before:
            self.failures.setdefault(f"changed or reached: {self.watch.found[:3]}", []).append(number)
            self.watch.found.clear()
        left = [path for path in self.root.iterdir() if path.name.startswith((".out", "out"))]
        if any(path.name.startswith(".") for path in left):
            self.failures.setdefault(f"left: {[path.name for path in left]}", []).append(number)
        for path in left:
            shutil.rmtree(path)

    def refused(self, number: int, error: UpcycleError) -> None:
        self.results[type(error).__name__] += 1
        text = str(error)
        self.longest = max(self.longest, len(text))
        if len(text) > MESSAGE:
            self.failures.setdefault(f"a message of more than {MESSAGE} characters: {text[:200]!r}", []).append(number)
        plain = re.sub(r"'[^']*'|\[[^]]*\]|/\S*|-?\d[\d.,e+]*|nan|\binf", "_", text[:300])
        self.messages[plain[:100]] += 1

    def failed(self, number: int, error: BaseException) -> None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/upcycle/" in frame.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        key = f"{type(error).__name__} at {where}: {str(error)[:120]}"
        if key not in self.failures:
            print(f"input {number}: {key}", file=sys.stderr, flush=True)
        self.failures.setdefault(key, []).append(number)

    def try_seeds(self, draw: random.Random) -> None:
        names = [str(self.root / name) for name in "ab"]
        name = draw.choice(sorted(builtin_recipes()))
        recipe = load_recipe(name, UNAIDED.get(name, ()))
        options: dict[str, Any] = {"dtype": draw.choice([None, None, "F32", "F16"])}
        if recipe.copies:
            names, options["num_experts"] = names[:1], draw.randint(2, 4)
        if draw.random() < 0.2:
            self.call("plan", "--config", f"{names[0]}/config.json", "--recipe", recipe.name, "--num-experts", "2")
        options["allow_unrelated"] = draw.random() < 0.7
        plan = plan_merge(recipe, read_seeds(names), **options)
        self.write(plan, draw)
        problems = verify(self.out, names).problems
        assert not problems, problems[:3]
        if plan.format == "bam":
            read_mixture(self.out)
        else:
            inspect_checkpoint(self.out)

    def write(self, plan: MergePlan, draw: random.Random) -> None:
        merge(plan, self.out, max_shard_size=draw.choice([10**9, 5000, 1]))

    def try_mixture(self, draw: random.Random) -> None:
        folder = self.root / "m"
        for work in (
            lambda: verify(folder),
            lambda: verify(folder, [str(self.root / name) for name in "ab"]),
            lambda: inspect_checkpoint(folder),
            lambda: make_card(folder) if draw.random() < 0.5 else None,
            lambda: self.call("inspect", str(folder)) if draw.random() < 0.2 else None,
        ):
            with contextlib.suppress(UpcycleError):
                work()
        mixture = read_mixture(folder)
        for expert in range(min(2, len(mixture.groups))):
            self.write(plan_extract(mixture, expert), draw)
            assert not verify(self.out).problems
            shutil.rmtree(self.out)

    def call(self, *arguments: str) -> None:
        """The command line, in this process; what it prints is only looked at for tracebacks."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                command_line(arguments)
            except SystemExit as stop:
                if stop.code not in (None, 0, 1):
                    raise


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--random-seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    os.environ["UPCYCLE_DEBUG"] = "1"  # the command line then raises what it did not foresee

    warnings.simplefilter("error")  # numpy's, which would be printed

    def hang(*_: object) -> None:
        raise HangError

    signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        fuzzer, began = Fuzzer(Path(folder).resolve(), options.random_seed), time.monotonic()
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
        numbers = range(options.count) if options.only is None else [options.only]
        for number in numbers:
            fuzzer.run(number)
        if options.only is not None:
            print(dict(fuzzer.messages))
    for message, count in fuzzer.messages.most_common(25):
        print(f"{count:6}  {message}")
    print(f"{len(numbers)} inputs in {time.monotonic() - began:.0f} s: {dict(fuzzer.results)}")
    print(f"{len(fuzzer.messages)} messages, the longest of {fuzzer.longest} characters")
    print(f"slowest: {fuzzer.slowest[0]:.2f} s, input {fuzzer.slowest[1]}")
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    peak = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    print(f"peak memory: {int(peak[1]) // 1000 if peak else 0} MB")
    for key, found in sorted(fuzzer.failures.items(), key=lambda item: -len(item[1])):
        print(f"FAILURE {len(found)} times, first in inputs {found[:5]}: {key}")
    sys.exit(bool(fuzzer.failures))


if __name__ == "__main__":
    main()
