"""Native results: each class computes what the seeds do, reads the config as it is meant, or is refused with why."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import run_cli
from tests.test_package import ROOT, fresh_environment, run
from tests.tiny import BY_NAME, VOCAB, edit_json, make_seed, make_seeds
from upcycle.errors import CheckpointError, RecipeError
from upcycle.families import FAMILIES
from upcycle.inspect import inspect_checkpoint
from upcycle.merge import merge
from upcycle.mixture import plan_extract, read_mixture
from upcycle.native import NATIVE
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds
from upcycle.verify import verify

# One of each family that has a class; Qwen2 without a sliding window, which its class has not, and Cohere2 with logits
# that are not scaled down.
CASES = [BY_NAME[name] for name in ("llama", "mistral", "qwen2-full", "qwen3", "olmo2", "granite")]
CASES += [replace(BY_NAME["cohere2"], config={**BY_NAME["cohere2"].config, "logit_scale": 1.0})]
each_class = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ROPES = {
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}
# Values that a class assumes and the tests' cases set otherwise.
WITH_DEFAULTS = {
    "cohere2": {"tie_word_embeddings": True, "layer_types": None, "logit_scale": 0.0625},
    "granite": {"logits_scaling": 1.0},
}
TEXT = "def main():\n\n\n    return  1234\n\n\n\n"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def make_plan(paths, recipe, *overrides, copies=None, format="native", **options):
    loaded, seeds = load_recipe(recipe, overrides), read_seeds([str(path) for path in paths])
    return plan_merge(loaded, seeds, num_experts=copies, allow_unrelated=True, format=format, **options)


def load(folder):
    """By the class that config.json names, without remote code."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def tokens(length):
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))


def same_logits(seed, out, length=24):
    """That a mixture of equal experts is its seed; returns both models."""
    dense, mixture, x = load(seed), load(out), tokens(length)
    assert type(mixture).__name__ == NATIVE[FAMILIES[dense.config.model_type].native].architecture
    with torch.no_grad():
        torch.testing.assert_close(mixture(x).logits, dense(x).logits, atol=1e-5, rtol=0)
    return dense, mixture


