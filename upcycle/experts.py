"""Experts under autocast, which does not reach transformers' grouped products: they would stay in fp32."""

from typing import Any, Final

import torch

GROUPED_AUTOCAST: Final = "grouped_mm_autocast"


def use_autocast_experts(model: Any) -> None:
    """Let a mixture's grouped products follow autocast; the choice is the loaded model's, and is not saved with it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(GROUPED_AUTOCAST, _forward)
    model.set_experts_implementation(GROUPED_AUTOCAST)


def _forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As `grouped_mm`; tokens `[T, D]`, indices and gates `[T, K]`, in autocast's dtype where it is on."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    device = hidden_states.device.type
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    if not torch.is_autocast_enabled(device):
        result: torch.Tensor = grouped(self, hidden_states, top_k_index, top_k_weights)
        return result
    dtype = torch.get_autocast_dtype(device)
    half: torch.Tensor = grouped(_Cast(self, dtype), hidden_states.to(dtype), top_k_index, top_k_weights.to(dtype))
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
