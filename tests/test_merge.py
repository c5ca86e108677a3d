"""Running a plan: exact bytes, the same bytes again, shards, means, dtypes, failures that leave nothing."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import upcycle.assemble as assembling
from tests.conftest import branch, run_cli, words
from tests.tiny import BY_NAME, CASES, VOCAB, edit_json, make_seed, make_seeds
from upcycle import preflight
from upcycle.errors import OutputError, SeedError
from upcycle.merge import merge
from upcycle.mixture import find_expert, plan_extract, read_mixture
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds


def make_plan(paths, recipe="bam", *overrides, **options):
    return plan_merge(load_recipe(recipe, overrides), read_seeds([str(path) for path in paths]), **options)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def state(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# Every family in bf16, and the other dtypes once: they only change the size of an element.
EXTRACTED = [(case, torch.bfloat16) for case in CASES]
EXTRACTED += [(BY_NAME["qwen3"], dtype) for dtype in (torch.float16, torch.float32)]


@pytest.mark.parametrize("recipe", ["bam", "bam-kv-shared", "btx"])
@pytest.mark.parametrize(("case", "dtype"), EXTRACTED, ids=lambda value: getattr(value, "name", str(value)))
def test_extract_undoes_merge(case, recipe, dtype, tmp_path):
    """Every expert tensor of every seed comes back bit for bit, and what was averaged is the mean."""
    if recipe == "bam-kv-shared" and not case.grouped:
        pytest.skip("refused: no grouped queries")
    paths = make_seeds(case, tmp_path, dtype=dtype)
    merge(make_plan(paths, recipe, allow_unrelated=True), tmp_path / "out")
    mixture = read_mixture(tmp_path / "out")
    seeds = [load_file(path / "model.safetensors") for path in paths]
    resolved = load_recipe(recipe)
    for index, name in enumerate("abc"):
        merge(plan_extract(mixture, find_expert(mixture, name)), tmp_path / f"{name}-again")
        again = load_file(tmp_path / f"{name}-again" / "model.safetensors")
        assert set(again) == set(seeds[index])
        for key, tensor in again.items():
            expert = ".mlp." in key or (resolved.attention_experts and any(x in key for x in ("attn", "attention."))
                                        and "layernorm" not in key)  # fmt: skip
            if expert and resolved.shared_key_value and "qkv_proj" in key:
                assert torch.equal(tensor[:32], seeds[index][key][:32])
                continue
            if expert and not (resolved.shared_key_value and any(x in key for x in ("k_proj", "v_proj", "k_norm"))):
                assert torch.equal(tensor, seeds[index][key]), key
            else:
                total = seeds[0][key].float() + seeds[1][key].float() + seeds[2][key].float()
                assert torch.equal(tensor, (total / 3).to(dtype)), key
        AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-again")


def test_the_same_command_gives_the_same_bytes(seeds, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first = run_cli("merge", "--seeds", "code", "law", "math", "--recipe", "bam-kv-shared", cwd=tmp_path)
    moved = [shutil.copytree(seed, elsewhere / seed.name) for seed in seeds]
    second = run_cli("merge", "--seeds", *moved, "--recipe", "bam-kv-shared", "--out", elsewhere / "x", cwd=elsewhere)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert digests(tmp_path / "bam-kv-shared-3x") == digests(elsewhere / "x")
    again = run_cli(
        "merge", "--seeds", *seeds, "--recipe", "bam-kv-shared", "--random-seed", "1", "--out", "y", cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    one, other = state(elsewhere / "x"), state(tmp_path / "y")
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {name for name in one if "router" in name}


def test_routers_are_drawn_and_written(seeds, tmp_path):
    merge(make_plan(seeds, "bam", "router.attention.init=zeros"), tmp_path / "out")
    routers = {name: tensor.float() for name, tensor in state(tmp_path / "out").items() if "router" in name}
    assert len(routers) == 4
    for name, router in routers.items():
        if "self_attn" in name:
            assert not router.any()
        else:
            assert 0.01 < router.std() < 0.03
    drawn = [router for name, router in routers.items() if "mlp" in name]
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("limit", [4_000, 20_000, 10**9])
def test_shards_hold_the_same_tensors(limit, seeds, tmp_path):
    merge(make_plan(seeds), tmp_path / "one")
    merge(make_plan(seeds), tmp_path / "many", max_shard_size=limit)
    one, many = state(tmp_path / "one"), state(tmp_path / "many")
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    if len(files) > 1:
        index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(one)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
        largest = max(tensor.nbytes for tensor in one.values())  # a tensor is never split
        assert all(file.stat().st_size <= max(limit, largest) + 4096 for file in files)
    AutoModelForCausalLM.from_pretrained(tmp_path / "many", trust_remote_code=True)


def test_small_buffers_change_nothing(seeds, tmp_path, monkeypatch):
    """Blocks, rows, means and random numbers cut at any size give the same file."""
    for recipe, *overrides in (
        ("bam",),
        ("bam-kv-shared",),
        ("average",),
        ("btx", "experts.drop=0.5", "experts.granularity=2"),
        ("btx", "experts.noise=0.1", "experts.drop=0.2"),
    ):
        merge(make_plan(seeds, recipe, *overrides), tmp_path / "whole", overwrite=True)
        for chunk, contiguous in ((2048, 0), (2048, 10**9), (65_536, 512)):
            monkeypatch.setattr(assembling, "CHUNK", chunk)
            monkeypatch.setattr(assembling, "MEAN_CHUNK", chunk // 2)
            monkeypatch.setattr(assembling, "CONTIGUOUS", contiguous)
            merge(make_plan(seeds, recipe, *overrides), tmp_path / "cut", overwrite=True)
            assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
        monkeypatch.undo()


def test_sharded_seeds_give_the_same_mixture(seeds, tmp_path):
    merge(make_plan(seeds), tmp_path / "one")
    for seed in seeds:
        AutoModelForCausalLM.from_pretrained(seed).save_pretrained(tmp_path / "s" / seed.name, max_shard_size="20kB")
        shutil.copy(seed / "config.json", tmp_path / "s" / seed.name / "config.json")
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(seed / file, tmp_path / "s" / seed.name / file)
    merge(make_plan([tmp_path / "s" / seed.name for seed in seeds]), tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_other_dtypes_are_converted_when_asked(seeds, tmp_path):
    from tests.test_seeds import edit_weights, to_fp32

    edit_weights(seeds[1], to_fp32)
    for dtype, torch_dtype in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        merge(make_plan(seeds, dtype=dtype), tmp_path / dtype)
        result = state(tmp_path / dtype)
        assert {tensor.dtype for tensor in result.values()} == {torch_dtype}
        stacked = result["dense.model.layers.0.mlp.experts.down_proj"]
        for index, seed in enumerate(seeds):
            expected = load_file(seed / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
            assert torch.equal(stacked[index], expected.to(torch_dtype))
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == str(torch_dtype).split(".")[1]


def test_a_value_that_a_dtype_cannot_hold_is_refused(seeds, tmp_path):
    from tests.test_seeds import edit_weights

    edit_weights(seeds[2], lambda weights: weights["model.norm.weight"].fill_(1e6))
    edit_weights(seeds[1], lambda weights: weights["model.layers.0.mlp.up_proj.weight"].fill_(1e6))
    with pytest.raises(SeedError, match="F16 cannot hold"):
        merge(make_plan(seeds, dtype="F16", allow_unrelated=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weighted_means_and_single_seeds(seeds, tmp_path):
    overrides = ("mix.norm=weighted", "weights.code=3", "weights.law=1", "weights.math=0", "mix.embedding=seed:math")
    merge(make_plan(seeds, "average", *overrides), tmp_path / "out")
    code, law, math = (load_file(seed / "model.safetensors") for seed in seeds)
    result = state(tmp_path / "out")
    expected = code["model.norm.weight"].float() * 0.75 + law["model.norm.weight"].float() * 0.25
    assert torch.equal(result["model.norm.weight"], expected.bfloat16())
    assert torch.equal(result["model.embed_tokens.weight"], math["model.embed_tokens.weight"])


def test_sparse_upcycling_copies_one_seed(seeds, tmp_path):
    merge(make_plan(seeds[:1], "sparse-upcycling", num_experts=5, format="bam"), tmp_path / "out")
    result, seed = state(tmp_path / "out"), load_file(seeds[0] / "model.safetensors")
    stacked = result["dense.model.layers.1.mlp.experts.down_proj"]
    assert stacked.shape[0] == 5
    assert all(torch.equal(expert, seed["model.layers.1.mlp.down_proj.weight"]) for expert in stacked)
    assert read_mixture(tmp_path / "out").experts == [f"code-{i}" for i in range(5)]
    dense = AutoModelForCausalLM.from_pretrained(seeds[0], dtype=torch.float32)
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True)
    x = torch.arange(3, 30)[None]
    torch.testing.assert_close(sparse(x).logits, dense(x).logits, atol=1e-5, rtol=0)


def test_the_average_is_a_dense_model(seeds, tmp_path):
    merge(make_plan(seeds, "average"), tmp_path / "out")
    assert words(tmp_path / "out").keys() == words(seeds[0]).keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((seeds[0] / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize(
    ("name", "tokenizer_class"),
    [
        *(
            (name, f"{kind}Tokenizer")
            for name in ("llama", "mistral", "olmo2", "granite", "phi3")
            for kind in ("GPT2", "Llama")
        ),
        ("llama", "PreTrainedTokenizerFast"),
        *(("qwen2", f"{kind}Tokenizer") for kind in ("Qwen2", "GPT2", "Llama")),
        ("qwen2", "PreTrainedTokenizerFast"),
        ("starcoder2", "GPT2Tokenizer"),
        ("gpt_neox", "GPTNeoXTokenizer"),
    ],
)
def test_a_mixture_tokenizes_like_its_seed(name, tokenizer_class, tmp_path):
    """AutoTokenizer chooses by model type; the mixture's type must not change what a text becomes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    tokenizer.decoder = decoders.ByteLevel()
    text = "def main():\n\n\n    return  1234\n\n\n\n"
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([text] * 9, trainer)
    paths = make_seeds(BY_NAME[name], tmp_path, 2, torch.bfloat16)
    for path in paths:
        tokenizer.save(str(path / "tokenizer.json"))
        table = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>", "model_max_length": 64}
        (path / "tokenizer_config.json").write_text(json.dumps(table))
    merge(make_plan(paths, "bam", allow_unrelated=True), tmp_path / "out")
    dense, mixed = (AutoTokenizer.from_pretrained(p, trust_remote_code=True) for p in (paths[0], tmp_path / "out"))
    assert mixed(text)["input_ids"] == dense(text)["input_ids"]
    assert mixed("a</s> b")["input_ids"] == dense("a</s> b")["input_ids"]


