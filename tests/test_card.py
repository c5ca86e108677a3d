"""The model card: metadata that the Hub takes, figures from the files alone, people's own text left as it is."""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from tests.conftest import merge_and_load, write_tokenizer
from tests.hub_server import HubServer
from tests.test_report import make_evaluation, make_run, step_line
from tests.tiny import BY_NAME, VOCAB, edit_json, make_seeds, mixtral_config
from upcycle.card import BEGIN, END, make_card, title
from upcycle.comparison import evaluate_models
from upcycle.errors import CheckpointError, DataError
from upcycle.evaluation_inputs import EvaluationOptions
from upcycle.inspect import inspect_checkpoint
from upcycle.licenses import licensing
from upcycle.merge import merge
from upcycle.mixture import plan_extract, read_mixture
from upcycle.plan import plan_merge
from upcycle.push_plan import result_files
from upcycle.recipe_file import load_recipe
from upcycle.report_tables import number, quantity
from upcycle.seeds import read_seeds

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOSTILE = 'x | y\'s: "z"\n---\nlicense: mit\n---\n<script>`a` ```\n# big [b](javascript:c) <!-- upcycle: end --> *d*'


def make(recipe: str, seeds: list[Path], out: Path, **options: Any) -> Path:
    merge(plan_merge(load_recipe(recipe), read_seeds([*map(str, seeds)]), allow_unrelated=True, **options), out)
    return out


@pytest.fixture(scope="module")
def made_mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of `a`, `b` and `c`, merged once."""
    folder = tmp_path_factory.mktemp("card")
    seeds = make_seeds(BY_NAME["llama"], folder / "seeds")
    for seed in seeds:
        write_tokenizer(seed)
    return make("bam-kv-shared", seeds, folder / "mix")


@pytest.fixture
def mix(made_mixture: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made_mixture, tmp_path / "mix")


@pytest.fixture
def trained(mix: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "trained", mix)


def provenance(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "upcycle.json").read_text())


def edit_seeds(folder: Path, *changes: dict[str, Any]) -> None:
    """Change the records of the first seeds."""
    seeds = provenance(folder)["seeds"]
    for seed, change in zip(seeds, changes, strict=False):
        seed.update(change)
    edit_json(folder / "upcycle.json", seeds=seeds)


def from_hub(folder: Path, license: str | None = "apache-2.0") -> Path:
    """As if the seeds had come from the Hub."""
    edit_seeds(folder, *({"repository": f"org/{n}", "revision": COMMIT, "license": license} for n in "abc"))
    return folder


def metadata(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.split("\n---\n")[0])
    assert isinstance(found, dict)
    return found


def body(card: str) -> str:
    return card.split(BEGIN)[1].split(END)[0]


def cells(card: str, label: str, after: str = "") -> list[str]:
    """The cells of the first row that begins with `label`, below `after`."""
    row = re.search(rf"^\| {re.escape(label)}.*$", card[card.index(after) :], re.M)
    assert row, label
    return [cell.strip() for cell in row[0].strip("|").split("|")]


def validate(hub: HubServer, home: Path, *cards: str) -> list[str]:
    """What the client and the Hub say of each card, in a process of its own, as its settings are read at import."""
    script = """
import json, sys
from huggingface_hub import ModelCard
said = []
for text in json.load(sys.stdin):
    try:
        ModelCard(text).validate()
        said.append("")
    except Exception as error:
        said.append(type(error).__name__)
