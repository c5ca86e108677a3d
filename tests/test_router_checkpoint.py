"""Routers of checkpoints set from text: in a merge, in a copy of a mixture, in transformers' own."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from tests.conftest import run_cli
from tests.test_routers import texts
from tests.tiny import BY_NAME, VOCAB, edit_json, make_seeds, mixtral_config
from upcycle.card import write_card
from upcycle.checksums import read_sums
from upcycle.errors import CheckpointError, OutputError, RecipeError
from upcycle.merge import merge
from upcycle.plan import plan_merge
from upcycle.recipe import FfnRouter
from upcycle.recipe_file import load_recipe, parse_recipe
from upcycle.router_checkpoint import init_routers, router_settings, set_checkpoint_routers
from upcycle.router_text import RouterText
from upcycle.seeds import read_seeds
from upcycle.staging import partial_folder
from upcycle.training_settings import read_facts
from upcycle.verify import verify

NAMES = ("code", "law", "math")


def text_for(names: tuple[str, ...] = NAMES) -> RouterText:
    return RouterText(list(names), texts().windows)


def merged_with_text(seeds: list[Path], out: Path, recipe: str = "bam", *overrides: str) -> Any:
    text = text_for()
    plan = plan_merge(
        load_recipe(recipe, overrides), read_seeds([str(s) for s in seeds]), text=text.record(), usage=text.usage(VOCAB)
    )
    merge(plan, out, finish=lambda folder: set_checkpoint_routers(folder, text, plan.recipe.from_text())[1])
    return plan


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The same text as words for the command line."""
    for name, windows in zip(NAMES, texts().windows, strict=True):
        np.save(tmp_path / f"{name}-text.npy", windows.astype(np.uint16))
    return [f"{name}={tmp_path / f'{name}-text.npy'}" for name in NAMES]


@pytest.mark.parametrize("recipe", ["bam", "bam-kv-shared", "btx", "btx-top1"])
def test_a_merge_with_text_is_whole_and_proven(recipe: str, seeds: list[Path], tmp_path: Path) -> None:
    merged_with_text(seeds, tmp_path / "out", recipe)
    found = verify(tmp_path / "out", [str(seed) for seed in seeds], load=True)
    assert found.problems == []
    routers = 2 if recipe.startswith("btx") else 4
    assert found.from_text == routers + 2  # embedding and head are weighted by the text
    assert found.remade == found.tensors - found.from_text
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert record["router_text"] == text_for().record()
    assert set(record["routers"]) == {"ffn"} | (set() if recipe.startswith("btx") else {"attention"})
    assert min(record["routers"]["ffn"]["accuracy"]) > 0.6  # of 1/3 by chance
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("ffn_scale" in config) == (recipe != "btx")  # whose gates are rescaled anyway


def test_the_scale_survives_loading_saving_and_training_code(seeds: list[Path], tmp_path: Path) -> None:
    merged_with_text(seeds, tmp_path / "out")
    wanted = json.loads((tmp_path / "out" / "config.json").read_text())["ffn_scale"]
    assert all(scale > 1.05 for scale in wanted)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    for loaded in (model, again):
        assert [float(layer.mlp.scale) for layer in loaded.dense.model.layers] == pytest.approx(wanted, rel=1e-6)
    quiet = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(quiet(tokens).logits, again(tokens).logits)
        for layer in quiet.dense.model.layers:
            layer.mlp.scale.fill_(1.0)
        assert not torch.allclose(quiet(tokens).logits, again(tokens).logits, atol=1e-3)


