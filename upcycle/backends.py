"""Which code computes a mixture's FFN experts: the one asked for, or the fastest of those that serve it here.

Axes: T tokens, K experts per token, N experts, D hidden.
"""

import copy
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from upcycle import liger
from upcycle.errors import UpcycleError
from upcycle.expert_modules import attention_experts, ffn_experts
from upcycle.experts import follow_autocast
from upcycle.kernels import dispatch
from upcycle.layout import GROUPED_BYTES

AUTO: Final = "auto"
# In the order of preference where times are level.
MEASURED: Final = ("fused", "grouped_mm", "eager")
# Taken by their names alone: Liger adds up the gates' gradients in no fixed order, and SonicMoE's code comes from the
# Hub at run time.
BACKENDS: Final = (AUTO, *MEASURED, "liger", "sonicmoe")
LEVEL: Final = 1.03  # times within 3 % are level: the same machine should choose alike
WARM_UP: Final = 2  # runs that compile
RUNS: Final = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """The choice and why it was made.

    Attributes:
        seconds: of one layer's experts by each backend that was measured.
        autocast: whether weights are of another type than products, so that autocast must be followed.
    """

    name: str
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    autocast: bool = True


def choose_backend(
    model: Any, wanted: str, tokens: int, top_k: int, dtype: torch.dtype, backward: bool
) -> Backend | None:
    """The backend for a model's experts; None for experts that transformers knows no other code for than their own.

    Args:
        model: on the device where it will run.
        wanted: one of `BACKENDS`; "auto" measures on CUDA, and is transformers' own grouped product elsewhere.
        tokens, top_k: of a forward and of a token, for the measurement.
        dtype: in which products are computed.
        backward: whether gradients will be wanted, too.

    Raises:
        UpcycleError: the backend does not serve the model here, and why.
    """
    stacks = [module for module in ffn_experts(model).values() if hasattr(type(module).forward, "__wrapped__")]
    if not stacks and wanted != AUTO:
        raise UpcycleError(f"--experts-backend {wanted}: this model has no experts whose code can be chosen")
    if not stacks:
        return None
    stack, device = stacks[0], _device(stacks[0])
    shape, autocast = _stand_in(stack, dtype, "meta"), stack.down_proj.dtype != dtype
    reasons = {name: _unserved(name, shape, dtype, device) for name in BACKENDS if name != AUTO}
    if wanted != AUTO:
        if reasons[wanted] is not None:
            raise UpcycleError(f"--experts-backend {wanted}: {reasons[wanted]}; leave the choice to 'auto'")
        return Backend(wanted, "asked for", autocast=autocast)
    if device.type == "cuda":
        names = [name for name in MEASURED if reasons[name] is None]
        fastest = _fastest(names, _stand_in(stack, dtype, device), tokens, top_k, backward)
        if fastest:
            return replace(fastest, autocast=autocast)
    name = "grouped_mm" if reasons["grouped_mm"] is None else "eager"
    why = "as nothing could be measured" if device.type == "cuda" else f"as nothing is faster on {device.type}"
    return Backend(name, f"transformers' own, {why}", autocast=autocast)


def _device(stack: Any) -> torch.device:
    device: torch.device = stack.down_proj.device
    return device


def use_backend(model: Any, backend: Backend) -> None:
    """Let a model's experts, and with "fused" the gates of its attention experts, be computed by a backend."""
    _log.info("experts backend %s: %s", backend.name, backend.reason)
    model.set_experts_implementation(_implementation(backend.name, backend.autocast))
    gated = attention_experts(model).values()
    for module in gated:
        vars(module).pop("scale", None)  # a former choice's
    if backend.name == "fused":
        dispatch.use_fused_gates(gated)


def _implementation(name: str, autocast: bool) -> str:
    """The name by which transformers knows a backend, registered there."""
    if name == "fused":
        dispatch.register()
        return dispatch.NAME
    if name == "liger":
        liger.register_experts()
        return liger.NAME
    return follow_autocast(name) if autocast and name != "eager" else name  # the loop follows it itself