print(json.dumps(said))
"""
    variables = {**os.environ, **hub.environment(home=home)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, input=json.dumps(cards), env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_hub_takes_the_metadata(hub, mix, trained, tmp_path):
    fresh = make_card(from_hub(mix))
    assert metadata(fresh) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["upcycle", "moe", "mixture-of-experts", "merge", "bam", "arxiv:2408.08274"],
        "base_model": ["org/a", "org/b", "org/c"],
        "base_model_relation": "merge",
    }
    evaluated = make_card(trained, evaluation=make_evaluation([str(trained)], str(trained)), repository="org/name")
    again = make_card(trained, existing=evaluated, license="My own: terms")
    edit_seeds(mix, {"name": HOSTILE, "repository": HOSTILE, "revision": HOSTILE, "license": HOSTILE})
    hostile = make_card(mix, license=HOSTILE)
    cards = [fresh, evaluated, again, hostile, fresh.replace("tags:", "- tags:")]
    assert validate(hub, tmp_path / "home", *cards) == ["", "", "", "", "ParserError"]
    assert len(hub.asked("validate-yaml")) == 4  # the last one already fails at the client


def test_a_merge_has_its_card_without_the_client(mix):
    script = f"""
import sys
from pathlib import Path
from upcycle.card import make_card
make_card(Path({str(mix)!r}))
print(sorted({{"huggingface_hub", "jinja2", "matplotlib", "torch", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_seeds_that_are_on_no_hub(mix):
    found = metadata(make_card(mix))
    assert not {"license", "base_model", "base_model_relation", "model-index", "datasets"} & found.keys()
    edit_seeds(mix, {"repository": "org/a"}, {"repository": "../b"}, {"repository": 3})
    card = make_card(mix)
    assert metadata(card)["base_model"] == ["org/a"]
    assert "[org/a](https://huggingface.co/org/a) |" in card


@pytest.mark.parametrize(
    ("file", "changes", "shown"),
    [
        ("upcycle.json", {"random_seed": 4711}, "| Random seed | `4711` |"),
        ("upcycle.json", {"plan": "fedcba98" * 8}, f"| Plan | `{'fedcba98' * 8}` |"),
        ("upcycle.json", {"upcycle_version": "9.8.7"}, "| upcycle | `9.8.7` |"),
        ("upcycle.json", {"ancestor": "b"}, "| b, the ancestor of the others |"),
        ("config.json", {"num_experts_per_tok": 2}, "A token uses 2 of 3 FFN experts, gates as they are"),
        ("config.json", {"norm_topk_prob": True}, "FFN experts, gates rescaled to sum to one"),
        ("config.json", {"max_position_embeddings": 4711}, "positions for 4,711 tokens"),
        ("train.json", {"settings": {"steps": 4711}}, "for 4,711 steps"),
        ("train.json", {"settings": {"learning_rate": 0.0047}}, "| learning rate | 0.0047 |"),
        ("train.json", {"model": "other"}, "from `other`"),
        ("train.json", {"upcycle_version": "9.8.7"}, "Trained by upcycle 9.8.7"),
        ("train.json", {"data": {"docs": {"tokens": 4_710_000, "documents": 47}}}, "| 4.71 M | 47 | 0.25× |"),
        ("train.json", {"epochs": {"docs": 0.47}}, "| 0.47× |"),
        ("train.json", {"reasons": {"learning_rate": "4711"}}, "| learning rate: why | 4711 |"),
    ],
)
def test_figures_come_from_the_files(trained, file, changes, shown):
    assert shown not in make_card(trained)
    edit_json(trained / file, **changes)
    assert shown in make_card(trained)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"license": "mit"}, "| `mit` |"),
        ({"fingerprint": "4711" * 16}, "| `471147114711` |"),
        (
            {"revision": COMMIT, "repository": "o/n"},
            f"[o/n](https://huggingface.co/o/n/tree/{COMMIT}) | `0123456789ab` |",
        ),
        ({"name": "tort-law"}, "| tort-law |"),
    ],
)
def test_what_is_said_of_a_seed_comes_from_its_record(mix, change, shown):
    assert shown not in make_card(mix)
    edit_seeds(mix, change)
    assert shown in make_card(mix)


