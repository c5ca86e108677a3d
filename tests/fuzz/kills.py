"""Kills merges at random moments and starts them again; `python -m tests.fuzz.kills FOLDER KILLS RANDOM_SEED`.

Every merge runs in a fork of one warm process, whose writes are slowed, and dies by SIGKILL in one of three ways: after
a random time of its life, at a random line of upcycle's code, or at a random line from the first renaming on. It prints
what it saw as one JSON object, and fails at the first thing that is not as it must be.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import upcycle.merge as merging
from tests.fuzz.checkpoints import checkpoint, config, write
from upcycle import checkpoint as checkpoints
from upcycle import staging
from upcycle.errors import OutputError
from upcycle.journal import JOURNAL
from upcycle.plan import MergePlan, plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds
from upcycle.verify import verify

PAUSE = 0.002  # seconds that every slowed call sleeps
CODE = {
    str(Path(merging.__file__).parent / f"{name}.py")
    for name in ("merge", "staging", "checkpoint", "journal", "checksums")
}
Digests = Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """One merge: its seeds' sizes, recipe and shards."""

    name: str
    sizes: Mapping[str, Any]
    recipe: str
    max_shard_size: int = 10**9
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = (
    Case("small", {}, "bam"),
    Case("small-shards", {"num_hidden_layers": 2}, "bam-kv-shared", 3000),
    Case("deep", {"num_hidden_layers": 6}, "btx", 20_000, {"dtype": "F32"}),
    Case("dense", {"num_hidden_layers": 4, "vocab_size": 2000}, "average", 40_000),
    Case("copies", {"num_hidden_layers": 3}, "sparse-upcycling", 10**9, {"num_experts": 5, "random_seed": 3}),
    # Tensors of several jobs, and one shard for each of the largest.
    Case("wide", {"hidden_size": 256, "intermediate_size": 4096}, "bam", 7_000_000),
)


def make_plan(case: Case, folder: Path, **options: Any) -> MergePlan:
    """The plan of a case, its seeds written on the first call."""
    table, count = config(**case.sizes), 1 if case.recipe == "sparse-upcycling" else 3
    paths = [folder / "seeds" / case.name / name for name in ("code", "law", "math")[:count]]
    for index, path in enumerate(paths):
        if not path.exists():
            write(path, checkpoint(table, index))
    recipe = load_recipe(case.recipe)
    return plan_merge(recipe, read_seeds([str(path) for path in paths]), **{**case.options, **options})


def digests(folder: Path) -> Digests:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def slow_down() -> None:
    """Let every call that changes the disk take a while; a write reaches it in two halves."""

    def slowed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            time.sleep(PAUSE)
            result = real(*arguments, **options)
            time.sleep(PAUSE)
            return result

        return call

    pwrite = os.pwrite

    def in_halves(descriptor: int, data: Any, offset: int) -> int:
        half = len(data) // 2
        pwrite(descriptor, data[:half], offset)
        time.sleep(PAUSE)
        return half + pwrite(descriptor, data[half:], offset + half)

    os.pwrite = in_halves
    os.fsync, shutil.copyfile, Path.rename = slowed(os.fsync), slowed(shutil.copyfile), slowed(Path.rename)
    checkpoints.write_json = merging.write_json = slowed(checkpoints.write_json)


