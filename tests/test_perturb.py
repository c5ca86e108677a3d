"""What makes copied experts differ: noise, and inner units drawn anew."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import merge_and_load
from tests.tiny import BY_NAME, make_seed, make_seeds
from upcycle.errors import SeedError
from upcycle.merge import merge
from upcycle.perturb import UnitSums, dropped_units, normal
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds
from upcycle.verify import verify

LAYERS, INNER, EXPERTS = 2, 48, 4


def make(paths, out, recipe, *overrides, random_seed=0, format="bam"):
    loaded = load_recipe(recipe, overrides)
    plan = plan_merge(
        loaded,
        read_seeds([str(path) for path in paths]),
        num_experts=EXPERTS if loaded.copies else None,
        allow_unrelated=True,
        random_seed=random_seed,
        format=format,
    )
    merge(plan, out)
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    return make_seed(BY_NAME["llama"], tmp_path_factory.mktemp("seed") / "a", 0)


def matrices(result, layer):
    """Gate, up and down of each expert, `[E, I, D]`, units first."""
    at = f"dense.model.layers.{layer}.mlp.experts."
    gate, up = result[f"{at}gate_up_proj"].chunk(2, 1)
    return gate, up, result[f"{at}down_proj"].transpose(1, 2)


def dense_matrices(seed, layer):
    state = load_file(seed / "model.safetensors")
    at = f"model.layers.{layer}.mlp."
    return state[f"{at}gate_proj.weight"], state[f"{at}up_proj.weight"], state[f"{at}down_proj.weight"].T


def test_drop_upcycling_draws_the_same_units_of_gate_up_and_down(seed, tmp_path):
    """arXiv:2502.19261: floor(r * I) units of each expert, one set for its three matrices, each expert its own set."""
    result = make([seed], tmp_path / "out", "drop-upcycling", "experts.drop=0.4")
    sets = []
    for layer in range(LAYERS):
        changed = [
            (after != before).any(-1)
            for after, before in zip(matrices(result, layer), dense_matrices(seed, layer), strict=True)
        ]
        assert torch.equal(changed[0], changed[1])
        assert torch.equal(changed[0], changed[2])
        assert changed[0].sum(-1).tolist() == [int(0.4 * INNER)] * EXPERTS
        sets += [tuple(row.tolist()) for row in changed[0]]
        for after, before in zip(matrices(result, layer), dense_matrices(seed, layer), strict=True):
            drawn = changed[0].unsqueeze(-1).expand_as(after)
            assert (after[drawn] != before.expand_as(after)[drawn]).float().mean() > 0.999  # whole units
    assert len(set(sets)) == LAYERS * EXPERTS


def test_what_is_drawn_has_the_moments_of_what_it_replaces(tmp_path):
    """Of every matrix by itself; the seed's are made to differ, and not to be centred."""
    path = make_seed(BY_NAME["llama"], tmp_path / "a", 1)
    state = load_file(path / "model.safetensors")
    for name in state:
        if ".mlp." in name:
            state[name] = state[name] * (3 if "down" in name else 1) + (0.7 if "up" in name else -0.2)
    from safetensors.torch import save_file

    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    result = make([path], tmp_path / "out", "drop-upcycling", "experts.drop=0.5")
    for layer in range(LAYERS):
        for after, before in zip(matrices(result, layer), dense_matrices(path, layer), strict=True):
            for expert in after:
                units = (expert != before).any(-1)
                new, old = expert[units].double(), before[units].double()
                error = old.std() / new.numel() ** 0.5
                assert abs(new.mean() - old.mean()) < 4 * error
                assert abs(new.std() / old.std() - 1) < 4 / (2 * new.numel()) ** 0.5


def test_noise_is_so_many_standard_deviations_of_each_matrix(seed, tmp_path):
    result = make([seed], tmp_path / "out", "noise", "experts.noise=0.1")
    for layer in range(LAYERS):
        for after, before in zip(matrices(result, layer), dense_matrices(seed, layer), strict=True):
            noise = ((after - before) / before.std(correction=0)).double()
            assert abs(noise.std() / 0.1 - 1) < 0.03
            assert abs(noise.mean()) < 4 * 0.1 / noise.numel() ** 0.5
            flat = noise.flatten(1)
            correlations = torch.corrcoef(flat) - torch.eye(EXPERTS)
            assert correlations.abs().max() < 0.12  # each expert has its own


