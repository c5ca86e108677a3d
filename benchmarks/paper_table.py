"""The paper's comparison in small: seeds, their mean, and mixtures after the same training, by held-out loss.

    python benchmarks/paper_table.py DIR [--work FOLDER] [--workers 2] [--specialists code law math]

DIR is laid out as `benchmarks/make_seeds.py` leaves it: dense checkpoints `seed`, `code`, `law`, `math` (`general` if
there), `tokens/DOMAIN.train.npy`, `heldout/DOMAIN.heldout.npy`, and the models once more under `parallel/`, where
blocks are parallel. Every mixture of `seed code law math` is trained as long, on the same sequences, with three random
seeds (routers, order of the data); then once more for as many steps as give the training FLOPs of `btx-top1` (`upcycle
plan`), as in the paper's "same compute". Finished runs are found again in the work folder, so a broken-off table goes
on.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STEPS, BATCH, LENGTH, RATE = 120, 8, 256, 1e-3
WINDOWS = 100
SPECIALISTS = ("code", "law", "math")
MIXTURES = ("btx-top1", "btx", "bam-kv-shared", "bam")
REFERENCE = "btx-top1"
DENSE = "seed, trained on"


def upcycle(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "upcycle", *map(str, arguments), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@dataclass(frozen=True)
class Set:
    """Seeds of one architecture, and where their runs go."""

    name: str
    data: Path
    models: Path
    work: Path
    specialists: tuple[str, ...]

    def tokens(self, kind: str) -> list[str]:
        if kind == "train":
            return [f"{domain}={self.data / 'tokens' / f'{domain}.train.npy'}" for domain in domains(self.specialists)]
        return [f"{domain}={self.work / self.name / f'{domain}.heldout.npy'}" for domain in domains(self.specialists)]

    def choose_windows(self) -> None:
        """Put those held-out windows into the work folder that the README's figures stand for."""
        for domain in domains(self.specialists):
            rows = np.load(self.data / "heldout" / f"{domain}.heldout.npy")
            chosen = np.linspace(0, len(rows) - 1, min(WINDOWS, len(rows))).round().astype(int)
            np.save(self.work / self.name / f"{domain}.heldout.npy", rows[chosen])

    def seeds(self) -> list[str]:
        return [str(self.models / name) for name in ("seed", *self.specialists)]

    def flops(self, recipe: str) -> int:
        """Training FLOPs a token."""
        if recipe == DENSE:
            recipe = "average"
        plan = upcycle("plan", "--seeds", *self.seeds(), "--recipe", recipe, "--context", LENGTH)
        return int(plan["training_flops_per_token"])

    def run(self, recipe: str, random_seed: int, steps: int) -> dict[str, float]:
        """Held-out loss by domain after `steps`; `steps` 0 measures the model as it is."""
        where = self.work / self.name / f"{recipe.replace(', ', '-').replace(' ', '-')}-{random_seed}-{steps}"
        found = where.with_suffix(".json")
        if found.is_file():
            known: dict[str, float] = json.loads(found.read_text())["heldout"]
            return known
        model = self.models / ("seed" if recipe == DENSE else recipe)
        merged = self.work / self.name / f"{recipe}-{random_seed}-{steps}-merged"
        if recipe in (*MIXTURES, "average"):
            model = merged
            shutil.rmtree(merged, ignore_errors=True)
            seeds = ("--seeds", *self.seeds())
            upcycle("merge", *seeds, "--recipe", recipe, "--random-seed", random_seed, "--out", merged)
        shutil.rmtree(where, ignore_errors=True)
        result = upcycle(
            *("train", model, "--data", *self.tokens("train"), "--eval-data", *self.tokens("heldout"), "--out", where),
            *("--steps", max(1, steps), "--batch-size", BATCH, "--sequence-length", LENGTH, "--learning-rate", RATE),
            *("--random-seed", random_seed, "--eval-every", 10**6, "--save-every", 10**6),
        )
        if not steps:
            result["heldout"] = result["first_heldout"]
        losses: dict[str, float] = result["heldout"]
        shutil.copy(where / "metrics.jsonl", where.with_suffix(".metrics.jsonl"))
        for folder in (where, merged):
            shutil.rmtree(folder, ignore_errors=True)
        found.write_text(json.dumps(result, indent=2))
        print(f"{self.name} {where.name}: {mean(result['heldout']):.4f}", file=sys.stderr, flush=True)
        return losses


def domains(specialists: tuple[str, ...]) -> list[str]:
    return ["docs", *specialists]


def mean(losses: dict[str, float]) -> float:
    return statistics.mean(losses.values())


def table(rows: list[tuple[str, int, str, list[dict[str, float]]]]) -> str:
    """Markdown: mean over random seeds, and for the mean of the domains the spread (standard deviation)."""
    names = list(rows[0][3][0])
    lines = [f"| model | steps | FLOPs | {' | '.join(names)} | mean |", "|---|---|---|" + "---|" * (len(names) + 1)]
    for name, steps, flops, runs in rows:
        cells = [f"{statistics.mean(run[domain] for run in runs):.3f}" for domain in names]
        means = [mean(run) for run in runs]
        spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
        lines.append(
            f"| {name} | {steps or '–'} | {flops} | {' | '.join(cells)} | {statistics.mean(means):.3f}{spread} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=Path("paper-table"))
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--random-seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", default=["llama", "parallel"])
    parser.add_argument("--specialists", nargs="+", default=SPECIALISTS)
    options = parser.parse_args()
    sets = [
        Set(
            name,
            options.folder,
            options.folder / name if name == "parallel" else options.folder,
            options.work,
            tuple(options.specialists),
        )
        for name in options.sets
    ]
    plans: list[tuple[Set, str, int, int]] = []
    for one in sets:
        (options.work / one.name).mkdir(parents=True, exist_ok=True)
        one.choose_windows()
        reference = one.flops(REFERENCE)
        for name in ("seed", "average", *(["general"] if (one.models / "general").is_dir() else [])):
            plans.append((one, name, 0, 1))
        for name in (DENSE, *MIXTURES):
            plans.append((one, name, STEPS, options.random_seeds))
        for name in (DENSE, *MIXTURES):
            steps = round(STEPS * reference / one.flops(name))
            if steps != STEPS:
                plans.append((one, name, steps, options.random_seeds))
    results: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    with ThreadPoolExecutor(options.workers) as pool:
        jobs = [
            (one, name, steps, pool.submit(one.run, name, random_seed, steps))
            for random_seed in range(options.random_seeds)
            for one, name, steps, count in plans
            if random_seed < count
        ]
        for one, name, steps, job in jobs:
            results.setdefault((one.name, name, steps), []).append(job.result())
    for one in sets:
        reference = one.flops(REFERENCE)
        mine = [(name, steps) for which, name, steps, _ in plans if which is one]

        def rows(chosen: list[tuple[str, int]], one: Set = one, reference: int = reference) -> Any:
            return [
                (
                    {"average": "plain mean", "general": "`general`"}.get(name, name),
                    steps,
                    f"{one.flops(name) * steps / reference / STEPS:.2f}" if steps else "–",
                    results[one.name, name, steps],
                )
                for name, steps in chosen
            ]

        print(f"\n### {one.name}: the same data\n")
        print(table(rows([(name, steps) for name, steps in mine if steps in (0, STEPS)])))
        print(f"\n### {one.name}: the training FLOPs of {REFERENCE}\n")
        print(table(rows([(name, steps) for name, steps in mine if steps not in (0, STEPS) or name == REFERENCE])))


if __name__ == "__main__":
    main()
