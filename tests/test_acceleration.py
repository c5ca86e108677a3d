"""What makes a training's steps faster: compiled layers, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import moe

from tests.conftest import run_cli
from tests.training import arguments, metrics
from upcycle import acceleration
from upcycle.acceleration import speed_up
from upcycle.backends import Backend
from upcycle.errors import UpcycleError
from upcycle.weights import decoder_layers

X = torch.arange(36).reshape(2, 18)


def outcome(model):
    model.zero_grad()
    out = model(X, labels=X, use_cache=False, output_router_logits=True)
    out.loss.backward()
    return [out.loss, out.logits, *out.router_logits, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("name", ["llama", "cohere2", "gpt_neox"])
def test_a_step_compiles_without_a_break_and_layers_share_it(made, name):
    model = made(name, "bam").train()
    atol, rtol = 1e-5, 1e-4
    if not hasattr(moe, "_grouped_mm_fallback_bwd"):  # an older transformers compiles the product of bf16 alone
        model, atol, rtol = model.bfloat16(), 5e-2, 5e-2
    expected = outcome(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in decoder_layers(model):
        layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for found, wanted in zip(outcome(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol)
    kinds = {"sliding", "full"} if name == "cohere2" else {"full"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(kinds)
    torch._dynamo.reset()


@pytest.mark.slow  # the compiler for CPUs takes its time
def test_a_compiled_training_learns_the_same(mixture, data, tmp_path):
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        done = run_cli(*arguments(mixture, data, tmp_path / name, "--steps", 3, *more))
        assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "compiled", "loss") == pytest.approx(metrics(tmp_path / "plain", "loss"), rel=1e-4)
    record = json.loads((tmp_path / "compiled" / "train.json").read_text())
    assert record["settings"]["compile"]
    assert any("layers compiled" in sentence for sentence in record["acceleration"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--liger",), "--liger needs a CUDA device"),
        (("--side-by-side",), "--side-by-side needs a CUDA device"),
        (("--experts-backend", "sonicmoe"), "--experts-backend sonicmoe needs a CUDA device"),
        (("--compile", "--activation-checkpointing"), "--compile does not go with --activation-checkpointing"),
        (("--compile", "--lora", "4"), "--compile does not go with --lora"),
    ],
)
def test_what_cannot_be_faster_is_refused_before_anything_is_written(mixture, data, tmp_path, more, message):
    done = run_cli(*arguments(mixture, data, tmp_path / "out", "--steps", 1, *more))
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def settings(**changes):
    values = {"precision": "fp32", "micro_batch_size": 2, "sequence_length": 16}
    return SimpleNamespace(**values, **{"liger": False, "side_by_side": False, "compile": False, **changes})


def test_a_resumed_training_keeps_its_backend_where_it_is_served(made):
    model, facts = made("llama", "btx"), SimpleNamespace(top_k=2)
    accelerator = SimpleNamespace(num_processes=1, is_main_process=True, device=torch.device("cpu"))

    def chosen(wanted, former):
        return speed_up(model, settings(), facts, accelerator, wanted, former).record()["experts_backend"]

    assert chosen("auto", "eager") == "eager"
    assert speed_up(model, settings(), facts, accelerator, "auto", "eager").told == ["experts by eager: as before"]
    assert chosen("auto", "fused") == "grouped_mm"  # another machine
    assert chosen("auto", None) == "grouped_mm"
    assert chosen("grouped_mm", "eager") == "grouped_mm"
    with pytest.raises(UpcycleError, match="fused kernels run on CUDA"):
        chosen("fused", "eager")


def test_what_was_put_in_place_is_told(made, monkeypatch):
    model, facts = made("cohere2", "btx"), SimpleNamespace(top_k=2)
    accelerator = SimpleNamespace(num_processes=1, is_main_process=True, device=torch.device("cpu"))
    head = object()
    monkeypatch.setattr(acceleration, "choose_backend", lambda *_, **__: Backend("eager", "asked for"))
    monkeypatch.setattr(acceleration.liger, "available", lambda: True)
    monkeypatch.setattr(acceleration.liger, "use_norms", lambda _: 5)
    monkeypatch.setattr(acceleration.liger, "use_rope", lambda _: False)
    monkeypatch.setattr(acceleration.liger, "use_loss_head", lambda *_: head)
    monkeypatch.setattr(acceleration, "run_side_by_side", lambda _: 2)
    found = speed_up(model, settings(liger=True, side_by_side=True), facts, accelerator, "auto")
    assert found.loss_head is head
    assert found.told == [
        "experts by eager: asked for",
        "Liger computes 5 norms, the loss without logits",
        "attention and FFN side by side in 2 layers",
    ]
    monkeypatch.setattr(acceleration, "run_side_by_side", lambda _: 0)
    with pytest.raises(UpcycleError, match="do not read the same input"):
        speed_up(model, settings(side_by_side=True), facts, accelerator, "auto")
