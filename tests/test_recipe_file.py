"""Recipe files: what ships, what is strict, what the command line may change, what the documents say of them."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from upcycle.errors import RecipeError
from upcycle.recipe import (
    ANCESTOR,
    EQUAL,
    EXPERTS,
    INITS,
    MEAN,
    ROLES,
    USAGE,
    WEIGHTED,
    AttentionRouter,
    Experts,
    FfnRouter,
    Loss,
)
from upcycle.recipe_file import MAX_EXPERTS, SCALARS, SECTIONS, builtin_recipes, load_recipe, parse_recipe

DOCS = Path(__file__).parent.parent / "docs" / "recipes.md"
EVERY_KEY = {
    "summary": "Every key, none at its default",
    "paper": "arXiv:0000.00000",
    "needs": "a, b and c",
    "example": "upcycle merge",
    "mix": {
        "ffn": "experts",
        "attention": {"query": "experts", "key": "weighted", "value": "mean", "output": "experts"},
        "norm": "seed:a",
        "embedding": "usage",
        "default": "weighted",
    },
    "layers": {"mix": "0-1, 3"},
    "experts": {
        "granularity": 2,
        "extra": 1,
        "extra_from": "seed:b",
        "shared": ["mean", "weighted", "ancestor", "seed:c"],
        "shared_weight": 0.25,
        "noise": 0.125,
        "drop": 0.5,
    },
    "weights": {"a": 1, "b": 2.5, "c": 0},
    "prompts": {"a": ["one", "two"], "b": ["three"], "c": ["four"]},
    "router": {
        "ffn": {
            "top_k": 2,
            "normalize": True,
            "init": "fit",
            "std": 0.5,
            "softness": 2,
            "keep_scale": False,
            "bias": {"a": -1, "b": 0.5},
        },
        "attention": {
            "routing": "top-k",
            "top_k": 2,
            "normalize": True,
            "init": "prototypes",
            "std": 0.25,
            "softness": 1.5,
        },
    },
    "loss": {"load_balance": 0.5, "z": 0.25},
}


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


def acts(recipe):
    """All of a recipe but for the words about it, which `upcycle.json` does not need."""
    words = ("needs", "example")
    return {field.name: getattr(recipe, field.name) for field in fields(recipe) if field.name not in words}


def again(recipe):
    return parse_recipe(recipe.name, {key: value for key, value in recipe.resolved().items() if key != "name"})


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_resolved_recipe_is_the_same_recipe(name):
    recipe = load_recipe(name)
    assert acts(again(recipe)) == acts(recipe)
    if not recipe.from_text():
        settled = recipe.settled(has_text=False)
        assert acts(again(settled)) == acts(settled)


def test_a_resolved_recipe_with_every_key_is_the_same_recipe():
    recipe = parse_recipe("every", EVERY_KEY)
    assert acts(again(recipe)) == acts(recipe)
    # None of its keys is at its default, so that what `resolved` would forget is missed.
    for default, found in (
        (Experts(), recipe.experts),
        (FfnRouter(), recipe.ffn_router),
        (AttentionRouter(), recipe.attention_router),
        (Loss(), recipe.loss),
    ):
        for field in fields(default):
            assert getattr(found, field.name) != getattr(default, field.name), field.name
    assert set(EVERY_KEY) == {*SCALARS, *SECTIONS} - {"copies"}
    weighted = recipe.weighted_by({"a": 1.0, "b": 2.0, "c": 3.0})
    assert acts(again(weighted)) == acts(weighted)


def test_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text('summary = "Mine."\n[mix]\nffn = "experts"\ndefault = "mean"\n')
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    assert recipe.name == "mine"
    assert recipe.ffn_experts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("router.ffn.topk=2", "did you mean 'top_k'"),
        ("router.fnn.top_k=2", "did you mean 'ffn'"),
        ("expert.noise=1", "did you mean 'experts'"),
        ("layer.mix=all", "did you mean 'layers'"),
        ("layers.mixed=all", "did you mean 'mix'"),
        ("mix.atention.query=mean", "did you mean 'attention.query'"),
        ("mix.ffn=expert", "did you mean 'experts'"),
        ("mix.ffn=3", "3 is no way to mix"),
        ("router.ffn.top_k=two", "expected a whole number"),
        ("router.ffn.top_k=2.0", "expected a whole number"),
        ("router.ffn.top_k=true", "expected a whole number"),
        ("router.ffn.top_k=0", "expected 1 or more"),
        ("router.ffn.top_k=99999999999999999999", "whole number beyond any use"),
        ("router.ffn.normalize=1", "expected true or false"),
        ("router.ffn.std=yes", "expected a number"),
        ("router.ffn.std=0", "expected between 0 and 1"),
        ("router.ffn.std=nan", "expected between 0 and 1"),
        ("router.ffn.softness=0", "expected above 0"),
        ("router.ffn.init=randon", "did you mean 'random'"),
        ("router.ffn.bias=1", "expected a table of numbers"),
        ("router.ffn.bias.code=low", "bias: code is 'low', expected a number"),
        ("router.ffn.bias.code=nan", "code is nan, expected a number of a logit's size"),
        ("router.ffn.bias.code=1e9", "expected a number of a logit's size"),
        ("router.attention.routing=top_k", "expected 'soft' or 'top-k'"),
        ("router.attention.routing=2", "expected text"),
        ("router.attention.top_k=0", "expected 1 or more"),
        ("router.attention.topk=1", "did you mean 'top_k'"),
        ("router.attention.init=fitt", "did you mean 'fit'"),
        ("router.attention.std=1", "expected between 0 and 1"),
        ("router.attention.keep_scale=true", "unknown key 'keep_scale'"),
        ("loss.balance=1", "did you mean 'load_balance'"),
        ("loss.z=-1", "expected 0 or more"),
        ("loss.z=inf", "expected 0 or more"),
        ("mix.norm=experts", "no router chooses"),
        ("mix.norm=usage", "no row for each token"),
        ("mix.attention.output=mean", "must both be experts"),
        ("mix.attention.key=mean", "must both be experts"),
        ("mix.default=experts", "name the roles instead"),
        ("mix.norm=weighted", "[weights] is missing"),
        ("experts.shared=['weighted']", "[weights] is missing"),
        ("weights.code=much", "expected a number"),
        ("prompts.code=text", "expected a list of texts"),
        ("prompts.code=[]", "expected a list of texts"),
        ("prompts.code=[' ']", "expected a list of texts"),
        ("summary=1", "expected text"),
        ("copies=1", "expected true or false"),
        ("sumary=x", "did you mean 'summary'"),
        ("router=1", "expected a table"),
        ("layers=1", "expected a table"),
        ("layers.mix=odd", 'expected "all", "every 2" or like "0-3, 6, 8-"'),
        ("layers.mix=3-2", "there are the layers"),
        ("top_k", "expected key=value"),
        ("summary.x=1", "'summary' is a value"),
        ("mix.ffn=mean", "attention experts need ffn"),
        ("experts.granular=2", "did you mean 'granularity'"),
        ("experts.granularity=0", "expected 1 to 1024"),
        ("experts.granularity=half", "expected a whole number"),
        ("experts.extra=-1", "expected 0 to 1024"),
        ("experts.extra_from=ancestors", "did you mean 'ancestor'"),
        ("experts.extra_from=usage", "expected ancestor, mean, weighted or seed:<name>"),
        ("experts.shared=mean", "expected a list of texts"),
        ("experts.shared=[1]", "expected text"),
        ("experts.shared=['men']", "did you mean 'mean'"),
        ("experts.shared_weight=1", "expected between 0 and 1"),
        ("experts.shared_weight=0", "expected between 0 and 1"),
        ("experts.noise=-0.1", "expected 0 (none) to 10"),
        ("experts.noise=nan", "expected 0 (none) to 10"),
        ("experts.drop=1.5", "expected 0 (none) to 1"),
        ("experts.drop=all", "expected a number"),
    ],
)
def test_a_wrong_value_names_the_right_one(override, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe("bam", [override])
    assert message in str(caught.value)


def test_split_experts_need_gates_that_differ():
    """Where all tie the top-k is any of them, not whole groups."""
    for init in ("random", "fit", "prototypes"):
        load_recipe("virtual-groups", [f"router.ffn.init={init}"])
    with pytest.raises(RecipeError, match="all gates tie"):
        load_recipe("virtual-groups", ["router.ffn.init=zeros"])
    load_recipe("virtual-groups", ["router.ffn.init=zeros", "experts.granularity=1"])


def test_not_too_many_shared_experts():
    with pytest.raises(RecipeError, match="1025 shared experts"):
        load_recipe("btx", [f"experts.shared={['mean'] * (MAX_EXPERTS + 1)}"])


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        ("average", "router.ffn.top_k=2"),
        ("btx", "router.attention.init=zeros"),
        ("average", "weights.a=1"),
        ("average", "loss.z=0"),
        ("average", "experts.noise=0.1"),
        ("average", "layers.mix=every 2"),
        ("average", "prompts.a=['x']"),
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


def toml(value):
    """A default as a recipe file says it; `–` where there is none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"' if value else "–"
    if isinstance(value, dict):
        return "{}"
    return "[]" if value == () else str(value)