def test_a_trained_mixture_is_inspected_and_extracted(seeds, tmp_path):
    """save_pretrained knows nothing of upcycle.json; the config alone says what is an expert."""
    merge(make_plan(seeds), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / "upcycle.json").exists()
    inspected = json.loads(run_cli("inspect", tmp_path / "trained", "--json").stdout)
    assert inspected["experts"] == ["code", "law", "math"]
    merge(plan_extract(read_mixture(tmp_path / "trained"), 1), tmp_path / "again")
    assert np.array_equal(
        words(tmp_path / "again")["model.layers.0.mlp.up_proj.weight"],
        words(seeds[1])["model.layers.0.mlp.up_proj.weight"],
    )


def test_a_dense_result_names_no_code_that_it_lacks(seeds, tmp_path):
    for seed in seeds:
        edit_json(seed / "config.json", auto_map={"AutoConfig": "configuration_x.X"})
    merge(make_plan(seeds, "average"), tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_files_beside_the_weights_are_taken_over_byte_for_byte(seeds, tmp_path):
    (seeds[0] / "chat_template.jinja").write_text("{{ messages }}\r\n")
    merge(make_plan(seeds), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (seeds[0] / name).read_bytes()


def test_provenance_says_what_was_made_from_what(seeds, tmp_path):
    merge(make_plan(seeds), tmp_path / "out")
    provenance = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert [seed["name"] for seed in provenance["seeds"]] == provenance["experts"] == ["code", "law", "math"]
    assert provenance["recipe"]["mix"]["attention.query"] == "experts"
    assert len({seed["fingerprint"] for seed in provenance["seeds"]}) == 3
    assert str(tmp_path) not in (tmp_path / "out" / "upcycle.json").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    merge(make_plan(seeds, "bam", "router.ffn.top_k=2"), tmp_path / "two")
    assert json.loads((tmp_path / "two" / "upcycle.json").read_text())["plan"] != provenance["plan"]


def test_a_full_disk_is_found_before_and_while_writing(seeds, tmp_path, monkeypatch):
    plan = make_plan(seeds)
    monkeypatch.setattr(preflight, "free_bytes", lambda folder: 1000)
    needed = plan.nbytes + sum(file.stat().st_size for file in plan.copied.values()) + preflight.MARGIN
    with pytest.raises(OutputError, match=rf"needs {needed:,} bytes \(.* and a margin\), but only 1,000"):
        merge(plan, tmp_path / "out")
    monkeypatch.undo()
    real, calls = os.pwrite, []

    def full(descriptor, data, offset):
        calls.append(offset)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="disk is full"):
        merge(plan, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"code", "law", "math"}


def test_what_may_not_be_read_or_written_is_refused_first(seeds, tmp_path, monkeypatch):
    plan = make_plan(seeds)
    for folder, error, message in (
        (seeds[1], SeedError, "seed 'law': .*model.safetensors may not be read by this user"),
        (tmp_path, OutputError, "may not be written by this user"),
    ):
        real = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode, f=folder, real=real: path not in (f, f / "model.safetensors")
            and real(path, mode)
        )  # fmt: skip
        with pytest.raises(error, match=message):
            merge(plan, tmp_path / "out")
        monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"code", "law", "math"}


