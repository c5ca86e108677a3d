"""The terms of the loss against float64 formulas written from the paper, and where their gradients go."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralForCausalLM

from tests.conftest import merge_and_load
from tests.tiny import BY_NAME, VOCAB, make_seeds, mixtral_config
from upcycle.losses import forward_losses, next_token_nll

EXACT = 1e-12


def softmax(logits: Any) -> Any:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def balance(logits: Any, top_k: int) -> float:
    """N * sum_i f_i P_i, with a loop over tokens."""
    gates = softmax(logits)
    tokens, experts = gates.shape
    routed = np.zeros(experts)
    for row in gates:
        for expert in np.argsort(-row)[:top_k]:
            routed[expert] += 1
    return float(experts * sum(routed[i] / tokens * gates[:, i].mean() for i in range(experts)))


def z(logits: Any) -> float:
    return float(np.mean([np.log(np.exp(row).sum()) ** 2 for row in logits]))


def nll(logits: Any, targets: Any, counted: Any) -> float:
    gates = softmax(logits)
    total = 0.0
    for row in range(targets.shape[0]):
        for place in range(targets.shape[1]):
            if counted[row, place]:
                total -= np.log(gates[row, place, targets[row, place]])
    return total


@pytest.fixture
def mixture(tmp_path: Path) -> Any:
    seeds = make_seeds(BY_NAME["llama"], tmp_path)
    overrides = ("router.ffn.top_k=2", "router.ffn.std=0.5", "router.attention.std=0.5")
    model = merge_and_load(seeds, tmp_path / "mixture", "bam", *overrides).double()
    model.set_experts_implementation("eager")
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))


def test_every_term_equals_its_formula(mixture: Any) -> None:
    batch = tokens()
    counted = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) > 0.3
    found, routers = forward_losses(mixture, batch, counted, 2)
    outputs = mixture(input_ids=batch[:, :-1], output_router_logits=True)
    assert routers is not None
    assert found.item() == pytest.approx(
        nll(outputs.logits.detach().numpy(), batch[:, 1:].numpy(), counted.numpy()), rel=EXACT
    )
    ffn = [logits.detach().numpy() for logits in outputs.router_logits]
    attention = [logits.detach().numpy() for logits in outputs.attention_router_logits]
    assert routers.load_balance.tolist() == pytest.approx([balance(logits, 2) for logits in ffn], rel=EXACT)
    assert routers.z.tolist() == pytest.approx([z(logits) for logits in ffn], rel=EXACT)
    assert routers.attention_z.tolist() == pytest.approx([z(logits) for logits in attention], rel=EXACT)
    total = sum(0.3 * balance(logits, 2) + 0.2 * z(logits) for logits in ffn) + sum(0.2 * z(a) for a in attention)
    assert routers.total(0.3, 0.2).item() == pytest.approx(total, rel=EXACT)
    entropy = [float(-(softmax(logits) * np.log(softmax(logits))).sum(-1).mean()) for logits in ffn]
    assert routers.entropy.tolist() == pytest.approx(entropy, rel=1e-9)
    assert routers.gates.tolist() == [pytest.approx(softmax(logits).mean(0).tolist()) for logits in attention]
    assert routers.load.sum(-1).tolist() == pytest.approx([1.0] * len(ffn))


def test_the_models_own_loss_is_the_same_sum(mixture: Any) -> None:
    batch = tokens()
    own = mixture(input_ids=batch[:, :-1], labels=batch[:, :-1], output_router_logits=True)
    _, routers = forward_losses(mixture, batch, None, 2)
    assert routers is not None
    assert routers.load_balance.sum().item() == pytest.approx(own.load_balance_loss.item(), rel=EXACT)
    assert (routers.z.sum() + routers.attention_z.sum()).item() == pytest.approx(own.z_loss.item(), rel=EXACT)


@pytest.mark.parametrize("term", ["nll", "load_balance", "z", "attention_z"])
def test_gradients_reach_every_router(term: str, mixture: Any) -> None:
    found, routers = forward_losses(mixture, tokens(), None, 2)
    (found if term == "nll" else getattr(routers, term).sum()).backward()
    reached = {
        name: parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        for name, parameter in mixture.named_parameters()
        if name.endswith("router.weight")
    }
    assert len(reached) == 4
    own = {"load_balance": "mlp", "z": "mlp", "attention_z": "self_attn", "nll": ""}[term]
    assert all(grad for name, grad in reached.items() if own in name), reached


def test_native_mixtures_give_the_same_terms() -> None:
    torch.manual_seed(0)
    config = mixtral_config()
    model = MixtralForCausalLM(config).double()
    model.set_experts_implementation("eager")
    batch = tokens()
    _, routers = forward_losses(model, batch, None, 2)
    logits = model(input_ids=batch[:, :-1], output_router_logits=True).router_logits
    assert routers is not None
    assert routers.load_balance.tolist() == pytest.approx([balance(x.detach().numpy(), 2) for x in logits], rel=EXACT)
    assert routers.z.tolist() == pytest.approx([z(x.detach().numpy()) for x in logits], rel=EXACT)
    assert not routers.attention_z.numel()


@pytest.mark.parametrize("vocab", [7, 400_000])
def test_the_nll_and_its_gradient_are_the_librarys(vocab: int) -> None:
    """Also where a piece is one row, and where logits are so large that their exponential is not finite."""
    torch.manual_seed(0)
    logits = (torch.randn(2, 5, vocab, dtype=torch.float64) * 300).requires_grad_()
    targets = torch.randint(vocab, (2, 5))
    counted = torch.rand(2, 5) > 0.4
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.masked_fill(~counted, -100).flatten(), reduction="sum"
    )
    [gradient] = torch.autograd.grad(expected * 3, logits)
    found = next_token_nll(logits, targets, counted)
    [own] = torch.autograd.grad(found * 3, logits)
    assert found.item() == pytest.approx(expected.item(), rel=EXACT)
    torch.testing.assert_close(own, gradient, atol=1e-12, rtol=0)
    with torch.no_grad():
        assert next_token_nll(logits, targets, counted).item() == found.item()


def test_a_nan_in_the_logits_is_seen() -> None:
    logits = torch.zeros(1, 3, 5)
    logits[0, 1, 2] = float("nan")
    assert next_token_nll(logits, torch.zeros(1, 3, dtype=torch.int64)).isnan()


def test_uncounted_targets_have_no_gradient() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    counted = torch.tensor([[True, False, True], [False, False, True]])
    next_token_nll(logits, torch.zeros(2, 3, dtype=torch.int64), counted).backward()
    assert logits.grad is not None
    assert ((logits.grad.abs().sum(-1) > 0) == counted).all()
