"""One pass, layer by layer: each router is given what a whole forward gives it; nothing is left behind."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.conftest import merge_and_load
from tests.tiny import BY_NAME, CASES, VOCAB, make_seeds, mixtral_config
from upcycle.errors import CheckpointError
from upcycle.layerwise import find_routers, set_layer_by_layer

GRID = [
    pytest.param(case, recipe, id=f"{case.name}-{recipe}")
    for case in CASES
    for recipe in ("bam", "bam-kv-shared", "btx")
    if case.grouped or recipe != "bam-kv-shared"
]


def tokens(windows: int, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (windows, length), generator=torch.Generator().manual_seed(1))


def set_at_random(model: Any, windows: torch.Tensor, batch: int) -> list[tuple[Any, torch.Tensor]]:
    """Set every router to random weights; each with the inputs it was given."""
    given = []

    def set_router(router: Any, inputs: torch.Tensor) -> None:
        torch.manual_seed(len(given))
        router.module.weight.copy_(torch.randn_like(router.module.weight))
        given.append((router, inputs))

    set_layer_by_layer(model, windows, set_router, batch=batch)
    return given


def check(model: Any, windows: torch.Tensor) -> None:
    given = set_at_random(model, windows, batch=2)
    seen: dict[Any, torch.Tensor] = {}
    for router, _ in given:
        router.module.register_forward_pre_hook(
            lambda module, args: seen.update({module: args[0].reshape(-1, args[0].shape[-1])})
        )
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for router, inputs in given:
        torch.testing.assert_close(inputs, seen[router.module], atol=1e-5, rtol=1e-5, msg=router.where)


@pytest.mark.parametrize(("case", "recipe"), GRID)
def test_each_router_is_given_its_own_true_input(case: Any, recipe: str, tmp_path: Path) -> None:
    model = merge_and_load(make_seeds(case, tmp_path / "seeds"), tmp_path / "out", recipe).eval()
    kinds = ["ffn"] if recipe == "btx" else ["attention", "ffn"]
    assert [(router.layer, router.kind) for router in find_routers(model)] == [(n, k) for n in (0, 1) for k in kinds]
    check(model, tokens(5))  # the last batch is a smaller one


def native_models() -> list[Any]:
    torch.manual_seed(0)
    sizes = {key: getattr(mixtral_config(), key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    qwen = Qwen3MoeConfig(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    return [MixtralForCausalLM(mixtral_config()), Qwen3MoeForCausalLM(qwen)]


@pytest.mark.parametrize("number", [0, 1])
def test_so_is_each_router_of_transformers_own_mixtures(number: int) -> None:
    check(native_models()[number].eval(), tokens(3))


@pytest.mark.parametrize("name", ["llama", "cohere2", "gemma2"])
def test_every_layer_is_computed_once_and_nothing_is_left_behind(name: str, tmp_path: Path) -> None:
    model = merge_and_load(make_seeds(BY_NAME[name], tmp_path / "seeds"), tmp_path / "out", "bam").eval()
    calls: Counter[str] = Counter()
    handles = []
    for layer in model.dense.model.layers:
        for part in (layer.self_attn.o_proj.linear, layer.mlp.experts):
            key = type(part).__name__
            handles.append(part.register_forward_hook(lambda *_, key=key: calls.update([key])))
    windows = tokens(6)
    set_at_random(model, windows, batch=2)
    # Three batches through two layers, and one forward of two tokens that shows how layers answer.
    assert calls == {"Linear": 3 * 2 + 2, "BamExperts": 3 * 2 + 2}
    for handle in handles:
        handle.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(windows).logits, fresh(windows).logits)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    (seed,) = make_seeds(BY_NAME["llama"], tmp_path, count=1)
    with pytest.raises(CheckpointError, match="no experts"):
        find_routers(AutoModelForCausalLM.from_pretrained(seed))


def test_a_router_with_a_bias_is_refused() -> None:
    model = native_models()[0]
    gate = model.model.layers[1].mlp.gate
    gate.bias = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"layer 1 .* without a bias"):
        find_routers(model)
