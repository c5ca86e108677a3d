"""Statistics of routers against a count by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import merge_and_load
from tests.tiny import BY_NAME, VOCAB, make_seeds
from upcycle.evaluate import token_losses
from upcycle.heldout import Heldout
from upcycle.routing import RoutingTally

CHOICES = [0, 1, 1, 2, 1, 0]  # the expert that each of six tokens goes to
GATES = (0.7, 0.2, 0.1)  # of the expert chosen, of the next one (cyclically), of the one after


def logits_of(choices: list[int]) -> torch.Tensor:
    rows = [np.log(np.roll(GATES, choice)) for choice in choices]
    return torch.tensor(np.array(rows), dtype=torch.float32)


def test_a_tally_equals_a_count_by_hand() -> None:
    tally = RoutingTally(1, own_experts=[1])
    tally.add([logits_of(CHOICES[:4]), logits_of([2] * 4)], [logits_of([0] * 4)])
    tally.add([logits_of(CHOICES[4:]), logits_of([2] * 2)], [logits_of([1] * 2)])
    means = tally.means()
    entropy = -sum(gate * np.log(gate) for gate in GATES)
    np.testing.assert_allclose(means["load"], [[2 / 6, 3 / 6, 1 / 6], [0, 0, 1]])
    np.testing.assert_allclose(means["own_share"], [3 / 6, 0])
    np.testing.assert_allclose(means["entropy"], [entropy, entropy], rtol=1e-6)
    np.testing.assert_allclose(
        means["gates"], [[(4 * 0.7 + 2 * 0.1) / 6, (4 * 0.2 + 2 * 0.7) / 6, (4 * 0.1 + 2 * 0.2) / 6]], rtol=1e-6
    )
    np.testing.assert_allclose(means["attention_entropy"], [entropy], rtol=1e-6)


def test_with_two_experts_a_token_both_count() -> None:
    tally = RoutingTally(2, own_experts=[2])
    tally.add([logits_of([0, 1])], [])  # experts 0 and 1, then 1 and 2
    means = tally.means()
    np.testing.assert_allclose(means["load"], [[1 / 4, 2 / 4, 1 / 4]])
    np.testing.assert_allclose(means["own_share"], [1 / 2])
    assert "gates" not in means


def test_tokens_that_do_not_count_are_left_out() -> None:
    tally = RoutingTally(1)
    tally.add([logits_of(CHOICES)], [logits_of(CHOICES)], torch.tensor([True, False, False, True, False, False]))
    np.testing.assert_allclose(tally.means()["load"], [[1 / 2, 0, 1 / 2]])
    assert "own_share" not in tally.means()


def test_sums_of_several_processes_are_added_first() -> None:
    tally = RoutingTally(1)
    tally.add([logits_of([0, 0])], [])
    other = {"tokens": 6, "load": torch.tensor([[0, 6, 0]]), "entropy": torch.zeros(1)}
    names = iter(tally.sums)
    means = tally.means(lambda sums: sums + other[next(names)])
    np.testing.assert_allclose(means["load"], [[2 / 8, 6 / 8, 0]])


@pytest.mark.parametrize("recipe", ["bam", "btx"])
def test_a_models_fixed_router_is_counted_as_it_routes(recipe: str, tmp_path: Path) -> None:
    """The router's only input is the first hidden unit of the token's embedding, in a model that is nothing else."""
    paths = make_seeds(BY_NAME["llama"], tmp_path / "seeds")
    model = merge_and_load(paths, tmp_path / "out", recipe, "router.ffn.top_k=1").eval()
    tokens = np.random.default_rng(0).integers(VOCAB, size=(3, 9))
    base = model.dense.model
    with torch.no_grad():
        for layer in base.layers:  # nothing is added to the embedding, so every layer's routers see it alone
            layer.mlp.experts.down_proj.zero_()
            (layer.self_attn.o_proj.linear if recipe == "bam" else layer.self_attn.o_proj).weight.zero_()
            layer.post_attention_layernorm.weight.fill_(1)
            layer.input_layernorm.weight.fill_(1)
            routers = [layer.mlp.router] + ([layer.self_attn.o_proj.router] if recipe == "bam" else [])
            for router in routers:
                router.weight.zero_()
                router.weight[1, 0] = 5.0  # expert 1 where the unit is above 0, else expert 0 (the first of equals)
        base.embed_tokens.weight[:, 0] = torch.where(torch.arange(VOCAB) % 3 == 0, 1.0, -1.0)
    tally = RoutingTally(1, own_experts=[1])
    token_losses(model, Heldout("code", tokens), 2, torch.device("cpu"), tally)
    means = tally.means()
    third = float((tokens[:, :-1] % 3 == 0).mean())  # a window's last token is predicted, not read
    assert means["own_share"] == pytest.approx([third] * 2)
    for layer in means["load"]:
        assert layer[1] == pytest.approx(third)
        assert sum(layer) == pytest.approx(1)
    if recipe == "bam":
        with torch.no_grad():
            inputs = base.embed_tokens(torch.from_numpy(tokens[:, :-1])).flatten(0, 1).double()
            unit = inputs[:, 0] / inputs.square().mean(-1).add(base.layers[0].input_layernorm.variance_epsilon).sqrt()
        expected = torch.softmax(torch.stack([0 * unit, 5 * unit, 0 * unit], -1), -1).mean(0)
        for layer in means["gates"]:
            np.testing.assert_allclose(layer, expected, atol=1e-6)
