"""Recipes: what ships, what is strict, what the command line may change."""

import pytest

from upcycle.errors import RecipeError
from upcycle.recipe import ROLES
from upcycle.recipe_file import builtin_recipes, load_recipe, parse_recipe


def test_every_recipe_names_its_paper_and_its_need():
    recipes = builtin_recipes()
    assert {"bam", "bam-kv-shared", "btx", "btx-top1", "average", "sparse-upcycling"} <= set(recipes)
    for recipe in recipes.values():
        assert recipe.paper.startswith("arXiv:")
        assert recipe.needs
        assert f"--recipe {recipe.name}" in recipe.example
        assert set(recipe.mix) == set(ROLES)


@pytest.mark.parametrize(
    ("name", "top_k", "normalize", "attention", "shared"),
    [
        ("bam", 1, False, True, False),
        ("bam-kv-shared", 1, False, True, True),
        ("btx", 2, True, False, False),
        ("btx-top1", 1, False, False, False),
        ("sparse-upcycling", 2, True, False, False),
    ],
)
def test_routers_are_those_of_the_papers(name, top_k, normalize, attention, shared):
    recipe = load_recipe(name)
    assert (recipe.ffn_router.top_k, recipe.ffn_router.normalize) == (top_k, normalize)
    assert (recipe.attention_experts, recipe.shared_key_value) == (attention, shared)


def test_overrides_change_one_value():
    recipe = load_recipe("bam", ["router.ffn.top_k=2", "loss.z=0", "mix.norm=seed:base", "router.ffn.init=zeros"])
    assert recipe.ffn_router.top_k == 2
    assert recipe.loss.z == 0.0
    assert recipe.mix["norm"] == "seed:base"
    assert recipe.ffn_router.init == "zeros"
    assert recipe.attention_router.init == "random"


def test_a_resolved_recipe_is_the_same_recipe():
    for recipe in builtin_recipes().values():
        again = parse_recipe(recipe.name, {k: v for k, v in recipe.resolved().items() if k != "name"})
        assert (again.mix, again.ffn_router, again.attention_router, again.loss) == (
            recipe.mix,
            recipe.ffn_router,
            recipe.attention_router,
            recipe.loss,
        )


def test_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text('summary = "Mine."\n[mix]\nffn = "experts"\ndefault = "mean"\n')
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    assert recipe.name == "mine"
    assert recipe.ffn_experts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("router.ffn.topk=2", "did you mean 'top_k'"),
        ("mix.atention.query=mean", "did you mean 'attention.query'"),
        ("mix.ffn=expert", "did you mean 'experts'"),
        ("router.ffn.top_k=two", "expected a whole number"),
        ("router.ffn.top_k=0", "expected 1 or more"),
        ("router.ffn.init=randon", "did you mean 'random'"),
        ("router.attention.routing=top_k", "expected 'soft'"),
        ("loss.balance=1", "did you mean 'load_balance'"),
        ("loss.z=-1", "expected 0 or more"),
        ("mix.norm=experts", "no router chooses"),
        ("mix.attention.output=mean", "must both be experts"),
        ("mix.attention.key=mean", "must both be experts"),
        ("mix.default=experts", "name the roles instead"),
        ("mix.norm=weighted", "[weights] is missing"),
        ("summary=1", "expected text"),
        ("top_k", "expected key=value"),
        ("mix.ffn=mean", "attention experts need ffn"),
    ],
)
def test_a_wrong_value_names_the_right_one(override, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe("bam", [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        ("average", "router.ffn.top_k=2"),
        ("btx", "router.attention.init=zeros"),
        ("bam", "weights.a=1"),
        ("average", "loss.z=0"),
    ],
)
def test_no_option_is_without_effect(recipe, override):
    with pytest.raises(RecipeError, match="no effect"):
        load_recipe(recipe, [override])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'bam-kv-shared'"):
        load_recipe("bam-kv-share")


@pytest.mark.parametrize("text", ["not toml", "", "summary = 3", 'summary = "x"\nmix = 3'])
def test_a_broken_file_is_refused(text, tmp_path):
    (tmp_path / "broken.toml").write_text(text)
    with pytest.raises(RecipeError, match="broken"):
        load_recipe(str(tmp_path / "broken.toml"))
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(str(tmp_path / "missing.toml"))
