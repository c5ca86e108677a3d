"""The recipe itself: which layers it mixes, what it means with and without text, and what shares of the seeds do."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run_cli
from tests.test_merge import make_plan, state
from upcycle.errors import RecipeError
from upcycle.merge import merge
from upcycle.plan import plan_merge
from upcycle.recipe import MEAN, ROLES, USAGE, WEIGHTED, Experts, FfnRouter, Recipe, mixed_layers
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds
from upcycle.verify import verify

SHARES = ("code=3", "law=1", "math=0.7")
BY_NAME = {"code": 3.0, "law": 1.0, "math": 0.7}


@pytest.mark.parametrize(
    ("layers", "mixed"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("every 1", (0, 1, 2, 3, 4, 5)),
        ("every 2", (1, 3, 5)),
        ("every 6", (5,)),
        ("0-1, 4", (0, 1, 4)),
        ("4-,0", (0, 4, 5)),
        ("5-5", (5,)),
        ("2,2,1-2", (1, 2)),
    ],
)
def test_layers_are_counted_from_0(layers, mixed):
    assert mixed_layers(layers, 6) == mixed


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("every 7", "none of the 6 layers"),
        ("every 0", "expected"),
        ("every", "expected"),
        ("", "expected"),
        ("-3", "expected"),
        ("1,,2", "expected"),
        ("a", "expected"),
        ("0-6", "layers 0 to 5"),
        ("6", "layers 0 to 5"),
        ("3-2", "layers 0 to 5"),
    ],
)
def test_layers_that_cannot_be_are_refused(layers, message):
    with pytest.raises(RecipeError, match=message):
        mixed_layers(layers, 6)


def test_experts_are_counted_before_and_after_the_split():
    recipe = Recipe("x", "x", dict.fromkeys(ROLES, MEAN), experts=Experts(granularity=4, extra=2))
    recipe = Recipe("x", "x", recipe.mix, experts=recipe.experts, ffn_router=FfnRouter(top_k=3))
    assert (recipe.ffn_groups(4), recipe.ffn_count(4), recipe.ffn_active) == (6, 24, 12)


def test_usage_is_the_average_where_there_is_no_text():
    recipe = load_recipe("btx")
    assert recipe.mix["head"] == USAGE
    assert recipe.settled(False).mix["head"] == MEAN
    assert recipe.settled(True).mix["head"] == USAGE
    weighted = recipe.weighted_by(BY_NAME)
    assert weighted.mix["head"] == USAGE
    assert weighted.settled(False).mix["head"] == WEIGHTED
    assert weighted.settled(True).mix["head"] == USAGE


def test_shares_hold_for_whatever_is_averaged():
    recipe = load_recipe("btx", ["mix.norm=seed:code"], SHARES)
    assert recipe.weights == BY_NAME
    assert recipe.mix["norm"] == "seed:code"
    assert recipe.mix["ffn"] == "experts"
    assert {recipe.mix[role] for role in ROLES if role.startswith("attention")} == {WEIGHTED}
    assert load_recipe("shared-expert", (), SHARES).experts.shared == (WEIGHTED,)
    extra = load_recipe("btx-extra", ["experts.extra_from=mean"], SHARES)
    assert extra.experts.extra_from == WEIGHTED
    assert load_recipe("btx", (), SHARES).experts == Experts()


def test_shares_take_the_place_of_the_recipes_own(tmp_path):
    (tmp_path / "own.toml").write_text('summary = "x"\n[mix]\nnorm = "weighted"\n[weights]\na = 1\nb = 2\n')
    assert load_recipe(str(tmp_path / "own.toml")).mix["head"] == MEAN
    recipe = load_recipe(str(tmp_path / "own.toml"), (), SHARES)
    assert recipe.weights == BY_NAME
    assert set(recipe.mix.values()) == {WEIGHTED}
    # A recipe may leave them to whoever uses it.
    (tmp_path / "open.toml").write_text('summary = "x"\n[mix]\nnorm = "weighted"\n')
    assert load_recipe(str(tmp_path / "open.toml"), (), SHARES).weights == BY_NAME
    with pytest.raises(RecipeError, match="--weights code=2"):
        load_recipe(str(tmp_path / "open.toml"))


@pytest.mark.parametrize(
    ("recipe", "shares", "message"),
    [
        ("average", ["code"], "expected NAME=SHARE"),
        ("average", ["code="], "expected NAME=SHARE"),
        ("average", ["=1"], "expected NAME=SHARE"),
        ("average", ["code=much"], "expected NAME=SHARE"),
        ("average", ["code=1", "code=2"], "seed 'code' has two shares"),
        ("average", ["code=-1", "law=2"], "code is -1.0, expected 0 or more"),
        ("average", ["code=nan"], "code is nan, expected 0 or more"),
        ("average", ["code=inf"], "code is inf, expected 0 or more"),
        ("average", ["code=1e308", "law=1e308"], "too large"),
        ("average", ["code=0", "law=0", "math=0"], "all weights are 0"),
        ("flex", ["code=1"], "averages nothing .its roles are mixed by equal, experts.; leave out --weights"),
        ("sparse-upcycling", ["code=1"], "copies one seed, so nothing is averaged"),
    ],
)
def test_shares_that_cannot_be_are_refused(recipe, shares, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, (), shares)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (["code=1", "law=1"], "seed 'math' no share; add one, math = 1"),
        (["code=1", "law=1", "maths=1"], "its weights speak of seed 'maths', which is not given; did you mean 'math'"),
    ],
)
def test_shares_are_the_seeds(shares, message, seeds):
    read = read_seeds([str(path) for path in seeds])
    for recipe in ("average", "btx"):
        with pytest.raises(RecipeError, match=message):
            plan_merge(load_recipe(recipe, (), shares), read)


def reference(arrays, scale=1.0):
    """The weighted mean in fp32, seed after seed, rounded once to bf16."""
    weights = [np.float32(share / sum(BY_NAME.values())) for share in BY_NAME.values()]
    total = np.zeros(arrays[0].shape, np.float32)
    for weight, array in zip(weights, arrays, strict=True):
        total += weight * array.float().numpy()
    return torch.from_numpy(total * np.float32(scale)).bfloat16()


def test_a_weighted_average_is_exact(seeds, tmp_path):
    plan = plan_merge(load_recipe("average", (), SHARES), read_seeds([str(path) for path in seeds]))
    merge(plan, tmp_path / "out")
    dense = [load_file(seed / "model.safetensors") for seed in seeds]
    result = state(tmp_path / "out")
    assert set(result) == set(dense[0])
    for name, tensor in result.items():
        assert torch.equal(tensor, reference([one[name] for one in dense])), name


def test_only_what_is_averaged_is_weighted(seeds, tmp_path):
    """A shared expert and dense layers, too; experts stay the seeds'."""
    overrides = ('layers.mix="1"', "mix.attention.value=seed:law")
    recipe = load_recipe("shared-expert", overrides, SHARES)
    plan = plan_merge(recipe, read_seeds([str(path) for path in seeds]))
    merge(plan, tmp_path / "out")
    dense = [load_file(seed / "model.safetensors") for seed in seeds]
    result = state(tmp_path / "out")

    def of(name):
        return [one[name] for one in dense]

    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(result[f"dense.{name}"], reference(of(name))), name
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight"):
        assert torch.equal(result[f"dense.{name}"], reference(of(name))), name
    at = "model.layers.1.mlp"
    shared = result[f"dense.{at}.shared.0.down_proj.weight"]
    assert torch.equal(shared, reference(of(f"{at}.down_proj.weight"), scale=0.5))
    value = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(result[f"dense.{value}"], dense[1][value])
    for number, one in enumerate(dense):
        halved = (one[f"{at}.down_proj.weight"].float() * 0.5).bfloat16()
        assert torch.equal(result[f"dense.{at}.experts.down_proj"][number], halved)