def same_function(seed, out):
    """The same, and of what it generates."""
    dense, mixture = same_logits(seed, out)
    greedy = {"do_sample": False, "max_new_tokens": 32, "min_new_tokens": 32, "pad_token_id": 0}
    assert torch.equal(mixture.generate(tokens(8), **greedy), dense.generate(tokens(8), **greedy))


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("sparse-upcycling", ()),
        ("virtual-groups", ()),
        ("virtual-groups", ("experts.granularity=3",)),
        ("noise", ("experts.noise=0",)),
        ("btx", ()),
    ],
    ids=["sparse-upcycling", "virtual-groups-4", "virtual-groups-3", "noise-0", "btx"],
)
@each_class
def test_equal_experts_compute_what_the_seed_does(case, recipe, overrides, tmp_path):
    seed = make_seed(case, tmp_path / "seed", 0)
    same = recipe == "btx"
    paths, copies = ([f"{name}={seed}" for name in "abc"], None) if same else ([seed], 3)
    merge(make_plan(paths, recipe, *overrides, copies=copies), tmp_path / "out")
    same_function(seed, tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@each_class
def test_in_shards_and_with_a_tied_head(case, tied, tmp_path):
    case = replace(case, config={**case.config, "tie_word_embeddings": tied})
    seed = make_seed(case, tmp_path / "seed", 0)
    merge(make_plan([seed], "sparse-upcycling", copies=3), tmp_path / "out", max_shard_size=30_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert ("lm_head.weight" in read_mixture(tmp_path / "out").tensors) != tied
    same_function(seed, tmp_path / "out")


def write_rope(seed, rope, version):
    """A rotary position as transformers 4 or 5 writes it, from a length of 16."""
    from_16 = rope["rope_type"] in ("llama3", "yarn")
    rope = {**rope, "original_max_position_embeddings": 16} if from_16 else rope
    spelling = {"rope_parameters": {**rope, "rope_theta": 5000.0}}
    if version == 4:
        spelling = {"rope_theta": 5000.0, "rope_scaling": rope, "rope_parameters": ...}
    edit_json(seed / "config.json", max_position_embeddings=64 if from_16 else 16, **spelling)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("rope", ROPES)
@each_class
def test_scaled_rotary_positions_are_kept(case, rope, version, tmp_path):
    seed, x = make_seed(case, tmp_path / "seed", 0), tokens(40)
    write_rope(seed, {"rope_type": "default"}, version)
    plain = load(seed)
    write_rope(seed, ROPES[rope], version)
    merge(make_plan([seed], "sparse-upcycling", copies=2), tmp_path / "out")
    dense, _ = same_logits(seed, tmp_path / "out", length=40)
    with torch.no_grad():
        assert (dense(x).logits - plain(x).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    "ids",
    [
        dict.fromkeys(IDS, ...),
        dict.fromkeys(IDS),
        {"eos_token_id": [2, 7], "bos_token_id": 4, "pad_token_id": 9},
    ],
    ids=["absent", "null", "a-list"],
)
@each_class
def test_token_ids_are_those_of_the_seed(case, ids, tmp_path):
    seed = make_seed(case, tmp_path / "seed", 0)
    edit_json(seed / "config.json", **ids)
    merge(make_plan([seed], "sparse-upcycling", copies=2), tmp_path / "out")
    dense, mixture = AutoConfig.from_pretrained(seed), AutoConfig.from_pretrained(tmp_path / "out")
    assert [getattr(mixture, key) for key in IDS] == [getattr(dense, key) for key in IDS]


@pytest.mark.parametrize("model_type", [case.model_type for case in CASES])
def test_the_token_ids_of_a_family_are_those_of_its_class(model_type):
    config = AutoConfig.for_model(model_type)
    assert FAMILIES[model_type].token_ids == tuple(getattr(config, key) for key in IDS)


@each_class
def test_a_config_that_leaves_defaults_out(case, tmp_path):
    """As transformers 4 wrote them: what is the class's default is not said."""
    seed = make_seed(replace(case, config={**case.config, **WITH_DEFAULTS.get(case.name, {})}), tmp_path / "seed", 0)
    expected = load(seed)
    defaults = AutoConfig.for_model(case.model_type).to_dict()
    written = json.loads((seed / "config.json").read_text())
    said = {"model_type", "head_dim", "num_key_value_heads"}  # their defaults depend on the version, or on other keys
    left = {key: ... for key, value in written.items() if key not in said and defaults.get(key, ...) == value}
    assert {"rope_parameters", "initializer_range", "use_cache", "hidden_act"} <= left.keys()
    edit_json(seed / "config.json", **left)
    merge(make_plan([seed], "sparse-upcycling", copies=2), tmp_path / "out")
    _, mixture = same_logits(seed, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(mixture(tokens(9)).logits, expected(tokens(9)).logits, atol=1e-5, rtol=0)


# What the dense classes themselves take: most know no null here.
WRITTEN_HEADS = [
    *((case, {"head_dim": size}) for case in CASES for size in (8, 16)),
    *((case, {"head_dim": None}) for case in CASES if case.name in ("llama", "mistral")),
    *((case, {"num_key_value_heads": None}) for case in CASES if case.name != "mistral"),
]


@pytest.mark.parametrize(("case", "change"), WRITTEN_HEADS, ids=lambda value: getattr(value, "name", str(value)))
def test_heads_as_a_config_may_write_them(case, change, tmp_path):
    """32 elements in 4 heads: 8 is what a config that says nothing means, and null key/value heads are as many."""
    meant = {"head_dim": change.get("head_dim") or 8, "num_key_value_heads": 2 if "head_dim" in change else 4}
    seed = make_seed(replace(case, config={**case.config, **meant}), tmp_path / "seed", 0)
    edit_json(seed / "config.json", **change)
    if change == {"head_dim": 16} and not NATIVE[FAMILIES[case.model_type].native].head_dim:
        with pytest.raises(RecipeError, match="heads have 16 elements"):
            make_plan([seed], "sparse-upcycling", copies=2)
        return
    merge(make_plan([seed], "sparse-upcycling", copies=2), tmp_path / "out")
    same_logits(seed, tmp_path / "out")


REFUSED = {
    "attention": ("llama", "bam", (), "attention is mixed too"),
    "family": ("gemma2", "btx", (), "no mixture class whose layers are those of a Gemma2ForCausalLM"),
    "biases": ("llama-biases", "btx", (), "attention_bias = True, and Mixtral knows only False"),
    "window": ("qwen2", "btx", (), "sliding_window = 6, and Qwen2Moe knows only None"),
    "gates": ("llama", "btx-top1", (), "Mixtral always rescales"),
    "bias": ("qwen3", "btx", ("router.ffn.bias={a=-1.0}",), "Qwen3Moe's router has no bias"),
    "shared": ("olmo2", "shared-expert", (), "FlexOlmo has no shared experts"),
    "shared-two": ("qwen2-full", "shared-expert", ("experts.shared=['mean','seed:a']",), "Qwen2Moe has one shared"),
    "layers": ("granite", "btx", ("layers.mix=every 2",), "GraniteMoe has experts in every layer"),
    "scale": ("qwen3", "btx-top1", ("router.ffn.init=fit",), "keep_scale"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_no_class_computes_is_refused_and_auto_says_why(why, tmp_path):
    name, recipe, overrides, reason = REFUSED[why]
    paths = make_seeds(BY_NAME[name], tmp_path)
    text = {"tokens": {}} if why == "scale" else None
    with pytest.raises(RecipeError, match=r"^--format native: ") as refusal:
        make_plan(paths, recipe, *overrides, text=text)
    assert reason in str(refusal.value)
    plan = make_plan(paths, recipe, *overrides, format="auto", text=text)
    assert plan.format == "bam"
    assert str(refusal.value) == f"--format native: {plan.native_misfit}; --format auto takes BAM's format there"


@pytest.mark.parametrize("format", ["native", "bam"])
def test_a_dense_result_has_one_format(format, seeds):
    with pytest.raises(RecipeError, match=r"^recipe 'average' makes a dense model, which has one format; leave"):
        make_plan(seeds, "average", format=format)
    assert make_plan(seeds, "average", format="auto").format == "dense"


def test_the_command_line_says_why(seeds, tmp_path):
    arguments = ("--seeds", *seeds, "--recipe", "btx-top1")
    reason = "Mixtral always rescales the selected gates to sum to 1, and the recipe (normalize = false) does not"
    refused = run_cli("merge", *arguments, "--format", "native", cwd=tmp_path)
    assert refused.returncode == 1
    assert reason in refused.stderr
    assert not (tmp_path / "btx-top1-3x").exists()
    said = json.loads(run_cli("plan", *arguments, "--json").stdout)
    assert (said["format"], said["native_misfit"]) == ("bam", reason)
    assert f"Why BAM's format and no class of transformers' own: {reason}." in run_cli("plan", *arguments).stdout
    merged = run_cli("merge", *arguments, cwd=tmp_path)
    assert f"Why BAM's format and no class of transformers' own: {reason}." in merged.stdout
    said = json.loads(run_cli("plan", "--seeds", *seeds, "--recipe", "btx", "--json").stdout)
    assert (said["format"], said["native_misfit"], said["model_type"]) == ("native", None, "mixtral")


def with_tokenizer(folder, tokenizer_class):
    """A tokenizer that splits digits, and marks words' beginnings as Llama 2 does or bytes as later ones do."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<s>"))
    byte_level = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
    if tokenizer_class == "LlamaTokenizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(byte_level)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    table = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))


TOKENIZERS = [
    *((case, kind) for case in CASES for kind in ("TokenizersBackend", "PreTrainedTokenizerFast")),
    *((case, kind) for case in CASES[1:] for kind in ("GPT2Tokenizer", "LlamaTokenizerFast")),
    *((case, "Qwen2Tokenizer") for case in CASES if case.name.startswith("qwen")),
    (CASES[-1], "CohereTokenizerFast"),
]


@pytest.mark.parametrize(("case", "kind"), TOKENIZERS, ids=lambda value: getattr(value, "name", str(value)))
def test_a_native_result_tokenizes_like_its_seed(case, kind, tmp_path):
    """AutoTokenizer chooses by model type; and transformers 4 knows no TokenizersBackend."""
    seed = make_seed(case, tmp_path / "seed", 0)
    with_tokenizer(seed, kind)
    plan = make_plan([seed], "sparse-upcycling", copies=2)
    merge(plan, tmp_path / "out")
    dense, mixture = (AutoTokenizer.from_pretrained(folder) for folder in (seed, tmp_path / "out"))
    for text in (TEXT, "a</s> b", "  two", "é 12e\u0301"):
        assert mixture(text)["input_ids"] == dense(text)["input_ids"]
    assert plan.notes == ()
    assert (
        json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] != "TokenizersBackend"
    )


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer"])
def test_a_llama_whose_tokenizer_transformers_rebuilds(kind, tmp_path):
    """AutoTokenizer rebuilds it for the seed alone, which is said; by its class both are the same."""
    seed, out = make_seed(BY_NAME["llama"], tmp_path / "seed", 0), tmp_path / "out"
    with_tokenizer(seed, kind)
    said = run_cli("merge", "--seeds", seed, "--recipe", "sparse-upcycling", "--num-experts", 2, "--out", out)
    assert f"{kind}.from_pretrained gives theirs" in said.stderr.replace("\n", " ")
    text = "  two</s>12 b"
    dense, mixture = (AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (seed, out))
    assert dense != mixture
    assert getattr(transformers, kind).from_pretrained(out)(text)["input_ids"] == dense
    merge(make_plan([seed], "sparse-upcycling", copies=2, format="bam"), tmp_path / "bam")
    assert AutoTokenizer.from_pretrained(tmp_path / "bam", trust_remote_code=True)(text)["input_ids"] == dense


@each_class
def test_extract_undoes_a_native_merge(case, tmp_path):
    """Of seeds that differ in their FFNs alone every tensor comes back byte for byte; verify and inspect read it."""
    paths = make_seeds(case, tmp_path, dtype=torch.bfloat16)
    first = load_file(paths[0] / "model.safetensors")
    for path in paths[1:]:
        own = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if ".mlp." in name}
        save_file({**first, **own}, path / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    merge(make_plan(paths, "btx"), out)
    found = verify(out, [str(path) for path in paths], load=True)
    assert found.problems == []
    assert found.tensors == found.finite == found.remade
    assert found.loaded
    seen = inspect_checkpoint(out)
    assert (seen.format, seen.model_type) == ("native", FAMILIES[case.model_type].native)
    assert (seen.num_experts, seen.experts, seen.recipe, seen.dtype) == (3, ["a", "b", "c"], "btx", "BF16")
    for index, path in enumerate(paths):
        again = tmp_path / f"{index}-again"
        merge(plan_extract(read_mixture(out), index), again)
        before, after = (load_file(folder / "model.safetensors") for folder in (path, again))
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(tensor.view(torch.int16), after[name].view(torch.int16)), name
        load(again)


@each_class
def test_transformers_needs_nothing_of_ours(case, tmp_path):
    """A native result without what upcycle wrote beside it."""
    paths, out = make_seeds(case, tmp_path), tmp_path / "out"
    merge(make_plan(paths, "btx"), out)
    bare = shutil.copytree(out, tmp_path / "bare", ignore=shutil.ignore_patterns("upcycle*", "README.md"))
    assert not list(bare.glob("*.py"))
    with torch.no_grad():
        assert torch.equal(load(bare)(tokens(9)).logits, load(out)(tokens(9)).logits)


OLDER = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, __version__

found = {"versions": [__version__, torch.__version__]}
for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    x = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 89]])
    y = model.eval().generate(x, do_sample=False, max_new_tokens=24, min_new_tokens=24, pad_token_id=0)
    keys = [*info["missing_keys"], *info["unexpected_keys"]]
    found[folder.name] = [type(model).__name__, type(model).__module__.split(".")[0], keys, y[0].tolist()]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_transformers_4_loads_and_generates_the_same(tmp_path):
    """Every class that 4.57 has, of unrelated seeds behind random routers, in fp32."""
    out = tmp_path / "out"
    for case in CASES[:-1]:  # Cohere2Moe came with transformers 5
        paths = make_seeds(case, tmp_path / case.name)
        native = NATIVE[FAMILIES[case.model_type].native]
        for recipe in ("btx",) if native.rescales else ("btx", "btx-top1"):
            merge(make_plan(paths, recipe), out / f"{case.name}-{recipe}")
    pinned = ("transformers==", "huggingface_hub==", "tokenizers==")
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith(pinned)]
    (tmp_path / "older.txt").write_text("\n".join(lines))
    constraints = ("--constraint", tmp_path / "older.txt")
    python = fresh_environment(tmp_path / "env", *constraints, "transformers==4.57.*", "huggingface_hub<1", "torch")
    (tmp_path / "older.py").write_text(OLDER)
    old, new = (json.loads(run(which, tmp_path / "older.py", out)) for which in (python, sys.executable))
    versions = old.pop("versions"), new.pop("versions")
    assert versions[0][0].startswith("4.57.")
    assert versions[1][0].startswith("5.")
    assert versions[0][1] == versions[1][1]
    assert len(old) == 9
    assert old == new
    for name, module, keys, _ in old.values():
        assert name in [native.architecture for native in NATIVE.values()]
        assert module == "transformers"
        assert keys == []


@pytest.mark.parametrize("experts", [[0, 1, 2], ["a", "b"], [["a"], "b", "c"]])
def test_experts_that_are_no_names_are_refused(experts, tmp_path):
    merge(
        plan_merge(
            load_recipe("btx"),
            read_seeds([str(path) for path in make_seeds(BY_NAME["llama"], tmp_path)]),
            allow_unrelated=True,
            format="native",
        ),
        tmp_path / "out",
    )
    edit_json(tmp_path / "out" / "upcycle.json", experts=experts)
    with pytest.raises(CheckpointError, match=r"num_local_experts is 3, but upcycle\.json names \d experts"):
        read_mixture(tmp_path / "out")
