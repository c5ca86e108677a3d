"""Whose chat template a result has, in which place, and what is said of it."""

import json

import pytest
from transformers import AutoTokenizer

from tests.conftest import run_cli
from tests.tiny import edit_json
from upcycle.chat_template import template_note
from upcycle.errors import SeedError
from upcycle.merge import merge
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds
from upcycle.verify import verify

FIRST, OTHER = "{{ messages[0].content }}", "<{{ messages[0].content }}>"


def as_file(folder, text):
    (folder / "chat_template.jinja").write_text(text)


def in_config(folder, text):
    edit_json(folder / "tokenizer_config.json", chat_template=text)


def in_older_file(folder, text):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))


PLACES = {"chat_template.jinja": as_file, "tokenizer_config.json": in_config, "chat_template.json": in_older_file}


def places(folder):
    """Where a folder has a chat template."""
    found = {name for name in ("chat_template.jinja", "chat_template.json") if (folder / name).exists()}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return found | ({"tokenizer_config.json"} if "chat_template" in config else set())


@pytest.mark.parametrize("recipe", ["average", "bam"])
@pytest.mark.parametrize("first", [*PLACES, None])
@pytest.mark.parametrize("other", PLACES)
def test_a_template_stands_where_its_seed_has_it(first, other, recipe, seeds, tmp_path):
    if first:
        PLACES[first](seeds[0], FIRST)
    PLACES[other](seeds[1], OTHER)
    read = read_seeds([str(path) for path in seeds])
    merge(plan_merge(load_recipe(recipe), read, chat_template="law"), tmp_path / "out")
    assert places(tmp_path / "out") == {other}
    if other != "chat_template.json":  # which tokenizers do not read
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert tokenizer.chat_template == OTHER
        assert tokenizer("word3 word4").input_ids == [3, 4]
    assert json.loads((tmp_path / "out" / "upcycle.json").read_text())["chat_template"] == "law"
    assert verify(tmp_path / "out", [str(path) for path in seeds]).problems == []
    merge(plan_merge(load_recipe(recipe), read), tmp_path / "plain")
    assert places(tmp_path / "plain") == ({first} if first else set())
    merge(plan_merge(load_recipe(recipe), read, chat_template="code"), tmp_path / "own") if first else None
    assert not first or places(tmp_path / "own") == {first}


@pytest.mark.parametrize(
    ("templates", "chosen", "named"),
    [
        ((None, None, None), None, None),
        ((FIRST, FIRST, FIRST), None, None),
        ((FIRST, None, FIRST), None, None),
        ((FIRST, OTHER, FIRST), None, "takes that of seed 'code'; others are those of 'law' (--chat-template NAME)"),
        ((FIRST, OTHER, FIRST), "law", "takes that of seed 'law'; others are those of 'code', 'math'"),
        ((None, OTHER, OTHER), None, "has none, as seed 'code' has none; others are those of 'law', 'math'"),
        ((None, OTHER, OTHER), "law", "takes that of seed 'law'"),
        ((FIRST, OTHER, None), "nobody", None),
    ],
)
def test_what_is_said(templates, chosen, named, seeds):
    for number, (path, text) in enumerate(zip(seeds, templates, strict=True)):
        if text:
            (as_file, in_config, in_older_file)[number](path, text)
    note = template_note(read_seeds([str(path) for path in seeds]), chosen)
    assert note is None if named is None else named in note


def test_one_note_on_stderr(seeds, tmp_path):
    as_file(seeds[0], FIRST)
    in_config(seeds[1], OTHER)
    command = ["merge", "--seeds", *seeds, "--recipe", "bam", "--chat-template", "law", "--out", "out", "--json"]
    made = run_cli(*command, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["out"] == "out"
    assert made.stderr.count("chat template") == 1
    assert "takes that of seed 'law'" in made.stderr
    extracted = run_cli("extract", "out", "--expert", "math", "--out", "math-again", cwd=tmp_path)
    assert extracted.returncode == 0, extracted.stderr
    assert places(tmp_path / "math-again") == {"tokenizer_config.json"}


def test_seeds_without_a_tokenizer_config(seeds, tmp_path):
    for path in seeds:
        (path / "tokenizer_config.json").unlink()
    (seeds[1] / "tokenizer_config.json").write_text(json.dumps({"chat_template": OTHER}))
    read = read_seeds([str(path) for path in seeds])
    merge(plan_merge(load_recipe("average"), read, chat_template="law"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"chat_template": OTHER}


@pytest.mark.parametrize(
    ("damage", "chosen", "named"),
    [
        (lambda f: None, "low", ["--chat-template low", "did you mean 'law'"]),
        (lambda f: None, "law", ["--chat-template law", "no chat template"]),
        (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "law", ["'law'", "chat_template.jinja", "read"]),
        (lambda f: (f / "chat_template.jinja").write_bytes(b" " * 4_000_001), "law", ["'law'", "4,000,001 bytes"]),
        (lambda f: (f / "tokenizer_config.json").write_text("["), "law", ["'law'", "tokenizer_config.json"]),
    ],
)
def test_what_is_no_template_is_refused(damage, chosen, named, seeds):
    damage(seeds[1])
    with pytest.raises(SeedError) as refusal:
        plan_merge(load_recipe("bam"), read_seeds([str(path) for path in seeds]), chat_template=chosen)
    for word in named:
        assert word in str(refusal.value)
