"""Cosines of experts: equal ones, opposite ones, and against a count with separate modules."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from tests.conftest import merge_and_load
from tests.tiny import BY_NAME, VOCAB, make_seed, make_seeds, mixtral_config
from upcycle.similarity import expert_similarity

WINDOWS = [torch.arange(12)[None] % VOCAB, torch.arange(7)[None] * 5 % VOCAB]


@pytest.mark.parametrize("case", ["llama", "cohere2", "starcoder2", "phi3", "gpt_neox"])
def test_identical_experts_have_cosine_one_in_everything(case: str, tmp_path: Path) -> None:
    seed = make_seed(BY_NAME[case], tmp_path / "a", 0)
    model = merge_and_load([f"{name}={seed}" for name in "xyz"], tmp_path / "out", "bam").eval()
    found = expert_similarity(model, WINDOWS)
    assert set(found) == {"ffn_weights", "ffn_outputs", "attention_weights", "attention_outputs"}
    for cosines in found.values():
        np.testing.assert_allclose(cosines, np.ones((2, 3, 3)), atol=1e-5)


def test_cosines_are_those_of_the_seeds_own_modules(tmp_path: Path) -> None:
    """With one token a window, attention is its value projection, so every expert's answer can be made apart."""
    paths = make_seeds(BY_NAME["llama"], tmp_path / "seeds", count=2)
    model = merge_and_load(paths, tmp_path / "out", "bam").eval()
    seeds = [AutoModelForCausalLM.from_pretrained(path).eval() for path in paths]
    token = torch.tensor([[7]])
    found = expert_similarity(model, [token])
    layer, inputs = model.dense.model.layers[0], {}
    layer.self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.update(attention=kwargs["hidden_states"]), with_kwargs=True
    )
    layer.mlp.register_forward_pre_hook(lambda _, args: inputs.update(mlp=args[0]))
    with torch.no_grad():
        model(input_ids=token)
        answers = [seed.model.layers[0].mlp(inputs["mlp"]).flatten() for seed in seeds]
        heads = []
        for seed in seeds:
            attention = seed.model.layers[0].self_attn
            values = attention.v_proj(inputs["attention"]).view(2, 8).repeat_interleave(2, 0)  # two queries a value
            heads.append(attention.o_proj(values.flatten()))
    for name, (one, other) in (("ffn_outputs", answers), ("attention_outputs", heads)):
        expected = torch.cosine_similarity(one, other, dim=0).item()
        assert found[name][0][0][1] == pytest.approx(expected, abs=1e-5)
        assert abs(expected) < 0.99
    flat = [torch.cat([w.flatten() for w in seed.model.layers[0].mlp.parameters()]) for seed in seeds]
    assert found["ffn_weights"][0][0][1] == pytest.approx(torch.cosine_similarity(*flat, dim=0).item(), abs=1e-5)


def test_a_collapsed_pair_stands_out_and_the_model_is_left_alone(tmp_path: Path) -> None:
    paths = make_seeds(BY_NAME["llama"], tmp_path / "seeds")
    model = merge_and_load(paths, tmp_path / "out", "btx").eval()
    experts = model.dense.model.layers[1].mlp.experts
    with torch.no_grad():
        for weight in experts.parameters():
            weight[2] = weight[0]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = expert_similarity(model, WINDOWS)
    assert set(found) == {"ffn_weights", "ffn_outputs"}
    for cosines in found.values():
        assert cosines[1][0][2] == pytest.approx(1, abs=1e-5)
        assert cosines[1][0][1] < 0.9
        assert cosines[0][0][2] < 0.9
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not experts._forward_pre_hooks


def test_transformers_own_mixtures_are_served() -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(mixtral_config()).eval()
    with torch.no_grad():
        for weight in model.model.layers[0].mlp.experts.parameters():
            weight[3] = weight[1]
    found = expert_similarity(model, WINDOWS)
    assert np.array(found["ffn_outputs"]).shape == (2, 4, 4)
    assert found["ffn_outputs"][0][3][1] == pytest.approx(1, abs=1e-5)
