"""Memory of training: against what autograd really keeps, against a process's real peak, and its arithmetic."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import run_cli
from tests.tiny import BY_NAME, CASES, dense_config
from upcycle.backends import Backend, use_backend
from upcycle.companions import bam_config
from upcycle.dense_config import read_dense
from upcycle.layout import Layout, make_layout
from upcycle.memory import Counter, held, training_memory
from upcycle.modeling.configuration_bam import BamConfig
from upcycle.modeling.modeling_bam import BamForCausalLM
from upcycle.native import NATIVE
from upcycle.recipe_file import load_recipe
from upcycle.scaling import config_training

ROOT = Path(__file__).parents[1]
LLAMA = Path(__file__).parent / "data" / "llama_7b.json"
EXPERTS, SEQUENCES, LENGTH, VOCAB = 3, 2, 32, 512


@pytest.mark.parametrize("shape", ["wide", "deep", "large-vocabulary"])
def test_the_peak_of_two_real_steps_is_as_predicted(shape):
    command = [sys.executable, str(ROOT / "benchmarks" / "training_memory.py"), shape, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    [result] = json.loads(done.stdout)
    assert result["measured"] > 400e6  # so that what torch itself takes does not matter
    assert 0.85 < result["ratio"] < 1.15


def kept_by_autograd(model, autocast: bool) -> int:
    """Bytes of all storages that autograd keeps of a forward and its NLL, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}  # the tensors are held, so that no address is taken twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(VOCAB, (SEQUENCES, LENGTH))
    switches = {"output_router_logits": True} if isinstance(model, BamForCausalLM) else {}
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids, use_cache=False, **switches).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    return sum(size for size, _ in kept.values())


