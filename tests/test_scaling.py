"""Costs: the paper's parameter counts, and counts against the model itself."""

from math import prod
from pathlib import Path

import pytest

from tests.tiny import CASES, make_seed
from upcycle.checkpoint import read_json, read_tensors
from upcycle.dense_config import read_dense
from upcycle.errors import RecipeError
from upcycle.layout import make_layout
from upcycle.recipe_file import load_recipe
from upcycle.scaling import config_cost, layout_cost

PAPER = Path(__file__).parent / "data" / "paper_small.json"


@pytest.mark.parametrize(
    ("recipe", "total", "active"),
    [
        ("bam", 776_002_560, 662_756_352),
        ("bam-kv-shared", 738_253_824, 625_007_616),
        ("btx-top1", 700_480_512, 587_234_304),
    ],
)
def test_the_papers_small_model_has_the_right_number_of_parameters(recipe, total, active):
    estimate = config_cost(load_recipe(recipe), PAPER, 4, None, 5 * 10**9, 2048)
    assert (estimate.cost.total_parameters, estimate.cost.active_parameters) == (total, active)
    assert estimate.dense.total_parameters == 587_209_728


def test_flops_are_those_of_the_papers_table():
    """Forward FLOPs of BAM.md's formula per layer, plus the output head."""
    n, k, d, c, layers, vocab = 4, 1, 1024, 2048, 6, 256_000
    inner = 4096  # gate and up counted together
    layer = 2 * n * d + 6 * n * d * d + 4 * n * c * d + 2 * n * d * d + 2 * n * d + 3 * k * d * inner
    cost = config_cost(load_recipe("bam"), PAPER, 4, None, 5 * 10**9, c).cost
    assert cost.flops_per_token == layers * layer + 2 * d * vocab
    assert cost.training_flops_per_token == 3 * cost.flops_per_token


def test_cache_grows_with_key_value_experts_alone():
    def cache(recipe):
        return config_cost(load_recipe(recipe), PAPER, 4, None, 10**10, 1).cost.cache_bytes_per_token

    assert cache("btx") == cache("bam-kv-shared") == 2 * 2 * 6 * 1024
    assert cache("bam") == 4 * cache("btx")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_counts_are_those_of_the_file(case, tmp_path):
    tensors = read_tensors(make_seed(case, tmp_path / "seed", 0))
    model = read_dense(read_json(tmp_path / "seed" / "config.json"), "x")
    layout = make_layout(model, load_recipe("average"), 1)
    assert dict(layout.dense) == {name: info.shape for name, info in tensors.items()}
    cost = layout_cost(layout, load_recipe("average"), 0, 1)
    assert cost.total_parameters == sum(prod(info.shape) for info in tensors.values())


def test_a_config_alone_needs_a_number_of_experts():
    with pytest.raises(RecipeError, match="--num-experts"):
        config_cost(load_recipe("bam"), PAPER, None, None, 10**10, 1)
    with pytest.raises(RecipeError, match="top_k"):
        config_cost(load_recipe("bam", ["router.ffn.top_k=5"]), PAPER, 4, None, 10**10, 1)
