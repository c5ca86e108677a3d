"""What the benchmarks of one card share: its facts and ceilings, a clock, comparisons, and tables of their results.

python benchmarks/card.py kernels.json train_step.json     # prints both as the README's Markdown
"""

import argparse
import gc
import importlib.metadata
import json
import platform
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if find_spec("upcycle") is None:  # on a machine where nothing can be installed
    sys.path.insert(0, str(ROOT))

NOMINAL = {"H100": 989.0, "H200": 989.0}  # dense bf16 TFLOP/s by the vendor's data sheet
WRONG = 3e-2  # relative, of two sides that both round to bf16
BOTH = "forward+backward"
# What tables show of the results, in this order, and how.
COLUMNS = {"model": "", "layers": "", "experts": "", "tokens": ",", "what": "", "recipe": "", "backend": ""}
COLUMNS |= {"ms": ".3g", "tflops": ".0f", "gb_per_s": ",.0f", "of_ceiling": ".0%", "of_nominal": ".0%"}
COLUMNS |= {"tokens_per_s": ",.0f", "fused_is_faster_by": ".2f", "peak_mib": ",.0f", "error": ".1e"}
COLUMNS |= {"over_btx": ".3f", "paper": "", "aim": ""}
PARTS = ("ffn", "gates", "attention", "steps", "generation")


def options(description: str | None, seconds: float) -> tuple[argparse.Namespace, torch.device]:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results as JSON, after each part")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU; the numbers mean nothing")
    parser.add_argument("--seconds", type=float, default=seconds, help="the budget (default: %(default)s)")
    found = parser.parse_args()
    if not found.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device; --smoke shows on a CPU that the script runs")
    return found, torch.device("cpu" if found.smoke else "cuda")


def facts(device: torch.device) -> dict[str, Any]:
    """The card and the versions; no date."""
    table: dict[str, Any] = {"card": "CPU", "nominal_tflops": None, "memory_gib": None}
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        table["card"] = properties.name
        table["nominal_tflops"] = next((rate for key, rate in NOMINAL.items() if key in properties.name), None)
        table["memory_gib"] = round(properties.total_memory / 2**30, 1)
    else:
        table["note"] = "smoke run on a CPU: it shows that the script runs, its numbers mean nothing"
    table |= {"cuda": torch.version.cuda, "python": platform.python_version()}
    installed = {library.name: library.version for library in importlib.metadata.distributions()}
    return table | {name: installed.get(name) for name in ("torch", "triton", "transformers", "liger_kernel")}


class Budget:
    """The seconds that a script may take, and what it left out to keep to them."""

    def __init__(self, seconds: float) -> None:
        self.ends = time.monotonic() + seconds
        self.dropped: list[str] = []

    def left(self) -> float:
        return self.ends - time.monotonic()

    def allows(self, what: str, seconds: float) -> bool:
        if self.left() >= seconds:
            return True
        self.dropped.append(what)
        print(f"dropped ({self.left():.0f} s are left, it may take {seconds:.0f} s): {what}", flush=True)
        return False


def attempt(function: Callable[[], Any], limit: float) -> tuple[Any, str | None]:
    """A function's value, or why it has none: what one backend cannot must not stop the others.

    It may take `limit` seconds, or what is left of an outer attempt's; it is stopped when Python has its turn, and each
    second again, since an autotuner takes the first alarm for a failed compilation and tries the next of its settings.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {limit:.0f} s")

    former, began = signal.signal(signal.SIGALRM, stop), time.monotonic()
    outer = signal.getitimer(signal.ITIMER_REAL)[0]
    signal.setitimer(signal.ITIMER_REAL, max(0.001, min(limit, outer or limit)), 1.0)
    try:
        return function(), None
    except Exception as error:  # any: compilers, kernels, memory, missing libraries
        failure = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
    finally:
        signal.signal(signal.SIGALRM, former)
        left = max(0.001, outer - (time.monotonic() - began)) if outer else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, 1.0 if left else 0.0)
    release()  # raises if the card itself no longer answers: nothing that follows could be believed
    return None, failure


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def peak_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """The most memory that a call takes above what is held before it; None where there is no CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


