"""Recipes in words: what is said holds, for every recipe; and the commands that say it."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import upcycle
from tests.conftest import run_cli
from tests.tiny import BY_NAME, VOCAB, make_seed
from upcycle.checkpoint import read_json
from upcycle.errors import RecipeError, SeedError
from upcycle.explain import REFERENCE, explain, in_one_line, starts_as
from upcycle.families import FAMILIES
from upcycle.merge import merge
from upcycle.plan import plan_merge
from upcycle.recipe_file import builtin_recipes, load_recipe, parse_recipe
from upcycle.scaling import config_cost
from upcycle.seeds import read_seeds

PAPER = Path(__file__).parent / "data" / "paper_small.json"
LLAMA = Path(__file__).parent / "data" / "llama_7b.json"
DOCS = Path(__file__).parent.parent / "docs" / "recipes.md"
# What a test of equal seeds without text must change.
OVERRIDES = {"flex": ["router.ffn.init=random"], "btx-extra": ["experts.extra_from=mean"]}
STARTS = [
    *((name, OVERRIDES.get(name, [])) for name in builtin_recipes()),
    ("bam", ["router.ffn.top_k=2", "router.ffn.normalize=true", "experts.granularity=2"]),
    ("top-k-attention", ["router.ffn.normalize=true"]),
    ("top-k-attention", ["router.ffn.normalize=true", "router.attention.normalize=true", "layers.mix=every 2"]),
    ("btx", ["experts.shared=['mean', 'seed:b']", "experts.shared_weight=0.3", "router.ffn.bias.a=1"]),
    ("sparse-upcycling", ["router.ffn.normalize=false"]),
    ("sparse-upcycling", ["router.ffn.init=zeros", "layers.mix=every 2"]),
    ("virtual-groups", ["experts.granularity=6", "router.ffn.top_k=1", "router.ffn.bias.a=-1"]),
]


def sections(recipe, *arguments):
    return dict(explain(recipe, *arguments).sections)


@pytest.fixture(scope="module")
def equal_seeds(tmp_path_factory):
    """Three folders of one model."""
    folder = tmp_path_factory.mktemp("equal")
    first = make_seed(BY_NAME["llama"], folder / "a", 0)
    return [first, *(shutil.copytree(first, folder / name) for name in "bc")]


@pytest.mark.parametrize(
    ("name", "overrides"), STARTS, ids=lambda value: ",".join(value) or "as it is" if isinstance(value, list) else value
)
def test_a_mixture_starts_as_is_said(name, overrides, equal_seeds, tmp_path):
    recipe = load_recipe(name, overrides)
    seeds = read_seeds([str(path) for path in equal_seeds[: 1 if recipe.copies else 3]])
    merge(plan_merge(recipe, seeds, num_experts=3 if recipe.copies else None, allow_unrelated=True), tmp_path / "out")
    upcycle.register()
    x = torch.arange(3, VOCAB)[None]
    with torch.no_grad():
        made, seed = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(x).logits
            for path in (tmp_path / "out", equal_seeds[0])
        )
    far = (made - seed).abs().max().item()
    assert (starts_as(recipe) == "seed") == (recipe.copies and far < 1e-4)
    assert (starts_as(recipe) != "other") == (far < 1e-4), far


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipe_is_explained(name):
    recipe = load_recipe(name)
    found = explain(recipe)
    assert found.estimate
    assert found.num_experts == 4
    assert set(found.formats) == set(FAMILIES)
    words = dict(found.sections)
    assert words["Example"] == recipe.example
    assert words["Needs"] == recipe.needs
    assert ("FFN router" in words, "Attention router" in words) == (recipe.ffn_experts, recipe.attention_experts)
    assert not any("  " in text or ".." in text or "None" in text for text in words.values())


def test_each_role_is_told():
    table = {
        "summary": "x",
        "mix": {
            "ffn": "experts",
            "attention": {"query": "weighted", "key": "mean", "value": "seed:law", "output": "equal"},
            "norm": "ancestor",
            "embedding": "usage",
            "head": "usage",
        },
        "weights": {"code": 2, "law": 0.5},
    }
    mix = sections(parse_recipe("x", table))["Mix"].splitlines()
    assert mix == [
        "FFN: each seed's stays an expert of its own; the router picks some for each token",
        "attention.query: the mean, weighted: code 2, law 0.5",
        "attention.key: the mean of the seeds'",
        "attention.value: that of seed 'law'",
        "attention.output: the same in all seeds; refused, and by which tensor, where it is not",
        "norms: that of the seeds' ancestor, which is found among four or more by its weights",
        "embedding, head: with --router-data each token's row by how often each seed's text has it, else the mean, "
        "weighted: code 2, law 0.5",
    ]


@pytest.mark.parametrize(
    ("recipe", "overrides", "section", "text"),
    [
        ("btx", ["experts.granularity=4"], "Experts", "split by its inner units into 4 experts"),
        ("btx", ["experts.granularity=4"], "FFN router", "the 2 FFNs with the largest gates, whole: 8 experts"),
        ("btx", ["experts.extra=2"], "Experts", "2 more, the ancestor's FFN"),
        ("btx", ["experts.extra=1", "experts.extra_from=seed:law"], "Experts", "1 more, seed 'law's FFN"),
        ("btx", ["experts.extra=1"], "FFN router", "random (standard deviation 0.02)."),
        ("btx", ["experts.shared=['mean']"], "Experts", "1 shared (the seeds' mean FFN)"),
        ("btx", ["experts.noise=0.25"], "Experts", "noise of 0.25"),
        ("btx", ["experts.drop=0.5"], "Experts", "50% are drawn anew"),
        (
            "btx",
            ["layers.mix=every 2", "mix.norm=ancestor"],
            "Layers",
            "every 2. The others are dense, mixed as the norms",
        ),
        ("btx", ["layers.mix=0-3"], "Layers", "number 0-3 (from 0)"),
        ("btx", ["router.ffn.bias.law=-1"], "FFN router", "by expert: law -1"),
        ("btx", ["router.ffn.top_k=1"], "FFN router", "gives the router no gradient"),
        ("btx", ["router.ffn.init=zeros"], "FFN router", "starts at zero"),
        ("btx", ["router.ffn.init=fit"], "FFN router", "starts as a logistic regression"),
        ("btx", ["router.ffn.init=prototypes"], "FFN router", "the means of each seed's text"),
        ("btx-top1", [], "FFN router", "keep_scale"),
        ("bam", [], "Attention router", "Soft: every token uses every expert"),
        ("top-k-attention", [], "Attention router", "the 2 with the largest gates"),
        ("btx", ["loss.load_balance=0.5"], "Loss", "0.5 load balance + 0 z"),
        ("btx", [], "Format", "Native, a class of transformers' own, for Llama, Mistral (Mixtral), "),
        (
            "btx-top1",
            [],
            "Format",
            "BAM for Llama, Mistral (Mixtral), Cohere2 (Cohere2Moe), Granite (GraniteMoe): the class",
        ),
        ("btx-top1", [], "Format", "With --router-data BAM for Qwen2 (Qwen2Moe)"),
        ("bam", [], "Format", "BAM for every family: its attention is mixed too"),
        ("bam-kv-shared", [], "Format", "Refused for GPTNeoX: "),
        ("average", [], "Format", "A dense model of the seeds' own family."),
    ],
)
def test_what_a_key_does_is_told(recipe, overrides, section, text):
    assert text in sections(load_recipe(recipe, overrides))[section]


def test_formats_are_those_of_merges():
    """Whatever the sizes of the families' default models: no layers or units of theirs stand in the way."""
    found = explain(load_recipe("btx", ["experts.granularity=7", "layers.mix=90-"]))
    assert found.formats["qwen3"].native == "Qwen3MoeForCausalLM"
    assert found.formats["olmo2"].why == "FlexOlmo has experts in every layer, and the recipe leaves some dense"
    assert found.estimate is None
    assert "the layers 0 to 15" in found.misfit


