"""Vocabularies aligned by token: every row against one computed by token string, and what is refused."""

import json
import shutil
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import upcycle
from tests.conftest import branch, run_cli, tokenizer_json, words, write_tokenizer
from tests.fuzz.checkpoints import as_json
from tests.test_fuzz import SECONDS, TOKENIZERS, measured
from tests.tiny import BY_NAME, VOCAB, edit_json, make_seed
from upcycle.errors import SeedError
from upcycle.merge import merge
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds
from upcycle.verify import verify
from upcycle.vocabulary import MAX_PIECES, align, usage_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTED = ["mix.embedding=weighted", "mix.head=weighted"]


def entry(token, index, **flags):
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, **plain, "special": True, **flags}


def set_added(folder, tokens, swap=None):
    """A tokenizer with added tokens; `swap` exchanges the ids of two words."""
    table = json.loads(tokenizer_json(swap))
    table["added_tokens"] = [entry(token, VOCAB + number) for number, token in enumerate(tokens)]
    (folder / "tokenizer.json").write_text(json.dumps(table))


def resize(folder, rows, random_seed=0):
    """Embedding and head with so many rows, new ones random."""
    state = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(random_seed)
    for name in {EMBEDDING, HEAD} & state.keys():
        new = torch.randn(rows, state[name].shape[1], generator=draw).to(state[name].dtype)
        kept = state[name][:rows]
        state[name] = torch.cat([kept, new[len(kept) :]])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", vocab_size=rows)


@pytest.fixture(params=["untied", "tied"])
def unlike(request, tmp_path):
    """`code` is padded; `law` has two tokens more; `math` one of these, one of its own, and two words swapped."""
    case = BY_NAME["llama" if request.param == "untied" else "llama-biases"]
    base = make_seed(case, tmp_path / "base", 0, torch.bfloat16)
    write_tokenizer(base)
    paths = [branch(base, tmp_path / name, index + 1) for index, name in enumerate(("code", "law", "math"))]
    code, law, math = paths
    resize(code, 98, 1)
    set_added(law, ["<one>", "<two>"])
    resize(law, 98, 2)
    set_added(math, ["<two>", "<three>"], swap=(5, 7))
    resize(math, 104, 3)
    return paths


def plan_aligned(paths, recipe="average", overrides=(), **options):
    seeds = read_seeds([str(path) for path in paths], align_vocab=True)
    return plan_merge(load_recipe(recipe, overrides), seeds, alignment=align(seeds), **options)


def ids_of(folder):
    return AutoTokenizer.from_pretrained(folder).get_vocab()


def expected_rows(paths, out, name, shares=lambda token: (1, 1, 1)):
    """By id of the result: the mean by `shares` over the seeds that have the token, by the ids of transformers."""
    tables = [load_file(path / "model.safetensors")[name].float() for path in paths]
    vocabularies = [ids_of(path) for path in paths]
    rows = {}
    for token, index in ids_of(out).items():
        having = [
            (share, table[ids[token]])
            for share, table, ids in zip(shares(token), tables, vocabularies, strict=True)
            if token in ids
        ]
        if not sum(share for share, _ in having):
            having = [(1, row) for _, row in having]
        total = sum(share for share, _ in having)
        rows[index] = sum(row * share for share, row in having) / total
    return rows