def test_the_recipe_is_the_one_that_acted(mix):
    recipe = provenance(mix)["recipe"]
    recipe["router"]["ffn"] |= {"top_k": 3, "std": 0.47}
    recipe["mix"] |= {"norm": "seed:b", "head": "weighted"}
    edit_json(mix / "upcycle.json", recipe={**recipe, "paper": "arXiv:4711.12345", "weights": {"a": 4, "b": 7}})
    card = make_card(mix)
    assert "| FFN router | top 3, gates as they are, random start (std 0.47) |" in card
    assert "| Of b alone | norms |" in card
    assert "| Shares | a 4, b 7 |" in card
    assert "[arXiv:4711.12345](https://arxiv.org/abs/4711.12345)" in card
    assert "arxiv:4711.12345" in metadata(card)["tags"]


def test_costs_are_those_of_the_headers(mix, tmp_path):
    other = make("bam", make_seeds(BY_NAME["qwen3"], tmp_path / "qwen"), tmp_path / "other")
    units = {"Parameters": "total_parameters", "Active per token": "active_parameters"}
    for folder in (mix, other):
        card, found = make_card(folder), inspect_checkpoint(folder)
        rows = {label: (getattr(found.cost, key), getattr(found.dense, key), "") for label, key in units.items()}
        rows["Forward, per token"] = (found.cost.flops_per_token, found.dense.flops_per_token, "FLOPs")
        rows["Weight files"] = (found.cost.checkpoint_bytes, found.dense.checkpoint_bytes, "B")
        rows["Cache, per token"] = (found.cost.cache_bytes_per_token, found.dense.cache_bytes_per_token, "B")
        for label, (mine, seed, unit) in rows.items():
            assert cells(card, label) == [label, quantity(mine, unit), quantity(seed, unit), f"{mine / seed:.2f}×"]
    assert "Qwen3ForCausalLM, the weights are in F32" in make_card(other)


def test_no_figure_stands_in_the_code():
    """Text of the card's own code holds no digit but that of a licence."""
    for name in ("card", "card_sections", "card_results"):
        tree = ast.parse((Path(__file__).parent.parent / "upcycle" / f"{name}.py").read_text())
        documents = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if hasattr(node, "body")
                     if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)}  # fmt: skip
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        texts = {text for text in texts if isinstance(text, str) and text not in documents}
        assert [text for text in texts if re.search(r"\d", text.replace("apache-2.0", ""))] == []


def test_a_training(trained):
    lines = [step_line(1, nll=4.711, tokens=4000), step_line(2), step_line(7, nll=3.817, tokens=4711, skipped="nan")]
    (trained / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "broken\n")
    card = make_card(trained)
    assert "Trained by upcycle 1 from `mix` for 30 steps." in card
    assert "2 steps were taken and 1 skipped, on 4,711 tokens; forward and backward cost" in card
    assert "was 4.711 nats per token at step 1, and 3.817 at step 7." in card
    assert "metrics.jsonl: line 4 is damaged" in card
    assert str(trained.parent) not in card
    assert cells(card, "docs")[1:3] == ["100.0%", "3 M"]
    assert "untrained" not in card
    (trained / "train.json").write_text("{")
    card = make_card(trained)
    assert "Trained by upcycle. 2 steps were taken" in card
    assert "train.json cannot be read as JSON" in card
    assert str(trained.parent) not in card


def test_what_a_training_held_out(trained):
    card = make_card(trained)
    first, *_, last = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for name, part in first["heldout"].items():
        before, after = part["loss"], last["heldout"][name]["loss"]
        row = [name, number(before), number(after), number(after - before, sign=True)]
        assert cells(card, name, "**Held-out loss while") == row


def test_untrained_routers_are_said_to_be(mix, trained):
    assert "**Its routers are untrained.**" in make_card(mix)
    assert "## Training" not in make_card(mix)
    assert "untrained" not in make_card(trained)
    step = shutil.copytree(mix, trained / "checkpoints" / "step-000020")
    (step / "training_state").mkdir()
    assert "untrained" not in make_card(step), "a training's own checkpoint is trained, though its record is elsewhere"