def test_costs_are_those_of_plan():
    config = read_json(PAPER)
    for name in ("bam", "btx-top1", "virtual-groups"):
        recipe = load_recipe(name)
        found = explain(recipe, config, str(PAPER), 8)
        assert found.estimate == config_cost(recipe, PAPER, 8, None, 5 * 10**9, 2048)
    assert "BAM, since Cohere2Moe always rescales" in sections(load_recipe("btx-top1"), config, "c.json")["Format"]
    assert "c.json: native, Cohere2MoeForCausalLM." in sections(load_recipe("btx"), config, "c.json")["Format"]
    # As many experts as routers choose where that is more than 4.
    assert explain(load_recipe("btx", ["router.ffn.top_k=8"])).num_experts == 8
    with pytest.raises(RecipeError, match="only 4 experts"):
        explain(load_recipe("btx", ["router.ffn.top_k=8"]), config, "c.json", 4)
    with pytest.raises(SeedError, match="cannot be mixed"):
        explain(load_recipe("btx"), {"model_type": "bert"}, "c.json")


def test_the_reference_is_what_is_said_of_it():
    found = explain(load_recipe("average"))
    assert found.estimate.cost == found.estimate.dense
    assert round(found.estimate.dense.total_parameters / 1e9, 2) == 1.24
    text = " ".join(DOCS.read_text().split())
    assert (
        f"hidden {REFERENCE['hidden_size']}, inner {REFERENCE['intermediate_size']}, "
        f"{REFERENCE['num_hidden_layers']} layers, "
        f"{REFERENCE['num_attention_heads']} heads in {REFERENCE['num_key_value_heads']} groups, "
        f"vocabulary {REFERENCE['vocab_size']:,}, tied"
    ) in text


