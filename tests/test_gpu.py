"""The kernels, the backends and the training on a real GPU; `pytest -m gpu` on a machine that has one."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import merge_and_load, run_cli
from tests.test_kernels import BOUNDS, NAMES, Case, draw, error, run
from tests.test_routers import texts
from tests.tiny import BY_NAME, make_seeds
from tests.training import arguments, metrics
from upcycle.backends import MEASURED, Backend, choose_backend, use_backend
from upcycle.kernels import reference
from upcycle.recipe import AttentionRouter, FfnRouter
from upcycle.routers import set_routers
from upcycle.side_by_side import run_side_by_side
from upcycle.weights import decoder_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
# Few widths, since each is compiled for itself.
CASES = {
    "one token": Case(1, 2, 4, 1000, 2731),
    "odd": Case(333, 2, 4, 1000, 2731),
    "odd, one idle": Case(777, 2, 5, 1000, 2731, idle=3),
    "several tiles": Case(1500, 2, 8, 1024, 2048),
    "plain, first idle": Case(500, 1, 4, 384, 1000, gated=False, activation="gelu_tanh", idle=0),
}
X = torch.arange(36).reshape(2, 18)


def on_device(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def exact(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_experts_are_those_of_the_definition(name: str, dtype: torch.dtype) -> None:
    from upcycle.kernels.ffn import fused_experts

    case = CASES[name]
    inputs = on_device(draw(case, dtype))
    found = run(fused_experts, inputs, case.gated, case.activation)
    wanted = run(reference.experts, exact(inputs), case.gated, case.activation)
    errors = {name: error(*pair) for name, *pair in zip(NAMES, found, wanted, strict=True)}
    assert all(value <= BOUNDS[dtype] for value in errors.values()), errors
    assert [tensor.dtype for tensor in found] == [dtype] * len(NAMES)
    if case.idle is not None:
        assert not found[3][case.idle].any()
        assert not found[4][case.idle].any()
    for _ in range(3):
        assert all(map(torch.equal, run(fused_experts, inputs, case.gated, case.activation), found))
    with torch.no_grad():  # without what a backward would need
        leaves = [inputs[name] for name in ("hidden", "index", "gates", "wide_in", "down")]
        assert torch.equal(fused_experts(*leaves, case.gated, case.activation), found[0])


def test_no_token_at_all() -> None:
    from upcycle.kernels.ffn import fused_experts

    found = run(fused_experts, on_device(draw(Case(0, 2, 3, 64, 96), torch.bfloat16)), True, "silu")
    assert found[0].shape == (0, 64)
    assert not any(tensor.any() for tensor in found)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    "sizes", [(2, 300, 8, 4, 128), (4, 129, 6, 4, 384), (1, 1, 1, 2, 7), (1, 33, 5, 3, 77)], ids=str
)
def test_gated_heads_are_those_of_the_definition(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    from upcycle.kernels.heads import gate_heads

    batch, length, key_value_heads, experts, width = sizes
    generator = torch.Generator().manual_seed(0)
    shape = (batch, length, key_value_heads * experts * width)
    heads, gradient = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    gates = torch.randn(batch, length, experts, generator=generator).softmax(-1).to(DEVICE, dtype)

    def outcome(function: Callable[..., torch.Tensor], to: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(to).clone().requires_grad_() for tensor in (heads, gates)]
        output = function(*leaves, key_value_heads)
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(to))]

    found = outcome(gate_heads, dtype)
    errors = [error(*pair) for pair in zip(found, outcome(reference.gate_heads, torch.float64), strict=True)]
    assert max(errors) <= BOUNDS[dtype], errors
    for _ in range(3):
        assert all(map(torch.equal, outcome(gate_heads, dtype), found))


def outcome(model: Any) -> dict[str, torch.Tensor]:
    """Loss, logits and every gradient of a step."""
    model.zero_grad()
    ids = X.to(DEVICE)
    out = model(ids, labels=ids, use_cache=False, output_router_logits=True)
    out.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **gradients}


def assert_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], bound: float) -> None:
    assert found.keys() == wanted.keys()
    scale = max(float(value.norm()) for value in wanted.values())
    for name, value in wanted.items():
        difference = float((found[name] - value).norm())
        assert difference <= bound * max(float(value.norm()), 1e-3 * scale), (name, difference, float(value.norm()))


@pytest.mark.parametrize("backend", ["fused", "grouped_mm", "liger"])
@pytest.mark.parametrize("name", ["llama", "cohere2"])
@pytest.mark.parametrize("recipe", ["bam", "bam-kv-shared", "btx"])
def test_a_mixture_is_the_same_by_each_backend(made: Any, name: str, recipe: str, backend: str) -> None:
    if backend == "liger" and not HAS_LIGER:
        pytest.skip("liger-kernel is not installed")
    model = made(name, recipe).to(DEVICE)
    use_backend(model, Backend("eager", "what the others are compared with"))
    expected = outcome(model)
    chosen = choose_backend(model, backend, X.numel(), 2, torch.float32, True)
    assert chosen is not None
    use_backend(model, chosen)
    # Liger multiplies fp32 on tensor cores, in TF32.
    assert_same(outcome(model), expected, 2e-2 if backend == "liger" else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_auto_measures_and_chooses(made: Any, dtype: torch.dtype) -> None:
    model = made("llama", "bam").to(DEVICE)
    backend = choose_backend(model, "auto", 256, 1, dtype, True)
    assert backend is not None
    assert set(backend.seconds) == set(MEASURED), backend.reason  # none of them failed
    assert all(value > 0 for value in backend.seconds.values())
    assert backend.seconds[backend.name] <= 1.03 * min(backend.seconds.values())
    use_backend(model, backend)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert outcome(model)["loss"].isfinite()


@pytest.mark.parametrize("name", ["llama", "cohere2"])
def test_fused_layers_compile_whole(made: Any, name: str) -> None:
    model = made(name, "bam").to(DEVICE).train()
    use_backend(model, Backend("eager", "what the compiled ones are compared with"))
    expected = outcome(model)
    use_backend(model, Backend("fused", "asked for"))
    torch._dynamo.reset()
    for layer in decoder_layers(model):
        layer.compile(fullgraph=True, dynamic=False)
    for _ in range(2):
        assert_same(outcome(model), expected, 1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_side_by_side_is_one_after_the_other(made: Any, backend: str) -> None:
    model = made("cohere2", "bam").to(DEVICE).train()
    use_backend(model, Backend(backend, "asked for"))
    expected = outcome(model)
    assert run_side_by_side(model) == len(decoder_layers(model))
    for _ in range(10):  # a missing wait shows in some runs only
        assert_same(outcome(model), expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", ("--experts-backend", "fused")),
        ("llama", ("--compile",)),
        ("cohere2", ("--side-by-side",)),
        ("llama", ("--experts-backend", "fused", "--compile")),
        ("cohere2", ("--experts-backend", "fused", "--side-by-side")),
        ("llama", ("--liger",)),
        ("llama", ("--liger", "--experts-backend", "liger")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_faster_training_lowers_the_loss(
    name: str, more: tuple[str, ...], data: Mapping[str, str], tmp_path: Path
) -> None:
    if "--liger" in more and not HAS_LIGER:
        pytest.skip("liger-kernel is not installed")
    merge_and_load(make_seeds(BY_NAME[name], tmp_path / "seeds", dtype=torch.bfloat16), tmp_path / "mixture", "bam")
    done = run_cli(*arguments(tmp_path / "mixture", data, tmp_path / "out", "--steps", 40, *more))
    assert done.returncode == 0, done.stderr
    losses = metrics(tmp_path / "out", "nll")
    assert losses[-1] < losses[0] - 0.2
    told = json.loads((tmp_path / "out" / "train.json").read_text())["acceleration"]
    sentences = {
        "fused": "by fused",
        "--compile": "compiled",
        "--side-by-side": "side by side",
        "--liger": "Liger computes",
    }
    for option in sentences.keys() & set(more):
        assert any(sentences[option] in line for line in told), told


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "adamw-offload"])
def test_training_in_bf16_lowers_the_loss(
    optimizer: str,
    mixture: Path,
    data: Mapping[str, str],
    tmp_path: Path,
) -> None:
    if optimizer != "adamw" and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    more = ("--steps", 40, "--optimizer", optimizer)
    done = run_cli(*arguments(mixture, data, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr
    losses = metrics(tmp_path / "out", "nll")
    assert losses[-1] < losses[0] - 1


def test_an_evaluation_agrees_with_the_hosts(mixture: Path, data: Mapping[str, str]) -> None:
    sources = [f"{name}={file}" for name, file in data.items()]
    found = []
    for more in (("--device", "cpu"), ("--device", "cuda", "--precision", "fp32"), ("--device", "cuda")):
        done = run_cli("eval", mixture, "--data", *sources, "--sequence-length", 32, "--json", *more)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout)["models"][str(mixture)]["mean_loss"])
    assert found[1] == pytest.approx(found[0], abs=1e-3)
    assert found[2] == pytest.approx(found[0], abs=2e-2)  # bf16


@pytest.mark.parametrize("name", ["llama", "cohere2"])
def test_routers_set_on_the_gpu_are_the_hosts(made: Any, name: str) -> None:
    settings = {"ffn": FfnRouter(init="fit"), "attention": AttentionRouter(init="prototypes")}
    model, text, routers = made(name, "bam"), texts(), []
    for device in ("cpu", DEVICE):
        set_routers(model.to(device), text, settings, dtype=torch.float32)
        routers.append({name: p.detach().cpu().clone() for name, p in model.named_parameters() if "router" in name})
    assert_same(routers[1], routers[0], 1e-2)


def test_fp32_on_the_gpu_is_fp32_on_the_host(
    mixture: Path,
    data: Mapping[str, str],
    tmp_path: Path,
) -> None:
    for name, devices in (("gpu", "0"), ("host", "")):
        more = ("--steps", 3, "--precision", "fp32")
        done = run_cli(*arguments(mixture, data, tmp_path / name, *more), CUDA_VISIBLE_DEVICES=devices)
        assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "gpu", "loss") == pytest.approx(metrics(tmp_path / "host", "loss"), rel=1e-4)
