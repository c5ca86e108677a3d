"""Training: what it computes, that it can be repeated, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from tests.conftest import merge_and_load, run_cli, write_tokenizer
from tests.tiny import BY_NAME, edit_json, make_seed, make_seeds, mixtral_config, skip_what_tells_nothing
from tests.training import LENGTH, arguments, metrics, options, run, same, state, weights
from upcycle.data import parse_shares
from upcycle.errors import TrainingError
from upcycle.inspect import inspect_checkpoint
from upcycle.losses import forward_losses
from upcycle.merge import merge
from upcycle.mixture import plan_extract, read_mixture
from upcycle.train import train
from upcycle.training_settings import read_facts
from upcycle.verify import verify


def test_training_lowers_the_loss_and_the_result_loads_like_the_mixture(
    mixture: Path, data: dict[str, str], tmp_path: Path
) -> None:
    result = run(mixture, data, tmp_path / "out", steps=40, heldout=data, eval_windows=8)
    assert result.finished
    assert result.tokens == 40 * 4 * LENGTH
    assert all(result.heldout[name] < result.first_heldout[name] - 1 for name in data)
    before, after = weights(mixture), weights(tmp_path / "out")
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    assert all(not torch.equal(before[name], after[name]) for name in before if "norm" not in name)
    for name in ("config.json", "upcycle.json", "modeling_bam.py"):
        assert (tmp_path / "out" / name).read_bytes() == (mixture / name).read_bytes()
    load = "from transformers import AutoModelForCausalLM as M; M.from_pretrained('out', trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", load], check=True, capture_output=True, cwd=tmp_path)
    assert len(list((tmp_path / "out" / "checkpoints").iterdir())) == 2
    assert not (tmp_path / "out" / "tokens").exists()


def test_the_first_step_is_adamw_on_the_gradient_of_the_loss(
    mixture: Path, data: dict[str, str], tmp_path: Path
) -> None:
    """One step without clipping or decay, from the model's own loss: micro-batches and sums change nothing."""
    plain = {"steps": 1, "weight_decay": 0.0, "max_grad_norm": 1e9, "warm_up": 0}
    run(mixture, data, tmp_path / "out", **plain)
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    from upcycle.data import Domain
    from upcycle.stream import TokenStream

    domains = [Domain(name, file, np.load(file), None, None) for name, file in data.items()]
    batch = TokenStream(domains, parse_shares([], data), LENGTH, 4, 0).next_batch()
    tokens = torch.from_numpy(batch.tokens)
    outputs = model(input_ids=tokens[:, :-1], output_router_logits=True)
    nll = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), tokens[:, 1:].flatten())
    (nll + 0.01 * outputs.load_balance_loss + 0.001 * outputs.z_loss).backward()
    assert metrics(tmp_path / "out") == [pytest.approx(nll.item(), rel=1e-6)]
    trained = state(tmp_path / "out", 1)
    for name, parameter in model.named_parameters():
        # AdamW's first step moves each weight by the rate, against its gradient's sign.
        expected = parameter - 1e-2 * parameter.grad / (parameter.grad.abs() + 1e-8)
        sure = parameter.grad.abs() > 1e-6
        torch.testing.assert_close(trained[name][sure], expected[sure].detach(), atol=1e-4, rtol=0, msg=name)


def test_accumulation_is_one_large_batch_for_a_dense_model(data: dict[str, str], tmp_path: Path) -> None:
    seed = make_seed(BY_NAME["llama"], tmp_path / "seed", 0, torch.bfloat16)
    run(seed, data, tmp_path / "whole", steps=3)
    run(seed, data, tmp_path / "parts", steps=3, micro_batch_size=1)
    assert metrics(tmp_path / "parts") == pytest.approx(metrics(tmp_path / "whole"), rel=1e-5)
    for name, value in state(tmp_path / "whole", 3).items():
        torch.testing.assert_close(state(tmp_path / "parts", 3)[name], value, atol=2e-4, rtol=0)


