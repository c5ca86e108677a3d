"""Liger's kernels under Triton's interpreter: what a model computes with them is what it computes without.

The interpreter lacks things that Liger asks of it, and the fixture adds them: for RMSNorm floats that have a type, and
`libdevice.rsqrt`; for rotations in bf16 products and sums of numbers, not of their bits.
"""

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralForCausalLM
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3 import modeling_phi3

from tests.conftest import merge_and_load
from tests.interpreter import interpreted
from tests.tiny import BY_NAME, VOCAB, dense_config, make_seeds, mixtral_config
from upcycle import liger
from upcycle.kernels import reference
from upcycle.liger import LossHead
from upcycle.losses import next_token_nll
from upcycle.modeling.modeling_bam import BamExperts, ExpertNorm

pytest.importorskip("liger_kernel")
pytest.importorskip("triton")


@pytest.fixture(scope="module", autouse=True)
def ops() -> Iterator[Any]:
    """Liger's operators, interpreted."""
    from triton import language
    from triton.runtime import interpreter

    implicit = interpreter._implicit_cvt

    def typed(argument: Any) -> Any:
        if not isinstance(argument, float):
            return implicit(argument)
        handle = interpreter.TensorHandle(np.array([argument], np.float32), language.float32)
        return language.tensor(handle, language.float32)

    binary = interpreter.InterpreterBuilder.binary_op

    def in_floats(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if left.dtype.scalar != language.bfloat16:
            return binary(self, left, right, operation)
        wide = [self.cast_impl(handle, language.float32) for handle in (left, right)]
        return self.cast_impl(binary(self, *wide, operation), language.bfloat16)

    with interpreted("liger_kernel") as patch:
        patch.setenv("LIGER_FUSED_MOE_AUTOTUNE", "0")
        patch.setattr(interpreter, "_implicit_cvt", typed)
        patch.setattr(interpreter.InterpreterBuilder, "binary_op", in_floats)
        module = importlib.import_module("liger_kernel.ops")
        norms = importlib.import_module("liger_kernel.ops.rms_norm")
        patch.setattr(norms, "rsqrt", lambda x: language.math.rsqrt(x))
        liger.register_experts()
        yield module


@pytest.fixture
def calls(ops: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of Liger's functions, each time one is called."""
    called: list[str] = []
    for name in ("LigerRMSNormFunction", "LigerRopeFunction", "LigerFusedMoEFunction"):
        function = getattr(ops, name)

        def apply(*arguments: Any, function: Any = function, name: str = name) -> Any:
            called.append(name)
            return function.apply(*arguments)

        monkeypatch.setattr(ops, name, SimpleNamespace(apply=apply))
    return called


@pytest.fixture
def plain_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced rotation goes with the test."""
    for module in (modeling_llama, modeling_cohere, modeling_phi3):
        monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)


def make_model(name: str, **changes: Any) -> Any:
    """A tiny dense model whose every weight is random."""
    torch.manual_seed(0)
    config = dense_config(BY_NAME[name])
    for key, value in changes.items():
        setattr(config, key, value)
    return randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


@torch.no_grad()
def randomize(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.mul_(3 if parameter.dim() > 1 else 1).add_(0.1 * torch.randn_like(parameter))
    return model


def window(rows: int = 1, length: int = 9) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def outcome(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of some function of them."""
    model.zero_grad()
    logits = model(input_ids=tokens, use_cache=False).logits
    logits.float().square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": logits.detach().clone(), **gradients}


@torch.no_grad()
def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], bound: float = 1e-5) -> None:
    errors = {name: error(found[name], wanted[name]) for name in wanted}
    assert all(value <= bound for value in errors.values()), errors
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: tensor.dtype for n, tensor in wanted.items()}


def test_importing_imports_no_liger() -> None:
    script = "import sys, upcycle.liger as l; raise SystemExit(not l.available() or 'liger_kernel' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, env={**os.environ}).returncode == 0