class Clock:
    """Times of calls in ms: by events, behind a flushed L2, on CUDA; by the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = 2**28 if device.type == "cuda" else 0  # bytes, several times the largest L2
        self.flushed = torch.empty(size, dtype=torch.uint8, device=device)

    def times(self, call: Callable[[], Any], count: int) -> list[float]:
        if self.device.type != "cuda":
            began = [time.perf_counter()]
            for _ in range(count):
                call()
                began.append(time.perf_counter())
            return [1000 * (b - a) for a, b in pairwise(began)]
        pairs = []
        for _ in range(count):
            for _ in range(8):  # about 0.7 ms, in which the host gets ahead as it is in a training
                self.flushed.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]


def ceilings(clock: Clock) -> dict[str, float]:
    """What the card reaches: TFLOP/s of a square bf16 product, GB/s of a copy (bytes read and written)."""
    side, size = (8192, 2**30) if clock.device.type == "cuda" else (256, 2**22)
    left, right = (torch.randn(side, side, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 255, (size,), device=clock.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = statistics.median(clock.times(lambda: torch.mm(left, right), 25)[5:])
    copied = statistics.median(clock.times(lambda: target.copy_(source), 25)[5:])
    return {"tflops": 2 * side**3 / product / 1e9, "gb_per_s": 2 * size / copied / 1e6}


@dataclass(frozen=True)
class Side:
    """One way to compute something: its output, and what it has gradients for (the inputs, two in all, come first)."""

    call: Callable[[], torch.Tensor]
    leaves: Sequence[torch.Tensor]

    def trained(self, gradient: torch.Tensor) -> list[torch.Tensor]:
        output = self.call()
        return [output.detach(), *torch.autograd.grad(output, list(self.leaves), gradient)]


def compare(
    clock: Clock, makers: Mapping[str, Callable[[], Side]], gradient: torch.Tensor, plan: Any
) -> list[dict[str, Any]]:
    """A row for each side, forward and forward with backward; the first side is what the others are compared with.

    `ms`, the medians of the `rounds`, `fused_is_faster_by`, the `error` of output and the inputs' gradients, `peak_mib`
    above inputs (gradients included); or the `failure`.
    """
    wanted: list[torch.Tensor] = []
    sides: dict[str, Side] = {}
    notes: dict[str, dict[str, Any]] = {}

    def check(make: Callable[[], Side]) -> tuple[Side, dict[str, Any]]:
        side = make()
        found = side.trained(gradient)[:3]
        wanted.extend(() if wanted else found)
        pairs = [(a.float(), b.float()) for a, b in zip(found, wanted, strict=True)]
        errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
        if not all(value <= WRONG for value in errors):  # NaN is wrong, too
            raise ValueError(f"wrong: output and its inputs' gradients differ by {errors}")
        return side, {"error": max(errors)}

    for name, make in makers.items():
        made, failure = attempt(partial(check, make), plan.limit)
        notes[name] = {"failure": failure} if failure else made[1]
        if not failure:
            sides[name] = made[0]
    rows = []
    for what in ("forward", BOTH):
        calls: dict[str, Callable[[], Any]] = {name: torch.no_grad()(side.call) for name, side in sides.items()}
        if what == BOTH:
            calls = {name: partial(side.trained, gradient) for name, side in sides.items()}
        times = rounds(clock, calls, plan)
        for name in makers:
            row = {"what": what, "backend": name, **notes[name], **times.get(name, {})}
            if "ms" in row and "ms" in times.get("fused", {}):
                pairs = zip(row["rounds"], times["fused"]["rounds"], strict=True)
                row["fused_is_faster_by"] = statistics.median(own / fused for own, fused in pairs)
            rows.append(row)
    return rows


def rounds(clock: Clock, calls: Mapping[str, Callable[[], Any]], plan: Any) -> dict[str, dict[str, Any]]:
    """Each call's `ms`, `rounds` and `peak_mib`, or its `failure`; a round runs all of them in drawn order.

    The plan says how many `rounds`, how often a round `repeat`s each call, and the `limit` of its seconds.
    """
    found: dict[str, dict[str, Any]] = {}

    def warm_up(call: Callable[[], Any]) -> float | None:
        clock.times(call, 3)
        return peak_mib(call, clock.device)

    for name, call in calls.items():
        peak, failure = attempt(partial(warm_up, call), plan.limit)
        found[name] = {"failure": failure} if failure else {"peak_mib": peak, "rounds": []}
    for number in range(plan.rounds):
        for name in random.Random(number).sample(list(calls), len(calls)):
            if "failure" in found[name]:
                continue
            times, failure = attempt(partial(clock.times, calls[name], plan.repeat), plan.limit)
            former = found[name]["rounds"]
            found[name] |= {"rounds": [*former, statistics.median(times)]} if times else {"failure": failure}
    for result in (result for result in found.values() if "failure" not in result):
        result["ms"] = statistics.median(result["rounds"])
    return found


def rated(rows: list[dict[str, Any]], top: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rows with their rates and shares of the ceilings: of `flops` or `bytes` in `ms`; three passes train."""
    for row in (row for row in rows if "ms" in row):
        work, rate, unit = ("flops", "tflops", 1e9) if "flops" in row else ("bytes", "gb_per_s", 1e6)
        passes = 3 if (work, row["what"]) == ("flops", BOTH) else 1
        row[rate] = passes * row[work] / row["ms"] / unit
        row["of_ceiling"] = row[rate] / top[rate]
    return rows