def test_an_evaluation_is_shown_as_it_is(trained):
    mine, other = str(trained), "/elsewhere/dense"
    evaluation = make_evaluation([other, mine], mine)
    evaluation["models"][mine]["domains"]["a"] |= {"loss": 2.345678, "ci95": [2.2, 2.4], "perplexity": 10.44}
    evaluation["models"][mine]["tasks"] = {"arc_easy": {"acc": 0.4711}}
    evaluation["verdict"] = ["It is ahead by 0.47.", "But | only | here."]
    card = make_card(trained, evaluation=evaluation, repository="org/name")
    domains = evaluation["models"][mine]["domains"]
    row = cells(card, "trained (this model), mixture")
    shown = {
        name: f"{number(part['loss'])} ± {(part['ci95'][1] - part['ci95'][0]) / 2:.3f}"
        for name, part in domains.items()
    }
    assert [cell.removesuffix(" ★") for cell in row[1:4]] == list(shown.values())
    assert shown["a"] == "2.346 ± 0.100"
    assert row[2].endswith("★"), "it is the best in `a`"
    assert cells(card, "trained (this model)", "**Perplexity**")[2] == "10.44"
    assert cells(card, "dense", "**Perplexity**")[1:] == [f"{math.exp(3):.2f}"] * 3
    assert cells(card, "arc_easy", "**Downstream tasks**")[1:] == ["acc", "–", "0.4711"]
    assert "- It is ahead by 0.47.\n- But \\| only \\| here." in card
    assert "a: 100 tokens in 3 documents" in card
    found = ModelCard(card).data
    assert found.model_name == "org/name"
    values = {(one.dataset_name, one.metric_type): one.metric_value for one in found.eval_results}
    keys = ("loss", "perplexity", "bits_per_byte")
    assert values == {(f"held-out text, domain {n}", key): part[key] for n, part in domains.items() for key in keys}
    assert "has not been measured, nor" not in card


def test_a_real_evaluation(mix, tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(VOCAB, size=(4, 16)).astype(np.uint16))
    monkeypatch.chdir(tmp_path)
    evaluation = evaluate_models(EvaluationOptions(["mix"], {"a": "a.npy"}))
    card = make_card(mix, evaluation=json.loads(json.dumps(evaluation)))
    (domain,) = evaluation["models"]["mix"]["domains"].values()
    assert cells(card, "mix (this model), mixture")[1].startswith(f"{domain['loss']:.3f} ± ")
    for sentence in evaluation["verdict"]:
        assert f"- {sentence}" in card