def parser_keys():
    """Every key of a recipe file, by the section as the document's heading says it, with its default."""
    keys = {("top", key): "–" if kind is str else "false" for key, kind in SCALARS.items()}
    keys |= {("mix", role): "default" for role in ROLES}
    keys |= {("mix", "default"): '"mean"', ("layers", "mix"): '"all"'}
    keys |= {("weights", "NAME"): "–", ("prompts", "NAME"): "–"}
    sections = {"experts": Experts(), "router.ffn": FfnRouter(), "router.attention": AttentionRouter(), "loss": Loss()}
    for section, default in sections.items():
        keys |= {(section, field.name): toml(getattr(default, field.name)) for field in fields(default)}
    return keys


def test_the_document_names_every_key_with_its_default_and_no_other():
    documented = {}
    section, keys = "", False  # whether the table at hand is one of keys
    for line in DOCS.read_text().splitlines():
        if line.startswith("#"):
            found = re.fullmatch(r"### (?:`\[(.+)\]`|The (top) of the file)", line)
            section = (found[1] or found[2]) if found else ""
        keys = line.startswith("| key |") or (keys and line.startswith("|"))
        if keys and (row := re.match(r"\| `([^`]+)` \| (.+?) \|", line)):
            assert (section, row[1]) not in documented
            documented[section, row[1]] = row[2].replace("`", "")
    assert documented == parser_keys()
    assert {section.partition(".")[0] for section, _ in documented} == {"top", *SECTIONS}


def test_the_document_names_every_way_to_mix_and_to_initialise():
    text = DOCS.read_text()
    for way in (EXPERTS, MEAN, WEIGHTED, USAGE, EQUAL, ANCESTOR):
        assert f"\n| `{way}` |" in text, way
    assert "\n| `seed:NAME` |" in text
    for init in INITS:
        assert f"`{init}`" in text, init


def test_the_documents_recipes_are_recipes():
    import tomllib

    blocks = re.findall(r"```toml\n(.*?)```", DOCS.read_text(), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        parse_recipe("documented", tomllib.loads(block))


def test_the_documents_commands_name_what_there_is():
    for name in re.findall(r"(?:--recipe|recipes show) ([\w-]+)(?![\w.-])", DOCS.read_text()):
        load_recipe(name)