def test_the_limit_of_open_files_is_raised_or_told(seeds, tmp_path, monkeypatch):
    limits, raised = [(66, 100)], []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: raised.append(pair))
    merge(make_plan(seeds), tmp_path / "out", max_shard_size=60_000)
    files = 3 + len(list((tmp_path / "out").glob("*.safetensors")))
    assert raised == [(files + 64, 100)]
    limits[0] = (30, 60)
    with pytest.raises(OutputError, match=rf"opens {files} files at once, and this user may open 60; raise the limit"):
        merge(make_plan(seeds), tmp_path / "more", max_shard_size=60_000)
    assert not (tmp_path / "more").exists()


def test_a_seed_that_changes_while_it_is_read_is_noticed(seeds, tmp_path):
    def change(_):
        (seeds[1] / "model.safetensors").touch()

    with pytest.raises(SeedError, match=r"seed 'law': .*model\.safetensors was changed while it was read"):
        merge(make_plan(seeds), tmp_path / "out", progress=change)
    assert {path.name for path in tmp_path.iterdir()} == {"code", "law", "math"}


def test_folders_made_for_a_merge_that_failed_go_with_it(seeds, tmp_path):
    from tests.test_seeds import edit_weights, set_nan

    edit_weights(seeds[1], set_nan)
    with pytest.raises(SeedError, match="nan"):
        merge(make_plan(seeds), tmp_path / "a" / "b" / "out")
    assert not (tmp_path / "a").exists()