def test_embeddings_are_weighted_by_what_each_text_has(seeds: list[Path], tmp_path: Path) -> None:
    plan = merged_with_text(seeds, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    shares = torch.from_numpy(plan.usage)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        own = torch.stack([load_file(seed / "model.safetensors")[name].double() for seed in seeds])
        expected = torch.einsum("vn,nvd->vd", shares, own)
        torch.testing.assert_close(tensors[f"dense.{name}"].double(), expected, rtol=2**-8, atol=1e-6)
        assert not torch.allclose(tensors[f"dense.{name}"].double(), own.mean(0), rtol=2**-8, atol=1e-6)


def test_identical_seeds_give_the_dense_model_whatever_the_text(seeds: list[Path], tmp_path: Path) -> None:
    """With rescaled gates to the bit of rounding; with the scale in the place of that on average alone."""
    shutil.copytree(seeds[0], tmp_path / "a")
    same = [f"{name}={tmp_path / 'a'}" for name in NAMES]
    text = text_for()
    usage = text.usage(VOCAB)
    plan = plan_merge(
        load_recipe("bam", ["router.ffn.normalize=true"]), read_seeds(same), text=text.record(), usage=usage
    )
    merge(
        plan, tmp_path / "out", finish=lambda folder: set_checkpoint_routers(folder, text, plan.recipe.from_text())[1]
    )
    dense, mixed = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("a", "out"))
    tokens = torch.from_numpy(text.windows[0][:2])
    with torch.no_grad():
        torch.testing.assert_close(mixed(tokens).logits, dense(tokens).logits, atol=1e-4, rtol=0)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    own = load_file(tmp_path / "a" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(tensors[f"dense.{name}"], own[name], rtol=0, atol=0)


def test_the_same_text_gives_the_same_bytes(seeds: list[Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        merged_with_text(seeds, tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_what_is_interrupted_while_routers_are_set_leaves_nothing_that_looks_finished(
    failure: type[BaseException], seeds: list[Path], tmp_path: Path
) -> None:
    text, out = text_for(), tmp_path / "out"
    plan = plan_merge(
        load_recipe("bam"), read_seeds([str(s) for s in seeds]), text=text.record(), usage=text.usage(VOCAB)
    )

    def half(folder: Path) -> Any:
        changed = set_checkpoint_routers(folder, text, plan.recipe.from_text())[1]
        raise failure(str(changed))

    with pytest.raises(failure):
        merge(plan, out, finish=half)
    assert not out.exists()
    assert partial_folder(out).exists() == (failure is KeyboardInterrupt)
    merge(plan, out, finish=lambda folder: set_checkpoint_routers(folder, text, plan.recipe.from_text())[1])
    merged_with_text(seeds, tmp_path / "whole")
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes(), file.name


def test_a_finished_mixture_gets_routers_in_a_copy(seeds: list[Path], tmp_path: Path) -> None:
    merge(plan_merge(load_recipe("bam"), read_seeds([str(seed) for seed in seeds])), tmp_path / "random")
    before = {file.name: file.read_bytes() for file in (tmp_path / "random").iterdir()}
    settings = router_settings(tmp_path / "random", read_facts(tmp_path / "random"), "fit")
    result = init_routers(tmp_path / "random", tmp_path / "out", text_for(), settings)
    assert {file.name: file.read_bytes() for file in (tmp_path / "random").iterdir()} == before
    assert min(result.accuracy["attention"]) > 0.6  # of 1/3 by chance
    found = verify(tmp_path / "out", [str(seed) for seed in seeds], load=True)
    assert (found.problems, found.from_text) == ([], 4)
    tensors, old = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "random"))
    assert {name for name in tensors if not torch.equal(tensors[name], old[name])} == {
        name for name in tensors if "router" in name
    }
    assert "routers are untrained" in (tmp_path / "random" / "README.md").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "routers are untrained" not in card
    assert "Its routers are set from text" in card
    assert "of the time in the attention and" in card
    with pytest.raises(OutputError, match="exists"):
        init_routers(tmp_path / "random", tmp_path / "out", text_for(), settings)


def test_one_of_transformers_own_mixtures_gets_routers_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    MixtralForCausalLM(mixtral_config()).to(torch.bfloat16).save_pretrained(tmp_path / "mixtral")
    text = RouterText(list("0123"), [*texts().windows, texts().windows[0] % 7 + 3])
    settings = router_settings(tmp_path / "mixtral", read_facts(tmp_path / "mixtral"), "prototypes")
    init_routers(tmp_path / "mixtral", tmp_path / "out", text, settings)
    tensors, old = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "mixtral"))
    changed = {name for name in tensors if not torch.equal(tensors[name], old[name])}
    assert changed == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in (0, 1)}
    assert read_sums(tmp_path / "out") is None  # as it had none before
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_text_has_no_use_where_nothing_is_routed(seeds: list[Path]) -> None:
    text = text_for().record()
    read = read_seeds([str(seed) for seed in seeds])
    with pytest.raises(RecipeError, match="makes no experts"):
        plan_merge(load_recipe("average"), read, text=text)
    with pytest.raises(RecipeError, match="all experts of one seed"):
        plan_merge(load_recipe("sparse-upcycling"), read[:1], num_experts=2, text=text)


