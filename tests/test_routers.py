"""The fits against their definitions, and what is said of routers that learn nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import merge_and_load
from tests.tiny import BY_NAME, VOCAB, make_seeds
from upcycle import routers
from upcycle.errors import CheckpointError
from upcycle.recipe import AttentionRouter, FfnRouter
from upcycle.router_text import RouterText
from upcycle.routers import coinciding, fit_warnings, logistic, prototypes, set_routers

BOTH = {"ffn": FfnRouter(init="fit"), "attention": AttentionRouter(init="fit")}


def clusters(sizes: tuple[int, ...] = (300, 200, 100), spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around one centre an expert, of unequal numbers and scales of dimensions."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(len(sizes), 8, generator=generator)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    noise = torch.randn(len(labels), 8, generator=generator) * torch.logspace(-1, 1, 8)
    return centres[labels] + spread * noise, labels


def texts(per_expert: int = 2048, length: int = 16, overlap: bool = False) -> RouterText:
    """Each expert's text has tokens of its own, or all have the same."""
    windows = []
    for expert in range(3):
        random = np.random.default_rng(expert)
        low, high = (3, VOCAB) if overlap else (3 + 31 * expert, 3 + 31 * (expert + 1))
        windows.append(random.integers(low, high, (per_expert // length, length)).astype(np.int64))
    return RouterText(["a", "b", "c"], windows)


def test_the_logistic_fit_is_the_minimum_of_its_objective() -> None:
    inputs, labels = clusters()
    weight = logistic(inputs, labels, 3).double().requires_grad_()
    size = inputs.double().square().mean().sqrt()
    shares = torch.stack([labels == expert for expert in range(3)]).double()
    shares /= 3 * shares.sum(1, keepdim=True)
    logits = inputs.double() @ weight.T
    loss = -(shares.T * logits.log_softmax(-1)).sum() + routers.RIDGE * (weight * size).square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert loss < 0.6
    assert (gradient / size).norm() < 1e-3


def test_separable_texts_give_finite_weights() -> None:
    inputs, labels = clusters(spread=1e-3)
    weight = logistic(inputs, labels, 3)
    assert weight.isfinite().all()
    assert ((inputs @ weight.T).argmax(-1) == labels).all()


def test_one_dimension_that_never_changes_does_no_harm() -> None:
    inputs, labels = clusters()
    inputs[:, 3] = 0
    assert logistic(inputs, labels, 3).isfinite().all()


def test_prototypes_are_the_differences_of_means_over_the_variance() -> None:
    inputs, labels = clusters()
    groups = [inputs[labels == expert].double().numpy() for expert in range(3)]
    means = np.stack([group.mean(0) for group in groups])
    variance = np.mean([group.var(0) for group in groups])
    expected = (means - means.mean(0)) / variance
    np.testing.assert_allclose(prototypes(inputs, labels, 3).numpy(), expected, rtol=1e-4, atol=1e-6)


def test_only_means_that_differ_by_chance_coincide() -> None:
    inputs, labels = clusters((400, 400, 400))
    assert coinciding(inputs, labels, 3) == []
    half = labels.clone()
    half[labels == 2] = torch.arange(400) % 2 + 2  # one cloud under two names
    assert coinciding(inputs, half, 4) == [(2, 3)]


def test_two_texts_of_one_kind_are_told_though_their_tokens_differ(tmp_path: Path) -> None:
    """Each window has words of its own, so that thousands of tokens are a few hundred samples."""
    model = merge_and_load(make_seeds(BY_NAME["llama"], tmp_path / "seeds"), tmp_path / "out", "bam").eval()
    random = np.random.default_rng(0)

    def windows(low: int, high: int) -> np.ndarray:
        words = random.integers(low, high, (256, 8))
        return np.take_along_axis(words, random.integers(0, 8, (256, 32)), axis=1).astype(np.int64)

    text = RouterText(["a", "b", "c"], [windows(3, 50), windows(3, 50), windows(50, VOCAB)])
    fits = set_routers(model, text, BOTH, dtype=torch.float32)
    assert {tuple(fit.alike) for fit in fits} == {((0, 1),)}


@pytest.mark.parametrize("name", ["llama", "cohere2"])
@pytest.mark.parametrize("init", ["fit", "prototypes"])
def test_tokens_find_their_own_expert(name: str, init: str, tmp_path: Path) -> None:
    model = merge_and_load(make_seeds(BY_NAME[name], tmp_path / "seeds"), tmp_path / "out", "bam").eval()
    settings = {"ffn": FfnRouter(init=init, softness=1.0), "attention": AttentionRouter(init=init, softness=1.0)}
    fits = set_routers(model, texts(), settings, dtype=torch.float32)
    assert [(fit.router.layer, fit.router.kind) for fit in fits] == [
        (0, "attention"),
        (0, "ffn"),
        (1, "attention"),
        (1, "ffn"),
    ]
    assert min(fit.accuracy for fit in fits) > 0.6  # of 1/3 by chance
    assert fit_warnings(fits, "abc") == []


def test_routers_that_are_not_named_stay(tmp_path: Path) -> None:
    model = merge_and_load(make_seeds(BY_NAME["llama"], tmp_path / "seeds"), tmp_path / "out", "bam").eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    set_routers(model, texts(), {"ffn": FfnRouter(init="fit")}, dtype=torch.float32)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"dense.model.layers.{layer}.mlp.router.weight" for layer in (0, 1)}


def test_the_same_text_in_another_order_gives_nearly_the_same_and_in_the_same_order_the_same(tmp_path: Path) -> None:
    model = merge_and_load(make_seeds(BY_NAME["llama"], tmp_path / "seeds"), tmp_path / "out", "bam").eval()
    text = texts()
    shuffled = RouterText(text.experts, [np.random.default_rng(5).permutation(one) for one in text.windows])
    logits = []
    for one in (text, text, shuffled):
        set_routers(model, one, BOTH, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(torch.from_numpy(text.windows[0][:4])).logits.log_softmax(-1))
    assert torch.equal(logits[0], logits[1])
    assert (logits[0] - logits[2]).abs().mean() < 0.02


def test_texts_that_are_alike_are_told(tmp_path: Path) -> None:
    model = merge_and_load(make_seeds(BY_NAME["llama"], tmp_path / "seeds"), tmp_path / "out", "bam").eval()
    fits = set_routers(model, texts(overlap=True), BOTH, dtype=torch.float32)
    warnings = fit_warnings(fits, "abc")
    assert any("the texts of 'a' and 'b' look the same to 4 of 4 routers" in warning for warning in warnings)
    assert sum("look the same" in warning for warning in warnings) == 3  # one a pair
    assert any("hardly more than by chance (33%)" in warning for warning in warnings)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_scale_makes_up_for_soft_gates(top_k: int, tmp_path: Path) -> None:
    """Over the held-back tokens the gates that act, times the scale, sum to 1 on average."""
    paths = make_seeds(BY_NAME["llama"], tmp_path / "seeds")
    model = merge_and_load(paths, tmp_path / "out", "bam", f"router.ffn.top_k={top_k}").eval()
    model.config.ffn_scale = [1.0, 1.0]
    for layer in model.dense.model.layers:
        layer.mlp.scale = torch.tensor(1.0)
    text = texts()
    set_routers(model, text, {**BOTH, "ffn": FfnRouter(top_k=top_k, init="fit")}, dtype=torch.float32)
    sums: list[torch.Tensor] = []
    for layer in model.dense.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: sums.append(args[2].sum(-1).mean()))
    held_back = np.concatenate([one[7::8] for one in text.windows])
    with torch.no_grad():
        model(torch.from_numpy(held_back))
    assert [float(one) for one in sums] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert all(float(layer.mlp.scale) > 1.05 for layer in model.dense.model.layers)


def test_of_few_windows_the_ends_are_held_back() -> None:
    """Every expert has held-back tokens however short its text is, and none of them is fitted to."""
    text = texts(per_expert=64, length=32)
    assert routers._held_back(text, (2, 32)).nonzero()[:, 1].unique().tolist() == [28, 29, 30, 31]
    whole = texts(per_expert=128)
    assert routers._held_back(whole, (8, 16)).nonzero()[:, 0].unique().tolist() == [7]


def test_of_experts_that_were_split_a_text_belongs_to_all_parts_alike(tmp_path: Path) -> None:
    """And of layers without experts there is nothing to set: their place in `ffn_scale` is 1."""
    recipe = ("bam", "experts.granularity=2", "layers.mix=every 2", "router.ffn.top_k=2")
    model = merge_and_load(make_seeds(BY_NAME["llama"], tmp_path / "seeds"), tmp_path / "out", *recipe).eval()
    model.config.ffn_scale = [1.0, 1.0]
    mlp = model.dense.model.layers[1].mlp
    mlp.register_buffer("scale", torch.ones(()), persistent=False)
    whole = {"ffn": FfnRouter(top_k=2, init="fit", softness=1.0), "attention": AttentionRouter(init="fit")}
    fits = set_routers(model, texts(), whole, dtype=torch.float32)
    assert [(fit.router.layer, fit.router.kind) for fit in fits] == [(1, "attention"), (1, "ffn")]
    assert min(fit.accuracy for fit in fits) > 0.6  # of 1/3 by chance
    rows = mlp.router.weight.view(3, 2, -1)
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert not torch.allclose(rows[0], rows[1])
    assert model.config.ffn_scale == [1.0, pytest.approx(float(mlp.scale))]
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    gates = []
    again.dense.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, args: gates.append(args[2]))
    windows = torch.from_numpy(np.concatenate(texts().windows))
    with torch.no_grad():
        torch.testing.assert_close(again(windows[:4]).logits, model(windows[:4]).logits)
        again(windows)
    assert gates[1].shape[-1] == 4  # two of three FFNs, of each both halves
    assert float(gates[1].sum(-1).mean()) == pytest.approx(1, abs=0.03)  # the scale is of what was held back


def test_a_bias_of_bams_router_stays_and_counts(tmp_path: Path) -> None:
    unaided = ("router.ffn.init=random", "mix.default=mean", "router.ffn.bias.a=-100.0")
    model = merge_and_load(make_seeds(BY_NAME["llama"], tmp_path / "seeds"), tmp_path / "out", "flex", *unaided).eval()
    settings = {"ffn": FfnRouter(init="prototypes", softness=1.0)}
    fits = set_routers(model, texts(), settings, dtype=torch.float32)
    for layer in model.dense.model.layers:
        assert layer.mlp.router.bias.tolist() == [-100, 0, 0]
        assert layer.mlp.router.weight.abs().max() > 0
    assert max(fit.accuracy for fit in fits) < 0.7  # no token finds the expert that the bias keeps out


def test_text_for_some_experts_alone_is_refused(tmp_path: Path) -> None:
    seeds = make_seeds(BY_NAME["llama"], tmp_path / "seeds")
    model = merge_and_load(seeds, tmp_path / "out", "btx-extra", "experts.extra_from=mean").eval()
    with pytest.raises(CheckpointError, match="among 5 experts, and text is given for 3"):
        set_routers(model, texts(), {"ffn": FfnRouter(init="fit")}, dtype=torch.float32)
