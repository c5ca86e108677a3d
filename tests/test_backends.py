"""The choice of what computes a mixture's experts, and what a training and an evaluation do with it."""

import json
import logging
from typing import get_args

import pytest
import torch

from tests.conftest import run_cli, write_tokenizer
from tests.tiny import BY_NAME, make_seeds
from tests.training import arguments, run
from upcycle import backends
from upcycle.backends import AUTO, BACKENDS, Backend, choose_backend, use_backend
from upcycle.card import make_card
from upcycle.errors import UpcycleError
from upcycle.expert_modules import attention_experts, ffn_experts
from upcycle.generation import continue_text
from upcycle.inspect import inspect_checkpoint
from upcycle.merge import merge
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds
from upcycle.weights import load_model

X = torch.arange(24).reshape(2, 12)


def choose(model, wanted="auto", dtype=torch.float32, backward=True):
    return choose_backend(model, wanted, 32, 2, dtype, backward)


def test_on_a_cpu_auto_is_what_transformers_does(made):
    model = made("llama", "btx")
    assert model.config._experts_implementation == "grouped_mm"
    expected = model(X).logits
    backend = choose(model)
    assert (backend.name, backend.seconds) == ("grouped_mm", {})
    use_backend(model, backend)
    assert model.config._experts_implementation == "grouped_mm"  # its very function
    assert torch.equal(model(X).logits, expected)
    assert choose(model, dtype=torch.float64).name == "eager"


@pytest.mark.parametrize("name", ["fused", "liger", "sonicmoe"])
def test_what_is_not_served_is_refused_by_its_name(made, name):
    with pytest.raises(UpcycleError, match=f"--experts-backend {name}: .*(CUDA|kernels).*; leave the choice to 'auto'"):
        choose(made("llama", "btx"), name)


def test_a_dense_model_has_no_choice(made):
    model = made("llama", "average")
    assert choose(model) is None
    with pytest.raises(UpcycleError, match="has no experts whose code can be chosen"):
        choose(model, "eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_named_backend_computes_the_experts(made, dtype):
    """Under autocast each computes in bf16 (an fp32 product would be exact to more digits)."""
    model = made("llama", "bam")
    exact = model(X).logits
    for name in ("eager", "grouped_mm"):
        use_backend(model, choose(model, name))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = model(X).logits
        error = ((found - exact).norm() / exact.norm()).item()
        assert error < 1e-6 if dtype == torch.float32 else 1e-4 < error < 3e-2


def pretend_cuda(monkeypatch, seconds):
    """A card on which each backend that is named takes its seconds, or raises its error."""
    monkeypatch.setattr(backends, "_stand_in", lambda module, dtype, device: module)
    device = torch.device("cuda")
    monkeypatch.setattr(backends, "_device", lambda stack: device)
    monkeypatch.setattr(backends, "_unserved", lambda name, *_: None if name in seconds else "not here")

    def layer_seconds(name, *_):
        if isinstance(seconds[name], Exception):
            raise seconds[name]
        return seconds[name]

    monkeypatch.setattr(backends, "layer_seconds", layer_seconds)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"fused": 1.0, "grouped_mm": 2.0, "eager": 3.0}, "fused"),
        ({"fused": 2.0, "grouped_mm": 1.0, "eager": 3.0}, "grouped_mm"),
        ({"fused": 1.02, "grouped_mm": 1.0, "eager": 1.01}, "fused"),  # level
        ({"fused": 1.5, "grouped_mm": 1.2, "eager": 1.0}, "eager"),
        ({"eager": 1.0}, "eager"),
    ],
)
def test_on_a_card_the_fastest_is_chosen(made, monkeypatch, seconds, chosen):
    pretend_cuda(monkeypatch, seconds)
    backend = choose(made("llama", "btx"))
    assert backend.name == chosen
    assert backend.seconds == seconds
    assert all(f"{name} {1000 * value:.2f} ms" in backend.reason for name, value in seconds.items())
    assert "forward and backward of a layer's experts over 32 tokens" in backend.reason


def test_a_backend_that_fails_is_left_out_and_told(made, monkeypatch, caplog):
    pretend_cuda(monkeypatch, {"fused": RuntimeError("ptxas died\nat line 3"), "eager": 1.0})
    model = made("llama", "btx")
    assert choose(model).name == "eager"
    assert "experts backend fused failed and is left out: ptxas died" in caplog.text
    pretend_cuda(monkeypatch, {"fused": RuntimeError("ptxas died"), "grouped_mm": RuntimeError("no memory")})
    backend = choose(model)
    assert (backend.name, backend.reason) == ("grouped_mm", "transformers' own, as nothing could be measured")