def test_an_evaluation_of_another_model_is_refused(trained, tmp_path):
    def refused(evaluation: dict[str, Any], message: str, **options: Any) -> None:
        with pytest.raises(DataError, match=message):
            make_card(trained, evaluation=evaluation, **options)

    refused(make_evaluation(["mix", "dense"]), "is of 'mix', 'dense', and none of them may be")
    refused(make_evaluation(["one/trained", "two/trained"]), "and 2 of them may be")
    refused(make_evaluation(["elsewhere/trained"]), "has the experts of none, and .* \\['a', 'b', 'c'\\]")
    renamed = make_evaluation(["trained"], "trained")
    renamed["models"]["trained"]["routing"]["experts"] = ["a", "b", "x"]
    refused(renamed, "another model")
    for broken in ({}, {"models": {}}, {"models": {"trained": 1}}, {"models": {"trained": {"domains": {"a": 1}}}}):
        refused(broken, "none; expected what")
    here = str(trained / ".." / "trained")
    assert "## Evaluation" in make_card(trained, evaluation=make_evaluation(["one/trained", here], here))
    pushed = make_evaluation(["runs/name"], "runs/name")
    refused(pushed, "none of them")
    assert "## Evaluation" in make_card(trained, evaluation=pushed, repository="org/name")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_what_people_wrote_stays(trained, ending):
    card = make_card(from_hub(trained), evaluation=make_evaluation([str(trained)], str(trained)))
    above, below = f"# My own{ending}Text `x`\t{ending}{ending}", f"{ending}## More  {ending}<b>é</b> ---{ending}"
    theirs = {"type": "text-generation"}, {"type": "arc", "name": "ARC"}, [{"type": "acc", "value": 0.5}]
    results = dict(zip(("task", "dataset", "metrics"), theirs, strict=True))
    own = {
        "language": ["de", "en"],
        "pipeline_tag": "summarization",
        "license_link": "LICENSE.md",
        "thumbnail": "https://x/y.png?a=b: c",
        "tags": ["mine", "moe"],
        "model-index": [{"name": "theirs", "results": [results, metadata(card)["model-index"][0]["results"][0]]}],
    }
    block = card[card.index(BEGIN) : card.index(END) + len(END)]
    former = f"---\n{yaml.safe_dump({**metadata(card), **own})}---\n{above}{block.replace('mixture', 'x')}{below}"
    once = make_card(trained, existing=former)
    assert once.split("\n---\n", 1)[1].startswith(above + BEGIN)
    assert once.endswith(END + below)
    found = metadata(once)
    assert found["tags"] == ["mine", "moe", "upcycle", "mixture-of-experts", "merge", "bam", "arxiv:2408.08274"]
    assert found["model-index"] == [{"name": "theirs", "results": [results]}], "no evaluation is given, so none is ours"
    kept = own.keys() - {"tags", "model-index"}
    assert {key: found[key] for key in kept} == {key: own[key] for key in kept}
    assert make_card(trained, existing=once) == once
    evaluation = make_evaluation([str(trained)], str(trained))
    again = make_card(trained, existing=once, evaluation=evaluation)
    assert [len(entry["results"]) for entry in metadata(again)["model-index"]] == [1, 3]
    assert make_card(trained, existing=again, evaluation=evaluation) == again
    changed = metadata(make_card(trained, existing=once, license="mit"))
    assert changed["license"] == "mit"
    assert "license_link" not in changed, "it was another licence's"


def test_cards_without_marks_or_metadata(mix):
    fresh = make_card(mix)
    assert fresh.split("\n---\n")[1].startswith(f"\n# mix\n\n{BEGIN}\n")
    assert make_card(mix, existing=fresh) == fresh
    for nothing in ("", "\n \n"):
        assert make_card(mix, existing=f"---\nlanguage: de\n---\n{nothing}").count("# mix\n") == 1
    for text in ("# Mine\n\nWords\n", "Words", "----\nno metadata"):
        card = make_card(mix, existing=text)
        assert card.split("\n---\n", 1)[1].startswith(f"{text.rstrip(chr(10))}\n\n{BEGIN}")
        assert "# mix\n" not in card
        assert make_card(mix, existing=card) == card


@pytest.mark.parametrize(
    "text",
    [
        BEGIN,
        f"{END}\n{BEGIN}",
        f"{BEGIN}{END}{BEGIN}{END}",
        "---\na: [\n---\n",
        "---\n- a\n---\n",
        "---\n1: a\n---\n",
    ],
)
def test_a_damaged_card_is_refused(mix, text):
    with pytest.raises(DataError, match="the former README"):
        make_card(mix, existing=text)


@pytest.mark.parametrize("licenses", [["mit"] * 3, ["mit", "cc-by-nc-4.0", None]])
def test_licences(mix, licenses):
    edit_seeds(mix, *({"license": license} for license in licenses))
    found, card = licensing(provenance(mix)), make_card(mix)
    assert metadata(card).get("license") == found.license
    assert card.count(f"| {found.license and '`mit`'} |") == (3 if found.license else 0)
    assert [line for line in card.splitlines() if line in {f"- {problem}" for problem in found.problems}] == [
        f"- {problem}" for problem in found.problems
    ]
    if found.license:
        assert "All its seeds are under `mit`, and so is this model." in card
    else:
        assert len(found.problems) == 3
        assert "No licence is stated for this model." in card
        assert "Its publisher states `mit`" in make_card(mix, license="mit")