def make_model(case, recipe, layers: int, window: int):
    """A random model of a case, large enough that what is kept is mostly activations, and its layout."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": layers, "vocab_size": VOCAB}
    if case.config.get("head_dim"):
        sizes["head_dim"] = 40
    if case.config.get("sliding_window"):
        sizes["sliding_window"] = window
    if "layer_types" in case.config:
        sizes["layer_types"] = ["full_attention"] + ["sliding_attention"] * (layers - 1)
    config = dense_config(replace(case, config={**case.config, **sizes}))
    layout = make_layout(read_dense(config.to_dict(), case.name), recipe, EXPERTS)
    if not recipe.ffn_experts:
        return AutoModelForCausalLM.from_config(config).train(), layout
    mixture = bam_config(config.to_dict(), layout, recipe, list("abc"), "F32")
    return BamForCausalLM(BamConfig(**mixture)).train(), layout


WINDOWED = [case for case in CASES if case.config.get("sliding_window")]
COUNTED = [
    *((case, 64, *rest) for case in CASES for rest in (("bam", "fp32", "all"), ("bam", "autocast", "all"))),
    *((case, 64, *rest) for case in CASES for rest in (("btx", "fp32", "routers"), ("average", "bf16", "all"))),
    *((case, 16, "bam", "fp32", "experts") for case in WINDOWED),
]


@pytest.mark.parametrize(
    ("case", "window", "recipe", "precision", "trained"),
    COUNTED,
    ids=["-".join((case.name, str(window), *rest)) for case, window, *rest in COUNTED],
)
def test_autograd_keeps_of_a_layer_what_is_counted(case, window, recipe, precision, trained):
    torch.manual_seed(0)
    recipe = load_recipe(recipe)
    width, wide = {"fp32": (4, 4), "autocast": (2, 4), "bf16": (2, 2)}[precision]
    kept, counted = [], []
    for layers in (2, 3):
        model, layout = make_model(case, recipe, layers, window)
        counter = Counter(layout, recipe, LENGTH, width, wide, trained, 0, 1)
        chosen = {tensor.name for tensor in layout.mixture if counter.trained(tensor)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.replace("lm_head", layout.model.family.head) in chosen)
        model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        if precision == "autocast":
            use_backend(model, Backend("grouped_mm", ""))
        kept.append(kept_by_autograd(model, precision == "autocast"))
        counted.append(sum(stage.saved for stage in counter.stages(SEQUENCES * LENGTH, False)))
    # One layer more, so that neither the loss nor what lies before the first trained weight matters.
    assert counted[1] - counted[0] == pytest.approx(kept[1] - kept[0], rel=0.05)
    if trained == "all":
        assert counted[1] == pytest.approx(kept[1], rel=0.05)


@pytest.fixture(scope="module")
def layout() -> Layout:
    return make_layout(read_dense(json.loads(LLAMA.read_text()), "llama"), load_recipe("bam"), 8)


def memory(layout, **options):
    return training_memory(
        layout,
        load_recipe("bam"),
        **{"sequences": 1, "sequence_length": 2048, "precision": "fp32", **options},
    )


def test_weights_gradients_and_moments_are_those_of_what_is_trained(layout):
    total = sum(tensor.size for tensor in layout.mixture)
    routers = 2 * 32 * 8 * 4096
    whole, part = memory(layout), memory(layout, trained="routers")
    assert (whole.weights, whole.gradients, whole.optimizer) == (4 * total, 4 * total, 8 * total)
    assert (part.weights, part.gradients, part.optimizer) == (4 * total, 4 * routers, 8 * routers)
    outside = 2 * 32_000 * 4096 + 4096 + 32 * 2 * 4096  # embeddings and norms
    assert memory(layout, trained="experts").gradients == 4 * (total - outside)
    assert memory(layout, optimizer="adamw-8bit").optimizer == 2 * total + 2 * total * 4 // 256
    assert memory(layout, optimizer="adamw-offload").optimizer == 0


def test_adapters_are_two_thin_matrices_for_each_matrix(layout):
    attention = 4 * (8 + 1) * 4096  # rows and columns of three projections into eight experts, and one out of them
    ffn = 8 * ((2 * 11_008 + 4096) + (4096 + 11_008))
    trained = 16 * 32 * (attention + ffn) + 2 * 32 * 8 * 4096
    assert memory(layout, lora_rank=16).optimizer == 8 * trained
    assert memory(layout, lora_rank=16).weights == memory(layout).weights + 4 * 16 * 32 * (attention + ffn)


def test_shards_take_their_part_and_one_whole_layer(layout):
    whole, shard = memory(layout), memory(layout, shards=8)
    attention, ffn, routers, norms = 4 * 8 * 4096 * 4096, 8 * 3 * 4096 * 11_008, 2 * 8 * 4096, 2 * 4096
    layer = 4 * (attention + ffn + routers + norms)
    assert shard.weights == whole.weights // 8 + layer
    assert shard.gradients == whole.gradients // 8 + layer
    assert shard.optimizer == whole.optimizer // 8
    assert shard.activations == whole.activations
    # More devices than experts share them all the same; only the routers, eight rows each, are padded.
    assert memory(layout, shards=16).optimizer == pytest.approx(whole.optimizer / 16, rel=1e-4)


def test_stacks_are_cut_by_rows_where_that_is_even(layout):
    experts = next(tensor for tensor in layout.mixture if tensor.shape == (8, 22_016, 4096))
    assert held(experts, experts.size, 16) == experts.size // 16
    assert held(experts, experts.size, 3) == 3 * experts.size // 8  # three of the eight experts, or padding
    head = next(tensor for tensor in layout.mixture if tensor.shape == (32_000, 4096))
    assert held(head, head.size, 7) == 4572 * 4096


def test_activations_grow_with_tokens_alone_and_checkpointing_saves_most(layout):
    one, two = memory(layout), memory(layout, sequences=2)
    assert one.activations == pytest.approx(two.activations / 2)
    assert memory(layout, sequences=2).weights == one.weights
    assert memory(layout, activation_checkpointing=True).activations < 0.1 * one.activations
    assert one.total < one.weights + one.gradients + one.optimizer + one.activations
    assert one.total >= one.weights + one.gradients + one.optimizer


def test_unknown_choices_are_refused(layout):
    for options in ({"precision": "fp16"}, {"optimizer": "sgd"}, {"trained": "some"}):
        with pytest.raises(ValueError, match="unknown"):
            memory(layout, **options)


def test_bytes_sent_are_those_of_ring_gather_and_all_to_all():
    recipe = load_recipe("btx")
    training = config_training(recipe, LLAMA, 8, 8, 2, 1024)
    layout = make_layout(read_dense(json.loads(LLAMA.read_text()), "llama"), recipe, 8)
    total = sum(tensor.size for tensor in layout.mixture)
    assert training.ddp["communication_bytes"] == 2 * 4 * total * 7 // 8
    assert training.fsdp2["communication_bytes"] == (2 * 2 + 4) * total * 7 // 8
    assert training.expert_parallel["communication_bytes"] == 32 * 4 * 2 * 1024 * 2 * 4096 * 2 * 7 // 8
    assert training.ddp["gradients_bytes"] == 4 * total  # the buckets are where the gradients live
    alone = config_training(recipe, LLAMA, 8, 1, 2, 1024)
    assert alone.ddp["communication_bytes"] == alone.fsdp2["communication_bytes"] == 0
    assert alone.ddp == alone.fsdp2


def test_plan_shows_training_only_when_asked():
    asked = ("plan", "--config", LLAMA, "--num-experts", 8, "--recipe", "btx")
    plain = json.loads(run_cli(*asked, "--json").stdout)
    trained = json.loads(run_cli(*asked, "--gpus", 8, "--json").stdout)
    assert "training" not in plain
    assert trained.pop("training")["gpus"] == 8
    assert trained == plain
    table = run_cli(*asked, "--gpus", 64, "--sequence-length", 512, "--batch-size", 2).stdout
    assert "Training on 64 GPUs, each: 2 × 512 tokens" in table
    assert "Fits a card of 80 GB: FSDP2" in table


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--config", LLAMA, "--num-experts", 8, "--batch-size", 2), "--gpus"),
        (("--seeds", "a", "b", "--gpus", 8), "--config"),
    ],
)
def test_plan_refuses_options_without_effect(arguments, found):
    result = run_cli("plan", "--recipe", "btx", *arguments)
    assert result.returncode == 2
    assert found in result.stderr


def count(name: str, recipe: str, *overrides: str, format: str = "bam"):
    """The memory of training a mixture of tiny models of a case, with everything trained."""
    model = read_dense(dense_config(BY_NAME[name]).to_dict(), name)
    loaded = load_recipe(recipe, overrides)
    made = make_layout(model, loaded, EXPERTS, NATIVE[model.family.native] if format == "native" else None)
    return training_memory(made, loaded, sequences=2, sequence_length=16, precision="fp32")


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2", "granite", "cohere2"])
def test_a_native_mixture_takes_what_the_same_in_bams_format_takes(name):
    assert count(name, "btx", format="native") == count(name, "btx")


def test_layers_without_experts_take_what_dense_ones_take():
    every = count("llama", "bam")
    half = count("llama", "bam", "layers.mix=every 2")
    layout = make_layout(read_dense(dense_config(BY_NAME["llama"]).to_dict(), "x"), load_recipe("average"), 1)
    dense = training_memory(layout, load_recipe("average"), sequences=2, sequence_length=16, precision="fp32")
    for part in ("weights", "gradients", "optimizer", "activations", "total"):
        # Of two layers one is dense, so it lies in the middle but for what a peak has of one layer alone.
        middle = (getattr(every, part) + getattr(dense, part)) / 2
        assert getattr(half, part) == pytest.approx(middle, rel=0.01 if part in ("weights", "optimizer") else 0.2)
    assert count("llama", "bam", "layers.mix=0, 1") == every
