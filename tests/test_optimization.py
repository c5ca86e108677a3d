"""What is trained: experts and routers of every kind of mixture, and the same as the memory is counted for."""

from pathlib import Path

import pytest

from tests.conftest import merge_and_load
from tests.tiny import BY_NAME, make_seeds
from upcycle.memory import Counter
from upcycle.optimization import choose_trained, is_router
from upcycle.training_settings import read_facts

FLEX = ("flex", "router.ffn.init=random", "mix.default=mean", "router.ffn.bias.a=-1.0")
PARTIAL = ("bam", "experts.granularity=2", "layers.mix=every 2")
CASES = [
    ("llama", "bam", ("bam",)),
    ("llama", "bam", PARTIAL),
    ("llama", "bam", ("shared-expert",)),
    ("llama", "bam", FLEX),
    ("llama", "native", ("btx",)),
    ("llama", "native", ("btx", "experts.granularity=2")),
    ("qwen2-full", "native", ("btx", "layers.mix=every 2")),
    ("qwen2-full", "native", ("shared-expert",)),
    ("qwen3", "native", ("btx-top1",)),
    ("olmo2", "native", ("btx",)),
    ("granite", "native", ("btx",)),
    ("cohere2", "native", ("btx",)),
]


@pytest.mark.parametrize(("name", "format", "recipe"), CASES, ids=["-".join((n, f, *r)) for n, f, r in CASES])
def test_what_is_trained_is_what_memory_is_counted_for(
    name: str, format: str, recipe: tuple[str, ...], tmp_path: Path
) -> None:
    model = merge_and_load(make_seeds(BY_NAME[name], tmp_path / "seeds"), tmp_path / "mix", *recipe, format=format)
    facts = read_facts(tmp_path / "mix")
    assert facts.kind == format
    assert facts.layout is not None
    for trained in ("all", "experts", "routers"):
        choose_trained(model, trained)
        counter = Counter(facts.layout, facts.recipe, 16, 4, 4, trained, 0, 1)
        counted = sum(counter.trained(tensor) for tensor in facts.layout.mixture)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counted, trained
        model.requires_grad_(True)


def trained_names(tmp_path: Path, trained: str, name: str, *recipe: str, format: str = "bam") -> set[str]:
    model = merge_and_load(make_seeds(BY_NAME[name], tmp_path / "seeds"), tmp_path / "mix", *recipe, format=format)
    choose_trained(model, trained)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_layers_without_experts_stay(tmp_path: Path) -> None:
    names = trained_names(tmp_path, "experts", "llama", *PARTIAL)
    assert all(name.startswith("dense.model.layers.1.") for name in names)
    assert "dense.model.layers.1.self_attn.q_proj.weight" in names
    assert not any("layernorm" in name for name in names)


def test_shared_experts_are_experts_and_their_gates_no_routers(tmp_path: Path) -> None:
    names = trained_names(tmp_path / "bam", "experts", "llama", "shared-expert")
    assert "dense.model.layers.0.mlp.shared.0.down_proj.weight" in names
    assert not any("self_attn" in name for name in names)
    native = trained_names(tmp_path / "qwen", "experts", "qwen2-full", "shared-expert", format="native")
    assert {f"model.layers.0.mlp.{part}.weight" for part in ("shared_expert_gate", "shared_expert.up_proj")} < native
    routers = trained_names(tmp_path / "routers", "routers", "qwen2-full", "shared-expert", format="native")
    assert routers == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}


def test_a_routers_bias_is_the_routers(tmp_path: Path) -> None:
    names = trained_names(tmp_path, "routers", "llama", *FLEX)
    assert names == {f"dense.model.layers.{layer}.mlp.router.{part}" for layer in (0, 1) for part in ("weight", "bias")}
    assert all(map(is_router, names))
