"""Tasks by lm-eval: its numbers against those computed by hand, what it may not leave behind, what is refused."""

import json
import logging
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from tests.conftest import merge_and_load, run_cli, write_tokenizer
from tests.tiny import BY_NAME, edit_json, make_seed, make_seeds, mixtral_config
from upcycle.errors import DataError, UpcycleError
from upcycle.tasks import check_tasks, run_tasks
from upcycle.weights import load_model

BOS, EOS = 94, 95  # their words begin no other word, out of which the tokenizer would cut them
NEW_TOKENS = 3
CASE = BY_NAME["llama"]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, which must stay so, and a cache of datasets of the test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path, bos_token=f"word{BOS}", eos_token=f"word{EOS}")


def text(ids: Sequence[int]) -> str:
    return " ".join(f"word{i}" for i in ids)


def random_ids(generator: np.random.Generator, low: int, high: int) -> list[int]:
    return [int(i) for i in generator.integers(3, BOS, generator.integers(low, high))]


def write_task(folder: Path, name: str, documents: Sequence[dict[str, Any]], **config: Any) -> str:
    """A task's file with its documents beside it; what all have in common is included by a relative path."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "common").mkdir(exist_ok=True)
    (folder / "common" / "base.yaml").write_text(json.dumps({"dataset_path": "json", "test_split": "test"}))
    data = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"task": name, "include": "common/base.yaml", "dataset_kwargs": data, **config}))
    return str(path)


@torch.no_grad()
def log_likelihood(model: Any, context: Sequence[int], continuation: Sequence[int]) -> float:
    """Of a continuation, in nats, one sequence at a time and with no padding."""
    logits = model(torch.tensor([[*context, *continuation]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(context) + i - 1, token]) for i, token in enumerate(continuation))


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def choice_task(folder: Path, count: int = 12) -> tuple[str, list[dict[str, Any]]]:
    generator = np.random.default_rng(0)
    documents = [
        {
            "question": text(random_ids(generator, 4, 12)),
            "choices": [text(random_ids(generator, 1, 4)) for _ in range(4)],
            "answer": int(generator.integers(4)),
        }
        for _ in range(count)
    ]
    return write_task(folder, "choice", documents, **CHOICE), documents


def continuation_task(folder: Path, **more: Any) -> tuple[str, list[dict[str, Any]]]:
    generator = np.random.default_rng(1)
    documents = [{"context": random_ids(generator, 3, 9), "end": random_ids(generator, 2, 6)} for _ in range(9)]
    written = [{key: text(ids) for key, ids in document.items()} for document in documents]
    config = {"output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": " {{end}}"}
    return write_task(folder, "continuation", written, **config, **more), documents


def rolling_task(folder: Path) -> tuple[str, list[list[int]]]:
    generator = np.random.default_rng(2)
    documents = [random_ids(generator, 10, 60) for _ in range(5)]
    config = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}"}
    metrics = {"metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}]}
    return write_task(folder, "rolling", [{"page": text(ids)} for ids in documents], **config, **metrics), documents


def generation_task(folder: Path, model: Any) -> str:
    """Prompts of several lengths, so padded on the left; every second answer is the plain model's own."""
    generator = np.random.default_rng(3)
    documents = []
    for index in range(6):
        prompt = random_ids(generator, 3, 12)
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
        answer = ids[0, len(prompt) :].tolist()
        documents.append({"prompt": text(prompt), "answer": text(answer if index % 2 else [*answer[:-1], BOS])})
    return write_task(
        folder,
        "generation",
        documents,
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["never"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
        filter_list=[
            {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.*)"}, {"function": "take_first"}]}
        ],
    )


def dense(folder: Path) -> Any:
    return load_model(make_seed(CASE, folder / "dense", 0))


def bam(folder: Path) -> Any:
    merge_and_load(make_seeds(CASE, folder / "seeds"), folder / "bam", "bam")
    return load_model(folder / "bam")


def native(folder: Path) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(mixtral_config()).eval()


@pytest.mark.parametrize("make", [dense, bam, native])
def test_the_numbers_are_those_of_the_plain_model(make: Callable[[Path], Any], tmp_path: Path, tokenizer: Any) -> None:
    model = make(tmp_path)
    choice, questions = choice_task(tmp_path / "tasks")
    continuation, pairs = continuation_task(tmp_path / "tasks")
    rolling, pages = rolling_task(tmp_path / "tasks")
    tasks = [rolling, choice, generation_task(tmp_path / "tasks", model), continuation]
    results = run_tasks(model, tokenizer, tasks, batch_size=4)
    assert list(results) == ["rolling", "choice", "generation", "continuation"]

    likelihoods = [
        [log_likelihood(model, *(tokenizer.encode(part) for part in (q["question"], c))) for c in q["choices"]]
        for q in questions
    ]
    right = [int(np.argmax(row)) == q["answer"] for row, q in zip(likelihoods, questions, strict=True)]
    assert 0 < sum(right) < len(right)
    assert results["choice"]["acc"] == pytest.approx(np.mean(right), abs=1e-12)
    assert results["choice"]["acc_stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)), abs=1e-12)
    assert results["choice"]["samples"] == len(questions)

    total = sum(log_likelihood(model, pair["context"], pair["end"]) for pair in pairs)
    assert -math.log(results["continuation"]["perplexity"]) * len(pairs) == pytest.approx(total, rel=1e-6)

    nats = -sum(log_likelihood(model, [BOS], page) for page in pages)
    expected = nats / math.log(2) / sum(len(text(page)) for page in pages)
    assert results["rolling"]["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert "bits_per_byte_stderr" not in results["rolling"]

    assert results["generation"]["exact_match,first"] == 0.5
    assert results["generation"]["exact_match,first_stderr"] > 0
    assert all(type(value) is float for row in results.values() for value in row.values())


def test_identical_seeds_give_the_seeds_own_numbers(tmp_path: Path, tokenizer: Any) -> None:
    seed = make_seed(CASE, tmp_path / "seed", 0)
    model = load_model(seed)
    mixture = merge_and_load(
        [f"{name}={seed}" for name in "abc"], tmp_path / "mixture", "bam", "router.ffn.normalize=true"
    )
    folder = tmp_path / "tasks"
    tasks = [choice_task(folder)[0], continuation_task(folder)[0], rolling_task(folder)[0]]
    tasks.append(generation_task(folder, model))
    expected, found = (run_tasks(each, tokenizer, tasks) for each in (model, mixture.eval()))
    assert list(found) == list(expected)
    for task, row in expected.items():
        assert found[task] == pytest.approx(row, rel=1e-5, abs=1e-5)


def test_nothing_is_shown_changed_or_left_behind(
    tmp_path: Path,
    workplace: Path,
    tokenizer: Any,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = dense(tmp_path).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    padding = tokenizer.pad_token, tokenizer.padding_side
    task = continuation_task(tmp_path / "tasks")[0]  # its perplexity's error is what lm-eval prints about
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    capfd.readouterr()
    first = run_tasks(model, tokenizer, [task])
    environment, bars = dict(os.environ), tqdm.__init__  # importing lm-eval and what it needs sets some variables

    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    calls: list[tuple[int, int]] = []
    assert run_tasks(model, tokenizer, [task], progress=lambda *call: calls.append(call)) == first
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert first["continuation"]["perplexity_stderr"] > 0
    assert calls == [(done, 9) for done in range(1, 10)]

    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (tokenizer.pad_token, tokenizer.padding_side) == padding
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert list(workplace.iterdir()) == []
    assert dict(os.environ) == environment
    assert tqdm.__init__ is bars
    assert logging.root.manager.disable == logging.NOTSET


def test_limit_and_examples_before_the_question(tmp_path: Path, tokenizer: Any) -> None:
    model = dense(tmp_path)
    task, _ = continuation_task(tmp_path / "tasks")
    assert run_tasks(model, tokenizer, [task], limit=5)["continuation"]["samples"] == 5
    none, two = (run_tasks(model, tokenizer, [task], few_shot=count) for count in (0, 2))
    assert none == run_tasks(model, tokenizer, [task])
    assert two == run_tasks(model, tokenizer, [task], few_shot=2) != none
    own_two, _ = continuation_task(tmp_path / "own", num_fewshot=2)
    assert run_tasks(model, tokenizer, [own_two]) == two
    assert run_tasks(model, tokenizer, [own_two], few_shot=0) == none
    always_none, _ = continuation_task(tmp_path / "own", num_fewshot=0)
    assert run_tasks(model, tokenizer, [always_none], few_shot=2) == none
    for options in ({"limit": 0}, {"few_shot": -1}, {"batch_size": 0}):
        with pytest.raises(DataError, match="expected at least"):
            run_tasks(model, tokenizer, [task], **options)


def test_a_group_comes_before_its_members(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "tasks"
    choice_task(folder)
    parts = [json.loads((folder / "choice.yaml").read_text()) for _ in range(2)]
    for name, part in zip(("left", "right"), parts, strict=True):
        base = json.loads((folder / "common" / "base.yaml").read_text())
        part |= {"task": name, **base}
        del part["include"]
    group = {"group": "both", "task": parts, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (folder / "both.yaml").write_text(json.dumps(group))
    results = run_tasks(dense(tmp_path), tokenizer, [str(folder / "both.yaml")])
    assert list(results) == ["both", "both::left", "both::right"]
    assert results["both"]["acc"] == results["both::left"]["acc"] == results["both::right"]["acc"]
    assert results["both"]["samples"] == 24


def test_names_are_checked_without_a_model(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tasks(["arc_easy", "gsm8k", "mmlu", "ai2_arc"])
    for task, message in (
        ("arc_eazy", "lm-eval has no task 'arc_eazy'; did you mean 'arc_easy'?"),
        ("?" * 30, "`lm-eval ls tasks` lists them"),
        ("humaneval", "runs code that the model writes"),
        ("mmmu_val", "images"),
    ):
        with pytest.raises(DataError) as caught:
            check_tasks(["gsm8k", task])
        assert message in str(caught.value)
        assert len(str(caught.value)) < 300
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries, and waits, several times
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="task 'arc_easy': its data cannot be had"):
        run_tasks(dense(tmp_path), tokenizer, ["arc_easy"])


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, "no such file"),
        ("task: [unclosed", "cannot be read: ParserError"),
        ("- a\n- b", "cannot be read: ValueError"),
        ("include: gone.yaml", "cannot be read: FileNotFoundError"),
        ("dataset_path: json", "names no task"),
        ("group: g\ntask: arc_easy", "needs a list"),
        ("task: t\nunsafe_code: true", "runs code that the model writes"),
        ("task: t\ndoc_to_image: picture", "images"),
    ],
)
def test_damaged_files_are_refused(written: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    if written is not None:
        path.write_text(written)
    with pytest.raises(DataError) as caught:
        check_tasks([str(path)])
    assert message in str(caught.value)


def test_what_only_the_data_show_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    model, folder = dense(tmp_path), tmp_path / "tasks"
    task, documents = choice_task(folder)
    unknown_key = write_task(folder, "key", documents, **CHOICE, dataset_pth="json")
    no_split = write_task(folder, "split", documents, **{**CHOICE, "test_split": "tset"})
    no_data = write_task(folder, "data", documents, **CHOICE)
    (folder / "data.jsonl").unlink()
    too_long = write_task(folder, "long", documents, doc_to_text="{{question}}", doc_to_target="{{answer}}")
    for path, message in (
        (unknown_key, "cannot be prepared"),
        (no_split, "cannot be prepared"),
        (no_data, "its data cannot be had"),
        (too_long, "lm-eval cannot run long: AssertionError"),  # 256 tokens to generate, 64 positions
    ):
        with pytest.raises(DataError) as caught:
            run_tasks(model, tokenizer, [path])
        assert message in str(caught.value)
    twice = write_task(tmp_path / "again", "choice", documents, **CHOICE)
    with pytest.raises(DataError, match="task 'choice' is asked for twice"):
        run_tasks(model, tokenizer, [task, twice])
    with pytest.raises(DataError, match="no task"):
        run_tasks(model, tokenizer, [])


def test_a_tokenizer_is_needed(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    model, task = dense(tmp_path), choice_task(tmp_path / "tasks")[0]
    with pytest.raises(DataError, match="no tokenizer"):
        run_tasks(model, None, [task])
    with pytest.raises(DataError, match="without an end-of-text token"):
        run_tasks(model, AutoTokenizer.from_pretrained(tmp_path), [task])


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UpcycleError, match=r"pip install 'upcycle\[tasks\]'"):
        check_tasks(["arc_easy"])


def test_importing_is_cheap() -> None:
    script = (
        "import sys, upcycle.tasks; raise SystemExit(bool({'lm_eval', 'torch', 'tqdm', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_command_shows_tasks(tmp_path: Path) -> None:
    """From the command's words to a row of its table, and to the same figure in JSON."""
    model = make_seed(CASE, tmp_path / "model", 0)
    write_tokenizer(model)
    edit_json(model / "tokenizer_config.json", bos_token=f"word{BOS}", eos_token=f"word{EOS}")
    task, _ = choice_task(tmp_path / "tasks")
    expected = run_tasks(load_model(model), AutoTokenizer.from_pretrained(model), [task], limit=5)["choice"]
    shown = run_cli("eval", model, "--tasks", task, "--task-limit", 5, HF_HOME=str(tmp_path / "home"))
    assert shown.returncode == 0, shown.stderr
    assert f"choice acc {expected['acc']:.4f} ±" in " ".join(shown.stdout.split())
    found = run_cli("eval", model, "--tasks", task, "--task-limit", 5, "--json", HF_HOME=str(tmp_path / "home"))
    assert json.loads(found.stdout)["models"][str(model)]["tasks"]["choice"] == expected
    more = run_cli("eval", model, "--tasks", task, "--few-shot", 1, "--json", HF_HOME=str(tmp_path / "home"))
    expected = run_tasks(load_model(model), AutoTokenizer.from_pretrained(model), [task], few_shot=1)["choice"]
    assert json.loads(more.stdout)["models"][str(model)]["tasks"]["choice"] == expected
    write_tokenizer(model)
    refused = run_cli("eval", model, "--tasks", task)
    assert (refused.returncode, "has no eos_token" in refused.stderr) == (1, True)