def check_rows(paths, out, shares=lambda token: (1, 1, 1)):
    state = load_file(out / "model.safetensors")
    prefix = "dense." if "dense." + EMBEDDING in state else ""
    for name in {EMBEDDING, HEAD} & load_file(paths[0] / "model.safetensors").keys():
        found = state[prefix + name]
        rows = expected_rows(paths, out, name, shares)
        assert found.shape == (99, 32)
        assert rows.keys() == set(range(99))
        for index, row in rows.items():
            # One rounding to bf16, of sums in another order.
            torch.testing.assert_close(found[index].float(), row, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("recipe", ["average", "btx", "bam"])
def test_rows_are_those_of_their_tokens(recipe, unlike, tmp_path):
    upcycle.register()
    out = tmp_path / "out"
    merge(plan_aligned(unlike, recipe), out)
    ids = ids_of(out)
    assert len(ids) == 99
    assert {f"word{i}": i for i in range(VOCAB)}.items() <= ids.items()
    # Padding of the first seed's has room for two of the three.
    assert [ids[token] for token in ("<one>", "<two>", "<three>")] == [96, 97, 98]
    check_rows(unlike, out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert model.config.vocab_size == 99
    if recipe == "bam":
        assert model.config.dense_config.vocab_size == 99
    text = AutoTokenizer.from_pretrained(out)("word5 <three> word7 <one>", return_tensors="pt").input_ids
    assert text.tolist() == [[5, 98, 7, 96]]
    assert model(input_ids=text).logits.shape == (1, 4, 99)


@pytest.mark.parametrize(
    ("overrides", "shares"),
    [
        (["mix.embedding=seed:math", "mix.head=seed:law"], None),
        (
            ["mix.embedding=weighted", "mix.head=weighted", "weights.code=1", "weights.law=2", "weights.math=5"],
            (1, 2, 5),
        ),
        (
            ["mix.embedding=weighted", "mix.head=weighted", "weights.code=1", "weights.law=0", "weights.math=0"],
            (1, 0, 0),
        ),
    ],
)
def test_shares_are_those_of_the_seeds_that_have_the_token(overrides, shares, unlike, tmp_path):
    merge(plan_aligned(unlike, "btx", overrides), tmp_path / "out")
    if shares:
        check_rows(unlike, tmp_path / "out", lambda token: shares)
        return
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name, chosen in ((EMBEDDING, (0, 0, 1)), (HEAD, (0, 1, 0))):
        if "dense." + name in state:
            for index, row in expected_rows(unlike, tmp_path / "out", name, lambda _, chosen=chosen: chosen).items():
                torch.testing.assert_close(state["dense." + name][index].float(), row, rtol=2**-8, atol=1e-6)


def test_rows_by_usage(unlike, tmp_path):
    usage = np.random.default_rng(0).dirichlet([1, 1, 1], 99)
    usage[5] = (0, 0, 1)
    usage[98] = (0.5, 0.5, 0)  # <three>, which math alone has
    usage[97] = (1, 0, 0)  # <two>, which code has not
    plan = plan_aligned(unlike, "btx", text={}, usage=usage)
    merge(plan, tmp_path / "out")
    ids = ids_of(tmp_path / "out")
    check_rows(unlike, tmp_path / "out", lambda token: usage[ids[token]])


def test_shares_of_usage_sum_to_one():
    usage = np.array([[0.2, 0.3, 0.5], [1, 0, 0]])
    assert usage_of(usage, [0, 1, 2]) is usage
    np.testing.assert_allclose(usage_of(usage, [1, 2]), [[0.375, 0.625], [0.5, 0.5]])


def test_a_first_seed_without_padding_grows(unlike, tmp_path):
    code, law, math = unlike
    merge(plan_aligned([law, math, code], "average"), tmp_path / "out")
    ids = ids_of(tmp_path / "out")
    assert [ids[token] for token in ("<one>", "<two>", "<three>")] == [96, 97, 98]
    check_rows([law, math, code], tmp_path / "out")
    swapped = plan_aligned([math, law, code])
    assert swapped.config["vocab_size"] == 104  # padding of the first is kept
    assert [one["content"] for one in swapped.added_tokens] == ["<one>"]
    assert swapped.added_tokens[0]["id"] == 98


def test_what_needs_no_alignment_gives_the_same_bytes(seeds, tmp_path):
    for path in seeds:
        resize(path, VOCAB + 8, 4)  # padding is averaged, too
    plain = plan_merge(load_recipe("bam"), read_seeds([str(path) for path in seeds]))
    aligned = plan_aligned(seeds, "bam")
    assert aligned.tensors == plain.tensors
    assert (aligned.config, aligned.copied) == (plain.config, plain.copied)
    merge(plain, tmp_path / "plain")
    merge(aligned, tmp_path / "aligned")
    one, other = words(tmp_path / "plain"), words(tmp_path / "aligned")
    assert all(np.array_equal(one[name], other[name]) for name in one)
    usage = np.full((VOCAB + 8, 3), 1 / 3)
    merge(plan_merge(load_recipe("bam"), plain_seeds(seeds), text={}, usage=usage), tmp_path / "plain-usage")
    merge(plan_aligned(seeds, "bam", text={}, usage=usage), tmp_path / "aligned-usage")
    one, other = words(tmp_path / "plain-usage"), words(tmp_path / "aligned-usage")
    assert all(np.array_equal(one[name], other[name]) for name in one)


def plain_seeds(paths):
    return read_seeds([str(path) for path in paths])


def test_padding_comes_from_the_seeds_that_pad(seeds):
    for path in (seeds[0], seeds[2]):
        resize(path, VOCAB + 2, 4)
    runs = align(read_seeds([str(path) for path in seeds], align_vocab=True)).runs
    assert [(run.rows, run.starts) for run in runs] == [(VOCAB, (0, 0, 0)), (2, (VOCAB, None, VOCAB))]


def test_the_other_tokenizer_files_are_extended(unlike, tmp_path):
    code, law, _ = unlike
    set_added(code, ["<pad>"])
    decoder = {"96": {key: value for key, value in entry("<pad>", 96).items() if key != "id"}}
    edit_json(code / "tokenizer_config.json", added_tokens_decoder=decoder)
    (code / "added_tokens.json").write_text('{"<pad>": 96}')
    (code / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    table = json.loads((law / "tokenizer.json").read_text())
    table["added_tokens"][0]["lstrip"] = True
    (law / "tokenizer.json").write_text(json.dumps(table))
    merge(plan_aligned(unlike), tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "special_tokens_map.json").read_text() == '{"pad_token": "<pad>"}'
    assert json.loads((out / "added_tokens.json").read_text()) == {"<pad>": 96, "<one>": 97, "<two>": 98, "<three>": 99}
    written = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert list(written) == ["96", "97", "98", "99"]
    assert written["97"] == {"content": "<one>", "special": True, "lstrip": True} | dict.fromkeys(
        ("single_word", "rstrip", "normalized"), False
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("word1 <pad> <one> <three>").input_ids == [1, 96, 97, 99]
    assert tokenizer.decode([97, 98]) == "<one> <two>"


def test_everyone_is_told_and_verify_makes_it_again(unlike, tmp_path):
    made = run_cli("merge", "--seeds", *unlike, "--recipe", "bam", "--align-vocab", "--out", "out", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "tokens of seed 'law': 2 new to the first seed ('<one>', '<two>')" in made.stderr
    assert "seed 'math': 2 new to the first seed ('<two>', '<three>'); 2 moved ('word7', 'word5')" in made.stderr
    assert "seed 'code': 3 of the result's are not its own" in made.stderr
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())["vocabulary"]
    assert (record["aligned"], record["size"], record["added"]) == (True, 99, ["<one>", "<two>", "<three>"])
    assert record["seeds"]["math"] == {"new": 2, "moved": 2, "lacking": 1}
    found = verify(tmp_path / "out", [str(path) for path in unlike], load=True)
    assert found.problems == []
    assert found.remade == found.tensors
    again = run_cli("verify", "out", "--seeds", *unlike, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    planned = run_cli("plan", "--seeds", *unlike, "--recipe", "bam", "--align-vocab", "--json", cwd=tmp_path)
    assert json.loads(planned.stdout)["total_parameters"] > 0
    # Another tokenizer of a seed gives another plan.
    set_added(unlike[1], ["<one>", "<2>"])
    assert "do not give the plan" in verify(tmp_path / "out", [str(path) for path in unlike]).problems[0]
    without = run_cli("merge", "--seeds", *unlike, "--recipe", "bam", "--out", "other", cwd=tmp_path)
    assert without.returncode == 1
    for word in ("vocab_size", "--align-vocab"):
        assert word in without.stderr


def test_an_expert_comes_back_with_the_results_vocabulary(unlike, tmp_path):
    merge(plan_aligned(unlike, "bam"), tmp_path / "bam")
    made = run_cli("extract", "bam", "--expert", "law", "--out", "law-again", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    back = tmp_path / "law-again"
    model = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 99
    assert ids_of(back) == ids_of(tmp_path / "bam")
    check_rows(unlike, back)
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(load_file(back / "model.safetensors")[key], load_file(unlike[1] / "model.safetensors")[key])


def test_copies_of_one_seed_in_another_order_give_its_logits(base_seed, tmp_path):
    """The same model with rows and ids exchanged, and with padding: merged it computes what it computed."""
    upcycle.register()
    other = shutil.copytree(base_seed, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        state[name][[5, 7]] = state[name][[7, 5]]
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(other, (5, 7))
    resize(other, VOCAB + 3)
    merge(plan_aligned([base_seed, other], "bam", ["router.ffn.normalize=true"]), tmp_path / "out")
    text = AutoTokenizer.from_pretrained(tmp_path / "out")("word5 word7 word9 word1", return_tensors="pt").input_ids
    assert text.tolist() == [[5, 7, 9, 1]]
    one, two = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (tmp_path / "out", base_seed)
    )
    torch.testing.assert_close(one(input_ids=text).logits, two(input_ids=text).logits, rtol=1e-4, atol=1e-5)
    greedy = [model.generate(text, max_new_tokens=8, do_sample=False).tolist() for model in (one, two)]
    assert greedy[0] == greedy[1]


def change_tokenizer(change):
    def damage(folder):
        table = json.loads((folder / "tokenizer.json").read_text())
        change(table)
        (folder / "tokenizer.json").write_text(json.dumps(table))

    return damage


def other_word(table):
    table["model"]["vocab"] = {("other" if word == "word9" else word): i for word, i in table["model"]["vocab"].items()}


def add(*entries):
    return change_tokenizer(lambda table: table["added_tokens"].extend(entries))


def set_word(index):
    return change_tokenizer(lambda table: table["model"]["vocab"].update(word9=index))


def no_row_between(folder):
    """Of the first seed a token without a row, before one that another has a row for."""
    set_added(folder, ["<one>"])
    set_added(folder.parent / "math", ["<three>"])
    resize(folder.parent / "math", VOCAB + 1)


# How a seed is damaged, which, and what the message must name.
REFUSED = {
    "no tokenizer.json": (
        "law",
        lambda f: (f / "tokenizer.json").unlink(),
        ["law", "no tokenizer.json", "save_pretrained"],
    ),
    "another word": ("law", change_tokenizer(other_word), ["law", "'other'", "words", "leave the seed out"]),
    "another kind": ("law", change_tokenizer(lambda t: t["model"].update(type="BPE")), ["law", "BPE", "WordLevel"]),
    "other merges": (
        "law",
        change_tokenizer(lambda t: t["model"].update(merges=["a b", ["c", "d"]])),
        ["law", "merge 0", "'a b'", "'nothing'"],
    ),
    "unigram scores": ("law", change_tokenizer(lambda t: t["model"].update(vocab=[["a", 0.5]])), ["law", "'a'"]),
    "an id that nobody gives": ("law", add(entry("<one>", 200)), ["law", "'<one>'", "200", "96"]),
    "two tokens of one id": (
        "law",
        set_word(8),
        ["law", "'word8'", "'word9'", "8"],
    ),
    "ids in a place that is taken": (
        "law",
        change_tokenizer(lambda t: t["model"]["vocab"].update(word0=96) or t["added_tokens"].append(entry("<a>", 96))),
        ["law", "'word0'", "'<a>'", "96"],
    ),
    "an empty token": ("law", add(entry("", 96)), ["law", "damaged"]),
    "an endless token": ("law", add(entry("x" * 2000, 96)), ["law", "damaged", "1000"]),
    "half a character": ("law", add(entry("\ud800", 96)), ["law", "no vocabulary"]),
    "a flag that is none": ("law", add(entry("<a>", 96, lstrip="yes")), ["law", "damaged"]),
    "an entry that is none": ("law", add("<a>"), ["law", "no vocabulary"]),
    "ids that are none": (
        "law",
        change_tokenizer(lambda t: t["model"]["vocab"].update(word9=-1)),
        ["law", "whole numbers"],
    ),
    "a huge id": (
        "law",
        change_tokenizer(lambda t: t["model"]["vocab"].update(word9=10**18)),
        ["law", "whole numbers"],
    ),
    "no row between": ("code", no_row_between, ["code", "'<one>'", "96", "vocab_size = 96"]),
    "deep JSON": ("law", lambda f: (f / "tokenizer.json").write_text("[" * 10**5), ["law", "tokenizer.json"]),
    "other sizes": ("law", lambda f: edit_json(f / "config.json", hidden_size=64), ["law", "hidden_size"]),
    "fewer rows than it says": (
        "law",
        lambda f: edit_json(f / "config.json", vocab_size=100),
        ["law", "[96, 32]", "[100, 32]"],
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_be_aligned_is_refused(row, seeds, tmp_path):
    name, damage, named = REFUSED[row]
    damage(tmp_path / name)
    with pytest.raises(SeedError) as refusal:
        plan_aligned(seeds)
    for word in named:
        assert word in str(refusal.value)


def test_a_token_without_a_row_is_not_there(seeds, tmp_path):
    """A tokenizer with one token more than its embedding has rows, as some fine-tunes are published."""
    set_added(seeds[1], ["[PAD]"])
    alignment = align(read_seeds([str(path) for path in seeds], align_vocab=True))
    assert (alignment.size, alignment.added) == (VOCAB, ())
    assert "'law': 1 have no row in its embedding" in alignment.notes()[0]
    # In the first seed its id stays taken.
    set_added(seeds[0], ["[PAD]"])
    alignment = align(read_seeds([str(path) for path in seeds], align_vocab=True))
    assert alignment.size == VOCAB


def test_a_wholly_other_order_is_bounded(seeds, monkeypatch):
    assert MAX_PIECES == 100_000
    monkeypatch.setattr("upcycle.vocabulary.MAX_PIECES", 9)
    write_tokenizer(seeds[1], (5, 50))
    with pytest.raises(SeedError, match=r"code.*5 stretches of rows, expected at most 3"):
        align(read_seeds([str(path) for path in seeds], align_vocab=True))


def test_merges_are_compared_in_either_spelling(seeds):
    for path, merges in zip(seeds, (["a b"], [["a", "b"]], ["a b"]), strict=True):
        table = json.loads((path / "tokenizer.json").read_text(), object_pairs_hook=OrderedDict)
        table["model"]["merges"] = merges
        (path / "tokenizer.json").write_text(json.dumps(table))
    assert align(read_seeds([str(path) for path in seeds], align_vocab=True)).notes() == [
        "--align-vocab: all seeds have the same tokens with the same ids"
    ]


def test_a_large_tokenizer_takes_bounded_memory_and_time(seeds, tmp_path):
    """As many words as the largest have, thousands of added tokens: what is done per token is cheap."""
    count, added = 260_000, 5000
    pairs = [f"w{i} x" for i in range(count)]
    vocabulary = {f"w{i}": i for i in range(count)}
    for path, extra in zip(seeds, (0, added, added // 2), strict=True):
        entries = [entry(f"<{i}>", count + i) for i in range(extra)]
        model = {"type": "BPE", "vocab": vocabulary, "merges": pairs}
        (path / "tokenizer.json").write_text(json.dumps({"added_tokens": entries, "model": model}))
        resize(path, count + extra)
    script = (
        "import re, sys, time\nfrom upcycle.seeds import read_seeds\nfrom upcycle.vocabulary import align\n"
        "began = time.monotonic()\nfound = align(read_seeds(sys.argv[1:], align_vocab=True))\n"
        "peak = re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]\n"
        "print(found.size, time.monotonic() - began, int(peak) // 1000)"
    )
    done = subprocess.run([sys.executable, "-c", script, *seeds], capture_output=True, text=True, check=True)
    size, seconds, megabytes = map(float, done.stdout.split())
    print(done.stdout)
    assert size == count + added
    assert seconds < 10
    assert megabytes < 300


def test_routers_and_rows_from_text(unlike, tmp_path):
    """The whole way with --router-data: text in the first seed's tokens, shares for those that have the row."""
    for path, start in zip(unlike, (10, 40, 70), strict=True):
        words = [f"word{start + number * 7 % 20}" for number in range(400)]
        (tmp_path / f"{path.name}.txt").write_text(" ".join(words))
    data = [f"{path.name}={path.name}.txt" for path in unlike]
    command = ["merge", "--seeds", *unlike, "--recipe", "bam", "--align-vocab", "--out", "out"]
    made = run_cli(*command, "--router-data", *data, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    found = verify(tmp_path / "out", [str(path) for path in unlike], load=True)
    assert found.problems == []
    state = load_file(tmp_path / "out" / "model.safetensors")["dense." + EMBEDDING].float()
    own = load_file(unlike[2] / "model.safetensors")[EMBEDDING].float()
    torch.testing.assert_close(state[98], own[97], rtol=0, atol=0)  # <three>, which math alone has
    law, math = (load_file(path / "model.safetensors")[EMBEDDING].float() for path in unlike[1:])
    torch.testing.assert_close(state[97], (law[97] + math[96]) / 2, rtol=2**-8, atol=1e-6)  # <two>, which no text has


def test_a_trained_tokenizer_reads_alike(unlike, tmp_path):
    """A byte-level BPE: what is written is what tokenizers reads, merges and all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        ["the cat sat on the mat", "a cat and a hat"],
        trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False),
    )
    words = trained.get_vocab_size()
    for path, tokens in zip(unlike, ([], ["<one>", "<two>"], ["<two>", "<é>"]), strict=True):
        own = Tokenizer.from_str(trained.to_str())
        own.add_special_tokens(tokens)
        own.save(str(path / "tokenizer.json"))
        resize(path, words + len(tokens))
    merge(plan_aligned(unlike), tmp_path / "out")
    out, first = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", unlike[0]))
    text = "the cat 😀 sat"
    assert out(text).input_ids == first(text).input_ids
    assert out("cat<é>").input_ids == [*first("cat").input_ids, words + 2]
    assert out.convert_ids_to_tokens([words, words + 2]) == ["<one>", "<é>"]


MILLIONS = b",".join(b'"%07d":%d' % (i, i) for i in range(1_900_000))
HOSTILE = {
    "one token": TOKENIZERS["one token"],
    "unigram": TOKENIZERS["unigram"],
    "infinity": TOKENIZERS["infinity"],
    "words": b'{"model":{"vocab":{' + MILLIONS + b"}}}",
    "ids": b'{"model":{"vocab":{' + MILLIONS.replace(b":1", b":91") + b"}}}",
    "merges": b'{"model":{"vocab":{},"merges":[' + b",".join([b'["a","b"]'] * 1_300_000) + b"]}}",
    "merges of lists": b'{"model":{"vocab":{},"merges":[' + b",".join([b"[[]]"] * 1_300_000) + b"]}}",
    "added": b'{"model":{"vocab":{}},"added_tokens":['
    + b",".join(b'{"id":%d,"content":"%07d","special":true}' % (i, i) for i in range(490_000))
    + b"]}",
    "long added": as_json({"model": {"vocab": {}}, "added_tokens": [entry("x" * 400_000, 0)]}),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("others", ["ordinary", "the same"])
def test_a_hostile_tokenizer_is_refused_in_little_time_and_memory(case, others, seeds, tmp_path):
    (seeds[1] / "tokenizer.json").write_bytes(HOSTILE[case])
    if others == "the same":
        (seeds[0] / "tokenizer.json").write_bytes(HOSTILE[case] + b" ")
    command = ("merge", "--seeds", *seeds[:2], "--recipe", "btx", "--align-vocab", "--out", "out")
    done, seconds, megabytes = measured(tmp_path, *command)
    print(f"{case}: {seconds:.1f} s, {megabytes:.0f} MB: {done.stderr[:200]}")
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr
    assert len(done.stderr) < 5000
    assert seconds < SECONDS
    assert megabytes < 500  # what reading so large a tokenizer.json takes, with or without --align-vocab
    assert (done.returncode == 0) == (tmp_path / "out").exists()