def test_show_reads_well_and_as_json():
    shown = run_cli("recipes", "show", "bam")
    assert (shown.returncode, shown.stderr) == (0, "")
    for text in (
        "Attention router   Soft",
        "At the start",
        "Cost of 4 × a Llama of 1.24 billion parameters (format bam)",
    ):
        assert text in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 200
    found = json.loads(run_cli("recipes", "show", "btx", "--config", LLAMA, "--num-experts", 8, "--json").stdout)
    assert set(found) == {"recipe", "explanation", "formats", "of"}
    assert (found["recipe"]["name"], found["recipe"]["start"]) == ("btx", "equal")
    assert (found["of"]["num_experts"], found["of"]["format"], found["of"]["model_type"]) == (8, "native", "mixtral")
    assert found["of"]["ratios"]["cache_bytes_per_token"] == 1.0
    assert found["of"]["ratios"]["total_parameters"] > 5
    assert found["formats"]["llama"]["native"] == "MixtralForCausalLM"


def test_show_without_a_cost_says_why(tmp_path):
    (tmp_path / "upper.toml").write_text('summary = "Up."\n[mix]\nffn = "experts"\n[layers]\nmix = "20-"\n')
    shown = run_cli("recipes", "show", "upper.toml", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "Its cost is not shown: of a Llama of 1.24 billion parameters, [layers]" in shown.stdout
    assert "Up.." not in shown.stdout
    assert json.loads(run_cli("recipes", "show", "upper.toml", "--json", cwd=tmp_path).stdout)["of"]["cost"] is None
    shown = run_cli("recipes", "show", "upper.toml", "--config", LLAMA, cwd=tmp_path)
    assert "Cost of 4 × " in shown.stdout


def test_check_says_what_a_file_makes(tmp_path):
    text = DOCS.read_text().split("```toml\n")[1].split("```")[0]
    assert len(text.splitlines()) == 10
    (tmp_path / "half.toml").write_text(text)
    done = run_cli("recipes", "check", "half.toml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout in DOCS.read_text()
    found = json.loads(run_cli("recipes", "check", "half.toml", "--json", cwd=tmp_path).stdout)
    assert found["file"] == "half.toml"
    assert (
        found["makes"]
        == done.stdout.partition(": ")[2].strip()
        == in_one_line(parse_recipe("half", tomllib.loads(text)))
    )
    assert found["recipe"]["experts"]["shared"] == ["mean"]


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_check_refuses_with_the_parsers_message(flags, tmp_path):
    (tmp_path / "wrong.toml").write_text('summary = "x"\n[mix]\nffn = "expert"\n')
    for file, message in (
        ("wrong.toml", "ffn = 'expert' is no way to mix; did you mean 'experts'?"),
        ("missing.toml", "cannot be read"),
        ("bam", "its name must end in .toml"),
    ):
        done = run_cli("recipes", "check", file, *flags, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("recipes", "show", "bamm"), 1, "did you mean 'bam'"),
        (("recipes", "show"), 2, "RECIPE"),
        (("recipes", "shwo"), 2, "Did you mean 'show'"),
        (("recipes", "--json", "show", "bam"), 2, "upcycle recipes show"),
        (("recipes", "show", "bam", "--num-experts", "1"), 2, "--num-experts"),
        (("recipes", "show", "btx", "--config", "no.json"), 1, "no.json"),
        (("recipes", "show", "bam-kv-shared", "--config", "neox.json"), 1, "grouped queries"),
    ],
)
def test_what_cannot_be_shown_is_one_message(arguments, code, message, tmp_path):
    (tmp_path / "neox.json").write_text('{"model_type": "gpt_neox"}')
    done = run_cli(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_bare_command_lists():
    done = run_cli("recipes")
    assert (done.returncode, done.stderr) == (0, "")
    listed = json.loads(run_cli("recipes", "--json").stdout)["recipes"]
    assert [recipe["name"] for recipe in listed] == list(builtin_recipes())
    for recipe in listed:
        assert f"{recipe['name']}   " in done.stdout
        assert {"summary", "paper", "needs", "example", "mix", "start"} <= set(recipe)