def test_what_the_recipe_says_of_routers_holds(seeds: list[Path]) -> None:
    read, text = read_seeds([str(seed) for seed in seeds]), text_for().record()
    one = plan_merge(load_recipe("bam", ["router.ffn.init=prototypes"]), read, text=text).recipe
    assert (one.ffn_router.init, one.attention_router.init) == ("prototypes", "random")
    zeros = plan_merge(load_recipe("bam", ["router.attention.init=zeros"]), read, text=text).recipe
    assert (zeros.ffn_router.init, zeros.attention_router.init) == ("fit", "zeros")
    plain = plan_merge(load_recipe("bam"), read)
    assert plain.recipe.mix["embedding"] == "mean"
    with pytest.raises(RecipeError, match="init is 'fit', which needs text"):
        plan_merge(load_recipe("bam", ["router.ffn.init=fit"]), read)


def test_recipes_say_what_is_wrong_with_them() -> None:
    bam = {"summary": "x", "mix": {"ffn": "experts"}}
    for table, message in (
        ({**bam, "router": {"ffn": {"init": "fitt"}}}, "did you mean 'fit'"),
        ({**bam, "router": {"ffn": {"softness": 0}}}, "softness is"),
        ({**bam, "prompts": {"code": "def"}}, "expected a list of texts"),
        ({"summary": "x", "prompts": {"code": ["def"]}}, "has no effect"),
        ({**bam, "mix": {"ffn": "experts", "norm": "usage"}}, "norm has no row for each token"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe("x", table)


def test_the_command_line_merges_with_text(seeds: list[Path], files: list[str], tmp_path: Path) -> None:
    words = ["--seeds", *seeds, "--recipe", "bam", "--router-data", *files]
    done = run_cli("merge", *words, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert min(json.loads(done.stdout)["router_accuracy"]["ffn"]) > 0.6  # of 1/3 by chance
    for wrong, message in (
        (files[:2], "gives expert 'math' no text"),
        ([*files, "prose=x.npy"], "there is no expert 'prose'"),
        ([*files[:2], "math=nowhere.npy"], "there is no such file"),
    ):
        done = run_cli("merge", *words[:6], "--router-data", *wrong, "--out", tmp_path / "wrong")
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
        assert not (tmp_path / "wrong").exists()
    shown = run_cli("merge", *words, "--out", tmp_path / "dry", "--dry-run")
    assert shown.returncode == 0
    assert not (tmp_path / "dry").exists()


def test_prompts_in_a_recipe_are_text(seeds: list[Path], tmp_path: Path) -> None:
    prompts = "\n".join(
        f"{name} = {json.dumps([' '.join(f'word{3 + 31 * n + i}' for i in range(30))])}" for n, name in enumerate(NAMES)
    )
    (tmp_path / "mine.toml").write_text(f'summary = "x"\n[mix]\nffn = "experts"\n[prompts]\n{prompts}\n')
    done = run_cli("merge", "--seeds", *seeds, "--recipe", tmp_path / "mine.toml", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "Routers are set from text" in done.stdout
    assert run_cli("plan", "--seeds", *seeds, "--recipe", tmp_path / "mine.toml").returncode == 0


def test_the_command_line_sets_routers_of_a_mixture(seeds: list[Path], files: list[str], tmp_path: Path) -> None:
    merge(plan_merge(load_recipe("btx"), read_seeds([str(seed) for seed in seeds])), tmp_path / "btx")
    done = run_cli("routers", tmp_path / "btx", "--data", *files, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "tokens of held-back text that find their own expert: ffn routers" in done.stdout
    done = run_cli("routers", tmp_path / "btx", "--data", *files, "--out", tmp_path / "x", "--only", "attention")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no attention routers" in done.stderr
    done = run_cli("routers", seeds[0], "--data", *files, "--out", tmp_path / "x")
    assert done.returncode == 1
    assert "the model is dense" in done.stderr
    shutil.copytree(tmp_path / "out", tmp_path / "there")
    done = run_cli("routers", tmp_path / "btx", "--data", *files, "--out", tmp_path / "there", "--json", "--yes")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"out", "router_accuracy", "seconds"}


def test_a_config_that_asks_for_router_logits_does_no_harm(tmp_path: Path) -> None:
    config = mixtral_config()
    config.output_router_logits = True
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    text = RouterText(list("0123"), [*texts().windows, texts().windows[0] % 7 + 3])
    settings = router_settings(tmp_path / "mixtral", read_facts(tmp_path / "mixtral"), "fit")
    assert len(init_routers(tmp_path / "mixtral", tmp_path / "out", text, settings).accuracy["ffn"]) == 2


def test_text_that_no_router_is_set_from_is_refused_unless_it_weights_embeddings(seeds: list[Path]) -> None:
    read, text = read_seeds([str(seed) for seed in seeds]), text_for().record()
    zeros = ["router.ffn.init=zeros", "router.attention.init=zeros"]
    assert plan_merge(load_recipe("bam", zeros), read, text=text).recipe.from_text() == {}
    with pytest.raises(RecipeError, match="initialises nothing from text"):
        plan_merge(load_recipe("bam", [*zeros, "mix.embedding=mean", "mix.head=mean"]), read, text=text)


def test_damage_is_not_signed_anew(seeds: list[Path], tmp_path: Path) -> None:
    merge(plan_merge(load_recipe("bam"), read_seeds([str(seed) for seed in seeds])), tmp_path / "out")
    settings = router_settings(tmp_path / "out", read_facts(tmp_path / "out"), "fit")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not what its checksum says"):
        init_routers(tmp_path / "out", tmp_path / "again", text_for(), settings)
    assert not (tmp_path / "again").exists()


def test_weights_that_are_not_finite_are_named(seeds: list[Path], tmp_path: Path) -> None:
    merge(plan_merge(load_recipe("bam"), read_seeds([str(seed) for seed in seeds])), tmp_path / "out")
    (tmp_path / "out" / "upcycle.sums.json").unlink()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["dense.model.layers.0.mlp.experts.down_proj"][0, 0, 0] = float("nan")
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    settings = router_settings(tmp_path / "out", read_facts(tmp_path / "out"), "fit")
    with pytest.raises(CheckpointError, match="layer 1, attention router: its input is not finite"):
        init_routers(tmp_path / "out", tmp_path / "again", text_for(), settings)


def test_routers_of_the_other_kind_keep_their_record(seeds: list[Path], tmp_path: Path) -> None:
    merged_with_text(seeds, tmp_path / "out", "bam", "router.ffn.init=fit")
    found = verify(tmp_path / "out", [str(seed) for seed in seeds])
    assert (found.problems, found.from_text) == ([], 4)  # attention's routers are random, as the seeds' plan has them
    settings = router_settings(tmp_path / "out", read_facts(tmp_path / "out"), "prototypes", only="attention")
    init_routers(tmp_path / "out", tmp_path / "again", text_for(), settings)
    record = json.loads((tmp_path / "again" / "upcycle.json").read_text())["routers"]
    assert (record["ffn"]["init"], record["attention"]["init"]) == ("fit", "prototypes")
    assert record["ffn"] == json.loads((tmp_path / "out" / "upcycle.json").read_text())["routers"]["ffn"]


def test_a_trained_mixture_is_said_to_have_lost_its_routers(seeds: list[Path], tmp_path: Path) -> None:
    merged_with_text(seeds, tmp_path / "out")
    (tmp_path / "out" / "train.json").write_text("{}")
    settings = router_settings(tmp_path / "out", read_facts(tmp_path / "out"), "fit")
    for again in (False, True):  # and can be overwritten like any result
        init_routers(tmp_path / "out", tmp_path / "again", text_for(), settings, overwrite=again)
    assert not (tmp_path / "again" / "train.json").exists()
    assert "set anew, from text, after it was trained" in (tmp_path / "again" / "README.md").read_text()
    (tmp_path / "again" / "train.json").write_text("{}")  # and trained once more
    write_card(tmp_path / "again", "")
    assert "set anew" not in (tmp_path / "again" / "README.md").read_text()


def test_a_recipe_without_scale_stays_without(seeds: list[Path], tmp_path: Path) -> None:
    merged_with_text(seeds, tmp_path / "out", "bam", "router.ffn.keep_scale=false")
    settings = router_settings(tmp_path / "out", read_facts(tmp_path / "out"), "fit")
    init_routers(tmp_path / "out", tmp_path / "again", text_for(), settings)
    for name in ("out", "again"):
        assert "ffn_scale" not in json.loads((tmp_path / name / "config.json").read_text())


def test_a_scale_that_fits_no_model_is_refused(seeds: list[Path], tmp_path: Path) -> None:
    merged_with_text(seeds, tmp_path / "out")
    for scale, message in (
        ([1.0], "has 1 numbers, but there are 2 layers"),
        ([1.0, "x"], "expected a list of numbers"),
    ):
        edit_json(tmp_path / "out" / "config.json", ffn_scale=scale)
        with pytest.raises(CheckpointError, match=message):
            read_facts(tmp_path / "out")


def test_softness_of_no_use_is_refused(mixture: Path) -> None:
    for softness in (0.0, -1.0, 1e6, float("nan")):
        with pytest.raises(RecipeError, match="--softness"):
            router_settings(mixture, read_facts(mixture), "fit", softness)


NATIVE = [
    ("llama", "btx"),
    ("qwen2-full", "btx"),
    ("qwen3", "btx"),
    ("olmo2", "btx"),
    ("granite", "btx"),
    ("cohere2", "btx"),
    ("qwen2-full", "shared-expert"),
]


@pytest.mark.parametrize(("name", "recipe"), NATIVE, ids=["-".join(row) for row in NATIVE])
def test_a_native_mixture_is_merged_with_text_and_set_anew(name: str, recipe: str, tmp_path: Path) -> None:
    """Each class finds its own experts, at merging and after; only routers change."""
    paths = [str(path) for path in make_seeds(BY_NAME[name], tmp_path / "seeds", dtype=torch.bfloat16)]
    text = text_for(("a", "b", "c"))
    options: dict[str, Any] = {"allow_unrelated": True, "format": "native", "usage": text.usage(VOCAB)}
    plan = plan_merge(load_recipe(recipe), read_seeds(paths), text=text.record(), **options)
    merge(
        plan, tmp_path / "mix", finish=lambda folder: set_checkpoint_routers(folder, text, plan.recipe.from_text())[1]
    )
    found = verify(tmp_path / "mix", paths, load=True)
    routers = {tensor.name for tensor in plan.layout.mixture if tensor.router == "ffn"}
    assert len(routers) == 2
    usage = 1 if plan.layout.model.tied else 2
    assert (found.problems, found.from_text) == ([], 2 + usage)
    facts = read_facts(tmp_path / "mix")
    assert (facts.kind, facts.groups, facts.routed) == ("native", ["a", "b", "c"], True)
    settings = router_settings(tmp_path / "mix", facts, "prototypes", softness=1.0)
    result = init_routers(tmp_path / "mix", tmp_path / "out", text, settings)
    assert min(result.accuracy["ffn"]) > 0.5  # of 1/3 by chance
    tensors, old = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "mix"))
    assert {name for name in tensors if not torch.equal(tensors[name], old[name])} == routers
    assert "Its routers are set from text" in (tmp_path / "out" / "README.md").read_text()


def test_split_experts_in_some_layers(seeds: list[Path], tmp_path: Path) -> None:
    merged_with_text(seeds, tmp_path / "out", "bam", "experts.granularity=2", "layers.mix=every 2")
    found = verify(tmp_path / "out", [str(seed) for seed in seeds], load=True)
    assert (found.problems, found.from_text) == ([], 4)
    scale = json.loads((tmp_path / "out" / "config.json").read_text())["ffn_scale"]
    assert scale[0] == 1.0
    assert scale[1] > 1.05
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    rows = tensors["dense.model.layers.1.mlp.router.weight"].view(3, 2, -1)
    assert torch.equal(rows[:, 0], rows[:, 1])
    settings = router_settings(tmp_path / "out", read_facts(tmp_path / "out"), "fit", only="ffn")
    assert settings["ffn"] == FfnRouter(top_k=1, init="fit")
    init_routers(tmp_path / "out", tmp_path / "again", text_for(), settings)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["ffn_scale"] == scale


def test_experts_that_were_added_have_no_text(seeds: list[Path], tmp_path: Path) -> None:
    for recipe, format in (("btx-extra", "bam"), ("bam", "bam"), ("btx", "native")):
        overrides = ["experts.extra=1", "experts.extra_from=mean", "router.ffn.top_k=2"]
        plan = plan_merge(load_recipe(recipe, overrides), read_seeds([str(seed) for seed in seeds]), format=format)
        merge(plan, tmp_path / recipe)
        with pytest.raises(RecipeError, match=r"extra experts that no text belongs to \(mean-extra-0\)"):
            router_settings(tmp_path / recipe, read_facts(tmp_path / recipe), "fit")
    done = run_cli("routers", tmp_path / "btx", "--data", "code=x.npy", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "extra experts that no text belongs to" in done.stderr
