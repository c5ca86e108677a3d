"""The fused kernels under Triton's interpreter: outputs and every gradient against the definition in float64.

The bounds are those of the formats and are never loosened.
"""

import importlib
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tests.interpreter import interpreted
from upcycle.modeling.modeling_bam import BamExperts

pytest.importorskip("triton")

BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
NAMES = ("output", "hidden", "gates", "wide_in", "down")


class Case(NamedTuple):
    """Sizes of one comparison; `idle`: an expert that no token reaches."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    inner: int
    gated: bool = True
    activation: str = "silu"
    idle: int | None = None


CASES = {
    "one token": Case(1, 1, 2, 5, 3),
    "even": Case(48, 2, 4, 32, 32),
    "odd": Case(37, 2, 4, 35, 19),
    "three of five, one idle": Case(29, 3, 5, 33, 17, activation="gelu_tanh", idle=1),
    "first idle": Case(21, 1, 3, 16, 40, activation="gelu", idle=0),
    "last idle, plain": Case(40, 2, 3, 18, 35, gated=False, activation="gelu", idle=2),
    "plain, tanh": Case(19, 1, 2, 20, 9, gated=False, activation="gelu_tanh"),
    "all experts": Case(17, 3, 3, 9, 50, gated=False),
}


@pytest.fixture(scope="module")
def kernels() -> Iterator[SimpleNamespace]:
    """The kernels' modules, interpreted, and tiles small enough that small matrices take several."""
    with interpreted("upcycle.kernels") as patch:
        names = ("blocks", "dispatch", "ffn", "heads", "reference", "schedule")
        modules = {name: importlib.import_module(f"upcycle.kernels.{name}") for name in names}
        tile = modules["blocks"].Tile(columns=16, inner=32, warps=4, stages=2)
        blocks = modules["blocks"].Blocks(16, tile, tile, tile, 16, tile, 32)
        patch.setattr(modules["ffn"], "blocks_on", lambda *_: blocks)
        yield SimpleNamespace(**modules, small=blocks)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that a number that no kernel wrote cannot pass."""
    empty = torch.empty

    def nan(*sizes: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*sizes, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan)


def draw(case: Case, dtype: torch.dtype, random_seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of a case, rounded to `dtype`, and the output's gradient."""
    generator = torch.Generator().manual_seed(random_seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    logits = torch.randn(case.tokens, case.experts, generator=generator, dtype=torch.float64)
    if case.idle is not None:
        logits[:, case.idle] = -torch.inf
    gates, index = logits.softmax(-1).topk(case.top_k, dim=-1)
    rows = 2 * case.inner if case.gated else case.inner
    return {
        "hidden": normal(case.tokens, case.hidden),
        "index": index,
        "gates": gates.to(dtype),
        "wide_in": normal(case.experts, rows, case.hidden, scale=case.hidden**-0.5),
        "down": normal(case.experts, case.hidden, case.inner, scale=case.inner**-0.5),
        "gradient": normal(case.tokens, case.hidden),
    }


def run(function: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor], *more: Any) -> list[torch.Tensor]:
    """Output and gradients of an experts function, in the order of `NAMES`."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES[1:]}
    output = function(leaves["hidden"], inputs["index"], leaves["gates"], leaves["wide_in"], leaves["down"], *more)
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), inputs["gradient"])]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, and NaN where anything is."""
    with torch.no_grad():
        return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_definition(
    kernels: SimpleNamespace, name: str, dtype: torch.dtype
) -> None:
    case = CASES[name]
    inputs = draw(case, dtype)
    found = run(kernels.ffn.fused_experts, inputs, case.gated, case.activation)
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    wanted = run(kernels.reference.experts, exact, case.gated, case.activation)
    errors = {name: error(*pair) for name, *pair in zip(NAMES, found, wanted, strict=True)}
    assert all(value <= BOUNDS[dtype] for value in errors.values()), errors
    assert [tensor.dtype for tensor in found] == [dtype] * len(NAMES)
    if case.idle is not None:
        assert not found[3][case.idle].any()
        assert not found[4][case.idle].any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_same_inputs_give_the_same_bits(kernels: SimpleNamespace, dtype: torch.dtype) -> None:
    case = CASES["odd"]
    first, second = (run(kernels.ffn.fused_experts, draw(case, dtype), case.gated, case.activation) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("poisoned")
def test_gates_may_be_finer_than_tokens(kernels: SimpleNamespace) -> None:
    case = CASES["odd"]
    inputs = draw(case, torch.bfloat16) | {"gates": draw(case, torch.float32)["gates"]}
    found = run(kernels.ffn.fused_experts, inputs, True, "silu")
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    wanted = run(kernels.reference.experts, exact, True, "silu")
    assert max(error(*pair) for pair in zip(found, wanted, strict=True)) <= 1e-2
    assert [tensor.dtype for tensor in found[:3]] == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.usefixtures("poisoned")
def test_tiles_of_any_size_agree(kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["odd"]
    inputs = draw(case, torch.float32)
    tiles = (kernels.blocks.Tile(*sizes, warps=4, stages=2) for sizes in ((16, 64), (32, 16), (64, 32), (16, 16)))
    up, rowwise, activation, weight = tiles
    blocks = kernels.blocks.Blocks(32, up, rowwise, activation, 64, weight, vector=8)
    wanted = run(kernels.ffn.fused_experts, inputs, case.gated, case.activation)
    monkeypatch.setattr(kernels.ffn, "blocks_on", lambda *_: blocks)
    found = run(kernels.ffn.fused_experts, inputs, case.gated, case.activation)
    assert max(error(one, other.double()) for one, other in zip(found, wanted, strict=True)) <= 1e-6


@pytest.mark.usefixtures("poisoned")
def test_only_wanted_gradients_are_computed(kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["odd"]
    inputs = draw(case, torch.float32)
    whole = run(kernels.ffn.fused_experts, inputs, case.gated, case.activation)
    names = []
    weight_backward = kernels.ffn._weight_backward
    monkeypatch.setattr(kernels.ffn, "_weight_backward", lambda *a: names.append(a[2].shape) or weight_backward(*a))
    leaves = {name: inputs[name].clone().requires_grad_(name == "down") for name in NAMES[1:]}
    output = kernels.ffn.fused_experts(
        *(leaves["hidden"], inputs["index"], leaves["gates"], leaves["wide_in"], leaves["down"]),
        *(case.gated, case.activation),
    )
    output.backward(inputs["gradient"])
    assert names == [inputs["down"].shape]
    assert leaves["hidden"].grad is None
    assert torch.equal(leaves["down"].grad, whole[4])


@pytest.mark.usefixtures("poisoned")
def test_no_gradient_no_pre_activation(kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["odd"]
    inputs = draw(case, torch.float32)
    arguments = [inputs[name] for name in ("hidden", "index", "gates", "wide_in", "down")]
    kept = []
    up = kernels.ffn._up
    monkeypatch.setattr(kernels.ffn, "_up", lambda *a: kept.append(up(*a)) or kept[-1])
    output = kernels.ffn.fused_experts(*arguments, case.gated, case.activation)
    assert kept[0][0].numel() == 0
    assert torch.equal(output, run(kernels.ffn.fused_experts, inputs, True, "silu")[0])


@pytest.mark.usefixtures("poisoned")
def test_strided_inputs_and_expanded_gradients(kernels: SimpleNamespace) -> None:
    case = CASES["odd"]
    inputs = draw(case, torch.float32)
    strided = {name: tensor.mT.contiguous().mT for name, tensor in inputs.items()}
    strided["gradient"] = torch.ones(()).expand(case.tokens, case.hidden)
    plain = {**inputs, "gradient": torch.ones(case.tokens, case.hidden)}
    found, wanted = (run(kernels.ffn.fused_experts, x, True, "silu") for x in (strided, plain))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_no_token(kernels: SimpleNamespace) -> None:
    inputs = draw(Case(0, 2, 3, 8, 8), torch.float32)
    found = run(kernels.ffn.fused_experts, inputs, True, "silu")
    assert found[0].shape == (0, 8)
    assert not any(tensor.any() for tensor in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": torch.ones(37, 1)}, r"gates is shaped \(37, 1\), expected \(37, 2\)"),
        ({"index": torch.zeros(36, 2, dtype=torch.int64), "gates": torch.ones(36, 2)}, r"index is shaped \(36,\)"),
        ({"wide_in": torch.ones(4, 19, 35)}, r"wide_in is shaped \(4, 19, 35\), expected \(4, 38, 35\)"),
        ({"down": torch.ones(4, 35, 19, dtype=torch.float16)}, "expected one type in all"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    kernels: SimpleNamespace, change: dict[str, torch.Tensor], message: str
) -> None:
    inputs = draw(CASES["odd"], torch.float32) | change
    with pytest.raises(ValueError, match=message):
        run(kernels.ffn.fused_experts, inputs, True, "silu")


def test_what_cannot_be_computed_is_refused(kernels: SimpleNamespace) -> None:
    inputs = draw(CASES["odd"], torch.float32)
    with pytest.raises(ValueError, match="no activation 'relu'; known: silu, gelu, gelu_tanh"):
        run(kernels.ffn.fused_experts, inputs, True, "relu")
    with pytest.raises(ValueError, match="run on CUDA, not on cpu"):
        kernels.blocks.blocks_on(torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"no tiles for torch\.float64"):
        kernels.blocks.blocks_for(torch.float64, 227 * 1024)


def test_a_schedule_counted_by_hand(kernels: SimpleNamespace) -> None:
    # Slots: token 0 has 0, 1; token 1 has 2, 3; ... Expert 0 takes slots 1, 3, 5, 8; expert 2 the rest; 1 and 3 none.
    index = torch.tensor([[2, 0], [2, 0], [2, 0], [2, 2], [0, 2]])
    schedule = kernels.schedule.make_schedule(index, 4, 4)
    assert schedule.order.tolist() == [1, 3, 5, 8, 0, 2, 4, 6, 7, 9]
    assert schedule.offsets.tolist() == [0, 4, 4, 10, 10]
    assert schedule.tile_expert.tolist() == [0, 2, 2, -1, -1, -1]
    assert schedule.tile_start.tolist()[:3] == [0, 4, 8]


@pytest.mark.parametrize("rows", [1, 3, 16, 128])
def test_each_slot_lies_in_one_tile_of_its_expert(kernels: SimpleNamespace, rows: int) -> None:
    for random_seed in range(20):
        index = draw(Case(random_seed * 3, 3, 6, 1, 1, idle=random_seed % 6), torch.float32, random_seed)["index"]
        schedule = kernels.schedule.make_schedule(index, 6, rows)
        seen = []
        for expert, start in zip(schedule.tile_expert.tolist(), schedule.tile_start.tolist(), strict=True):
            if expert >= 0:
                end = min(start + rows, int(schedule.offsets[expert + 1]))
                slots = schedule.order[start:end]
                assert (index.reshape(-1)[slots] == expert).all()
                seen += slots.tolist()
        assert sorted(seen) == list(range(index.numel()))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("sizes", [(2, 3, 2, 3, 20), (1, 1, 1, 2, 7), (1, 2, 5, 4, 240)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_gated_heads(kernels: SimpleNamespace, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, key_value_heads, experts, width = sizes
    generator = torch.Generator().manual_seed(0)
    heads, gradient = (
        torch.randn(batch, length, key_value_heads * experts * width, generator=generator).to(dtype) for _ in range(2)
    )
    gates = torch.randn(batch, length, experts, generator=generator).softmax(-1).to(dtype)

    def outcome(function: Callable[..., torch.Tensor], to: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(to).requires_grad_() for tensor in (heads, gates)]
        output = function(*leaves, key_value_heads)
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(to))]

    found = outcome(kernels.heads.gate_heads, dtype)
    wanted = outcome(kernels.reference.gate_heads, torch.float64)
    errors = [error(*pair) for pair in zip(found, wanted, strict=True)]
    assert max(errors) <= BOUNDS[dtype], errors
    assert all(torch.equal(*pair) for pair in zip(found, outcome(kernels.heads.gate_heads, dtype), strict=True))
    with pytest.raises(ValueError, match="expected the same tokens"):
        kernels.heads.gate_heads(heads[..., :-1], gates, key_value_heads)


def make_experts(
    gated: bool = True,
    bias: bool = False,
    activation: str = "silu",
    hidden: int = 10,
    inner: int = 12,
    count: int = 3,
) -> Any:
    """The mixture's own experts with random weights."""
    dense = SimpleNamespace(hidden_size=hidden, intermediate_size=inner, hidden_act=activation)
    config = SimpleNamespace(
        num_experts=count, granularity=1, dense_config=dense, _experts_implementation="upcycle_fused"
    )
    experts = BamExperts(config, gated, bias)
    experts.has_gate, experts.has_bias = gated, bias
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return experts


def tokens(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = draw(Case(11, 2, 3, 10, 12), dtype)
    return inputs["hidden"], inputs["index"], inputs["gates"]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"])
def test_transformers_reaches_the_kernels(
    kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, gated: bool, activation: str
) -> None:
    kernels.dispatch.register()
    monkeypatch.setattr(kernels.dispatch, "unserved", lambda *_: None)  # no CUDA here
    experts = make_experts(gated, activation=activation)
    found = experts(*tokens())
    assert "routed_experts" in found.grad_fn.name()
    experts.config._experts_implementation = "eager"
    assert error(found, experts(*tokens()).double()) <= 1e-5
    experts.config._experts_implementation = "upcycle_fused"
    with torch.autocast("cpu", torch.bfloat16):
        half = experts(*tokens())
    assert half.dtype == torch.bfloat16
    assert error(half, found.double()) <= 2e-2  # the weights are rounded, too


def test_no_gradient_is_made_for_the_pre_activation(kernels: SimpleNamespace) -> None:
    """Autograd would fill one with zeros, as large as what the forward keeps."""
    inputs, made = draw(Case(40, 2, 4, 8, 64), torch.float32), []
    for name in ("hidden", "gates", "wide_in", "down"):
        inputs[name].requires_grad_()
    output = kernels.ffn.fused_experts(
        *(inputs[name] for name in ("hidden", "index", "gates", "wide_in", "down")), True, "silu"
    )

    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.name() in ("aten::zeros", "aten::zero_", "aten::zeros_like", "aten::new_zeros"):
                made.append(args[0])
            return function(*args, **(kwargs or {}))

    with Zeros():
        output.sum().backward()
    assert made == []


def kept(module: nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes that autograd keeps of a module's forward, inputs and parameters not counted."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*inputs)
    given = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *module.parameters())}
    return sum(size for place, size in storages.items() if place not in given)


def test_less_is_kept_than_by_grouped_products(kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it where I = 4 D: the pre-activation alone, of width 2 I, instead of four widths of I and two of D."""
    kernels.dispatch.register()
    monkeypatch.setattr(kernels.dispatch, "unserved", lambda *_: None)  # no CUDA here
    case = Case(256, 2, 4, 32, 128)
    inputs = draw(case, torch.float32)
    hidden, gates = inputs["hidden"].requires_grad_(), inputs["gates"].requires_grad_()
    experts = make_experts(hidden=32, inner=128, count=4)
    sizes = {}
    for name in ("grouped_mm", "upcycle_fused"):
        experts.config._experts_implementation = name
        sizes[name] = kept(experts, hidden, inputs["index"], gates)
    print(f"bytes kept of {case}: {sizes}")
    assert sizes["upcycle_fused"] < 0.5 * sizes["grouped_mm"]


@pytest.mark.parametrize("gated", [True, False])
def test_a_graph_can_be_gone_back_through_twice(kernels: SimpleNamespace, gated: bool) -> None:
    """A backward writes the pre-activation's gradient over it; the next one must not take that for it."""
    case = CASES["odd"]._replace(gated=gated)
    inputs = draw(case, torch.float32)
    leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES[1:]}
    tensors = [leaves["hidden"], inputs["index"], leaves["gates"], leaves["wide_in"], leaves["down"]]
    output = kernels.ffn.fused_experts(*tensors, gated, case.activation)
    back = partial(torch.autograd.grad, output, list(leaves.values()), inputs["gradient"])
    first = back(retain_graph=True)
    assert all(map(torch.equal, back(retain_graph=True), first))
    assert all(map(torch.equal, back(create_graph=True), first))


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_operators_are_what_a_compiler_is_told(kernels: SimpleNamespace, saved: bool, gated: bool) -> None:
    inputs = draw(CASES["odd"] if gated else CASES["all experts"], torch.float32)
    schedule = kernels.schedule.make_schedule(inputs["index"], inputs["down"].shape[0], 16).tensors()
    tensors = [inputs[name].requires_grad_(saved) for name in ("hidden", "gates", "wide_in", "down")]
    torch.library.opcheck(kernels.ffn.routed_experts, (*tensors, *schedule, gated, "silu", saved, False))
    heads, gates = torch.randn(2, 3, 24, requires_grad=saved), torch.randn(2, 3, 4, requires_grad=saved)
    torch.library.opcheck(kernels.heads.scaled_heads, (heads, gates, 2))


def test_a_layer_compiles_whole(kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.dispatch.register()
    monkeypatch.setattr(kernels.dispatch, "unserved", lambda *_: None)  # no CUDA here
    experts = make_experts()
    inputs = tokens()
    results = []
    for function in (experts, torch.compile(experts, fullgraph=True, backend="aot_eager")):
        hidden = inputs[0].clone().requires_grad_()
        output = function(hidden, *inputs[1:])
        results.append([output, *torch.autograd.grad(output.square().sum(), [hidden, *experts.parameters()])])
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


def test_what_is_asked_of_the_device_compiles(kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    experts, device = make_experts(), torch.device("cuda")

    def rows(x: torch.Tensor) -> torch.Tensor:
        served = kernels.dispatch.unserved(experts, x.dtype, device) is None
        return x * kernels.blocks.blocks_on(x.dtype, device).rows if served else x

    assert torch.compile(rows, fullgraph=True, backend="aot_eager")(torch.ones(1)) == 64


def test_what_the_kernels_do_not_serve_runs_as_ever(kernels: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    kernels.dispatch.register()
    assert ALL_EXPERTS_FUNCTIONS["upcycle_fused"] is kernels.dispatch.fused_experts_forward
    reasons = {
        "has_bias=True": (make_experts(bias=True), torch.float32),
        "no activation ReLU": (make_experts(activation="relu"), torch.float32),
        "not torch.float64": (make_experts().double(), torch.float64),
        "not torch.bfloat16 hidden states and torch.float32 weights": (make_experts(), torch.bfloat16),
        "run on CUDA, not on cpu": (make_experts(), torch.float32),
    }
    for reason, (experts, dtype) in reasons.items():
        found = kernels.dispatch.unserved(experts, dtype, torch.device("cpu"))
        assert found is not None
        assert reason in found
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            experts = make_experts(bias=True)
            found = experts(*tokens())
    assert len(caplog.records) == 1
    assert "has_bias=True; its own loop over the experts is used instead" in caplog.text
    experts.config._experts_implementation = "eager"
    assert torch.equal(found, experts(*tokens()))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu"])
def test_activations_are_what_they_are_called(kernels: SimpleNamespace, activation: str) -> None:
    name = kernels.dispatch.activation_of(ACT2FN[activation])
    assert (name is None) == (activation in ("quick_gelu", "relu"))
    if name is not None:
        values = torch.linspace(-6, 6, 101, dtype=torch.float64)
        assert torch.allclose(
            kernels.reference.ACTIVATIONS[name](values), ACT2FN[activation](values), rtol=0, atol=1e-6
        )


def test_importing_the_package_imports_neither_torch_nor_triton() -> None:
    script = "import sys, upcycle.kernels; raise SystemExit('torch' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