def test_what_appears_at_the_output_meanwhile_is_kept(seeds, tmp_path):
    def appear(_):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "thesis.txt").write_text("years of work")

    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"thesis\.txt"):
            merge(make_plan(seeds), tmp_path / "out", overwrite=overwrite, progress=appear)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
        shutil.rmtree(tmp_path / "out")


def test_a_failed_overwrite_keeps_the_former_result(seeds, tmp_path):
    from tests.test_seeds import edit_weights, set_nan

    merge(make_plan(seeds), tmp_path / "out")
    before = digests(tmp_path / "out")
    edit_weights(seeds[1], set_nan)
    with pytest.raises(SeedError, match="nan"):
        merge(make_plan(seeds), tmp_path / "out", overwrite=True)
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_merge_leaves_nothing_that_looks_finished(which, seeds, tmp_path):
    """Stopped in the middle by a slow write; afterwards the same merge goes on and ends with the same bytes."""
    script = (
        "import os, signal, time\nreal = os.pwrite\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test run in the background ignores it
        "def slow(*a):\n    os.write(1, b'writing\\n'); time.sleep(0.3); return real(*a)\n"
        "os.pwrite = slow\nfrom upcycle.cli.main import main\n"
        "main(['merge', '--seeds', 'code', 'law', 'math', '--recipe', 'bam', '--out', 'out'])\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, **pipes)
    for _ in range(4):
        assert process.stdout.readline() == b"writing\n"
    process.send_signal(which)
    _, stderr = process.communicate(timeout=30)
    assert not (tmp_path / "out").exists()
    if which != signal.SIGKILL:
        assert process.returncode == 130
        assert b"interrupted" in stderr
        assert b"Traceback" not in stderr
        assert b"the same command goes on from what was written" in stderr
    assert {path.name for path in tmp_path.iterdir()} == {"code", "law", "math", ".out.upcycle-partial"}
    told = []
    merge(make_plan(seeds), tmp_path / "out", tell=told.append)
    assert len(told) == 1
    assert "going on after an interrupted merge" in told[0]
    merge(make_plan(seeds), tmp_path / "undisturbed")
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")
    assert {path.name for path in tmp_path.iterdir()} == {"code", "law", "math", "out", "undisturbed"}


def test_memory_stays_constant(base_seed, tmp_path):
    """Buffers do not grow with the seeds: 100 MB a seed, under 100 MB of memory of its own."""
    config = {"vocab_size": 8, "hidden_size": 1024, "intermediate_size": 4096, "num_key_value_heads": 4}
    case = BY_NAME["llama"]
    base = make_seed(type(case)("big", "llama", {**case.config, **config}), tmp_path / "base", 0, torch.bfloat16)
    paths = [branch(base, tmp_path / name, index) for index, name in enumerate("ab")]
    script = (
        "import sys, threading, time\n"
        "from upcycle.cli.main import main\n"
        "peak = 0\n"
        "def watch():\n"
        "    global peak\n"
        "    while True:\n"
        "        rss = [l for l in open('/proc/self/status') if l.startswith('RssAnon')][0].split()[1]\n"
        "        peak = max(peak, int(rss)); time.sleep(0.002)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        f"main(['merge', '--seeds', '{paths[0]}', '{paths[1]}', '--recipe', 'bam', '--max-shard-size', '30MB'])\n"
    )
    script = script.replace("main([", "\ntry:\n    main([").rstrip() + "\nexcept SystemExit:\n    pass\nprint(peak)\n"
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) < 100_000, result.stdout
    assert (tmp_path / "bam-2x" / "config.json").exists()


def test_a_merge_of_small_seeds_is_quick_and_needs_no_torch(seeds, tmp_path):
    script = (
        "import sys\nfrom upcycle.cli.main import main\n"
        "try:\n    main(['merge', '--seeds', 'code', 'law', 'math', '--recipe', 'bam'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stdout.splitlines()[-1] == "[]"
    # Processor time, which other tests beside this one do not change much.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.5
    assert np.all([(tmp_path / "bam-3x" / name).exists() for name in ("config.json", "model.safetensors")])