def test_licences_that_the_hub_does_not_know(mix):
    named = metadata(make_card(from_hub(mix), license="Our Terms, v2"))
    assert {key: named.get(key) for key in ("license", "license_name", "license_link")} == {
        "license": "other",
        "license_name": "our-terms-v2",
        "license_link": None,
    }
    (mix / "LICENSE").write_text("text")
    assert metadata(make_card(mix, license="Our Terms, v2"))["license_link"] == "LICENSE"
    edit_seeds(mix, {"license": None})
    former = "---\nlicense: other\nlicense_name: theirs\nlicense_link: LICENSE\n---\n"
    card = make_card(mix, existing=former)
    assert metadata(card)["license_name"] == "theirs"
    assert "The metadata of this card state `theirs`." in card
    assert metadata(make_card(mix, existing=former, license="other"))["license_name"] == "theirs"


def test_a_record_without_seeds(mix):
    edit_json(mix / "upcycle.json", seeds=..., recipe=...)
    card = make_card(mix)
    assert "A mixture of 3 experts." in card
    assert "## Experts" not in card
    (mix / "upcycle.json").unlink()
    card = make_card(mix)
    assert "untrained" not in card, "nothing says that it is as a merge made it"
    assert "--data NAME=FILE.jsonl" in card


def test_lines_that_load_it(mix):
    card = make_card(mix, repository="org/name")
    options = 'from_pretrained("org/name", dtype="auto", trust_remote_code=True)'
    assert f"model = AutoModelForCausalLM.{options}\n" in card
    assert 'tokenizer = AutoTokenizer.from_pretrained("org/name", trust_remote_code=True)\n' in card
    assert "\nupcycle train org/name --data a=a.jsonl b=b.jsonl c=c.jsonl --out name-tuned --steps STEPS\n" in card
    (mix / "tokenizer.json").unlink()
    assert "okenizer" not in body(make_card(mix))
    assert "\nupcycle train mix --data" in make_card(mix)
    for name in ("-rf", 'a"b', "a b", "a/b/c", "a;b"):
        assert 'from_pretrained("path/to/this/model"' in make_card(mix, repository=name)


def test_dense_results(mix, tmp_path):
    seeds = make_seeds(BY_NAME["llama"], tmp_path / "seeds")
    card = make_card(from_hub(make("average", seeds, tmp_path / "mean")))
    assert "One dense model, merged by upcycle from the dense models a, b and c, by the recipe `average`." in card
    assert metadata(card)["tags"] == ["upcycle", "merge", "arxiv:2203.05482"]
    assert "## Merged from" in card
    merge(plan_extract(read_mixture(mix), 1), tmp_path / "expert")
    plan = provenance(mix)["plan"]
    extracted = make_card(tmp_path / "expert")
    assert "One dense model: the expert b of a mixture of a, b and c, taken out by upcycle." in extracted
    assert f"| Plan of the mixture | `{plan}` |" in extracted
    for text in (card, extracted):
        assert not re.search("remote_code|untrained|router|vLLM|BAM", body(text))
    copies = make_card(from_hub(make("sparse-upcycling", seeds[:1], tmp_path / "copies", num_experts=4)))
    assert "A mixture of 4 experts, made by upcycle from one dense model, a, by" in copies
    assert "Copied to each of the 4 experts." in copies
    assert "base_model_relation" not in metadata(copies), "one seed is no merge"


def test_a_family_that_is_only_trained(tmp_path):
    from transformers import MixtralForCausalLM

    MixtralForCausalLM(mixtral_config()).save_pretrained(tmp_path / "mixtral")
    card = make_card(tmp_path / "mixtral")
    assert "A mixture of 4 experts." in card
    assert "bam" not in metadata(card)["tags"]