def test_equal_shares_are_the_mean_to_the_bit(seeds, tmp_path):
    shares = ("code=2", "law=2", "math=2")
    merge(plan_merge(load_recipe("average", (), shares), read_seeds([str(path) for path in seeds])), tmp_path / "one")
    merge(make_plan(seeds, "average"), tmp_path / "two")
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize("recipe", ["average", "bam", "shared-expert"])
def test_the_command_line_takes_shares_and_verify_makes_them_again(recipe, seeds, tmp_path):
    command = ("merge", "--seeds", "code", "law", "math", "--recipe", recipe, "--weights", *SHARES, "--out", "m")
    made = run_cli(*command, "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    record = json.loads((tmp_path / "m" / "upcycle.json").read_text())
    assert record["recipe"]["weights"] == BY_NAME
    assert record["recipe"]["mix"]["norm"] == record["recipe"]["mix"]["head"] == WEIGHTED
    found = verify(tmp_path / "m", [str(seed) for seed in seeds])
    assert not found.problems
    assert found.remade == len(state(tmp_path / "m"))


@pytest.mark.parametrize("arguments", [("merge",), ("plan",)])
def test_wrong_shares_are_one_message(arguments, seeds, tmp_path):
    command = (*arguments, "--seeds", "code", "law", "math", "--recipe", "btx")
    done = run_cli(*command, "--weights", "code=1", "law=1", "mth=1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "did you mean 'math'" in done.stderr
    done = run_cli(*command, "--weights", "code=1", "law=1", "math=-1", cwd=tmp_path)
    assert (done.returncode, "math is -1.0" in done.stderr) == (1, True)


def test_a_plan_by_config_has_no_seeds_to_share(tmp_path):
    command = ("plan", "--config", "c.json", "--num-experts", "3", "--recipe", "btx", "--weights", "code=1")
    done = run_cli(*command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--weights" in done.stderr


def test_with_text_usage_stays_and_the_rest_is_weighted(seeds, tmp_path):
    for name in BY_NAME:
        (tmp_path / f"{name}.txt").write_text(" ".join(f"word{3 + ord(letter) % 90}" for letter in name * 40))
    text = [f"{name}={name}.txt" for name in BY_NAME]
    command = ("merge", "--seeds", "code", "law", "math", "--recipe", "btx", "--router-data", *text)
    made = run_cli(*command, "--weights", *SHARES, "--out", "m", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    record = json.loads((tmp_path / "m" / "upcycle.json").read_text())["recipe"]
    assert (record["mix"]["head"], record["mix"]["norm"], record["weights"]) == (USAGE, WEIGHTED, BY_NAME)
    assert not verify(tmp_path / "m", [str(seed) for seed in seeds]).problems
