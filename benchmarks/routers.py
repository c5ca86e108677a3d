"""Routers set from text: what they give before any training, how training goes on from there, and what they cost.

    python benchmarks/routers.py DIR [--work FOLDER] [--sets llama parallel hard] [--parts fresh curves order time]

DIR is laid out as for `paper_table.py`; `hard/` in it, if asked for, holds specialists that were trained at a much
higher learning rate (`make_seeds.py --hard-rate`). Three random seeds for `bam` (one for what
is shown beside it): they choose the routers' start where
it is random, the text that routers are set from (16,384 tokens an expert) where there is text, and the order of the
training data. Finished runs are found again in the work folder, so a broken-off table goes on.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from paper_table import Set, domains, mean, upcycle

STEPS, BATCH, LENGTH = 160, 8, 256
TOKENS = 16_384
EVERY = 20
RESCALED = ("--set", "router.ffn.normalize=true")
AVERAGED = ("--set", "mix.embedding=mean", "mix.head=mean")
PROTOTYPES = ("--set", "router.ffn.init=prototypes", "router.attention.init=prototypes")
RECIPES = ("bam", "bam-kv-shared", "btx", "btx-top1")


@dataclass(frozen=True)
class Bench:
    """One set of seeds, and its runs."""

    one: Set
    windows: int

    @property
    def work(self) -> Path:
        return self.one.work / self.one.name

    def text(self, random_seed: int, order: int | None = None) -> list[str]:
        """Windows of each expert's domain, drawn by the random seed; with `order` the same ones shuffled."""
        words = []
        for expert, domain in zip(("seed", *self.one.specialists), domains(self.one.specialists), strict=True):
            file = self.work / f"text-{domain}-{random_seed}-{order}.npy"
            if not file.is_file():
                tokens = np.load(self.one.data / "tokens" / f"{domain}.train.npy", mmap_mode="r").reshape(-1)
                random = np.random.default_rng(random_seed)
                starts = random.integers(0, tokens.size - LENGTH, TOKENS // LENGTH)
                if order is not None:
                    starts = np.random.default_rng(order).permutation(starts)
                np.save(file, np.stack([tokens[start : start + LENGTH] for start in starts]))
            words.append(f"{expert}={file}")
        return words

    def merged(self, recipe: str, random_seed: int, *more: object, name: str = "") -> Path:
        out = self.work / f"{recipe}{name}-{random_seed}"
        if not (out / "config.json").is_file():
            words = ("--recipe", recipe, "--random-seed", random_seed, "--out", out, *more)
            upcycle("merge", "--seeds", *self.one.seeds(), *words)
        return out

    def fitted(self, recipe: str, random_seed: int, *more: object, name: str = "-fitted") -> Path:
        return self.merged(recipe, random_seed, "--router-data", *self.text(random_seed), *more, name=name)

    def losses(self, model: Path) -> dict[str, float]:
        """Held-out loss by domain."""
        file = self.work / f"{model.name}.eval.json"
        if not file.is_file():
            words = ("--data", *self.one.tokens("heldout"), "--windows", self.windows, "--precision", "fp32")
            (result,) = upcycle("eval", model, *words)["models"].values()
            file.write_text(json.dumps({name: values["loss"] for name, values in result["domains"].items()}))
        known: dict[str, float] = json.loads(file.read_text())
        return known

    def curve(self, model: Path, random_seed: int, steps: int, *options: object, name: str) -> dict[int, float]:
        """Mean held-out loss by step."""
        out = self.work / f"run-{model.name}-{name}-{steps}"
        file = out.with_suffix(".json")
        if not file.is_file():
            shutil.rmtree(out, ignore_errors=True)
            upcycle(
                *("train", model, "--data", *self.one.tokens("train"), "--eval-data", *self.one.tokens("heldout")),
                *("--out", out, "--steps", steps, "--batch-size", BATCH, "--sequence-length", LENGTH, *options),
                *("--random-seed", random_seed, "--eval-every", EVERY, "--eval-windows", 25, "--save-every", 10**6),
            )
            events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            heldout = {event["step"]: event["heldout"] for event in events if "heldout" in event}
            found = {
                step: mean({name: one["loss"] for name, one in losses.items()}) for step, losses in heldout.items()
            }
            file.write_text(json.dumps(found))
            shutil.rmtree(out)
            print(f"{self.one.name} {out.name}: {found}", file=sys.stderr, flush=True)
        return {int(step): loss for step, loss in json.loads(file.read_text()).items()}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def fresh(bench: Bench, seeds: Sequence[int], recipes: Sequence[str], pool: ThreadPoolExecutor) -> None:
    """Held-out loss before any training."""
    one = bench.one
    dense = {name: pool.submit(bench.losses, one.models / name) for name in ("seed", *one.specialists)}
    average = pool.submit(lambda: bench.losses(bench.merged("average", 0)))
    rows = {}
    for recipe in recipes:
        kinds: dict[str, Callable[[int], Path]] = {
            f"{recipe}, random": lambda seed, recipe=recipe: bench.merged(recipe, seed),
            f"**{recipe}, fitted**": lambda seed, recipe=recipe: bench.fitted(recipe, seed),
        }
        if recipe == "bam":
            kinds |= {
                "bam, random, gates rescaled": lambda seed: bench.merged("bam", seed, *RESCALED, name="-rescaled"),
                "bam, fitted, embedding = mean": lambda seed: bench.fitted("bam", seed, *AVERAGED, name="-averaged"),
                "bam, prototypes": lambda seed: bench.fitted("bam", seed, *PROTOTYPES, name="-prototypes"),
            }
        for name, make in kinds.items():
            chosen = seeds if name in ("bam, random", "**bam, fitted**") else seeds[:1]
            rows[name] = [pool.submit(lambda seed=seed, make=make: bench.losses(make(seed))) for seed in chosen]
    names = domains(one.specialists)
    print(f"\n### {one.name}: before any training ({TOKENS:,} tokens of text an expert)\n")
    print(f"| model | {' | '.join(names)} | mean |\n|---|{'---|' * (len(names) + 1)}")
    oracle = {"docs": dense["seed"].result()["docs"], **{name: dense[name].result()[name] for name in one.specialists}}
    for name, losses in (
        ("seed", [dense["seed"].result()]),
        ("plain mean", [average.result()]),
        ("oracle: each domain by its own specialist", [oracle]),
        *((name, [job.result() for job in jobs]) for name, jobs in rows.items()),
    ):
        cells = [f"{statistics.mean(loss[domain] for loss in losses):.3f}" for domain in names]
        print(f"| {name} | {' | '.join(cells)} | {spread([mean(loss) for loss in losses])} |", flush=True)


def curves(bench: Bench, seeds: Sequence[int], pool: ThreadPoolExecutor) -> None:
    """Held-out loss while `bam` is trained, from random and from fitted routers."""
    runs = {
        "random": lambda seed: bench.curve(bench.merged("bam", seed), seed, STEPS, name="defaults"),
        "fitted": lambda seed: bench.curve(bench.fitted("bam", seed), seed, STEPS, name="defaults"),
    }
    jobs = {name: [pool.submit(run, seed) for seed in seeds] for name, run in runs.items()}
    done = {name: [job.result() for job in of] for name, of in jobs.items()}
    steps = sorted(done["random"][0])
    print(f"\n### {bench.one.name}: held-out loss of `bam` over {STEPS} steps of {BATCH} × {LENGTH} tokens\n")
    print(f"| routers | {' | '.join(map(str, steps))} |\n|---|{'---|' * len(steps)}")
    for name, found in done.items():
        cells = [spread([run[step] for run in found]) if step in found[0] else "" for step in steps]
        print(f"| {name} | {' | '.join(cells)} |")
    pairs = list(zip(done["random"], done["fitted"], strict=True))
    below = all(fitted[step] < random[step] for random, fitted in pairs for step in steps)
    gaps = ", ".join(f"{random[STEPS] - fitted[STEPS * 3 // 4]:+.3f}" for random, fitted in pairs)
    print(f"\nFitted is below random at every measured step, every random seed: {below}.")
    print(f"Random at step {STEPS} less fitted at step {STEPS * 3 // 4}, by random seed: {gaps}.")
    sys.stdout.flush()


def order(bench: Bench, pool: ThreadPoolExecutor) -> None:
    """How much a held-out loss changes with the order of the text."""
    first = bench.losses(bench.fitted("bam", 0))
    again = bench.losses(bench.fitted("bam", 0, name="-fitted-again"))
    jobs = []
    for shuffle in (1, 2):
        words = ("--router-data", *bench.text(0, order=shuffle))
        jobs.append(
            pool.submit(lambda w=words, s=shuffle: bench.losses(bench.merged("bam", 0, *w, name=f"-order-{s}")))
        )
    most = max(abs(job.result()[name] - first[name]) for job in jobs for name in first)
    print(
        f"\n{bench.one.name}: the same text in two other orders changes no held-out loss by more than {most:.4f}; ",
        end="",
    )
    print(f"once more in the same order: {max(abs(again[name] - first[name]) for name in first):.4f}.", flush=True)


TIMED = """
import sys, time
from pathlib import Path
import numpy as np, torch
from upcycle.recipe import AttentionRouter, FfnRouter
from upcycle.router_text import RouterText
from upcycle.routers import set_routers
from upcycle.weights import load_model
torch.set_num_threads(1)
model = load_model(Path(sys.argv[1])).eval()
words = [word.partition("=") for word in sys.argv[2:]]
text = RouterText([name for name, _, _ in words], [np.load(file).astype(np.int64) for _, _, file in words])
windows = torch.from_numpy(np.concatenate(text.windows))
settings = {"ffn": FfnRouter(init="fit"), "attention": AttentionRouter(init="fit")}
forwards, fits = [], []
for _ in range(3):
    began = time.perf_counter()
    with torch.no_grad():
        for batch in windows.split(32):
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
    forwards.append(time.perf_counter() - began)
    began = time.perf_counter()
    set_routers(model, text, settings, dtype=torch.bfloat16)
    fits.append(time.perf_counter() - began)
print(sorted(forwards)[1], sorted(fits)[1])
"""


def timed(bench: Bench) -> None:
    """What setting the routers takes, beside one forward pass over the same text; medians of three, one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", TIMED, str(bench.merged("bam", 0)), *bench.text(0)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    forward, fit = map(float, done.stdout.split()[-2:])
    began = time.perf_counter()
    bench.fitted("bam", 0, name=f"-timed-{time.time_ns()}")
    whole = time.perf_counter() - began
    print(
        f"\n{bench.one.name}: one forward pass over {4 * TOKENS:,} tokens takes {forward:.1f} s, setting all routers, "
        f"that pass in it, {fit:.1f} s (2 × forward + 10 s: {2 * forward + 10:.1f} s), the command {whole:.1f} s.",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=Path("routers-bench"))
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--random-seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=50, help="held-out windows of a domain, before training")
    parser.add_argument("--sets", nargs="+", default=["llama", "parallel", "hard"])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--parts", nargs="+", default=["time", "fresh", "order", "curves"])
    options = parser.parse_args()
    seeds = range(options.random_seeds)
    for part in options.parts:
        for name in options.sets:
            models = options.folder if name == "llama" else options.folder / name
            one = Set(name, options.folder, models, options.work, ("code", "law", "math"))
            (options.work / name).mkdir(parents=True, exist_ok=True)
            one.choose_windows()
            bench = Bench(one, options.windows)
            with ThreadPoolExecutor(1 if part == "time" else options.workers) as pool:
                if part == "fresh":
                    fresh(bench, seeds, options.recipes, pool)
                elif part == "curves" and name != "hard":
                    curves(bench, seeds, pool)
                elif part == "order":
                    order(bench, pool)
                elif part == "time":
                    timed(bench)


if __name__ == "__main__":
    main()
