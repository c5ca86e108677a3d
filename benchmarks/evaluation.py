"""What `upcycle eval` costs beside a bare transformers forward over the same windows, in one process, in turns.

    python benchmarks/evaluation.py MODEL [MODEL …] --data DOMAIN.npy [--windows 100] [--rounds 5]

The bare forward has its model loaded already, takes the same number of windows at once, and computes logits alone; the
evaluation also reads the data, loads the model, takes the loss, draws intervals and (for a mixture) counts what the
routers do. Ratios are taken within a round; imports are left out.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from upcycle.comparison import evaluate_models
from upcycle.evaluation_inputs import EvaluationOptions
from upcycle.heldout import evenly_spaced
from upcycle.measurement import BATCH_TOKENS
from upcycle.weights import load_model


@torch.no_grad()
def bare(model: torch.nn.Module, windows: torch.Tensor) -> float:
    began = time.perf_counter()
    for batch in windows.split(BATCH_TOKENS["cpu"] // windows.shape[1]):
        model(input_ids=batch, use_cache=False)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = np.load(options.data)
    windows = torch.from_numpy(rows[evenly_spaced(len(rows), options.windows)].astype(np.int64))
    results = {}
    for path in options.models:
        model = load_model(Path(path)).eval()
        evaluation = EvaluationOptions([path], {"text": str(options.data)}, windows=options.windows, device="cpu")
        bare(model, windows[:8])
        pairs = []
        for _ in range(options.rounds):
            alone = bare(model, windows)
            began = time.perf_counter()
            evaluate_models(evaluation)
            pairs.append((alone, time.perf_counter() - began))
        results[path] = {
            "bare_seconds": round(statistics.median(one for one, _ in pairs), 3),
            "eval_seconds": round(statistics.median(other for _, other in pairs), 3),
            "ratio": round(statistics.median(other / one for one, other in pairs), 3),
        }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