def _unserved(name: str, experts: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a backend does not serve experts on a device, or None if it does."""
    if name == "fused":
        return dispatch.unserved(experts, dtype, device)
    if name == "grouped_mm" and dtype == torch.float64:
        return "torch's grouped product knows no float64"
    if name == "grouped_mm" and any(size * dtype.itemsize % GROUPED_BYTES for size in experts.down_proj.shape[1:]):
        return f"torch's grouped product takes rows of whole multiples of {GROUPED_BYTES} bytes, which these have not"
    if name in ("liger", "sonicmoe") and device.type != "cuda":
        return f"its kernels run on CUDA, not on {device.type}"
    if name == "liger":
        return liger.experts_unserved(experts) if liger.available() else "liger-kernel is missing: upcycle[cuda] has it"
    if name == "sonicmoe":
        try:
            from transformers.integrations.sonicmoe import is_sonicmoe_loadable

            is_sonicmoe_loadable(raise_error=True)
        except ImportError as error:
            return str(error)
        # It looks for the activation's name where a mixture's config has none, and takes SiLU then.
        peculiar = liger.swiglu_unserved(experts)
        return None if peculiar is None else f"SonicMoE is not trusted with {peculiar}"
    return None


def _stand_in(module: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """An experts module like `module`, whole if that is sharded, with weights of its own: random ones in `dtype`."""
    generator = (
        None if str(device) == "meta" else torch.Generator(device).manual_seed(0)
    )  # the training's stays as it is

    def draw(parameter: Any) -> torch.nn.Parameter:
        empty = torch.empty(parameter.shape, dtype=dtype, device=device)
        return torch.nn.Parameter(empty.normal_(std=0.02, generator=generator))

    experts = copy.copy(module)
    experts._parameters = {name: None if value is None else draw(value) for name, value in module._parameters.items()}
    return experts


def _fastest(names: Sequence[str], experts: Any, tokens: int, top_k: int, backward: bool) -> Backend | None:
    """The backend that takes the least time for one layer's experts on random tokens; None if none can compute it."""
    seconds: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name in names:
        try:
            seconds[name] = layer_seconds(name, experts, tokens, top_k, backward)
        except Exception as error:  # what a card or its compiler refuses must not stop a training
            failures[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    for name, message in failures.items():
        _log.warning("experts backend %s failed and is left out: %s", name, message)
    if not seconds:
        return None
    name = next(name for name in seconds if seconds[name] <= LEVEL * min(seconds.values()))
    told = ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in seconds.items())
    what = "forward and backward" if backward else "forward"
    return Backend(name, f"the fastest {what} of a layer's experts over {tokens:,} tokens: {told}", seconds)


def layer_seconds(name: str, experts: Any, tokens: int, top_k: int, backward: bool) -> float:
    """Seconds that a backend takes for one layer's experts on random tokens: the median of some runs."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    down = experts.down_proj
    function = ALL_EXPERTS_FUNCTIONS.get(
        _implementation(name, False), type(experts).forward.__wrapped__
    )  # its own: "eager"
    generator = torch.Generator(down.device).manual_seed(0)

    def draw(width: int) -> torch.Tensor:
        return torch.randn(tokens, width, generator=generator, device=down.device)

    width = down.shape[2 if getattr(experts, "is_transposed", False) else 1]
    hidden = draw(width).to(down.dtype).requires_grad_(backward)
    gates, index = draw(len(down)).softmax(-1).topk(top_k, dim=-1)
    times = []
    for _ in range(WARM_UP + RUNS):
        _wait(down.device)
        began = time.perf_counter()
        with torch.set_grad_enabled(backward):
            output = function(experts, hidden, index, gates.to(down.dtype))
            if backward:
                leaves = [hidden, *experts.parameters()]
                torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)
        _wait(down.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_UP:])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