def test_the_same_random_seed_gives_the_same_weights_twice(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    for name, random_seed in (("a", 5), ("b", 5), ("c", 6)):
        run(mixture, data, tmp_path / name, random_seed=random_seed)
    assert same(state(tmp_path / "a", 6), state(tmp_path / "b", 6))
    assert not same(state(tmp_path / "a", 6), state(tmp_path / "c", 6))


def test_what_is_not_trained_stays(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32).state_dict()

    def changed(out: Path, **changes: Any) -> set[str]:
        run(mixture, data, out, **changes)
        after = weights(out)
        return {name for name, value in after.items() if not torch.equal(value.float(), before[name])}

    routers = {name for name in before if name.endswith("router.weight")}
    assert changed(tmp_path / "routers", trained="routers") == routers
    experts = changed(tmp_path / "experts", trained="experts")
    assert routers < experts
    assert not any("embed" in name or "lm_head" in name or "layernorm" in name for name in experts)
    assert any("q_proj" in name for name in experts)
    assert any("gate_up_proj" in name for name in experts)
    assert changed(tmp_path / "first", trained="routers-then-all:6") == routers
    assert len(changed(tmp_path / "then", trained="routers-then-all:3")) > len(experts)


def test_lora_is_merged_into_a_plain_checkpoint(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    result = run(mixture, data, tmp_path / "out", lora=4, steps=20, heldout=data, eval_windows=8)
    assert all(result.heldout[name] < result.first_heldout[name] - 0.1 for name in data)
    before, after = weights(mixture), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen == {name for name in before if "embed" in name or "norm" in name or "lm_head" in name}
    stacked = next(name for name in before if name.endswith("gate_up_proj"))
    change = (after[stacked].float() - before[stacked].float())[0]
    values = torch.linalg.svdvals(change)
    assert values[4] < 0.15 * values[0]  # rank 4, and what bf16 rounds
    again = run(tmp_path / "out", data, tmp_path / "check", steps=1, heldout=data, eval_windows=8)
    assert again.first_heldout == pytest.approx(result.heldout, abs=0.05)


def test_a_native_mixture_is_written_back_in_its_published_names(data: dict[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = mixtral_config()
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "mixtral")
    result = run(tmp_path / "mixtral", data, tmp_path / "out", steps=30, heldout=data, eval_windows=8)
    assert all(result.heldout[name] < result.first_heldout[name] - 0.5 for name in data)
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "mixtral").keys()
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len(metrics(tmp_path / "out", "load_balance")[0]) == 2


NATIVE = [
    ("llama", "btx", "MixtralForCausalLM"),
    ("qwen2-full", "shared-expert", "Qwen2MoeForCausalLM"),
    ("qwen3", "btx-top1", "Qwen3MoeForCausalLM"),
    ("olmo2", "btx-top1", "FlexOlmoForCausalLM"),
    ("granite", "btx", "GraniteMoeForCausalLM"),
    ("cohere2", "btx", "Cohere2MoeForCausalLM"),
]


@pytest.mark.parametrize(("name", "recipe", "architecture"), NATIVE, ids=[row[0] for row in NATIVE])
def test_a_merged_native_mixture_stays_what_it_is(
    name: str, recipe: str, architecture: str, data: dict[str, str], tmp_path: Path
) -> None:
    """Trained, it has the same files and names, loads as its class, and gives its experts back."""
    skip_what_tells_nothing(name)
    mix, out = tmp_path / "mix", tmp_path / "out"
    merge_and_load(make_seeds(BY_NAME[name], tmp_path / "seeds", dtype=torch.bfloat16), mix, recipe, format="native")
    facts = read_facts(mix)
    assert (facts.kind, list(facts.experts)) == ("native", ["a", "b", "c"])
    assert facts.z == {"btx": 0.0}.get(recipe, 0.001)
    assert facts.training_flops(LENGTH)
    assert facts.seed_parameters
    result = run(mix, data, out, steps=12, trained="experts", heldout=data, eval_windows=8)
    assert sum(result.heldout.values()) < sum(result.first_heldout.values())
    for file in ("config.json", "upcycle.json"):
        assert (out / file).read_bytes() == (mix / file).read_bytes()
    before, after = weights(mix), weights(out)
    assert before.keys() == after.keys()
    changed = {tensor for tensor in before if not torch.equal(before[tensor], after[tensor])}
    assert changed
    assert all(".mlp." in tensor or ".block_sparse_moe." in tensor for tensor in changed)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == architecture
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert inspect_checkpoint(out).experts == ["a", "b", "c"]
    assert not verify(out, load=True).problems
    merge(plan_extract(read_mixture(out), 1), tmp_path / "b")
    assert not verify(tmp_path / "b", load=True).problems


def test_split_experts_in_some_layers_are_trained(data: dict[str, str], tmp_path: Path) -> None:
    recipe = ("bam", "experts.granularity=2", "layers.mix=every 2")
    merge_and_load(make_seeds(BY_NAME["llama"], tmp_path / "seeds"), tmp_path / "mix", *recipe)
    result = run(tmp_path / "mix", data, tmp_path / "out", steps=12, heldout=data, eval_windows=8)
    assert sum(result.heldout.values()) < sum(result.first_heldout.values())
    assert np.array(metrics(tmp_path / "out", "load")[0]).shape == (1, 6)
    assert np.array(metrics(tmp_path / "out", "gates")[0]).shape == (1, 3)
    assert not verify(tmp_path / "out", load=True).problems
    lora = run(tmp_path / "mix", data, tmp_path / "lora", steps=2, lora=2)
    assert lora.finished
    before, after = weights(tmp_path / "mix"), weights(tmp_path / "lora")
    assert not torch.equal(
        before["dense.model.layers.0.mlp.up_proj.weight"], after["dense.model.layers.0.mlp.up_proj.weight"]
    )


def test_a_nan_never_reaches_the_weights(
    mixture: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1, 10))

    def poisoned(*args: Any) -> Any:
        nll, routers = forward_losses(*args)
        return (nll * float("nan") if next(calls) == 4 else nll), routers

    monkeypatch.setattr("upcycle.train.forward_losses", poisoned)
    states = {}

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "checkpoint":
            states[event["step"]] = state(tmp_path / "out", event["step"])

    result = train(options(mixture, data, tmp_path / "out", save_every=1), watch)
    assert same(states[3], states[4])
    assert not same(states[4], states[5])
    assert all(value.isfinite().all() for value in states[6].values())
    assert result.warnings == ["step 4 was not taken: the loss is nan"]
    assert [bool(reason) for reason in metrics(tmp_path / "out", "skipped")] == [step == 4 for step in range(1, 7)]


def test_a_model_of_nan_is_never_saved(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    damaged = weights(mixture)
    name = next(name for name in damaged if name.endswith("down_proj"))
    damaged[name][:] = float("nan")
    save_file(damaged, mixture / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="the loss is nan, and so were the 4 steps before"):
        run(mixture, data, tmp_path / "out", steps=40, save_every=40)
    with pytest.raises(TrainingError, match="step 2: a weight is no finite number"):
        run(mixture, data, tmp_path / "other", steps=40, save_every=2)
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_activation_checkpointing_and_bf16_compute_the_same(
    mixture: Path, data: dict[str, str], tmp_path: Path
) -> None:
    run(mixture, data, tmp_path / "plain")
    run(mixture, data, tmp_path / "twice", activation_checkpointing=True)
    assert metrics(tmp_path / "twice", "loss") == pytest.approx(metrics(tmp_path / "plain", "loss"), rel=1e-6)
    done = run_cli(*arguments(mixture, data, tmp_path / "half", "--steps", 6, "--precision", "bf16"))
    assert done.returncode == 0, done.stderr
    half = metrics(tmp_path / "half", "loss")
    assert half == pytest.approx(metrics(tmp_path / "plain", "loss"), rel=1e-2)
    assert half != metrics(tmp_path / "plain", "loss")


def test_unknown_trackers_are_refused(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    for tracker, message in (("nonsense", "accelerate refuses"), ("swanlab", "not installed")):
        done = run_cli(*arguments(mixture, data, tmp_path / "out", "--steps", 1, "--log-with", tracker))
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_chats_count_the_assistants_words(base_seed: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %} {{ m.content }}{% endfor %}"
    edit_json(base_seed / "tokenizer_config.json", chat_template=template, eos_token="word2")
    rows = [{"messages": [turn("user", "word5 word6"), turn("assistant", "word7 word8")]}] * 60
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events: list[Mapping[str, Any]] = []
    chat = {"chat": str(tmp_path / "chat.jsonl")}
    train(options(base_seed, chat, tmp_path / "out", steps=30, learning_rate=3e-2), events.append)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    logits = model(torch.tensor([[5, 6, 7, 8, 2]])).logits[0].log_softmax(-1)
    learned = [logits[place, token].item() for place, token in enumerate((6, 7, 8, 2))]
    assert min(learned[1:]) > -0.7, learned  # the assistant's words and the end
    assert learned[0] < -1.5, learned  # the user's are given, not learned
    assert any("will be seen" in event["message"] for event in events if event["event"] == "warning")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_what_is_refused_before_the_first_step(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    seed = tmp_path / "seeds" / "a"
    for model, message, changes in (
        (mixture, "positions for 64 tokens", {"sequence_length": 65}),
        (mixture, "no multiple", {"micro_batch_size": 3}),
        (mixture, "expected all, experts, routers", {"trained": "router"}),
        (seed, "neither experts nor routers", {"trained": "routers"}),
        (mixture, "accelerate launch", {"shard": True}),
        (mixture, "holds no training", {"resume": True}),
        (mixture, "leave --train out", {"lora": 2, "trained": "experts"}),
        (mixture, "expected a number above 0", {"learning_rate": 0.0}),
        (mixture, "9 steps, but the training has 6", {"warm_up": 9}),
        (mixture, "7 steps, but the training has 6", {"trained": "routers-then-all:7"}),
    ):
        with pytest.raises(TrainingError, match=message):
            run(model, data, tmp_path / "out", **changes)
        assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_what_cannot_fit_is_refused_with_the_arithmetic(
    mixture: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upcycle.train.free_memory", lambda *_: 400_000)
    with pytest.raises(TrainingError, match=r"takes 0\.00 GB of a device \(weights .* --lora 16, .*--sequence-length"):
        run(mixture, data, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    run(mixture, data, tmp_path / "small", trained="routers", micro_batch_size=1, steps=1)


def test_the_largest_forward_that_fits_is_taken(
    mixture: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upcycle.fit import step_memory
    from upcycle.training_settings import read_facts, resolve

    facts = read_facts(mixture)
    settings, _ = resolve(options(mixture, data, tmp_path, micro_batch_size=2), facts, 1, False)
    step = step_memory(settings, facts)
    assert step is not None
    monkeypatch.setattr("upcycle.train.free_memory", lambda *_: step[1])
    run(mixture, data, tmp_path / "out", steps=2)
    assert json.loads((tmp_path / "out" / "train.json").read_text())["settings"]["micro_batch_size"] == 2


def test_a_router_warm_up_does_not_end_in_a_spike(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    result = run(mixture, data, tmp_path / "out", steps=24, trained="routers-then-all:18")
    norms = metrics(tmp_path / "out", "gradient_norm")
    assert norms[18] > 5 * norms[17]
    assert result.finished
    assert set(metrics(tmp_path / "out", "skipped")) == {None}


def test_the_offloaded_optimizer_is_adamw_also_when_resumed(
    mixture: Path, data: dict[str, str], tmp_path: Path
) -> None:
    run(mixture, data, tmp_path / "plain")
    run(mixture, data, tmp_path / "offload", optimizer="adamw-offload")
    assert same(state(tmp_path / "plain", 6), state(tmp_path / "offload", 6))
    asked = iter([False, False, True])
    train(options(mixture, data, tmp_path / "broken", optimizer="adamw-offload"), stop=lambda: next(asked))
    run(mixture, data, tmp_path / "broken", optimizer="adamw-offload", resume=True)
    assert same(state(tmp_path / "plain", 6), state(tmp_path / "broken", 6))
    with pytest.raises(TrainingError, match="torchao"):
        run(mixture, data, tmp_path / "8bit", optimizer="adamw-8bit")


def test_a_training_that_explodes_is_no_success(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="of 4 steps could not be taken"):
        run(mixture, data, tmp_path / "out", steps=4, learning_rate=1e30, save_every=99, warm_up=0)
    assert not (tmp_path / "out" / "config.json").exists()
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_the_command_line(base_seed: Path, tmp_path: Path) -> None:
    edit_json(base_seed / "tokenizer_config.json", eos_token="word2")
    for name in ("code", "law"):
        rows = [{"text": " ".join(f"word{(i * k) % 90}" for i in range(40))} for k in range(1, 30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("--data", "code.jsonl", "law=law.jsonl", "--mix", "code=2", "law=1", "--eval-data", "code=code.jsonl")
    sizes = ("--steps", 3, "--sequence-length", 16, "--out", "out")
    done = run_cli("train", base_seed, *files, *sizes, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["steps"], result["finished"], list(result["heldout"])) == (3, True, ["code"])
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["settings"]["shares"] == {"code": pytest.approx(2 / 3), "law": pytest.approx(1 / 3)}
    assert "step law" in record["reasons"]["learning_rate"]
    sequences = {name: about["tokens"] // 16 for name, about in record["data"].items()}
    shares = record["settings"]["shares"]
    expected = {name: 3 * record["settings"]["batch_size"] * shares[name] / sequences[name] for name in shares}
    assert record["epochs"] == pytest.approx(expected)
    shown = run_cli("train", base_seed, *files, *sizes, "--yes", cwd=tmp_path)
    assert "before" in shown.stdout
    twice = run_cli("train", base_seed, "--data", "a=x.jsonl", "a=y.jsonl", *sizes, cwd=tmp_path)
    assert (twice.returncode, twice.stdout) == (1, "")
    assert "'a' is named twice" in twice.stderr
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "word2"
    write_tokenizer(base_seed)
