"""Several processes merge to one output, again and again: `python -m tests.fuzz.at_once FOLDER SECONDS`.

Each merge must succeed or be refused in words, and what stands at the output must be one of the results, whole. It
prints what it saw as one JSON object.
"""

import json
import os
import shutil
import sys
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.fuzz.kills import CASES, digests, make_plan
from upcycle.errors import OutputError
from upcycle.merge import merge
from upcycle.plan import MergePlan

PROCESSES = 3


def work(plan: MergePlan, out: Path, until: float) -> Counter[str]:
    counts = Counter[str]()
    while time.monotonic() < until:
        try:
            merge(plan, out, overwrite=True)
            counts["merged"] += 1
        except OutputError:
            counts["refused"] += 1
        except Exception:
            counts["tracebacks"] += 1
            last = traceback.format_exc()
    if counts["tracebacks"]:
        print(last, file=sys.stderr)
    return counts


def watch(folder: Path, out: Path, until: float, results: list[dict[str, str]]) -> Counter[str]:
    """Look at the output all the time; what is swapped while it is looked at counts for nothing."""
    counts = Counter[str]()
    while time.monotonic() < until:
        try:
            before = os.stat(out).st_ino
            found = digests(out)
            if os.stat(out).st_ino != before:
                continue
        except OSError:
            continue
        counts["seen"] += 1
        if found not in results:
            counts["not whole"] += 1
            with suppress(OSError):  # it may be replaced meanwhile
                shutil.copytree(out, folder / "not-whole", dirs_exist_ok=True)
    return counts


def main(folder: Path, seconds: float) -> None:
    plans = [make_plan(CASES[0], folder, random_seed=number) for number in range(PROCESSES)]
    results = []
    for number, plan in enumerate(plans):
        merge(plan, folder / f"expected-{number}")
        results.append(dict(digests(folder / f"expected-{number}")))
    out, until = folder / "place" / "out", time.monotonic() + seconds
    children = []
    for plan in plans:
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            os.write(send, json.dumps(work(plan, out, until)).encode())
            os._exit(0)
        os.close(send)
        children.append((child, receive))
    counts = watch(folder, out, until, results)
    for child, receive in children:
        counts.update(json.loads(os.read(receive, 10_000)))
        os.waitpid(child, 0)
    counts["whole at the end"] = digests(out) in results
    counts["left beside it"] = len(list(out.parent.iterdir())) - 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