def test_without_noise_or_drop_nothing_is_touched(seed, tmp_path):
    plain = make([seed], tmp_path / "plain", "sparse-upcycling")
    for number, (recipe, override) in enumerate((("noise", "experts.noise=0"), ("drop-upcycling", "experts.drop=0"))):
        result = make([seed], tmp_path / str(number), recipe, override)
        assert all(torch.equal(tensor, plain[name]) for name, tensor in result.items())


def test_all_units_may_be_drawn_anew(seed, tmp_path):
    result = make([seed], tmp_path / "out", "drop-upcycling", "experts.drop=1")
    for after, before in zip(matrices(result, 0), dense_matrices(seed, 0), strict=True):
        assert (after != before).float().mean() > 0.999


def test_numbers_are_the_plans_whatever_the_format(seed, tmp_path):
    """The same seed gives the same experts as one stack and as tensors of their own; another seed others."""
    stacked = make([seed], tmp_path / "bam", "drop-upcycling", "experts.noise=0.1")
    apart = make([seed], tmp_path / "native", "drop-upcycling", "experts.noise=0.1", format="native")
    for layer in range(LAYERS):
        for kind, name in zip(matrices(stacked, layer), ("w1", "w3", "w2"), strict=True):
            for expert in range(EXPERTS):
                own = apart[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"]
                assert torch.equal(kind[expert], own.T if name == "w2" else own)
    other = make([seed], tmp_path / "other", "drop-upcycling", "experts.noise=0.1", random_seed=1)
    assert not torch.equal(matrices(other, 0)[0], matrices(stacked, 0)[0])


@pytest.mark.parametrize("name", ["phi3", "starcoder2", "gpt_neox", "llama-biases"])
def test_fused_plain_and_biased_ffns(name, tmp_path):
    """Units of a fused gate and up, and their biases, go together; what is merged is verified from the seeds."""
    paths = make_seeds(BY_NAME[name], tmp_path)
    make(paths, tmp_path / "out", "btx-top1", "experts.drop=0.5", "experts.granularity=2")
    assert verify(tmp_path / "out", [str(path) for path in paths]).problems == []
    result = load_file(tmp_path / "out" / "model.safetensors")
    whole = make(paths, tmp_path / "whole", "btx-top1", "experts.granularity=2")
    wide = next(key for key in result if key.endswith(("gate_up_proj", "experts.up_proj")))
    down = wide.replace("gate_up_proj", "down_proj").replace("up_proj", "down_proj")
    into = (result[wide] != whole[wide]).any(-1)
    if "gate" in wide:
        gate, up = into.chunk(2, 1)
        assert torch.equal(gate, up)
        into = gate
    assert torch.equal(into, (result[down] != whole[down]).any(1))
    assert into.flatten(0).unflatten(0, (3, -1)).sum(1).tolist() == [INNER // 2] * 3
    if f"{wide}_bias" in result:
        biases = result[f"{wide}_bias"] != whole[f"{wide}_bias"]
        assert torch.equal(biases[:, : into.shape[1]], into)
        assert torch.equal(result[f"{down}_bias"], whole[f"{down}_bias"])


def test_experts_with_noise_are_finite_and_recorded(tmp_path):
    paths = make_seeds(BY_NAME["qwen3"], tmp_path, dtype=torch.bfloat16)
    model = merge_and_load(paths, tmp_path / "out", "bam", "experts.noise=0.01")
    assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert record["recipe"]["experts"]["noise"] == 0.01


def test_draws_do_not_depend_on_where_they_begin():
    whole = normal("a", 0, 1000)
    for start, count in ((0, 1), (1, 2), (3, 500), (7, 9), (8, 8), (997, 3), (4, 8)):
        assert np.array_equal(normal("a", start, count), whole[start : start + count])
    assert not np.array_equal(normal("b", 0, 1000), whole)


def test_draws_are_normal():
    values = np.sort(normal("shape", 0, 200_000).astype(np.float64))
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    # Kolmogorov-Smirnov's distance to the normal distribution.
    expected = torch.special.ndtr(torch.from_numpy(values)).numpy()
    assert np.abs(expected - np.arange(len(values)) / len(values)).max() < 1.63 / len(values) ** 0.5
    assert abs(np.corrcoef(normal("x", 0, 50_000), normal("y", 0, 50_000))[0, 1]) < 0.02


def test_draws_are_independent_of_their_neighbours():
    """Two numbers are drawn at once: what is between them, and between one draw and the next, is nothing either."""
    values = normal("neighbours", 0, 400_001).astype(np.float64)
    for change in (np.array, np.square, np.abs, lambda x: x > 1.5):
        for gap in (1, 2, 3, 4, 8):
            for first in (0, 1):  # of a pair, and across two
                one, two = change(values[first:-gap:2]), change(values[first + gap :: 2])
                assert abs(np.corrcoef(one, two)[0, 1]) < 4 / len(one) ** 0.5 + 0.003, (gap, first)
    # Of the quadrants beyond each of some quantiles, each pair's share is the product of its two numbers'.
    pairs = values[:400_000].reshape(-1, 2)
    assert np.linalg.norm(pairs, axis=1).max() < 5.5  # beyond which 1 of 4 million lies
    for powers in ((2, 2), (3, 1), (1, 3), (3, 3), (2, 4)):
        one, two = (pairs[:, axis] ** power for axis, power in enumerate(powers))
        assert abs((one * two).mean() - one.mean() * two.mean()) < 4 * (one * two).std() / len(pairs) ** 0.5
    for low, high in ((-1, 1), (0.5, -0.5), (2, 2), (-2, 1)):
        share = ((pairs[:, 0] < low) & (pairs[:, 1] < high)).mean()
        expected = float(torch.special.ndtr(torch.tensor([low, high], dtype=torch.float64)).prod())
        assert abs(share - expected) < 4 * (expected * (1 - expected) / len(pairs)) ** 0.5


@pytest.mark.parametrize(("override", "expected"), [("experts.drop=0.9", 0.0), ("experts.noise=1.0", 1.0)])
def test_an_extra_expert_is_perturbed_like_what_it_is_made_of(tmp_path, override, expected):
    """The mean of unrelated seeds has weights that are smaller than any seed's: so is what is drawn."""
    paths = make_seeds(BY_NAME["llama"], tmp_path)
    extra = ("experts.extra=1", "experts.extra_from=mean")
    plain = make(paths, tmp_path / "plain", "btx", *extra)
    result = make(paths, tmp_path / "out", "btx", *extra, override)
    for layer in range(LAYERS):
        for before, after in zip(matrices(plain, layer), matrices(result, layer), strict=True):
            for expert in range(4):
                spread = before[expert].std()
                found = (after - before)[expert].std() if expected else after[expert].std() - spread
                assert abs(found / spread - expected) < 0.15, (layer, expert)


@pytest.mark.parametrize("override", ["experts.drop=0.5", "experts.noise=1.0"])
def test_draws_that_the_dtype_cannot_hold_are_refused_by_name(seed, tmp_path, override):
    """Weights that are finite themselves, but whose like are not."""
    shutil.copytree(seed, tmp_path / "big")
    state = load_file(tmp_path / "big" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name] = torch.where(state[name] > 0, 3.3e38, -3.3e38)
    save_file(state, tmp_path / "big" / "model.safetensors", metadata={"format": "pt"})
    recipe = "drop-upcycling" if "drop" in override else "noise"
    with pytest.raises(SeedError, match=r"'big'.*layers\.1\.mlp\.up_proj.*overflows.*F32 cannot hold"):
        make([tmp_path / "big"], tmp_path / "out", recipe, override)
    assert not (tmp_path / "out").exists()


def test_the_share_of_units_is_rounded_down():
    assert [int(dropped_units(0, "k", 10, share).sum()) for share in (0.05, 0.5, 0.99, 1.0)] == [0, 5, 9, 10]
    assert int(dropped_units(0, "k", 100, 0.29).sum()) == 29  # 28.999999999999996 in floats
    assert UnitSums(np.zeros(4), np.zeros(4), 3).moments(np.zeros(4, bool)) == (0.0, 0.0)
