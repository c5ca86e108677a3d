"""Models measured and compared: figures against transformers' own, who is whose seed, what is refused."""

import html
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM
from upcycle.cli.evaluate import _plain_table

from tests.conftest import branch, merge_and_load, run_cli, write_tokenizer
from tests.tiny import BY_NAME, VOCAB, edit_json, make_seed, make_seeds, mixtral_config, skip_what_tells_nothing
from upcycle.comparison import evaluate_models
from upcycle.errors import CheckpointError, DataError, UpcycleError
from upcycle.evaluate import token_losses
from upcycle.evaluation_inputs import EvaluationOptions
from upcycle.merge import merge
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds


def make(recipe: str, seeds: list[Path], out: Path) -> Path:
    merge(plan_merge(load_recipe(recipe), read_seeds([str(seed) for seed in seeds])), out)
    return out


def evaluate(*models: Path | str, **changes: Any) -> dict[str, Any]:
    return evaluate_models(EvaluationOptions([str(model) for model in models], **changes))


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, str]:
    """Windows of tokens of two domains, one named like a seed."""
    random, sources = np.random.default_rng(0), {}
    for name in ("code", "docs"):
        np.save(tmp_path / f"{name}.npy", random.integers(VOCAB, size=(30, 24)).astype(np.uint16))
        sources[name] = str(tmp_path / f"{name}.npy")
    return sources


@pytest.fixture
def text(tmp_path: Path) -> dict[str, str]:
    """Documents of different lengths in words of the tiny tokenizer."""
    random, sources = np.random.default_rng(1), {}
    for name in ("code", "docs"):
        path = tmp_path / f"{name}.jsonl"
        lengths = random.integers(3, 40, 25)
        lines = [" ".join(f"word{word}" for word in random.integers(3, VOCAB, length)) for length in lengths]
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        sources[name] = str(path)
    return sources