def goal(text: str, values: Mapping[str, float | None], least: float | None = None, most: float = 0) -> dict[str, Any]:
    """A goal, what was measured for it, and whether all of it meets the goal; None if nothing was."""
    known = {name: value for name, value in values.items() if value is not None}
    kept = [value >= least if least is not None else value <= most for value in known.values()]
    return {"goal": text, "met": all(kept) if kept else None, "values": known}


def write(file: Path | None, results: Mapping[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(results, indent=1) + "\n")


def tables(results: Mapping[str, Any]) -> str:
    """Results as Markdown, below a line that names the card."""
    about, top = results["facts"], results["ceilings"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "transformers") if about[name])
    reached = f"{top['tflops']:.0f} TFLOP/s in a bf16 product, {top['gb_per_s']:.0f} GB/s in a copy"
    lines = [*([about["note"]] if "note" in about else []), f"{about['card']} ({versions}): {reached}"]
    for rows in (results[part] for part in PARTS if results.get(part)):
        columns = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
        lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_cell(row, name) for name in columns)} |" for row in rows]
    lines += ["", "| goal | | measured |", "|---|---|---|"]
    for entry in results["goals"]:
        verdict = (
            "no verdict" if "note" in about else {True: "met", False: "missed", None: "not measured"}[entry["met"]]
        )
        values = ", ".join(f"{name}: {value:.3g}" for name, value in entry["values"].items())
        lines.append(f"| {entry['goal']} | {verdict} | {values} |")
    return "\n".join([*lines, *(f"dropped for want of time: {what}" for what in results["dropped"])])


def _cell(row: Mapping[str, Any], column: str) -> str:
    text = "" if row.get(column) is None else format(row[column], COLUMNS[column])
    return f"{text}: {row['failure']}".replace("|", "/") if column == "backend" and "failure" in row else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="what fused_kernels.py and train_step.py wrote")
    print("\n\n".join(tables(json.loads(file.read_text())) for file in parser.parse_args().files))


if __name__ == "__main__":
    main()