@contextmanager
def counting_lines(files: set[str], after: str, reached: Callable[[int], None]) -> Iterator[None]:
    """Call `reached` with the number of each line of `files` that any thread runs, once `after` was called."""
    numbers, armed = itertools.count(1), [not after]

    def on_call(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_name == after:
            armed[0] = True
        return on_line if armed[0] and frame.f_code.co_filename in files else None

    def on_line(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            reached(next(numbers))
        return on_line

    threading.settrace(on_call)
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]


WAYS = {
    "line": (CODE, ""),
    "line while renaming": ({staging.__file__}, "_replace"),
    "line while removing": ({staging.__file__, shutil.__file__}, "_replace"),
}
RENAMING = ("line while renaming", "line while removing")


def forked(work: Callable[[], None], seconds: float | None = None) -> bool:
    """Run `work` in a fork, killed after so many seconds if given; whether it was killed before it ended."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"a merge ended with status {status}"
    return status == signal.SIGKILL


class Killer:
    """One case: what an undisturbed merge gives, how long one lives, and kills of others."""

    def __init__(self, case: Case, folder: Path, counts: Counter[str]) -> None:
        self.case, self.counts = case, counts
        self.plan = make_plan(case, folder)
        self.place = folder / case.name
        self.out = self.place / "out"
        self.partial, self.old = self.place / ".out.upcycle-partial", self.place / ".out.upcycle-old"
        self.merge(folder / f"{case.name}-expected")
        self.expected = digests(folder / f"{case.name}-expected")
        # A former result of other shards: no file of it is taken for one of the new one.
        self.former_folder = folder / f"{case.name}-former"
        merging.merge(make_plan(case, folder, random_seed=77, dtype="F16"), self.former_folder, max_shard_size=9_000)
        self.former = digests(self.former_folder)
        assert self.former != self.expected
        self.life, self.lines = self.measure()

    def merge(self, out: Path, **options: Any) -> list[str]:
        told: list[str] = []
        merging.merge(self.plan, out, max_shard_size=self.case.max_shard_size, tell=told.append, **options)
        return told

    def measure(self) -> tuple[float, dict[str, int]]:
        """Seconds of a slowed merge, and the lines it runs, by way to kill."""
        self.fresh(True)
        began = time.monotonic()
        forked(lambda: self.slowed(True))
        life, lines = time.monotonic() - began, {}
        for way, (files, after) in WAYS.items():
            self.fresh(True)
            with counting_lines(files, after, lambda number, way=way: lines.__setitem__(way, number)):
                self.merge(self.out, overwrite=True)
        assert digests(self.out) == self.expected
        return life, lines

    def fresh(self, overwrite: bool) -> None:
        """Nothing, or a former result."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        if overwrite:
            shutil.copytree(self.former_folder, self.out)

    def slowed(self, overwrite: bool) -> None:
        slow_down()
        self.merge(self.out, overwrite=overwrite)

    def kill(self, overwrite: bool, way: str, draw: random.Random) -> bool:
        """Start a merge and kill it; whether it was not too late."""
        if way == "time":
            return forked(lambda: self.slowed(overwrite), draw.uniform(0, self.life))
        files, after = WAYS[way]
        last = draw.randint(1, self.lines[way])

        def die(number: int) -> None:
            if number == last:
                os.kill(os.getpid(), signal.SIGKILL)

        def work() -> None:
            with counting_lines(files, after, die):
                self.merge(self.out, overwrite=overwrite)

        return forked(work)

    def journaled(self) -> int:
        """Tensors that the remains' journal names."""
        file = self.partial / JOURNAL
        return file.read_bytes().count(b'"tensor"') if file.is_file() else 0

    def look(self, overwrite: bool) -> None:
        """What a second command sees after a kill: nothing, or the former or the new result, whole."""
        if self.out.exists():
            found = digests(self.out)
            assert found == self.expected or (overwrite and found == self.former), sorted(found)
            assert not verify(self.out).problems
            self.counts["new result stood"] += found == self.expected
        elif overwrite:
            assert digests(self.old) in (self.former, self.expected)
            self.counts["between the renames"] += 1
        left = {path.name for path in self.place.iterdir()}
        assert left <= {"out", self.partial.name, *([self.old.name] if overwrite else [])}, left

    def round(self, draw: random.Random) -> None:
        """A merge, killed up to three times, then left alone."""
        way = draw.choice(["time", "time", "time", "line", *WAYS])
        overwrite = draw.random() < (0.7 if way in RENAMING else 0.3)
        self.fresh(overwrite)
        for _ in range(draw.choice([1, 1, 2, 3])):
            had = self.journaled()
            if not self.kill(overwrite, way, draw):
                self.counts["ended before the kill"] += 1
                break
            self.counts["kills"] += 1
            self.counts[f"kills by {way}"] += 1
            self.counts["kills while writing"] += self.journaled() > 0
            self.counts["kills of a resumed merge"] += had > 0
            self.look(overwrite)
            if self.out.exists() and not overwrite:
                break
        self.finish(overwrite, draw)

    def refused(self, **options: Any) -> str | None:
        try:
            self.merge(self.out, **options)
        except OutputError as error:
            return str(error)
        return None

    def finish(self, overwrite: bool, draw: random.Random) -> None:
        """The next commands: perhaps one that may overwrite nothing, then the same merge again."""
        if overwrite and draw.random() < 0.3:
            assert "exists" in (self.refused(overwrite=False) or "")
            assert digests(self.out) in (self.former, self.expected)
        if overwrite or not self.out.exists():
            claimed, told = self.journaled(), self.merge(self.out, overwrite=overwrite)
            assert len(told) == (claimed > 0), (told, claimed)
            assert all("going on after an interrupted merge" in text for text in told), told
            self.counts["merges taken up again"] += len(told)
        assert digests(self.out) == self.expected
        assert not verify(self.out).problems
        assert [path.name for path in self.place.iterdir()] == ["out"]
        self.counts["merges"] += 1


def main(folder: Path, kills: int, random_seed: int) -> None:
    began, draw, counts = time.monotonic(), random.Random(random_seed), Counter[str]()
    killers = [Killer(case, folder, counts) for case in (CASES if kills > 50 else CASES[:2])]
    while counts["kills"] < kills:
        for killer in killers:
            try:
                killer.round(draw)
            except BaseException:
                print(f"case {killer.case.name}, after {dict(counts)}; see {killer.place}", file=sys.stderr)
                raise
    print(json.dumps({**counts, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
