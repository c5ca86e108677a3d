"""The way to the fused kernels: as an experts implementation of transformers, and in attention experts' gates.

`register()` once, then `model.set_experts_implementation("upcycle_fused")`; any model whose experts carry transformers'
`use_experts_implementation` is served, the mixtures of this package among them.
"""

import logging
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from .reference import Activation

NAME: Final = "upcycle_fused"

_HAS_TRITON: Final = find_spec("triton") is not None
_log = logging.getLogger(__name__)
_told: set[str] = set()

# Attributes by which transformers tells that experts compute something else, and the plain value. Those that an older
# transformers lacks have it.
_PLAIN = {
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}


def register() -> None:
    """Make "upcycle_fused" known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, fused_experts_forward)


def fused_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Tokens `[T, D]`, indices and gates `[T, K]`, to `[T, D]`; follows autocast.

    What the kernels cannot serve (biases, an activation other than SiLU and GELU, float64, no CUDA device) goes through
    the module's own loop over its experts, and a warning says so once for each reason.
    """
    reason = unserved(self, hidden_states.dtype, hidden_states.device)
    if reason is not None:
        if reason not in _told:
            _told.add(reason)
            _log.warning("%s: %s; its own loop over the experts is used instead", type(self).__name__, reason)
        # `use_experts_implementation` keeps the class's own forward there.
        eager: torch.Tensor = type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
        return eager
    from .ffn import fused_experts

    wide_in, down = (self.gate_up_proj if self.has_gate else self.up_proj), self.down_proj
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, wide_in, down = (tensor.to(dtype) for tensor in (hidden_states, wide_in, down))
    activation = activation_of(self.act_fn)
    assert activation is not None, "unserved() has looked"
    return fused_experts(hidden_states, top_k_index, top_k_weights, wide_in, down, self.has_gate, activation)


def use_fused_gates(modules: Iterable[Any]) -> None:
    """Let attention experts' gated outputs (`GatedOutput`) scale heads by the fused kernel, where there is CUDA."""
    for module in modules:
        module.scale = partial(_scaled, type(module).scale, module)


def _scaled(plain: Any, module: Any, heads: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor
    if not heads.is_cuda or heads.dtype == torch.float64:
        result = plain(module, heads, gates)
    else:
        from .heads import gate_heads

        result = gate_heads(heads, gates, module.key_value_heads)
    return result


def unserved(module: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels do not serve an experts module for hidden states of a type on a device, or None if they do."""
    peculiar = peculiarity(module)
    if peculiar is not None:
        return f"the fused kernels do not serve {peculiar}"
    if activation_of(module.act_fn) is None:
        return f"the fused kernels know no activation {type(module.act_fn).__name__}, only SiLU and GELU"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the fused kernels compute in bfloat16, float16 or float32, not {dtype}"
    if not torch.is_autocast_enabled(device.type) and module.down_proj.dtype != dtype:
        return f"the fused kernels want one type, not {dtype} hidden states and {module.down_proj.dtype} weights"
    if device.type != "cuda":
        return f"the fused kernels run on CUDA, not on {device.type}"
    if not _HAS_TRITON:
        return "the fused kernels need triton (pip install triton)"
    from .blocks import has_blocks

    return None if has_blocks(dtype, device) else "the fused kernels need more shared memory than this card has"


def peculiarity(module: Any) -> str | None:
    """What experts compute that is neither W_down act(W x) nor W_down (act(W_gate x) * W_up x), or None."""
    # From the module itself: what a package imports lazily, the compiler of torch 2.11 does not trace.
    from transformers.integrations.moe import _default_apply_gate

    for name, value in _PLAIN.items():
        if getattr(module, name, value) != value:
            return f"experts with {name}={not value}"
    if module.has_gate and type(module)._apply_gate is not _default_apply_gate:
        return "experts with a gating of their own"
    return None


def activation_of(act_fn: Any) -> "Activation | None":
    """The kernels' name for an activation of transformers or torch, or None for one that they lack."""
    from transformers.activations import (
        FastGELUActivation,
        GELUActivation,
        GELUTanh,
        NewGELUActivation,
        SiLUActivation,
    )

    if isinstance(act_fn, (SiLUActivation, torch.nn.SiLU)) or act_fn is torch.nn.functional.silu:
        return "silu"
    # Three spellings of one formula; FastGELU and NewGELU round the constant differently, within fp32's last bits.
    tanh = (GELUTanh, NewGELUActivation, FastGELUActivation)
    if isinstance(act_fn, tanh):
        return "gelu_tanh"
    if isinstance(act_fn, torch.nn.GELU):
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    if isinstance(act_fn, GELUActivation) or act_fn is torch.nn.functional.gelu:
        return "gelu"
    return None
