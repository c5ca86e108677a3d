"""What one bad seed does: it is refused, in words, before a byte is written."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import branch, run_cli, write_tokenizer
from tests.tiny import BY_NAME, VOCAB, edit_json, make_seed
from upcycle.ancestry import find_ancestor, fingerprint, relatedness, sample
from upcycle.errors import SeedError
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_license, read_seed, read_seeds

OUT = "bam-kv-shared-3x"


def replace_seed(folder, **config):
    """A seed of other sizes in the place of `folder`, tokenizer kept."""
    case = BY_NAME["llama"]
    tokenizer = (folder / "tokenizer.json").read_bytes()
    shutil.rmtree(folder)
    make_seed(type(case)(case.name, case.model_type, {**case.config, **config}), folder, 0, torch.bfloat16)
    (folder / "tokenizer.json").write_bytes(tokenizer)


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def set_nan(state):
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def as_mistral(folder):
    edit_json(folder / "config.json", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)


def unrelated(folder):
    tokenizer = (folder / "tokenizer.json").read_bytes()
    shutil.rmtree(folder)
    make_seed(BY_NAME["llama"], folder, 99, torch.bfloat16)
    (folder / "tokenizer.json").write_bytes(tokenizer)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_tensor(state):
    del state["model.layers.0.self_attn.k_proj.weight"]


def extra_tensor(state):
    state["score.weight"] = torch.ones(2, 32, dtype=torch.bfloat16)


def to_fp32(state):
    for name in list(state):
        state[name] = state[name].float()


def older_rope(folder):
    edit_json(folder / "config.json", rope_parameters=..., rope_theta=250_000.0)


def small_disk(folder):
    """Python runs this module first, from its path: the disk has 1,000 bytes left."""
    script = "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(9000, 8000, 1000)\n"
    (folder / "sitecustomize.py").write_text(script)


# The rows of "What one bad seed does", and more: how seed `law` is damaged, and what the message must name.
BAD = {
    "other hidden size": (
        lambda f: replace_seed(f, hidden_size=64),
        ["law", "hidden_size", "64", "32", "tensor"],
    ),
    "other FFN size": (
        lambda f: replace_seed(f, intermediate_size=64),
        ["law", "64", "48", "mlp", "[32, 64]", "[32, 48]"],
    ),
    "more layers": (
        lambda f: replace_seed(f, num_hidden_layers=3),
        ["law", "num_hidden_layers", "3", "2", "layers.2"],
    ),
    "other kv heads": (
        lambda f: replace_seed(f, num_key_value_heads=4),
        ["law", "num_key_value_heads", "4", "2", "k_proj"],
    ),
    "larger vocabulary": (
        lambda f: replace_seed(f, vocab_size=VOCAB + 8),
        ["law", "vocab_size", "104", "96", "tensor", "--align-vocab"],
    ),
    "swapped token ids": (
        lambda f: write_tokenizer(f, (5, 7)),
        ["law", "word5", "7", "5", "tokenizer.json", "--align-vocab"],
    ),
    "other rope theta": (older_rope, ["law", "rope", "250000.0", "10000.0"]),
    "NaN in the weights": (
        lambda f: edit_weights(f, set_nan),
        ["law", "model.layers.1.mlp.up_proj.weight", "nan", "[3, 5]", "finite"],
    ),
    "missing tensor": (lambda f: edit_weights(f, drop_tensor), ["law", "layers.0.self_attn.k_proj.weight", "missing"]),
    "unknown tensor": (lambda f: edit_weights(f, extra_tensor), ["law", "score.weight", "not part of"]),
    "truncated file": (truncate, ["law", "model.safetensors", "truncated"]),
    "path that does not exist": (shutil.rmtree, ["law", "no folder", "Hub"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["law", "config.json", "missing"]),
    "a Mistral among Llamas": (as_mistral, ["law", "mistral", "llama"]),
    "other dtype": (lambda f: edit_weights(f, to_fp32), ["law", "embed_tokens", "F32", "BF16", "--dtype"]),
    "pickle only": (pickled, ["law", "pickle", "save_pretrained"]),
    "quantized": (lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}), ["law", "quantiz"]),
    "no common ancestor": (unrelated, ["law", "code", "ancestor", "cosine", "--allow-unrelated"]),
    "top-k above the number of experts": (lambda f: ["--set", "router.ffn.top_k=4"], ["top_k is 4", "only 3 experts"]),
    "misspelt option": (lambda f: ["--set", "router.ffn.topk=2"], ["'topk'", "did you mean 'top_k'"]),
    "disk full": (small_disk, ["bam-kv-shared-3x", "needs 67,", "only 1,000 are free"]),
}


@pytest.mark.parametrize("row", BAD)
def test_one_bad_seed_is_refused(row, seeds, tmp_path):
    """Damage is done to seed `law`; a list that it returns is added to the command."""
    damage, named = BAD[row]
    more = damage(seeds[1])
    command = ("merge", "--seeds", *seeds, "--recipe", "bam-kv-shared", *(more if isinstance(more, list) else ()))
    path = os.pathsep.join([str(seeds[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = run_cli(*command, cwd=tmp_path, PYTHONPATH=path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr) < 700
    for word in named:
        assert word in result.stderr, result.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"code", "law", "math"}  # no output, no remains


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "bma"], "did you mean 'bam'"),
        (["--recipe", "sparse-upcycling", "--num-experts", "4"], "copies one seed"),
        (["--recipe", "bam", "--num-experts", "4"], "--num-experts 4 with 3 seeds"),
        (["--recipe", "average", "--set", "mix.norm=seed:laww"], "did you mean 'law'"),
    ],
)
def test_what_the_recipe_asks_must_be_possible(arguments, message, seeds, tmp_path):
    result = run_cli("merge", "--seeds", *seeds, *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert message in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"code", "law", "math"}


def test_unrelated_seeds_are_mixed_when_asked(seeds, tmp_path):
    unrelated(seeds[1])
    result = run_cli("merge", "--seeds", *seeds, "--recipe", "bam", "--allow-unrelated", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_specialists_are_near_and_strangers_far(seeds):
    code, law, _ = read_seeds([str(path) for path in seeds])
    assert relatedness((code, sample(code)), (law, sample(law))) > 0.99
    unrelated(seeds[1])
    law = read_seed("law", str(seeds[1]))
    assert abs(relatedness((code, sample(code)), (law, sample(law)))) < 0.1


def test_relatedness_compares_across_dtypes(seeds):
    code = read_seed("code", str(seeds[0]))
    shutil.copytree(seeds[0], seeds[0].parent / "again")
    edit_weights(seeds[0].parent / "again", to_fp32)
    again = read_seed("again", str(seeds[0].parent / "again"))
    assert relatedness((code, sample(code)), (again, sample(again))) > 0.999
    assert fingerprint(code, sample(code)) != fingerprint(again, sample(again))


def test_a_fingerprint_tells_trainings_apart_and_not_sharding(seeds, tmp_path):
    from transformers import AutoModelForCausalLM

    code, law, _ = read_seeds([str(path) for path in seeds])
    assert fingerprint(code, sample(code)) != fingerprint(law, sample(law))
    AutoModelForCausalLM.from_pretrained(seeds[0]).save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    sharded = read_seed("code", str(tmp_path / "shards"))
    assert fingerprint(sharded, sample(sharded)) == fingerprint(code, sample(code))


def test_names_come_from_folders_or_the_user(seeds):
    assert [seed.name for seed in read_seeds([f"x={seeds[0]}", str(seeds[1])])] == ["x", "law"]
    with pytest.raises(SeedError, match=r"both named 'code'.*NAME="):
        read_seeds([str(seeds[0]), f"code={seeds[1]}"])
    with pytest.raises(SeedError, match="is no name"):
        read_seeds([f"7={seeds[0]}"])


def test_seeds_may_differ_in_what_decides_nothing(seeds):
    """Another longest position (a label here), another spelling of rope, bookkeeping of a trainer."""
    edit_json(seeds[1] / "config.json", max_position_embeddings=4096, rope_parameters=..., rope_theta=10000.0)
    edit_json(seeds[2] / "config.json", use_cache=False, trained_by="hand", initializer_range=0.1, eos_token_id=[2, 5])
    read_seeds([str(path) for path in seeds])
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}  # this one reads the longest position
    for path, longest in zip(seeds, (64, 4096, 64), strict=True):
        edit_json(path / "config.json", rope_parameters=scaled, max_position_embeddings=longest)
    with pytest.raises(SeedError, match="max_position_embeddings = 4096"):
        read_seeds([str(path) for path in seeds])


def test_a_tokenizer_that_only_looks_different_is_taken(seeds):
    path = seeds[1] / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    read_seeds([str(seed) for seed in seeds])


def test_a_tokenizer_is_never_lost_silently(seeds):
    (seeds[1] / "tokenizer.json").unlink()
    (seeds[1] / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(SeedError, match=r"'law'.*link to nothing"):
        read_seeds([str(path) for path in seeds])
    (seeds[1] / "tokenizer.json").unlink()
    read_seeds([str(path) for path in seeds])
    (seeds[0] / "tokenizer.json").unlink()
    with pytest.raises(SeedError, match="'code' has no tokenizer"):
        read_seeds([str(path) for path in seeds])


def test_a_name_is_the_last_component_as_written(seeds, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "poetry").symlink_to(seeds[0])
    assert [seed.name for seed in read_seeds([str(tmp_path / "links" / "poetry"), f"{seeds[1]}/"])] == ["poetry", "law"]


def test_a_tied_config_beside_another_head_is_refused(tmp_path):
    """transformers unties the two when they differ, so the head may not be dropped."""
    for name in "ab":
        make_seed(BY_NAME["llama-biases"], tmp_path / name, 0, torch.bfloat16)
        edit_weights(tmp_path / name, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1}))
    result = run_cli("merge", "--seeds", "a", "b", "--recipe", "bam", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    for word in ("lm_head.weight", "embed_tokens", "tie_word_embeddings"):
        assert word in result.stderr


def test_tied_heads_and_buffers_are_dropped_and_said(tmp_path):
    make_seed(BY_NAME["llama-biases"], tmp_path / "a", 0, torch.bfloat16)
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def add(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(tmp_path / "b", add)
    result = run_cli("merge", "--seeds", "a", "b", "--recipe", "bam", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    provenance = json.loads((tmp_path / "bam-2x" / "upcycle.json").read_text())
    assert [seed["dropped"] for seed in provenance["seeds"]] == [
        [],
        ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"],
    ]


def test_the_ancestor_is_found_among_its_specialists(base_seed, seeds, tmp_path):
    def found(*paths):
        read = read_seeds([str(path) for path in paths])
        return find_ancestor(read, [sample(seed) for seed in read])

    code, law, math = seeds
    assert found(code, base_seed, law, math) == "base"
    assert found(code, law, math, branch(base_seed, tmp_path / "prose", 8)) is None  # none of them
    assert found(law, math, base_seed) is None  # it could be the middle of a chain
    assert found(code, base_seed) is None  # either could be
    longer = branch(code, tmp_path / "longer", 9)
    assert found(longer, code, law, base_seed) is None  # two have descendants
    assert found(code, f"again={code}", f"third={code}", f"fourth={code}") is None


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (None, None),
        ("# no front matter", None),
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Title", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n: {[\n---\n", None),
        ("---\n- a\n---\n", None),
    ],
)
def test_the_licence_is_read_off_the_card(card, expected, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_license(tmp_path) == expected


def test_licences_are_recorded(seeds, tmp_path):
    (seeds[1] / "README.md").write_text("---\nlicense: mit\n---\n")
    records = plan_merge(load_recipe("bam"), read_seeds([str(seed) for seed in seeds])).provenance["seeds"]
    assert [record["license"] for record in records] == [None, "mit", None]
