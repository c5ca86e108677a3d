"""`upcycle train` against transformers' own Trainer: the same Mixtral, tokens, batch and optimizer, in turns.

    python benchmarks/training_speed.py [--rounds 3] [--steps 10]

Prints the median seconds a step of each, and the ratio within each round: whole steps, from batch to updated weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

VOCAB, LENGTH, BATCH = 4096, 256, 8
SIZES = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}

MODEL = f"""
import sys, torch
from transformers import MixtralConfig, MixtralForCausalLM
torch.manual_seed(0)
config = MixtralConfig(vocab_size={VOCAB}, num_key_value_heads=2, num_local_experts=4, **{SIZES})
MixtralForCausalLM(config).save_pretrained(sys.argv[1])
"""

TRAINER = f"""
import json, sys, time
import numpy as np, torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model.config.output_router_logits = True
model.config.use_cache = False
tokens = torch.from_numpy(np.load(sys.argv[2]).astype(np.int64)).view(-1, {LENGTH})
rows = [{{"input_ids": row, "labels": row}} for row in tokens]
seconds = []
class Clock(TrainerCallback):
    def on_step_end(self, *_, **__):
        now = time.perf_counter()
        seconds.append(now - self.began)
        self.began = now
    def on_train_begin(self, *_, **__):
        self.began = time.perf_counter()
arguments = TrainingArguments(
    output_dir=sys.argv[1] + "-trainer", per_device_train_batch_size={BATCH}, max_steps=int(sys.argv[3]),
    learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=1, weight_decay=0.1, optim="adamw_torch_fused",
    adam_beta2=0.95, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
)
Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
print("SECONDS " + json.dumps(seconds))
"""


def run(*command: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def trainer(model: Path, tokens: Path, steps: int) -> list[float]:
    line = next(line for line in run("-c", TRAINER, model, tokens, steps).splitlines() if line.startswith("SECONDS"))
    return [float(value) for value in json.loads(line.removeprefix("SECONDS "))]


def ours(model: Path, tokens: Path, steps: int, out: Path) -> list[float]:
    run(
        *("-m", "upcycle", "train", model, "--data", f"text={tokens}", "--out", out, "--steps", steps, "--yes"),
        *("--batch-size", BATCH, "--sequence-length", LENGTH, "--learning-rate", 1e-3, "--save-every", 10**6),
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines if "nll" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, tokens = Path(folder, "mixtral"), Path(folder, "tokens.npy")
        run("-c", MODEL, model)
        random = np.random.default_rng(0)
        np.save(tokens, random.integers(VOCAB, size=options.steps * BATCH * LENGTH * 2).astype(np.uint16))
        ratios, ours_all, trainer_all = [], [], []
        for number in range(options.rounds):
            sides = [
                lambda: trainer_all.append(statistics.median(trainer(model, tokens, options.steps)[2:])),
                lambda: ours_all.append(statistics.median(ours(model, tokens, options.steps, Path(folder, "out"))[2:])),
            ]
            for side in sides if number % 2 else reversed(sides):
                side()
            ratios.append(ours_all[-1] / trainer_all[-1])
            print(f"round {number + 1}: upcycle {ours_all[-1]:.3f} s, Trainer {trainer_all[-1]:.3f} s a step")
    rate = BATCH * LENGTH / statistics.median(ours_all)
    print(f"upcycle / Trainer, median of the rounds: {statistics.median(ratios):.3f}; {rate:,.0f} tokens/s")


if __name__ == "__main__":
    main()
