"""The memory that a training takes, predicted and measured: two real steps on the CPU, one process a shape.

Run by hand (Linux):

    python benchmarks/training_memory.py
    python benchmarks/training_memory.py deep --json

Measured is the process's highest resident memory during two steps, less what it held before the model was built: by
then everything is imported and a tiny mixture has taken a step, so that what torch itself takes is not counted.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EXPERTS = 4
STEPS = 2
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, the recipe that mixes four of it, and one forward of the training."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocab: int
    recipe: str
    sequences: int
    sequence_length: int

    def config(self) -> dict[str, Any]:
        """The config.json of one such Llama."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
        }


TINY = Shape(32, 64, 1, 4, 2, 64, "bam", 1, 16)
SHAPES: Mapping[str, Shape] = {
    "wide": Shape(768, 2048, 2, 12, 4, 1000, "bam", sequences=2, sequence_length=192),
    "deep": Shape(256, 704, 12, 8, 2, 1000, "bam-kv-shared", sequences=2, sequence_length=256),
    "large-vocabulary": Shape(256, 512, 2, 4, 2, 32_000, "btx", sequences=2, sequence_length=448),
}


def resident(key: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since `CLEAR` was written."""
    found = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def train(shape: Shape, steps: int) -> None:
    """Build a random mixture and train it as `upcycle train` does."""
    import torch

    from upcycle.companions import bam_config
    from upcycle.dense_config import read_dense
    from upcycle.layout import make_layout
    from upcycle.losses import forward_losses
    from upcycle.modeling.configuration_bam import BamConfig
    from upcycle.modeling.modeling_bam import BamForCausalLM
    from upcycle.optimization import make_optimizer
    from upcycle.recipe_file import load_recipe

    recipe = load_recipe(shape.recipe)
    layout = make_layout(read_dense(shape.config(), "the benchmark"), recipe, EXPERTS)
    model = BamForCausalLM(BamConfig(**bam_config(shape.config(), layout, recipe, list("abcd"), "F32"))).train()
    optimizer = make_optimizer(model, "adamw", 1e-4, 0.1)
    for _ in range(steps):
        tokens = torch.randint(shape.vocab, (shape.sequences, shape.sequence_length + 1))
        nll, routers = forward_losses(model, tokens, None, recipe.ffn_router.top_k)
        assert routers is not None
        loss = nll / tokens[:, 1:].numel() + routers.total(recipe.loss.load_balance, recipe.loss.z)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def measure(shape: Shape) -> int:
    """Bytes that two steps of this process take at most."""
    train(TINY, 1)
    gc.collect()
    before = resident("VmRSS")
    CLEAR.write_text("5")
    train(shape, STEPS)
    return resident("VmHWM") - before


def predict(shape: Shape) -> int:
    """Bytes that `upcycle plan` says."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        config.write_text(json.dumps(shape.config()))
        model = ("--config", config, "--num-experts", EXPERTS, "--recipe", shape.recipe)
        step = ("--batch-size", shape.sequences, "--sequence-length", shape.sequence_length, "--precision", "fp32")
        command = [sys.executable, "-m", "upcycle", "plan", *model, "--gpus", 1, *step, "--json"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout)["training"]["ddp"]["total_bytes"])


def compare(name: str) -> dict[str, Any]:
    """Predicted and measured bytes of a shape, measured in a process of its own."""
    # Large blocks are mapped and so given back when they are freed; else the heap's history would count.
    heap = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, name, "--measure"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **heap})
    predicted, measured = predict(SHAPES[name]), int(done.stdout)
    return {
        "name": name,
        **asdict(SHAPES[name]),
        "predicted": predicted,
        "measured": measured,
        "ratio": round(predicted / measured, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.shapes or list(SHAPES)
    if unknown := set(names) - set(SHAPES):
        parser.error(f"no shape {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    if arguments.measure:
        print(measure(SHAPES[names[0]]))
        return
    results = [compare(name) for name in names]
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{'shape':<18}{'predicted':>12}{'measured':>12}{'ratio':>8}")
    for result in results:
        predicted, measured = result["predicted"] / 1e6, result["measured"] / 1e6
        print(f"{result['name']:<18}{predicted:>9.0f} MB{measured:>9.0f} MB{result['ratio']:>8.3f}")


if __name__ == "__main__":
    main()