def plain_loss(folder: Path, tokens: np.ndarray) -> float:
    """What a loop over windows with transformers alone says, fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in torch.from_numpy(tokens.astype(np.int64)):
            logits = model(input_ids=row[None]).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
            count += len(row) - 1
    return total / count


def test_losses_are_those_of_a_plain_loop(seeds: list[Path], rows: dict[str, str], tmp_path: Path) -> None:
    mixture = make("bam", seeds, tmp_path / "bam")
    found = evaluate(mixture, *seeds, data=rows)["models"]
    for model in (mixture, *seeds):
        for name, path in rows.items():
            entry = found[str(model)]["domains"][name]
            expected = plain_loss(model, np.load(path))
            assert entry["loss"] == pytest.approx(expected, abs=1e-6)
            assert entry["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
            assert entry["ci95"][0] < expected < entry["ci95"][1]
            assert (entry["tokens"], entry["documents"], entry["bits_per_byte"]) == (30 * 23, 30, None)
        assert found[str(model)]["mean_loss"] == pytest.approx(
            np.mean([found[str(model)]["domains"][name]["loss"] for name in rows]), abs=1e-6
        )


@pytest.mark.parametrize("recipe", ["bam", "btx"])
def test_neither_batch_size_nor_order_changes_a_result(
    recipe: str, seeds: list[Path], rows: dict[str, str], tmp_path: Path
) -> None:
    mixture = make(recipe, seeds, tmp_path / "mix")
    shuffled = np.random.default_rng(2).permutation(np.load(rows["code"]))
    np.save(tmp_path / "shuffled.npy", shuffled)
    other = {"code": str(tmp_path / "shuffled.npy")}
    found = [
        evaluate(mixture, data=data, batch_tokens=batch)["models"][str(mixture)]
        for data, batch in (({"code": rows["code"]}, None), ({"code": rows["code"]}, 1), (other, 100))
    ]
    for entry in found[1:]:
        assert entry["domains"]["code"]["loss"] == pytest.approx(found[0]["domains"]["code"]["loss"], abs=1e-5)
        for key in ("load", "own_share", "entropy"):
            ours, theirs = entry["routing"]["domains"]["code"][key], found[0]["routing"]["domains"]["code"][key]
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_packed_text_is_measured_whole_and_by_its_bytes(base_seed: Path, text: dict[str, str], tmp_path: Path) -> None:
    edit_json(shutil.copytree(base_seed, tmp_path / "a") / "config.json", eos_token_id=2)
    entry = evaluate(tmp_path / "a", data=text, sequence_length=16)["models"][str(tmp_path / "a")]["domains"]["code"]
    lines = [json.loads(line)["text"] for line in Path(text["code"]).read_text().splitlines()]
    run = [int(word[4:]) for line in lines for word in [*line.split(), "word2"]]
    windows = [run[start : start + 16] for start in range(0, len(run), 16)]
    windows = [window for window in windows if len(window) > 1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for window in windows:
            row = torch.tensor(window)
            logits = model(input_ids=row[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
    tokens = sum(len(window) - 1 for window in windows)
    assert (entry["tokens"], entry["documents"]) == (tokens, 25)
    assert entry["loss"] == pytest.approx(total / tokens, abs=1e-6)
    # Words and spaces are some seven bytes a token; the first token of each window is not predicted.
    assert entry["bits_per_byte"] == pytest.approx(total / math.log(2) / sum(len(line) for line in lines), rel=0.15)


def test_overlapping_windows_give_context_and_lower_no_count(base_seed: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.random.default_rng(0).integers(VOCAB, size=200))
    data = {"code": str(tmp_path / "flat.npy")}
    found = evaluate(base_seed, data=data, sequence_length=20, stride=5)["models"][str(base_seed)]["domains"]["code"]
    assert found["tokens"] == 199
    with pytest.raises(DataError, match="--stride 30 would leave tokens out of windows of 20"):
        evaluate(base_seed, data=data, sequence_length=20, stride=30)


def test_seeds_ancestor_and_average_are_recognised_by_their_weights(
    base_seed: Path, seeds: list[Path], rows: dict[str, str], tmp_path: Path
) -> None:
    """Whatever their folders are called, and where the ancestor is among the seeds it is found."""
    sources = [base_seed, *seeds]
    mixture, average = make("bam", sources, tmp_path / "mix"), make("average", sources, tmp_path / "avg")
    names = ("v", "x", "y", "z")
    models = [seed.rename(tmp_path / name) for seed, name in zip(sources[1:], names[1:], strict=True)]
    models.append(shutil.copytree(base_seed, tmp_path / "v"))
    other = branch(base_seed, tmp_path / "other", 99)
    result = evaluate(mixture, average, other, *models, data=rows, windows=5)
    roles = {Path(path).name: entry["role"] for path, entry in result["models"].items()}
    assert roles == {
        "mix": "mixture",
        "avg": "plain average",
        "other": "dense",
        "v": "ancestor",
        "x": "seed code",
        "y": "seed law",
        "z": "seed math",
    }
    text = "\n".join(result["verdict"])
    for expected in ("the oracle", "(v)", "plain average of its seeds (avg)", "routes a token to the expert"):
        assert expected in text


def test_the_ancestor_may_be_named(base_seed: Path, seeds: list[Path], rows: dict[str, str], tmp_path: Path) -> None:
    mixture = make("btx", seeds, tmp_path / "mix")
    assert json.loads((mixture / "upcycle.json").read_text())["ancestor"] is None
    result = evaluate(mixture, data=rows, windows=5, base=str(base_seed))
    assert [entry["role"] for entry in result["models"].values()] == ["mixture", "ancestor"]
    assert "Against the seed that its specialists were trained from (base)" in "\n".join(result["verdict"])


def test_routing_and_similarity_come_with_a_mixture(
    mixture: Path, seeds: list[Path], rows: dict[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    native = tmp_path / "native"
    MixtralForCausalLM(mixtral_config()).save_pretrained(native)
    mixed = make("bam", seeds, tmp_path / "mix")
    found = evaluate(mixed, native, seeds[0], data=rows, windows=4)["models"]
    assert "routing" not in found[str(seeds[0])]
    assert found[str(native)]["role"] == "mixture"
    routing = found[str(mixed)]["routing"]
    assert routing["experts"] == ["code", "law", "math"]
    assert routing["domains"]["docs"]["own_share"] is None
    assert routing["domains"]["code"]["own_expert"] == "code"
    load = np.array(routing["domains"]["code"]["load"])
    np.testing.assert_allclose(routing["domains"]["code"]["own_share"], load[:, 0], atol=1e-5)  # top-1
    np.testing.assert_allclose(load.sum(1), 1, atol=1e-5)
    assert np.array(routing["similarity"]["attention_outputs"]).shape == (2, 3, 3)
    native_routing = found[str(native)]["routing"]
    assert "gates" not in native_routing["domains"]["code"]
    assert np.array(native_routing["similarity"]["ffn_outputs"]).shape == (2, 4, 4)


def test_models_of_different_tokenizers_are_compared_by_bytes(
    base_seed: Path, text: dict[str, str], rows: dict[str, str], tmp_path: Path
) -> None:
    one, other = (shutil.copytree(base_seed, tmp_path / name) for name in ("one", "other"))
    write_tokenizer(other, swap=(5, 6))
    for folder in (one, other):
        edit_json(folder / "tokenizer_config.json", eos_token="word2")
    result = evaluate(one, other, data=text)
    assert result["measure"] == "bits_per_byte"
    assert "different tokenizers" in "\n".join(result["verdict"])
    bits = [
        np.mean([found["bits_per_byte"] for found in entry["domains"].values()]) for entry in result["models"].values()
    ]
    assert f"({abs(bits[0] - bits[1]):.3f} bits per byte ahead" in result["verdict"][0]
    for entry in result["models"].values():
        for found in entry["domains"].values():
            assert found["bits_per_byte_ci95"][0] < found["bits_per_byte"] < found["bits_per_byte_ci95"][1]
    with pytest.raises(DataError, match="leave out --windows, which chooses other text for each"):
        evaluate(one, other, data=text, windows=3)
    with pytest.raises(DataError, match=r"holds tokens of one tokenizer, but .*one and .*other have different ones"):
        evaluate(one, other, data=rows)
    again = shutil.copytree(one, tmp_path / "again")  # the same tokenizer, written otherwise
    (again / "tokenizer.json").write_text(json.dumps(json.loads((one / "tokenizer.json").read_text()), indent=1))
    assert evaluate(one, again, data=text | {"rows": rows["code"]})["measure"] == "loss"


def test_what_cannot_be_measured_is_refused(base_seed: Path, rows: dict[str, str], tmp_path: Path) -> None:
    small = make_seed(BY_NAME["llama"], tmp_path / "small", 0)
    edit_json(small / "config.json", vocab_size=50)
    with pytest.raises(DataError, match=r"small has a vocabulary of 50 tokens, but --data code=.* holds token 95"):
        evaluate(small, base_seed, data=rows)
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate(base_seed, tmp_path / "nowhere", data=rows)
    with pytest.raises(DataError, match=r"--sequence-length 99: .*base has positions for 64 tokens"):
        evaluate(base_seed, data=rows, sequence_length=99)
    with pytest.raises(UpcycleError, match="--device moon cannot be used"):
        evaluate(base_seed, data=rows, device="moon")
    broken = shutil.copytree(base_seed, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"broken: its loss on code is no finite number"):
        evaluate(broken, data=rows)


def test_other_weights_than_those_checked_are_refused(base_seed: Path, rows: dict[str, str], tmp_path: Path) -> None:
    adapter, elsewhere, wrong = (shutil.copytree(base_seed, tmp_path / name) for name in ("adapter", "where", "wrong"))
    (adapter / "adapter_config.json").write_text("{}")
    edit_json(elsewhere / "config.json", transformers_weights="other.safetensors")
    edit_json(wrong / "config.json", intermediate_size=40)
    for folder, message in (
        (adapter, "adapter holds an adapter"),
        (elsewhere, "names a weight file of its own"),
        (wrong, r"tensor '.*' has shape \[.*48.*\], expected \[.*40.*\] by its config.json"),
    ):
        with pytest.raises(CheckpointError, match=message):
            evaluate(folder, data=rows)


def test_a_base_is_what_it_can_be(base_seed: Path, seeds: list[Path], rows: dict[str, str], tmp_path: Path) -> None:
    sources = [base_seed, *seeds]
    mixture = make("btx", sources, tmp_path / "mix")
    with pytest.raises(DataError, match="is a mixture; expected the dense model that the seeds were trained from"):
        evaluate(base_seed, data=rows, base=str(mixture))
    text = "\n".join(evaluate(mixture, base_seed, data=rows, windows=5, base=str(seeds[0]))["verdict"])
    assert "That seed was named by --base; mix's own record names base." in text
    twice = evaluate(mixture, f"{mixture}/../mix", base_seed, data=rows, windows=2, base=f"{base_seed}/")
    assert list(twice["models"]) == [str(mixture), str(base_seed)]


def test_an_average_is_the_plain_one_of_the_same_seeds(
    base_seed: Path, seeds: list[Path], rows: dict[str, str], tmp_path: Path
) -> None:
    mixture = make("btx", seeds, tmp_path / "mix")
    other = make("average", [base_seed, *seeds], tmp_path / "other")
    trained = make("average", seeds, tmp_path / "trained")
    (trained / "train.json").write_text("{}")
    roles = evaluate(mixture, other, trained, data=rows, windows=2)["models"]
    assert [entry["role"] for entry in roles.values()] == ["mixture", "dense", "dense"]


def test_batches_hold_as_many_tokens_as_asked(
    base_seed: Path, rows: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def watched(model: Any, heldout: Any, batch_size: int, *others: Any) -> Any:
        sizes.append(batch_size)
        return token_losses(model, heldout, batch_size, *others)

    monkeypatch.setattr("upcycle.measurement.token_losses", watched)
    for batch_tokens in (1, 24 * 7, None):
        evaluate(base_seed, data={"code": rows["code"]}, batch_tokens=batch_tokens)
    assert sizes == [1, 7, 4096 // 24]


def test_routers_that_do_not_tell_are_not_shown(rows: dict[str, str], tmp_path: Path) -> None:
    """DeepSeek's select within groups, and with a bias."""
    sizes = mixtral_config().to_dict()
    config = AutoConfig.for_model(
        "deepseek_v3",
        **{key: sizes[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        moe_intermediate_size=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deep")
    result = evaluate(tmp_path / "deep", data=rows)
    entry = result["models"][str(tmp_path / "deep")]
    assert entry["role"] == "mixture"
    assert "routing" not in entry
    assert entry["domains"]["code"]["loss"] == pytest.approx(
        plain_loss(tmp_path / "deep", np.load(rows["code"])), abs=1e-6
    )
    assert "What the routers of deep do is not shown" in "\n".join(result["verdict"])


def test_bf16_is_close_to_fp32(base_seed: Path, rows: dict[str, str]) -> None:
    losses = [
        evaluate(base_seed, data=rows, precision=precision)["models"][str(base_seed)]["mean_loss"]
        for precision in ("fp32", "bf16")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert losses[0] != losses[1]


def test_the_command_prints_tables_a_verdict_and_json(seeds: list[Path], rows: dict[str, str], tmp_path: Path) -> None:
    mixture = make("bam", seeds, tmp_path / "mix")
    data = [f"{name}={path}" for name, path in rows.items()]
    done = run_cli("eval", mixture, *seeds, "--data", *data)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for expected in ("Held-out loss, nats per token", "Perplexity", "code, FFN load", "docs, attention gate", "- "):
        assert expected in done.stdout
    assert "Bits per byte" not in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.split()[:1] == ["law"])
    assert "±" in row
    as_json = run_cli("eval", mixture, "--data", *data, "--windows", 3, "--json")
    found = json.loads(as_json.stdout)
    assert set(found) == {"models", "measure", "verdict"}
    assert set(found["models"][str(mixture)]["domains"]) == {"code", "docs"}


def test_a_report_is_made_of_what_the_command_printed(seeds: list[Path], rows: dict[str, str], tmp_path: Path) -> None:
    mixture = make("bam", seeds, tmp_path / "mix")
    data = [f"{name}={path}" for name, path in rows.items()]
    printed = run_cli("eval", mixture, *seeds, "--data", *data, "--json").stdout
    (tmp_path / "eval.json").write_text(printed)
    done = run_cli("report", mixture, "--evaluation", tmp_path / "eval.json", "--out", tmp_path / "read.html")
    assert done.returncode == 0, done.stderr
    measured = run_cli("report", mixture, *seeds, "--data", *data, "--out", tmp_path / "measured.html")
    assert measured.returncode == 0, measured.stderr
    first = json.loads(printed)["verdict"][0]
    for page in ("read.html", "measured.html"):
        assert first in html.unescape((tmp_path / page).read_text())
    (tmp_path / "other.json").write_text('{"models": {"a": 1}}')
    refused = run_cli("report", mixture, "--evaluation", tmp_path / "other.json", "--out", tmp_path / "no.html")
    assert (refused.returncode, "is no evaluation" in refused.stderr) == (1, True)
    assert not (tmp_path / "no.html").exists()


def test_names_neither_steer_the_terminal_nor_are_taken_for_markup(
    base_seed: Path, seeds: list[Path], rows: dict[str, str], tmp_path: Path
) -> None:
    mixture = make("bam", seeds, tmp_path / "\x1b[31mred[bold]a")
    edit_json(mixture / "config.json", expert_names=["[/]", "[red]b", "\x1b[0mc"])
    done = run_cli("eval", mixture, base_seed, "--data", f"code={rows['code']}")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    for name in ("[31mred[bold]a", "[/]", "[red]b"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "nothing to measure"),
        (["code=missing.jsonl"], "there is no such file"),
        (["code=empty.jsonl"], "is empty"),
        (["code=blank.jsonl"], "holds no text"),
        (["code=a.npy", "code=b.npy"], "named twice"),
    ],
)
def test_the_command_refuses_data_that_is_not_there(
    data: list[str], message: str, base_seed: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(base_seed, tmp_path / "model")
    edit_json(model / "tokenizer_config.json", eos_token="word2")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    done = run_cli("eval", model, *(["--data", *data] if data else []), "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blank.jsonl", "empty.jsonl", "model"]


def test_split_experts_in_some_layers_are_measured_by_what_they_were(
    seeds: list[Path], rows: dict[str, str], tmp_path: Path
) -> None:
    """Names of FFNs and of attentions, their own layers, and a domain's share over all parts of its expert."""
    overrides = ["experts.granularity=2", "layers.mix=every 2", "experts.extra=1", "experts.extra_from=mean"]
    mix = tmp_path / "mix"
    merge(plan_merge(load_recipe("bam", overrides), read_seeds([str(seed) for seed in seeds])), mix)
    result = evaluate(mix, seeds[0], data=rows, windows=4)
    routing = result["models"][str(mix)]["routing"]
    assert routing["experts"] == [f"{name}.{i}" for name in ("code", "law", "math", "mean-extra-0") for i in (0, 1)]
    assert routing["groups"] == ["code", "law", "math", "mean-extra-0"]
    assert (routing["layers"], routing["top_k"]) == ([1], 2)
    code = routing["domains"]["code"]
    assert (np.array(code["load"]).shape, np.array(code["gates"]).shape) == ((1, 8), (1, 3))
    # Routers begin with equal rows for the parts of an FFN: a token uses both or neither.
    np.testing.assert_allclose(code["own_share"], 2 * np.array(code["load"])[:, 0], atol=1e-5)
    np.testing.assert_allclose(code["own_share"], np.array(code["load"])[:, :2].sum(1), atol=1e-5)
    assert np.array(routing["similarity"]["ffn_outputs"]).shape == (1, 8, 8)
    assert np.array(routing["similarity"]["attention_outputs"]).shape == (1, 3, 3)
    said = "\n".join(result["verdict"])
    assert "(chance: 25%)" in said
    assert "layer 0" not in said
    shown = run_cli("eval", mix, "--data", *(f"{name}={file}" for name, file in rows.items()), "--windows", 4)
    assert shown.returncode == 0, shown.stderr
    gates = next(line for line in shown.stdout.splitlines() if "code, attention gate" in line)
    assert gates.count("%") == 3
    assert gates.rstrip().endswith("–")


@pytest.mark.parametrize("name", ["llama", "qwen2-full", "qwen3", "olmo2", "granite", "cohere2"])
def test_native_mixtures_that_upcycle_merged_tell_whom_they_route(
    name: str, rows: dict[str, str], tmp_path: Path
) -> None:
    skip_what_tells_nothing(name)
    paths = make_seeds(BY_NAME[name], tmp_path / "seeds")
    merge_and_load(
        [f"{n}={path}" for n, path in zip(("code", "law", "x"), paths, strict=True)],
        tmp_path / "mix",
        "btx",
        format="native",
    )
    found = evaluate(tmp_path / "mix", data=rows, windows=4)["models"][str(tmp_path / "mix")]
    assert found["role"] == "mixture"
    assert found["routing"]["experts"] == found["routing"]["groups"] == ["code", "law", "x"]
    assert found["routing"]["domains"]["code"]["own_expert"] == "code"
    assert found["domains"]["code"]["loss"] == pytest.approx(
        plain_loss(tmp_path / "mix", np.load(rows["code"])[:4]), rel=0.2
    )


def test_the_mean_perplexity_ranks_as_the_mean_loss_does(capsys: pytest.CaptureFixture[str]) -> None:
    """It is that loss's exponential: an arithmetic mean would be the worst domain's."""
    losses = {"even": (4.3, 4.3), "uneven": (3.0, 5.5)}
    models = {
        name: {"domains": {domain: {"perplexity": math.exp(loss)} for domain, loss in zip("ab", row, strict=True)}}
        for name, row in losses.items()
    }
    _plain_table("Perplexity", models, {name: name for name in models}, ["a", "b"], "perplexity", 2)
    even, uneven = (line.split()[-1] for line in capsys.readouterr().out.splitlines() if "even" in line)
    assert (even, uneven) == (f"{math.exp(4.3):.2f}", f"*{math.exp(4.25):.2f}")
