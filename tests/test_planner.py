"""What defines each recipe, seen in what it writes. That the result computes it: `test_matrix.py`."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import upcycle
from tests.conftest import run_cli
from tests.tiny import BY_NAME, make_seed, make_seeds
from upcycle.errors import RecipeError, SeedError
from upcycle.merge import merge
from upcycle.mixture import find_expert, plan_extract, read_mixture
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds
from upcycle.verify import verify

upcycle.register()

FFN = "dense.model.layers.0.mlp."
TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def make(paths, out, recipe, *overrides, format="bam", **options):
    plan = plan_merge(load_recipe(recipe, overrides), read_seeds([str(p) for p in paths]), format=format, **options)
    merge(plan, out)
    return load_file(out / "model.safetensors")


@pytest.fixture
def family(base_seed, seeds):
    """The ancestor and its three specialists."""
    return [base_seed, *seeds]


@pytest.fixture
def frozen(seeds):
    """Specialists that differ in their FFNs alone."""
    first = load_file(seeds[0] / "model.safetensors")
    for path in seeds[1:]:
        own = {name: t for name, t in load_file(path / "model.safetensors").items() if ".mlp." in name}
        save_file({**first, **own}, path / "model.safetensors", metadata={"format": "pt"})
    return seeds


def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_virtual_groups_split_each_copy_and_repeat_its_router_row(tmp_path):
    """arXiv:2410.07524: G shards of each FFN, one router row for all, outputs scaled so that the function is kept."""
    seed = make_seed(BY_NAME["llama"], tmp_path / "a", 0)
    result = make([seed], tmp_path / "out", "virtual-groups", num_experts=3)
    state = load_file(seed / "model.safetensors")
    groups, shards, width = 3, 4, 12
    wide, down = result[f"{FFN}experts.gate_up_proj"], result[f"{FFN}experts.down_proj"]
    assert wide.shape == (groups * shards, 2 * width, 32)
    for expert in range(groups * shards):
        units = slice(expert % shards * width, (expert % shards + 1) * width)
        gate, up, out = (state[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        assert torch.equal(wide[expert], torch.cat([gate[units], up[units]]))
        assert torch.equal(down[expert], shards * out[:, units])
    router = result[f"{FFN}router.weight"].unflatten(0, (groups, shards))
    assert torch.equal(router, router[:, :1].expand_as(router))
    assert len({tuple(row[0].tolist()) for row in router}) == groups
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"], config["granularity"]) == (12, 8, 4)
    assert config["expert_names"][:5] == ["a-0.0", "a-0.1", "a-0.2", "a-0.3", "a-1.0"]
    torch.testing.assert_close(logits(tmp_path / "out"), logits(seed), atol=1e-5, rtol=0)


@pytest.mark.parametrize("recipe", ["virtual-groups", "bam-virtual-groups"])
def test_a_group_of_shards_is_extracted_whole(recipe, tmp_path):
    paths = make_seeds(BY_NAME["llama-biases"], tmp_path, dtype=torch.bfloat16)
    copies = recipe == "virtual-groups"
    options = {"num_experts": 3} if copies else {"allow_unrelated": True}
    out = tmp_path / "out"
    make(paths[: 1 if copies else 3], out, recipe, **options)
    mixture = read_mixture(out)
    assert mixture.groups == (["a-0", "a-1", "a-2"] if copies else ["a", "b", "c"])
    merge(plan_extract(mixture, find_expert(mixture, mixture.groups[1])), tmp_path / "one")
    found, expected = (load_file(p / "model.safetensors") for p in (tmp_path / "one", paths[0 if copies else 1]))
    for name, tensor in expected.items():
        if ".mlp." in name or (".self_attn." in name and not copies):
            assert torch.equal(found[name], tensor), name


def test_an_inner_size_that_cannot_be_split_is_refused(tmp_path):
    seed = make_seed(BY_NAME["llama"], tmp_path / "a", 0)
    with pytest.raises(RecipeError, match=r"granularity is 5, which does not divide the FFN's 48 inner units"):
        make([seed], tmp_path / "out", "virtual-groups", "experts.granularity=5", num_experts=3)


@pytest.mark.parametrize("shared", ['["mean"]', '["ancestor", "seed:law"]'])
def test_shared_experts_take_their_share_of_the_output(shared, family, tmp_path):
    result = make(family, tmp_path / "out", "shared-expert", f"experts.shared={shared}", "experts.shared_weight=0.25")
    down = [load_file(path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"] for path in family]
    routed = result[f"{FFN}experts.down_proj"]
    for expert, own in zip(routed, down, strict=True):
        torch.testing.assert_close(expert.float(), 0.75 * own.float(), atol=1e-3, rtol=1e-2)
    expected = [sum(t.float() for t in down) / 4] if "mean" in shared else [down[0].float(), down[2].float()]
    for number, own in enumerate(expected):
        found = result[f"{FFN}shared.{number}.down_proj.weight"].float()
        torch.testing.assert_close(found, own * 0.25 / len(expected), atol=1e-3, rtol=1e-2)
    same = [f"{name}={family[0]}" for name in "xyz"]
    wanted = "experts.shared_weight=0.25"
    make(same, tmp_path / "same", "shared-expert", wanted, allow_unrelated=True, dtype="F32")
    torch.testing.assert_close(logits(tmp_path / "same"), logits(family[0]), atol=1e-5, rtol=0)


def test_qwen2s_obligatory_shared_expert_is_the_recipes_or_does_nothing(tmp_path):
    paths = make_seeds(BY_NAME["qwen2-full"], tmp_path)
    idle = make(paths, tmp_path / "idle", "btx", format="native", allow_unrelated=True)
    at = "model.layers.0.mlp.shared_expert"
    assert not any(idle[name].any() for name in idle if name.startswith(at))
    filled = make(paths, tmp_path / "filled", "shared-expert", format="native", allow_unrelated=True)
    up = [load_file(path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"] for path in paths]
    torch.testing.assert_close(filled[f"{at}.up_proj.weight"], sum(up) / 3)
    assert not filled[f"{at}_gate.weight"].any()


def test_extra_experts_are_the_ancestors(family, tmp_path):
    """arXiv:2408.08274, tables 4 and 5: two more copies of the seed's FFN, three active experts."""
    result = make(family[::-1], tmp_path / "out", "btx-extra")
    base = load_file(family[0] / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    down = result[f"{FFN}experts.down_proj"]
    assert down.shape[0] == 6
    assert all(torch.equal(expert, base) for expert in (down[3], down[4], down[5]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["expert_names"] == ["math", "law", "code", "base", "base-extra-0", "base-extra-1"]
    assert config["num_experts_per_tok"] == 3


def test_extra_ffns_beside_attention_experts(family, tmp_path):
    """FFN experts and attention experts then differ in number; an extra one has no attention, so it is no model."""
    out = tmp_path / "out"
    make(family, out, "bam", "experts.extra=2", "experts.extra_from=seed:law")
    config = json.loads((out / "config.json").read_text())
    assert (config["num_experts"], config["num_attention_experts"]) == (6, 4)
    assert torch.isfinite(logits(out)).all()
    mixture = read_mixture(out)
    merge(plan_extract(mixture, 2), tmp_path / "one-law")
    with pytest.raises(upcycle.errors.CheckpointError, match=r"'law-extra-0' .* added to the seeds'"):
        plan_extract(mixture, 4)
    assert verify(out, [str(path) for path in family]).problems == []


def test_an_ancestor_that_nobody_can_tell_is_asked_for(seeds, tmp_path):
    with pytest.raises(RecipeError, match=r"none of code, law, math is found to be it .* name it, seed:NAME"):
        make(seeds, tmp_path / "out", "btx-extra")


def test_flex_refuses_what_was_not_frozen(frozen, tmp_path):
    """arXiv:2507.07024: everything but the FFN is one model's, to the bit."""
    options = ("router.ffn.init=random",)
    result = make(frozen, tmp_path / "out", "flex", *options)
    first = load_file(frozen[0] / "model.safetensors")
    for name, tensor in first.items():
        if ".mlp." not in name:
            assert torch.equal(result[f"dense.{name}"], tensor)
    changed = load_file(frozen[2] / "model.safetensors")
    changed["model.layers.1.input_layernorm.weight"][5] += 1
    save_file(changed, frozen[2] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SeedError, match=r"'math'.*'model\.layers\.1\.input_layernorm\.weight' differs.*'code'.*'equal'"
    ):
        make(frozen, tmp_path / "refused", "flex", *options)
    assert not (tmp_path / "refused").exists()


def test_a_bias_on_some_experts(frozen, tmp_path):
    options = ("router.ffn.init=zeros", "router.ffn.bias.law=-2.5", "router.ffn.bias.code=1")
    result = make(frozen, tmp_path / "out", "flex", *options)
    assert result[f"{FFN}router.bias"].tolist() == [1.0, -2.5, 0.0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    told = model(TOKENS, output_router_logits=True).router_logits[0]
    assert torch.equal(told, torch.tensor([[1.0, -2.5, 0.0]]).expand_as(told))
    with pytest.raises(RecipeError, match=r"'lav', which is not given; did you mean 'law'"):
        make(frozen, tmp_path / "no", "flex", "router.ffn.bias.lav=1", "router.ffn.init=zeros")


@pytest.mark.parametrize(
    ("layers", "mixed"), [("every 2", [1]), ("1-", [1]), ("0", [0]), ("0-0,1", [0, 1]), ("all", [0, 1])]
)
@pytest.mark.parametrize("recipe", ["bam", "bam-kv-shared", "btx-top1", "shared-expert"])
def test_layers_without_experts_are_the_seeds_mean(layers, mixed, recipe, seeds, tmp_path):
    out = tmp_path / "out"
    result = make(seeds, out, recipe, f"layers.mix={layers}", dtype="F32")
    assert {int(name.split(".")[3]) for name in result if ".router." in name} == set(mixed)
    states = [load_file(path / "model.safetensors") for path in seeds]
    for layer in {0, 1} - set(mixed):
        for part in ("mlp.up_proj", "self_attn.q_proj"):
            name = f"model.layers.{layer}.{part}.weight"
            torch.testing.assert_close(result[f"dense.{name}"], sum(s[name].float() for s in states) / 3)
    assert torch.isfinite(logits(out)).all()
    config = json.loads((out / "config.json").read_text())
    assert config.get("mixed_layers", [0, 1]) == mixed
    assert verify(out, [str(path) for path in seeds]).problems == []
    mixture = read_mixture(out)
    merge(plan_extract(mixture, 1), tmp_path / "one-law")
    own = load_file(tmp_path / "one-law" / "model.safetensors")
    for layer in mixed:
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        assert torch.equal(own[name], states[1][name].float())


def test_native_classes_leave_layers_dense_where_they_can(tmp_path):
    paths = make_seeds(BY_NAME["qwen3"], tmp_path)
    make(paths, tmp_path / "out", "btx", "layers.mix=1", format="native", allow_unrelated=True)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model.model.layers[0].mlp).__name__ == "Qwen3MoeMLP"
    make(paths, tmp_path / "bam", "btx", "layers.mix=1", format="bam", allow_unrelated=True)
    read = load_file(tmp_path / "bam" / "model.safetensors")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.copy_(read["dense.model.layers.1.mlp.router.weight"])
        torch.testing.assert_close(model(TOKENS).logits, logits(tmp_path / "bam"), atol=1e-5, rtol=0)


def test_layers_that_there_are_not_are_refused(seeds, tmp_path):
    with pytest.raises(RecipeError, match=r"mix is '1-5', but there are the layers 0 to 1"):
        make(seeds, tmp_path / "out", "bam", "layers.mix=1-5")


def test_attention_cannot_use_more_experts_than_there_are(seeds, tmp_path):
    with pytest.raises(RecipeError, match=r"router\.attention\.top_k is 4, but there are only 3"):
        make(seeds, tmp_path / "out", "top-k-attention", "router.attention.top_k=4")


def test_one_run_from_the_command_line(seeds, tmp_path):
    """A recipe that combines nearly everything, verified, extracted."""
    changes = ("experts.granularity=2", "experts.extra=1", "experts.extra_from=mean", 'experts.shared=["seed:law"]')
    words = [word for change in (*changes, "layers.mix=1", "router.ffn.bias.law=-1") for word in ("--set", change)]
    done = run_cli("merge", "--seeds", *seeds, "--recipe", "bam", *words, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 experts" in done.stdout
    done = run_cli("verify", "out", "--seeds", *seeds, "--load", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_cli("extract", "out", "--expert", "math", "--out", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