def make_experts(gated: bool = True, bias: bool = False, activation: str = "silu", experts: int = 4) -> Any:
    dense = SimpleNamespace(hidden_size=35, intermediate_size=19, hidden_act=activation)
    config = SimpleNamespace(num_experts=experts, granularity=1, dense_config=dense, _experts_implementation=liger.NAME)
    module = BamExperts(config, gated, bias)
    module.has_gate, module.has_bias = gated, bias
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def draw(tokens: int, top_k: int, experts: int, idle: int | None = None) -> list[torch.Tensor]:
    """Tokens, indices and gates; no token reaches the expert `idle`."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, experts, generator=generator)
    if idle is not None:
        logits[:, idle] = -torch.inf
    gates, index = logits.softmax(-1).topk(top_k, dim=-1)
    return [torch.randn(tokens, 35, generator=generator), index, gates]


@pytest.mark.parametrize("case", [(37, 2, 4, None), (29, 3, 5, 1), (1, 1, 2, None), (150, 2, 3, 0)], ids=str)
def test_experts_are_those_of_the_definition(case: tuple[int, int, int, int | None], calls: list[str]) -> None:
    tokens, top_k, count, idle = case
    hidden, index, gates = draw(tokens, top_k, count, idle)
    module = make_experts(experts=count)
    gradient = torch.randn(tokens, 35, generator=torch.Generator().manual_seed(2))

    leaves = [x.clone().requires_grad_() for x in (hidden, gates)] + [module.gate_up_proj, module.down_proj]
    output = module(leaves[0], index, leaves[1])
    found = [output, *torch.autograd.grad(output, leaves, gradient)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    output = reference.experts(exact[0], index, *exact[1:], True, "silu")
    wanted = [output, *torch.autograd.grad(output, exact, gradient.double())]

    assert calls == ["LigerFusedMoEFunction"]
    names = ("output", "hidden", "gates", "gate_up_proj", "down_proj")
    errors = {name: error(a, b) for name, a, b in zip(names, found, wanted, strict=True)}
    assert all(value <= 1e-5 for value in errors.values()), errors


def test_experts_follow_autocast() -> None:
    """In fp16: the interpreter has no atomic addition in bf16, which Liger's gradient of the gates asks for."""
    module, (hidden, index, gates) = make_experts(), draw(11, 2, 4)
    wanted = module(hidden, index, gates)
    with torch.autocast("cpu", torch.float16):
        found = module(hidden.requires_grad_(), index, gates)
    found.sum().backward()
    assert (found.dtype, hidden.grad.dtype, module.down_proj.grad.dtype) == (torch.float16, *[torch.float32] * 2)
    assert 0 < error(found, wanted) <= 2e-3


def test_a_mixture_of_transformers_has_the_same_logits(calls: list[str]) -> None:
    torch.manual_seed(0)
    config = mixtral_config()
    config.num_hidden_layers = 1
    model = MixtralForCausalLM(config)
    wanted = outcome(model, window(2))
    model.set_experts_implementation(liger.NAME)
    assert_alike(outcome(model, window(2)), wanted)
    assert calls == ["LigerFusedMoEFunction"]