def test_names_cannot_break_out(trained):
    data = {HOSTILE: {"tokens": 3, "documents": 4}}
    edit_json(trained / "train.json", model=HOSTILE, data=data, reasons={HOSTILE: HOSTILE}, upcycle_version=HOSTILE)
    recipe = {"name": HOSTILE, "summary": HOSTILE, "paper": HOSTILE, "mix": {"ffn": HOSTILE}, "weights": {HOSTILE: 1}}
    edit_json(trained / "upcycle.json", recipe=recipe, plan=HOSTILE, ancestor=HOSTILE, random_seed=HOSTILE)
    keys = ("name", "repository", "revision", "license", "fingerprint")
    edit_seeds(trained, dict.fromkeys(keys, HOSTILE))
    evaluation = make_evaluation([str(trained), f"/x/{HOSTILE}"], str(trained))
    for model in evaluation["models"].values():
        model["domains"][HOSTILE] = model["domains"].pop("a")
        model["role"] = HOSTILE
    evaluation["verdict"] = [HOSTILE, "# heading", "1. one", "- dash", 5]
    card = make_card(trained, evaluation=evaluation, repository=HOSTILE, pictures=[f"p/{HOSTILE}.png"])
    text = card.split("\n---\n", 1)[1]
    assert text.count(BEGIN) == text.count(END) == 1
    assert (
        make_card(trained, existing=card, evaluation=evaluation, repository=HOSTILE, pictures=[f"p/{HOSTILE}.png"])
        == card
    )
    text = re.sub(r"<details><summary>Settings</summary>|</details>|<!-- .* -->", "", text)
    assert "<" not in text
    found = metadata(card)
    assert "license" not in found
    shown = HOSTILE.replace("\n", "\N{REPLACEMENT CHARACTER}")
    assert found["model-index"][0]["name"] == shown
    assert found["model-index"][0]["results"][-1]["dataset"]["config"] == shown
    assert "[b](" not in text
    assert not re.search(r"^(# big|# heading|- (# |1\. |- ))", text, re.M)
    fences = re.findall(r"^```.*$", text, re.M)
    assert fences == ["```python", "```", "```", "```"]
    for table in re.findall(r"(?:^\|.*\|$\n)+", text, re.M):
        rows = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(rows)) == 1, table


def test_pictures(mix):
    card = make_card(mix, pictures=["report-pictures/own-expert.png", "a b)(.png"])
    assert "![own expert](report-pictures/own-expert.png)" in card
    assert "![a b)(](a%20b%29%28.png)" in card
    assert "## Pictures" not in make_card(mix)


def test_folders_that_are_no_checkpoints(mix, tmp_path):
    for path, message in ((tmp_path / "no", "is no folder"), (make_run(tmp_path / "run"), "no finished checkpoint")):
        with pytest.raises(CheckpointError, match=message):
            make_card(path)
    damaged = make_run(tmp_path / "damaged", mix)
    (damaged / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="truncated"):
        make_card(damaged)


def test_a_merge_and_a_training_write_it(mix, tmp_path):
    """With people's text, and the title of what it is, so that the same merge gives the same bytes anywhere."""
    fresh = (mix / "README.md").read_text()
    assert fresh == make_card(mix, repository=title(provenance(mix), False))
    (mix / "README.md").write_text(f"---\nlanguage: de\n---\nOurs.\n{fresh.split('---', 2)[2]}")
    merge(plan_extract(read_mixture(mix), 1), tmp_path / "expert")
    (tmp_path / "expert" / "README.md").write_text("Theirs.\n")
    merge(plan_extract(read_mixture(mix), 1), tmp_path / "expert", overwrite=True)
    again = (tmp_path / "expert" / "README.md").read_text()
    assert "Theirs.\n" in again
    called = title(provenance(tmp_path / "expert"), False)
    assert called == "b, an expert of a mixture of a, b, c"
    assert f"# {called}\n" in make_card(tmp_path / "expert", repository=called)
    assert BEGIN in again
    (tmp_path / "expert" / "README.md").write_text(f"Mine. {BEGIN}{BEGIN}")
    merge(plan_extract(read_mixture(mix), 1), tmp_path / "expert", overwrite=True)
    assert (tmp_path / "expert" / "README.md").read_text() == f"Mine. {BEGIN}{BEGIN}"


