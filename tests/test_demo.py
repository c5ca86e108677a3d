import json
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner
from upcycle.cli.demo import demo as demo_command

from tests.tiny import BY_NAME, dense_config
from upcycle import demo
from upcycle.errors import OutputError, RecipeError, UpcycleError

TEXT = Path(__file__).parent / "data" / "text"
TINY = demo.Settings(
    vocab_size=300,
    context=32,
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    batch=2,
    seed_steps=2,
    specialist_steps=2,
    mixture_steps=2,
)
MODELS = ["seed", "code", "math", "prose"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The start of one document of each file."""
    folder = tmp_path / "text"
    folder.mkdir()
    for file in TEXT.glob("*.jsonl"):
        record = json.loads(file.read_text(encoding="utf-8").partition("\n")[0])
        (folder / file.name).write_text(json.dumps({**record, "text": record["text"][:2000]}) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the start of worker processes; one test runs them."""

    @contextmanager
    def workers() -> Iterator[Executor]:
        with ThreadPoolExecutor(1) as pool:
            yield pool

    monkeypatch.setattr(demo, "_workers", workers)


def run(data: Path, work: Path, settings: demo.Settings = TINY, family: str = "llama") -> list[str]:
    """Run the demo and return the names of the models that it trained."""
    messages: list[str] = []
    demo.run_demo(family, data, work, settings=settings, progress=messages.append)
    return sorted(message.partition(":")[0] for message in messages if ": trained" in message and "-4x" not in message)


def test_text_parses_and_its_sources_are_named() -> None:
    sources = (TEXT.parent / "SOURCES.md").read_text(encoding="utf-8")
    for file in sorted(TEXT.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n"):
            record = json.loads(line)
            assert record.keys() == {"text", "source"}
            assert f"`{record['source']}`" in sources
    assert all(
        len(documents) > 1 for split in ("train", "heldout") for documents in demo.read_text(TEXT, split).values()
    )
    assert sum(file.stat().st_size for file in TEXT.parent.rglob("*") if file.is_file()) < 3_000_000


def test_heldout_text_is_not_in_the_training_text() -> None:
    def shingles(document: str) -> set[tuple[str, ...]]:
        words = document.split()
        return {tuple(words[start : start + 10]) for start in range(len(words) - 9)}

    train = [document for documents in demo.read_text(TEXT, "train").values() for document in documents]
    seen = set().union(*map(shingles, train))
    for documents in demo.read_text(TEXT, "heldout").values():
        for document in documents:
            own = shingles(document)
            assert document not in train
            assert len(own & seen) < 0.25 * len(own)


def test_windows_do_not_overlap() -> None:
    stream = np.arange(70, dtype=np.uint16)
    assert demo.windows(stream, 32).tolist() == [list(range(32)), list(range(32, 64))]


@pytest.mark.usefixtures("in_process")
def test_parallel_family(data: Path, tmp_path: Path) -> None:
    result = demo.run_demo("cohere2", data, tmp_path / "work", settings=TINY)
    check_result(result, tmp_path / "work" / "cohere2")
    config = AutoConfig.from_pretrained(tmp_path / "work" / "cohere2" / "seed")
    assert config.sliding_window < TINY.context
    assert (config.logit_scale, config.tie_word_embeddings, config.head_dim) == (1.0, True, 8)


def test_sequential_family_in_worker_processes(data: Path, tmp_path: Path) -> None:
    result = demo.run_demo("llama", data, tmp_path / "work", settings=TINY)
    check_result(result, tmp_path / "work" / "llama")


def check_result(result: demo.DemoResult, folder: Path) -> None:
    """Every model is there, measured in every domain, loads as bf16, and knows its tokens."""
    models = {Path(path).name: entry for path, entry in result.evaluation["models"].items()}
    assert list(models) == ["bam-kv-shared-4x-trained", "bam-kv-shared-4x", *MODELS, "average-4x"]
    assert all(list(entry["domains"]) == list(demo.DOMAINS) for entry in models.values())
    assert all(0 < found["loss"] < 12 for entry in models.values() for found in entry["domains"].values())
    assert all(models[name]["role"] in (f"seed {name}", "ancestor") for name in MODELS)
    assert models["average-4x"]["role"] == "plain average"
    assert result.report == folder / "report.html"
    page = result.report.read_text()
    assert all(name in page for name in models)
    assert result.mixture == folder / "bam-kv-shared-4x-trained"
    assert (result.prompt + result.sample).strip()
    text = "def f(x):  return x ,\n"
    for name in (*MODELS, "bam-kv-shared-4x", "bam-kv-shared-4x-trained"):
        assert AutoConfig.from_pretrained(folder / name, trust_remote_code=True).dtype == torch.bfloat16
        tokenizer = AutoTokenizer.from_pretrained(folder / name, trust_remote_code=True)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert tokenizer(text)["input_ids"] == tokenizer.backend_tokenizer.encode(text).ids
        assert {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} == {demo.END_OF_TEXT}
        assert tokenizer.bos_token_id == 0


@pytest.mark.usefixtures("in_process")
def test_second_run_trains_nothing_and_changes_train_anew(data: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert run(data, work) == sorted(MODELS)
    assert run(data, work) == []
    assert run(data, work, replace(TINY, specialist_steps=1)) == sorted(MODELS)
    file = data / "math.train.jsonl"
    file.write_text(file.read_text(encoding="utf-8") * 2, encoding="utf-8")
    assert run(data, work, replace(TINY, specialist_steps=1)) == sorted(MODELS)


@pytest.mark.usefixtures("in_process")
def test_interrupted_run_leaves_no_half_model(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: torch.nn.Module, folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        if "math" in Path(folder).name:
            raise KeyboardInterrupt
        save(model, folder)

    llama = type(AutoModelForCausalLM.from_config(dense_config(BY_NAME["llama"])))
    save = llama.save_pretrained
    with monkeypatch.context() as patch:
        patch.setattr(llama, "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path)
    assert not (tmp_path / "llama" / "math").exists()
    # A killed run cannot clean up: what it leaves lies beside the place of the model.
    killed = tmp_path / "llama" / ".math.upcycle-partial"
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    assert "seed" not in run(data, tmp_path)
    assert not killed.exists()
    assert run(data, tmp_path) == []


@pytest.mark.usefixtures("in_process")
def test_same_settings_give_the_same_bytes(data: Path, tmp_path: Path) -> None:
    for work in ("one", "other"):
        run(data, tmp_path / work)
    for file in ("tokenizer/tokenizer.json", "seed/model.safetensors", "code/model.safetensors"):
        assert (tmp_path / "one" / "llama" / file).read_bytes() == (tmp_path / "other" / "llama" / file).read_bytes()


def test_what_cannot_be_served_is_said(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="did you mean 'cohere2'"):
        demo.run_demo("cohere", data, tmp_path)
    for recipe, message in (("bam-kv", "did you mean"), ("sparse-upcycling", "copies one seed")):
        with pytest.raises(RecipeError, match=message):
            demo.run_demo("llama", data, tmp_path, recipe=recipe, settings=TINY)
    assert not (tmp_path / "llama").exists()
    (tmp_path / "llama" / "tokenizer").mkdir(parents=True)
    (tmp_path / "llama" / "tokenizer" / "mine.txt").touch()
    with pytest.raises(OutputError, match="never overwritten"):
        demo.run_demo("llama", data, tmp_path, settings=TINY)
    (data / "code.train.jsonl").write_text("no json\n")
    with pytest.raises(UpcycleError, match=r"code\.train\.jsonl"):
        demo.run_demo("llama", data, tmp_path, settings=TINY)


def test_command_prints_losses_and_how_to_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("work/mixture").mkdir(parents=True)
    Path("work/mixture/modeling_bam.py").touch()  # of a native mixture there is none, and no option to run it
    losses = {"seed": {"docs": 4.0, "code": 5.0}, "mixture": {"docs": 4.5, "code": 3.25}}
    models = {
        name: {
            "domains": {domain: {"loss": loss, "ci95": None} for domain, loss in domains.items()},
            "mean_loss": sum(domains.values()) / 2,
            "role": "dense",
        }
        for name, domains in losses.items()
    }
    evaluation = {"models": models, "measure": "loss", "verdict": ["A sentence."]}
    result = demo.DemoResult(evaluation, Path("work/report.html"), Path("work/mixture"), "def", " main", 1.0)
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: result)
    app = typer.Typer()
    app.command()(demo_command)
    ran = CliRunner().invoke(app, ["--family", "llama"])
    assert ran.exit_code == 0, ran.output
    assert "4.500" in ran.stdout
    assert "*3.875" in ran.stdout  # the mixture's mean, the better one
    assert "A sentence." in ran.stdout
    assert ran.stdout.rstrip().endswith("Report: work/report.html")
    assert 'AutoModelForCausalLM.from_pretrained("work/mixture", trust_remote_code=True)' in ran.stdout
    assert ran.stderr == ""