def test_experts_that_liger_does_not_serve_are_refused(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    reasons = {
        "experts without a gate": make_experts(gated=False),
        "has_bias=True": make_experts(bias=True),
        "activation GELUTanh, only SiLU": make_experts(activation="gelu_pytorch_tanh"),
    }
    for reason, module in reasons.items():
        assert reason in str(liger.experts_unserved(module))
        with pytest.raises(ValueError, match=reason):
            module(*draw(5, 2, 4))
    module = make_experts()
    assert liger.experts_unserved(module) is None
    monkeypatch.delenv("TRITON_INTERPRET")  # tokens on a CPU take the class's own loop
    found = module(*draw(5, 2, 4))
    module.config._experts_implementation = "eager"
    assert torch.equal(found, module(*draw(5, 2, 4)))
    assert calls == []


def rms_norms(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize(
    ("name", "count"),
    [("llama", 5), ("qwen3", 9), ("gemma2", 9), ("gemma3_text", 13), ("olmo2", 9), ("granite", 5), ("phi3", 5)],
)
def test_norms_are_the_familys(name: str, count: int, calls: list[str]) -> None:
    model = make_model(name)
    wanted = outcome(model, window(2))
    assert liger.use_norms(model) == len(rms_norms(model)) == count
    calls.clear()
    assert_alike(outcome(model, window(2)), wanted)
    assert calls == ["LigerRMSNormFunction"] * count


@pytest.mark.parametrize("name", ["cohere", "cohere-plain", "cohere2", "starcoder2", "gpt_neox"])
def test_norms_that_are_no_rms_norms_stay(name: str, calls: list[str]) -> None:
    model = make_model(name)
    wanted = outcome(model, window())
    assert liger.use_norms(model) == 0
    calls.clear()
    assert_alike(outcome(model, window()), wanted, bound=0)
    assert calls == []


@pytest.mark.parametrize("norm", [modeling_llama.LlamaRMSNorm, Gemma2RMSNorm, Olmo2RMSNorm])
def test_one_variant_of_a_norm_fits(norm: Any) -> None:
    own = {"LlamaRMSNorm": (0.0, "llama"), "Gemma2RMSNorm": (1.0, "gemma"), "Olmo2RMSNorm": (0.0, "gemma")}
    for size in (8, 130):
        fits = [variant for variant in liger._NORMS if liger._same_norm(norm(size, eps=1e-5), *variant)]
        assert fits == [own[norm.__name__]]


def scaled(self: Any, states: torch.Tensor) -> torch.Tensor:
    return modeling_llama.LlamaRMSNorm.forward(self, states) * 1.00002


def other_eps(self: Any, states: torch.Tensor) -> torch.Tensor:
    return self.weight * nn.functional.rms_norm(states.float(), states.shape[-1:], eps=1e-5).to(states.dtype)


def rounded_twice(self: Any, states: torch.Tensor) -> torch.Tensor:
    return modeling_llama.LlamaRMSNorm.forward(self, states).to(states.dtype)


@pytest.mark.parametrize("forward", [scaled, other_eps, rounded_twice])
def test_almost_a_norm_of_ligers_does_not_fit(forward: Any) -> None:
    norm = type("Other", (modeling_llama.LlamaRMSNorm,), {"forward": forward})(16, eps=1e-6)
    assert not any(liger._same_norm(norm, *variant) for variant in liger._NORMS)


def test_norms_keep_types_under_autocast() -> None:
    model = make_model("qwen3")
    norm = model.model.layers[0].self_attn.q_norm
    states = torch.randn(2, 3, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        wanted, wanted_norm = outcome(model, window(2)), norm(states)
        assert liger.use_norms(model) == 9
        found, found_norm = outcome(model, window(2)), norm(states)
    assert_alike({"norm": found_norm}, {"norm": wanted_norm}, 4e-3)
    assert_alike(found, wanted, 5e-2)


def test_a_copied_models_norms_are_the_copys(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    liger.use_norms(model)
    twin = copy.deepcopy(model)
    randomize(twin)
    plain = make_model("llama")
    plain.load_state_dict(twin.state_dict())
    wanted = plain(input_ids=window()).logits
    assert error(twin(input_ids=window()).logits, wanted) <= 1e-5
    calls.clear()
    monkeypatch.delenv("TRITON_INTERPRET")  # on a CPU, norms are the family's
    assert torch.equal(twin(input_ids=window()).logits, wanted)
    assert liger.use_norms(plain) == 0
    assert calls == []


def test_norms_are_replaced_once_and_never_anothers_forward(calls: list[str]) -> None:
    model = make_model("llama")
    model.model.norm.forward = partial(type(model.model.norm).forward, model.model.norm)  # as offloading does
    assert liger.use_norms(model) == liger.use_norms(model) == 4
    assert isinstance(model.model.norm.forward, partial)
    calls.clear()
    model(input_ids=window())
    assert calls == ["LigerRMSNormFunction"] * 4


@pytest.mark.usefixtures("plain_rope")
def test_a_mixture_of_qwen3_keeps_its_experts_norms(tmp_path: Path, calls: list[str]) -> None:
    model = randomize(merge_and_load(make_seeds(BY_NAME["qwen3"], tmp_path / "seeds"), tmp_path / "out", "bam"))
    inner = [module for module in model.modules() if isinstance(module, ExpertNorm)]
    wanted = outcome(model, window(2))
    assert liger.use_norms(model) == len(rms_norms(model)) - len(inner) == 5
    model.set_experts_implementation(liger.NAME)
    assert liger.use_rope(model)
    calls.clear()
    assert_alike(outcome(model, window(2)), wanted)
    assert {name: calls.count(name) for name in calls} == {
        "LigerRMSNormFunction": 5,
        "LigerRopeFunction": 2,
        "LigerFusedMoEFunction": 2,
    }


@pytest.mark.usefixtures("plain_rope")
def test_rope_is_the_familys(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = make_model("llama"), modeling_llama.apply_rotary_pos_emb
    wanted = outcome(model, window(2))
    assert liger.use_rope(model)
    replacement = modeling_llama.apply_rotary_pos_emb
    assert liger.use_rope(model)
    assert modeling_llama.apply_rotary_pos_emb is replacement is not original
    calls.clear()
    assert_alike(outcome(model, window(2)), wanted)
    assert calls == ["LigerRopeFunction"] * 2

    heads = torch.randn(2, 5, 3, 8)  # positions before heads
    angles = torch.randn(2, 5, 4).repeat(1, 1, 2)
    calls.clear()
    found, right = (f(heads, heads, angles.cos(), angles.sin(), unsqueeze_dim=2) for f in (replacement, original))
    assert torch.equal(found[0], right[0])
    mixed = [heads.transpose(1, 2).bfloat16(), heads.transpose(1, 2).bfloat16(), angles.cos(), angles.sin()]
    assert replacement(*mixed)[0].dtype == original(*mixed)[0].dtype == torch.float32
    assert calls == []
    monkeypatch.delenv("TRITON_INTERPRET")
    assert_alike(outcome(model, window(2)), wanted, bound=0)
    assert not liger.use_rope(model)
    assert calls == []


@pytest.mark.usefixtures("plain_rope")
def test_rope_under_autocast(calls: list[str]) -> None:
    model = make_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        wanted = outcome(model, window(2))
        assert liger.use_rope(model)
        calls.clear()
        found = outcome(model, window(2))
    assert calls == ["LigerRopeFunction"] * 2
    assert_alike(found, wanted, 2e-2)


@pytest.mark.usefixtures("plain_rope")
def test_other_rotations_stay(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_cohere.apply_rotary_pos_emb
    assert not liger.use_rope(make_model("cohere"))  # interleaved
    assert modeling_cohere.apply_rotary_pos_emb is original
    model = make_model("phi3")  # half of each head
    wanted = outcome(model, window())
    assert liger.use_rope(model)
    calls.clear()
    assert_alike(outcome(model, window()), wanted, bound=0)
    assert calls == []
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, cos, sin: q)
    assert not liger.use_rope(make_model("llama"))


def loss_and_gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (loss / 7).backward()  # a loss is divided by its targets, so the gradient that arrives is not one
    return {"loss": loss.detach(), **{name: parameter.grad.clone() for name, parameter in model.named_parameters()}}


COUNTED = torch.tensor([[True, False, True, True, True, False, True, True], [False] * 8])


@pytest.mark.parametrize("counted", [None, COUNTED], ids=["all", "some"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama-biases", {}),  # tied
        ("cohere2", {"logit_scale": 0.25}),
        ("granite", {}),  # logits_scaling 2
        ("gemma2", {"final_logit_softcapping": None}),
    ],
)
def test_loss_of_the_hidden_states_is_that_of_the_logits(
    name: str, changes: dict[str, Any], counted: torch.Tensor | None
) -> None:
    model, tokens = make_model(name, **changes), window(2)
    targets = tokens[:, 1:]
    keys = list(model.state_dict())
    logits = model(input_ids=tokens[:, :-1]).logits
    wanted = loss_and_gradients(model, next_token_nll(logits, targets, counted))
    head = liger.use_loss_head(model, window())
    assert head is not None
    hidden = model(input_ids=tokens[:, :-1]).logits
    assert hidden.shape == (2, 8, 32)
    found = loss_and_gradients(model, head.nll(hidden, targets, counted))
    assert_alike(found, wanted)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert error(head.nll(hidden, targets, counted), wanted["loss"]) <= 1e-5
    with head.off():
        assert torch.equal(model(input_ids=tokens[:, :-1]).logits, logits)
    assert model(input_ids=tokens[:, :-1]).logits.shape == (2, 8, 32)
    assert liger.use_loss_head(model, window()) == head


def test_loss_of_a_mixture(mixture: Path) -> None:
    model, tokens = randomize(AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)), window(2)
    loss = next_token_nll(model(input_ids=tokens[:, :-1]).logits, tokens[:, 1:])
    wanted = loss_and_gradients(model, loss)
    head = liger.use_loss_head(model, window())
    assert head is not None
    outputs = model(input_ids=tokens[:, :-1], output_router_logits=True)
    assert_alike(loss_and_gradients(model, head.nll(outputs.logits, tokens[:, 1:])), wanted)


def test_loss_in_bf16_of_a_model_in_fp32() -> None:
    model, tokens = make_model("llama-biases"), window(2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1]).logits
    wanted = loss_and_gradients(model, next_token_nll(logits.float(), tokens[:, 1:]))
    head = liger.use_loss_head(model, window(), torch.bfloat16)
    assert head is not None
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(input_ids=tokens[:, :-1]).logits
    found = loss_and_gradients(model, head.nll(hidden.float(), tokens[:, 1:]))
    assert_alike(found, wanted, 3e-2)
    assert error(found["loss"], wanted["loss"]) <= 2e-7
    assert error(LossHead(head.head).nll(hidden.float(), tokens[:, 1:]), wanted["loss"]) > 1e-6  # in fp32


def test_a_head_trained_alone_has_its_gradient() -> None:
    model, tokens = make_model("llama"), window(2)
    model.model.requires_grad_(False)
    head = liger.use_loss_head(model, window())
    assert head is not None
    head.nll(model(input_ids=tokens[:, :-1]).logits, tokens[:, 1:]).backward()
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    with head.off():
        next_token_nll(model(input_ids=tokens[:, :-1]).logits, tokens[:, 1:]).backward()
    assert error(found, model.lm_head.weight.grad) <= 1e-5


def test_what_is_not_linear_after_its_head_is_refused() -> None:
    for name in ("gemma2", "biased", "patched"):
        model = make_model("gemma2" if name == "gemma2" else "llama")
        if name == "biased":
            model.lm_head = nn.Linear(32, VOCAB)
        if name == "patched":  # as offloading does
            model.lm_head.forward = partial(nn.functional.linear, weight=model.lm_head.weight)
        before, wanted = dict(vars(model.lm_head)), model(input_ids=window()).logits
        assert liger.use_loss_head(model, window()) is None
        assert vars(model.lm_head) == before
        assert torch.equal(model(input_ids=window()).logits, wanted)
