"""Whole training steps, and the latency of generation, of the paper's two models on one CUDA card; about four minutes.

    python benchmarks/train_step.py --out train_step.json
    python benchmarks/train_step.py --smoke              # tiny, on a CPU: shows that the script runs

A step is what `upcycle train` does: forward and loss in bf16 autocast over fp32 weights, backward, clipping, AdamW
(fused). Four experts of random weights; 4 sequences of 2048 tokens; the median of some steps. FLOPs are those that the
model needs (causal attention counted half), so recomputation or padding would not count. The large model has as many of
its 18 layers as fit the card. "auto" is whichever backend `upcycle.backends` measures to be fastest; side by side,
compile and Liger are added to that one.

Generation: 16 tokens, greedily, after a prompt of 256, one sequence, bf16, with a cache; the three models in turns.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import card
import torch
from accelerate import Accelerator

from upcycle.acceleration import speed_up
from upcycle.backends import Backend, choose_backend, use_backend
from upcycle.companions import bam_config
from upcycle.dense_config import read_dense
from upcycle.layout import Layout, make_layout
from upcycle.losses import forward_losses
from upcycle.memory import training_memory
from upcycle.modeling.configuration_bam import BamConfig
from upcycle.modeling.modeling_bam import BamForCausalLM
from upcycle.optimization import make_optimizer
from upcycle.recipe import Recipe
from upcycle.recipe_file import load_recipe
from upcycle.scaling import layout_cost

SECONDS = 260.0
EXPERTS = 4
FILLED = 0.8  # of the card's memory, by `upcycle.memory`, the rest for what it does not count
RECIPES = ("btx-top1", "bam", "bam-kv-shared")
PAPER, AIMS = {"bam": 1.28, "bam-kv-shared": 1.24}, {"bam": 1.10, "bam-kv-shared": 1.05}  # latency over BTX's
SMALL = json.loads((card.ROOT / "tests" / "data" / "paper_small.json").read_text())
SIZES = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 18}
LARGE = SMALL | SIZES | {"num_attention_heads": 18, "num_key_value_heads": 6, "tie_word_embeddings": True}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# A forward's sequences and their length; steps to warm up and to measure; a prompt's length and new tokens.
FULL = SimpleNamespace(sequences=4, length=2048, warm_up=3, steps=8, prompt=256, new=16)
SMOKE = SimpleNamespace(sequences=2, length=32, warm_up=1, steps=2, prompt=8, new=4)


@dataclass(frozen=True)
class Variant:
    """One training: its model, and what makes its steps faster."""

    model: str
    recipe: str
    backend: str
    side_by_side: bool = False
    compile: bool = False
    liger: bool = False
    seconds: float = 10.0  # about what it takes in all

    @property
    def name(self) -> str:
        switches = [key.replace("_", " ") for key in ("side_by_side", "compile", "liger") if getattr(self, key)]
        return " + ".join([self.backend, *switches])


def read_recipe(name: str) -> Recipe:
    return load_recipe(str(card.ROOT / "recipes" / f"{name}.toml"))


def layout_of(config: Mapping[str, Any], recipe: Recipe) -> Layout:
    return make_layout(read_dense(dict(config), "the benchmark"), recipe, EXPERTS)


def build(config: Mapping[str, Any], recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Any:
    """A mixture of random weights, made on the device."""
    mixture = bam_config(config, layout_of(config, recipe), recipe, list("abcd"), "F32")
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return BamForCausalLM(BamConfig(**mixture)).to(device)
    finally:
        torch.set_default_dtype(torch.float32)


def fitting(config: Mapping[str, Any], shape: Any, memory: float) -> dict[str, Any]:
    """The config with as many layers as BAM, the largest of the three, can have in so many bytes."""
    recipe = read_recipe("bam")
    for layers in range(config["num_hidden_layers"], 0, -1):
        smaller = dict(config) | {"num_hidden_layers": layers}
        sizes = {"sequences": shape.sequences, "sequence_length": shape.length, "precision": "bf16"}
        if training_memory(layout_of(smaller, recipe), recipe, EXPERTS, **sizes).total <= FILLED * memory:
            return smaller
    raise ValueError("not one layer fits")


def train(variant: Variant, config: Mapping[str, Any], shape: Any, device: torch.device) -> dict[str, Any]:
    """Some steps of one variant: milliseconds of each, tokens and FLOPs a second, peak memory."""
    torch._dynamo.reset()
    recipe = read_recipe(variant.recipe)
    model = build(config, recipe, device, torch.float32).train()
    settings: Any = SimpleNamespace(precision="bf16", micro_batch_size=shape.sequences, sequence_length=shape.length)
    settings.liger, settings.side_by_side, settings.compile = variant.liger, variant.side_by_side, variant.compile
    top_k: int = recipe.ffn_router.top_k
    facts: Any = SimpleNamespace(top_k=top_k)
    fast = speed_up(model, settings, facts, Accelerator(cpu=device.type == "cpu"), variant.backend)
    optimizer = make_optimizer(model, "adamw", 1e-4, 0.1)
    parameters = list(model.parameters())

    def wrapped(**inputs: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return model(**inputs)

    def step(tokens: torch.Tensor) -> float:
        nll, routers = forward_losses(wrapped, tokens, None, top_k, fast.loss_head)
        loss = nll / tokens[:, 1:].numel()
        if routers is not None:
            loss = loss + routers.total(recipe.loss.load_balance, recipe.loss.z)
        loss.backward()
        float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))  # the training looks at it before it goes on
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(nll.detach()) / tokens[:, 1:].numel()

    times, losses = [], []
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.manual_seed(1)
    for number in range(shape.warm_up + shape.steps):
        tokens = torch.randint(config["vocab_size"], (shape.sequences, shape.length + 1), device=device)
        if number == shape.warm_up and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait()
        began = time.perf_counter()
        losses.append(step(tokens))
        wait()
        times.append(1000 * (time.perf_counter() - began))
    if not all(math.isfinite(value) for value in losses):
        raise ValueError(f"wrong: the losses are {losses}")
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    backend = fast.backend or Backend("none", "no experts")
    return {
        "ms": statistics.median(times[shape.warm_up :]),
        "first_ms": times[0],
        "peak_mib": peak,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "chosen": backend.name,
        "experts_ms": {name: 1000 * value for name, value in backend.seconds.items()},
        "told": list(fast.told),
        "first_loss": losses[0],
    }


def rated(row: dict[str, Any], config: Mapping[str, Any], shape: Any, results: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its rates: FLOPs are 6 a multiplying weight that a token uses, and causal attention's."""
    recipe, nominal = read_recipe(row["recipe"]), results["facts"]["nominal_tflops"]
    cost = layout_cost(layout_of(config, recipe), recipe, EXPERTS, 0, shape.length // 2)
    row["tokens_per_s"] = 1000 * shape.sequences * shape.length / row["ms"]
    row["tflops"] = row["tokens_per_s"] * cost.training_flops_per_token / 1e12
    row["of_ceiling"] = row["tflops"] / results["ceilings"]["tflops"]
    row["of_nominal"] = row["tflops"] / nominal if nominal else None
    return row


def variants() -> list[Variant]:
    """In the order of their weight; "auto" comes first, since what is added to it is added to what it chose."""
    first = []
    for model in ("small", "large"):
        first.append(Variant(model, "bam", "auto", seconds=30.0))
        first += [Variant(model, "bam", name) for name in ("fused", "grouped_mm", "eager")]
        first += [Variant(model, name, "auto") for name in ("bam-kv-shared", "btx-top1")]
    added: list[dict[str, Any]] = [{"side_by_side": True}, {"liger": True}, {"compile": True, "seconds": 50.0}]
    return [*first, *(Variant(model, "bam", "auto", **more) for more in added for model in ("small", "large"))]


def generations(clock: card.Clock, model: str, config: Mapping[str, Any], plan: Any, shape: Any) -> list[Any]:
    """Latencies of the three models by each backend, and their ratios to BTX's."""
    prompt = torch.randint(3, config["vocab_size"], (1, shape.prompt), device=clock.device)
    mixtures: dict[str, Any] = {}
    for name in RECIPES:
        mixtures[name] = build(config, read_recipe(name), clock.device, torch.bfloat16).eval()
        mixtures[name].generation_config.eos_token_id = None  # so that all 16 tokens are made

    def generate(name: str, backend: str) -> None:
        given = {"max_new_tokens": shape.new, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        made = mixtures[name].generate(prompt, attention_mask=torch.ones_like(prompt), **given)
        assert made.shape[1] == shape.prompt + shape.new, f"{backend}: {made.shape}"

    rows = []
    for backend in ("grouped_mm", "fused", "eager"):
        for mixture in mixtures.values():
            _, failure = card.attempt(partial(switch, mixture, backend, shape.prompt), plan.limit)
            if failure:
                break
        calls = {} if failure else {name: partial(generate, name, backend) for name in mixtures}
        found = card.rounds(clock, calls, plan)
        for name in RECIPES:
            row = {"model": model, "recipe": name, "backend": backend, "paper": PAPER.get(name), "aim": AIMS.get(name)}
            row |= found.get(name, {"failure": failure})
            base = found.get("btx-top1", {})
            if "ms" in row and "ms" in base:
                pairs = zip(row["rounds"], base["rounds"], strict=True)
                row["over_btx"] = statistics.median(own / other for own, other in pairs)
            rows.append(row)
    return rows


def switch(mixture: Any, name: str, tokens: int) -> None:
    """Let a backend compute a model's experts."""
    backend = choose_backend(mixture, name, tokens, 1, torch.bfloat16, False)
    assert backend is not None
    use_backend(mixture, backend)


def goals(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of steps the best variant of each model counts, of generation the fastest backend of each."""
    best: dict[str, float] = {}
    for row in results["steps"]:
        if row.get("of_nominal"):
            name = f"{row['model']}, {row['recipe']}"
            best[name] = max(best.get(name, 0.0), row["of_nominal"])
    found = [card.goal("the whole step ≥ 40 % of nominal", best, least=0.4)]
    for name, aim in AIMS.items():
        ratios = {}
        for model in dict.fromkeys(row["model"] for row in results["generation"]):
            rows = [row for row in results["generation"] if row["model"] == model and "ms" in row]
            own, base = ([row["ms"] for row in rows if row["recipe"] == recipe] for recipe in (name, "btx-top1"))
            if own and base:
                ratios[model] = min(own) / min(base)
        found.append(card.goal(f"latency of {name} ≤ {aim} × BTX's (the paper: {PAPER[name]})", ratios, most=aim))
    return found


def main() -> None:
    options, device = card.options(__doc__, SECONDS)
    shape = SMOKE if options.smoke else FULL
    clock, budget = card.Clock(device), card.Budget(options.seconds)
    results: dict[str, Any] = {"facts": card.facts(device), "ceilings": card.ceilings(clock)}
    results |= {"steps": [], "generation": [], "goals": [], "dropped": budget.dropped}
    models = {"small": SMALL | TINY, "large": LARGE | TINY} if options.smoke else {"small": SMALL, "large": LARGE}
    cut = dict(models)
    if not options.smoke:
        cut["large"] = fitting(LARGE, shape, torch.cuda.get_device_properties(device).total_memory)
    chosen: dict[str, str] = {}

    def train_one(variant: Variant) -> None:
        if variant.name != "auto" and variant.backend == "auto":
            variant = replace(variant, backend=chosen.get(variant.model, "auto"))
        what = {"model": variant.model, "recipe": variant.recipe, "backend": variant.name}
        if budget.allows(f"training {' '.join(what.values())}", variant.seconds):
            print(f"{budget.left():.0f} s left: training {' '.join(what.values())}", flush=True)
            config = cut[variant.model]
            row, failure = card.attempt(partial(train, variant, config, shape, device), min(budget.left(), 75.0))
            row = what | {"layers": config["num_hidden_layers"]} | (row or {"failure": failure})
            if not failure:
                chosen.setdefault(variant.model, row["chosen"])
                row["backend"] += f" ({row['chosen']})" if variant.backend == "auto" else ""
                rated(row, config, shape, results)
            elif "OutOfMemory" in failure and config["num_hidden_layers"] > 4:  # the next may fit
                cut[variant.model] = dict(config) | {"num_hidden_layers": config["num_hidden_layers"] - 2}
            results["steps"].append(row)
            keep()

    def generate(model: str) -> None:
        plan = SimpleNamespace(rounds=2 if options.smoke else 5, repeat=1, limit=20.0)
        if budget.allows(f"generation {model}", 25):
            print(f"{budget.left():.0f} s left: generation {model}", flush=True)
            part = partial(generations, clock, model, models[model], plan, shape)
            rows, failure = card.attempt(part, min(budget.left(), 60.0))
            results["generation"] += rows or [{"model": model, "backend": "all", "failure": failure}]
            keep()

    def keep() -> None:
        results["goals"] = goals(results)
        card.write(options.out, results)
        card.release()

    plain = [variant for variant in variants() if variant.name in ("auto", variant.backend)]
    for variant in plain:
        train_one(variant)
    for model in models:
        generate(model)
    for variant in variants()[len(plain) :]:
        train_one(variant)
    card.write(options.out, results)
    print(card.tables(results))


if __name__ == "__main__":
    main()