def test_experts_of_any_layout_are_timed(monkeypatch):
    """GPT-OSS has transposed weights, biases and a gating of its own."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    stack = ffn_experts(GptOssForCausalLM(GptOssConfig(**sizes, **heads)))[0]
    experts = backends._stand_in(stack, torch.float32, "cpu")
    found = backends._fastest(["grouped_mm", "eager"], experts, 16, 2, True)
    assert found.seconds.keys() == {"grouped_mm", "eager"}
    for name in ("fused", "liger", "sonicmoe"):
        monkeypatch.setattr("upcycle.liger.available", lambda: True)
        monkeypatch.setattr("transformers.integrations.sonicmoe.is_sonicmoe_loadable", lambda raise_error: True)
        assert "experts with" in backends._unserved(name, experts, torch.float32, torch.device("cuda"))


def test_what_sonicmoe_would_compute_otherwise_is_refused(made, monkeypatch):
    """It reads the activation from the config's `hidden_act`, which a mixture's has not."""
    monkeypatch.setattr("transformers.integrations.sonicmoe.is_sonicmoe_loadable", lambda raise_error: True)
    device = torch.device("cuda")
    for name, reason in (("llama", None), ("gemma2", "only SiLU"), ("starcoder2", "without a gate")):
        experts = ffn_experts(made(name, "btx"))[0]
        found = backends._unserved("sonicmoe", experts, torch.float32, device)
        assert (found is None) == (reason is None)
        assert reason is None or reason in found


def test_what_is_not_the_same_at_every_run_is_not_chosen(made, monkeypatch):
    pretend_cuda(monkeypatch, {"fused": 2.0, "liger": 1.0, "sonicmoe": 1.0})
    assert choose(made("llama", "btx")).seconds == {"fused": 2.0}


@pytest.mark.parametrize("backward", [True, False])
def test_a_layers_experts_are_timed_without_a_trace(made, backward):
    model = made("llama", "btx")
    stack = ffn_experts(model)[0]
    before = {name: value.clone() for name, value in stack.named_parameters()}
    stand_in = backends._stand_in(stack, torch.bfloat16, "cpu")
    assert type(stand_in) is type(stack)
    for name in ("eager", "grouped_mm"):
        assert backends.layer_seconds(name, stand_in, 16, 2, backward) > 0
    for name, value in stack.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None
        assert stand_in._parameters[name].dtype == torch.bfloat16


def test_fused_experts_take_the_gates_along(made, monkeypatch):
    model = made("llama", "bam")
    expected = model(X).logits
    use_backend(model, Backend("fused", ""))
    assert len(attention_experts(model)) == len(ffn_experts(model))
    for module in attention_experts(model).values():
        assert "scale" in vars(module)
    assert torch.allclose(model(X).logits, expected, atol=1e-5)  # on a CPU both go their own ways
    use_backend(model, Backend("eager", ""))
    assert not any("scale" in vars(module) for module in attention_experts(model).values())


def test_the_choice_is_logged_once(made, caplog):
    model = made("llama", "btx")
    with caplog.at_level(logging.INFO, logger="upcycle.backends"):
        use_backend(model, choose(model))
        model(X)
        model(X)
    assert len(caplog.records) == 1
    assert "experts backend grouped_mm: transformers' own" in caplog.text


def test_a_training_records_and_keeps_its_backend(mixture, data, tmp_path):
    out = tmp_path / "out"
    run(mixture, data, out, experts_backend="eager", steps=2)
    record = json.loads((out / "train.json").read_text())
    assert record["experts_backend"] == "eager"
    assert record["acceleration"] == ["experts by eager: asked for"]


def test_training_and_evaluation_take_the_option(mixture, data, tmp_path):
    done = run_cli(*arguments(mixture, data, tmp_path / "out", "--steps", 1, "--experts-backend", "fused"))
    assert done.returncode == 1
    assert "--experts-backend fused needs a CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()
    losses = []
    for backend in ("auto", "eager"):
        sources = [f"{name}={file}" for name, file in data.items()]
        done = run_cli("eval", mixture, "--data", *sources, "--json", "--experts-backend", backend)
        assert done.returncode == 0, done.stderr
        losses.append(json.loads(done.stdout)["models"][str(mixture)]["mean_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_command_line_names_all_backends():
    from cli.train import ExpertsBackend

    assert get_args(get_args(ExpertsBackend)[0]) == BACKENDS


def test_experts_whose_rows_the_grouped_product_does_not_take(tmp_path):
    """Split into narrow ones, they are computed one by one by all that is ours, and the lines that load them say so."""
    sources = make_seeds(BY_NAME["llama"], tmp_path / "seeds", dtype=torch.bfloat16)
    for seed in sources:
        write_tokenizer(seed)
    seeds = [str(seed) for seed in sources]
    recipe = load_recipe("btx", ["experts.granularity=4"])  # 12 inner units, 24 bytes
    merge(plan_merge(recipe, read_seeds(seeds), allow_unrelated=True), tmp_path / "mix")
    assert not inspect_checkpoint(tmp_path / "mix").grouped
    model = load_model(tmp_path / "mix", torch.bfloat16)
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    backend = choose_backend(model, AUTO, 8, 8, torch.bfloat16, False)
    assert backend is not None
    assert backend.name == "eager"
    with pytest.raises(UpcycleError, match="whole multiples of 16 bytes"):
        choose_backend(model, "grouped_mm", 8, 8, torch.bfloat16, False)
    assert choose_backend(load_model(tmp_path / "mix"), AUTO, 8, 8, torch.float32, False).name == "grouped_mm"
    assert continue_text(tmp_path / "mix", "word5 word6", 4)
    assert 'experts_implementation="eager")' in make_card(tmp_path / "mix")
    options = ("--seeds", *seeds, "--allow-unrelated", "--recipe", "btx", "--yes", "--out", tmp_path / "cli")
    said = run_cli("merge", *options, "--set", "experts.granularity=4").stdout
    assert 'cli", experts_implementation="eager")' in said
    assert "experts_implementation" not in run_cli("merge", *options, "--set", "experts.granularity=2").stdout