def test_another_evaluation_of_the_same_name_is_refused(mix):
    row = {"domains": {"code": {"loss": 1.0}}, "fingerprint": "0" * 64, "routing": {"experts": ["a", "b", "c"]}}
    with pytest.raises(DataError, match="had other weights"):
        make_card(mix, evaluation={"models": {str(mix): row}, "measure": "loss"})


def test_a_native_mixture_says_what_it_is(tmp_path):
    """No code, so no option to run it and no tag of ours; its class, its routers, and what it was made of."""
    seeds = make_seeds(BY_NAME["llama"], tmp_path / "seeds")
    for seed in seeds:
        write_tokenizer(seed)
    card = make_card(from_hub(make("btx", seeds, tmp_path / "mix")), repository="org/mix")
    assert metadata(card)["tags"] == ["upcycle", "moe", "mixture-of-experts", "merge", "arxiv:2403.07816"]
    assert metadata(card)["base_model"] == ["org/a", "org/b", "org/c"]
    assert metadata(card)["base_model_relation"] == "merge"
    text = body(card)
    assert "A mixture of 3 experts, merged by upcycle from the dense models a, b and c, by the recipe `btx`" in text
    assert "A token uses 2 of 3 FFN experts, gates rescaled to sum to one; there is one attention." in text
    assert "It is a `MixtralForCausalLM` of transformers' own, which needs no code but that." in text
    assert "**Its routers are untrained.**" in text
    assert 'from_pretrained("org/mix", dtype="auto")' in text
    assert 'AutoTokenizer.from_pretrained("org/mix")' in text
    assert "trust_remote_code" not in text
    assert "modeling_bam" not in text
    assert "|  | mixture | one seed | ratio |" in card
    files = result_files(tmp_path / "mix")
    assert not any(name.endswith(".py") for name in files)
    assert {"config.json", "upcycle.json", "model.safetensors", "tokenizer.json"} <= files.keys()


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        (
            "bam",
            ["experts.granularity=2", "layers.mix=every 2"],
            [
                "A mixture of 6 experts, 2 of each of 3 FFNs",
                "A token uses 2 of 6 FFN experts in 1 of 2 layers (1), gates as they are, and all 3 attention experts",
                "| Layers with experts | every 2; the others are mixed as the norms are |",
                "| Each FFN split into | 2 experts |",
            ],
        ),
        ("top-k-attention", [], ["2 of 3 attention experts", "| Attention router | top 2, gates as they are, "]),
        ("shared-expert", ["experts.shared_weight=0.25"], ["| Shared experts | mean; 0.25 of the output |"]),
        ("btx-extra", ["experts.extra_from=mean"], ["A mixture of 5 experts", "| Extra experts | 2, of mean |"]),
        (
            "flex",
            ["router.ffn.init=random", "mix.default=mean", "router.ffn.bias.a=-1.5"],
            ["random start (std 0.02), bias a −1.5 |"],
        ),
    ],
)
def test_what_some_mixtures_have_is_said(recipe, overrides, said, tmp_path):
    seeds = make_seeds(BY_NAME["llama"], tmp_path / "seeds")
    merge_and_load(seeds, tmp_path / "mix", recipe, *overrides)
    text = make_card(tmp_path / "mix")
    for words in said:
        assert words.replace("−", "-") in text, words


def test_copies_that_were_split_are_said(tmp_path):
    (seed,) = make_seeds(BY_NAME["llama"], tmp_path / "seeds", count=1)
    made = plan_merge(load_recipe("virtual-groups"), read_seeds([str(seed)]), num_experts=3)
    merge(made, tmp_path / "mix")
    text = make_card(tmp_path / "mix")
    assert "A mixture of 12 experts, 4 of each of 3 FFNs, made by upcycle from one dense model" in text
    assert "A token uses 8 of 12 FFN experts" in text
    assert "Copied to each of the 3 FFNs that were split." in text
