"""Experts implementations under autocast, which does not reach the products of some: they would stay in fp32."""

from functools import partial
from typing import Any

import torch


def follow_autocast(name: str) -> str:
    """Register one of transformers' experts implementations as one that follows autocast; its new name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(f"{name}_autocast", partial(_forward, name))
    return f"{name}_autocast"


def _forward(
    name: str, self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As `name`; tokens `[T, D]`, indices and gates `[T, K]`, in autocast's dtype where it is on."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    device = hidden_states.device.type
    function = ALL_EXPERTS_FUNCTIONS[name]
    if not torch.is_autocast_enabled(device):
        result: torch.Tensor = function(self, hidden_states, top_k_index, top_k_weights)
        return result
    dtype = torch.get_autocast_dtype(device)
    half: torch.Tensor = function(_Cast(self, dtype), hidden_states.to(dtype), top_k_index, top_k_weights.to(dtype))
    return half


class _Cast:
    """An experts module whose weights are seen in another dtype, each converted once."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.to(self._dtype)
            setattr(self, name, value)
        return value
