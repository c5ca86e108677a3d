"""On a CPU: a step and a forward with `--experts-backend auto`, against the experts that transformers chooses itself.

    python benchmarks/experts_on_cpu.py [--rounds 15]

A Mixtral of transformers' own and a BAM mixture of random weights, two experts a token; each round runs both in drawn
order, and ratios are taken within a round. One thread, unless OMP_NUM_THREADS says otherwise.
"""

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from upcycle.backends import choose_backend, use_backend
from upcycle.merge import merge
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds
from upcycle.weights import load_model

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def models(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    seeds = [folder / name for name in ("base", "code", "law", "math")]
    dense = LlamaForCausalLM(LlamaConfig(**SIZES))
    for seed in seeds:
        dense.save_pretrained(seed)
    recipe = load_recipe("bam", ["router.ffn.top_k=2", "router.ffn.normalize=true"])
    merge(plan_merge(recipe, read_seeds([str(seed) for seed in seeds])), folder / "bam")
    mixtral = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    return {"mixtral": mixtral, "bam": load_model(folder / "bam")}


def seconds(model: Any, tokens: torch.Tensor, training: bool) -> float:
    began = time.perf_counter()
    with torch.set_grad_enabled(training):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        if training:
            loss.backward()
            model.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def compare(model: Any, tokens: torch.Tensor, training: bool, rounds: int) -> dict[str, float]:
    """Median seconds of transformers' own choice and of "auto", and the median of their ratios."""
    own = model.config._experts_implementation
    backend = choose_backend(model, "auto", tokens.numel(), 2, torch.float32, training)
    times: dict[str, list[float]] = {"transformers": [], "auto": []}
    for number in range(rounds + 1):
        for name in random.sample(list(times), 2):
            model.set_experts_implementation(own)
            if name == "auto":
                use_backend(model, backend)
            taken = seconds(model, tokens, training)
            if number:  # the first warms up
                times[name].append(taken)
    ratios = [auto / plain for auto, plain in zip(times["auto"], times["transformers"], strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    random.seed(0)
    cases = {"step": (True, (4, 256), 1), "forward": (False, (4, 256), 1), "token": (False, (1, 1), 20)}
    rows = []
    with TemporaryDirectory() as folder:
        for name, model in models(Path(folder)).items():
            for what, (training, shape, more) in cases.items():
                tokens = torch.randint(SIZES["vocab_size"], shape)
                found = compare(model, tokens, training, options.rounds * more)  # short ones are noisier
                rows.append({"model": name, "what": what} | found)
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'model':8} {'what':8} {'transformers':>13} {'auto':>9} {'ratio':>6}")
    for row in rows:
        plain, auto = (1000 * row[name] for name in ("transformers", "auto"))
        print(f"{row['model']:8} {row['what']:8} {plain:10.1f} ms {auto:6.1f} ms {row['ratio']:6.3f}")


if __name__ == "__main__":
    main()
