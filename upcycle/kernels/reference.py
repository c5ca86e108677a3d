"""The definition that each fused kernel is held to: plain torch, any floating type, differentiable by autograd.

Axes: T tokens, K experts per token, N experts, D hidden, I inner; B batch, S sequence.
"""

from collections.abc import Callable
from functools import partial
from typing import Final, Literal

import torch
from torch.nn import functional

Activation = Literal["silu", "gelu", "gelu_tanh"]

ACTIVATIONS: Final[dict[Activation, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def experts(
    hidden: torch.Tensor,
    index: torch.Tensor,
    gates: torch.Tensor,
    wide_in: torch.Tensor,
    down: torch.Tensor,
    gated: bool,
    activation: Activation,
) -> torch.Tensor:
    """Routed FFN experts, y = sum over k of g_k FFN_e(k)(x) (arXiv:2408.08274, section 3), `[T, D]`.

    `hidden [T, D]`, `index [T, K]` int64 in 0..N-1, `gates [T, K]`; `down [N, D, I]`. Gated experts (arXiv:2002.05202)
    hold `wide_in [N, 2I, D]`, the gate's rows first: FFN(x) = W_down (act(W_gate x) * W_up x). Plain ones hold
    `wide_in [N, I, D]`: FFN(x) = W_down act(W x).
    """
    act = ACTIVATIONS[activation]
    result = torch.zeros_like(hidden)
    for expert in range(down.shape[0]):
        token, slot = (index == expert).nonzero(as_tuple=True)
        inner = hidden[token] @ wide_in[expert].T
        if gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = act(gate) * up
        else:
            inner = act(inner)
        output = inner @ down[expert].T
        result = result.index_add(0, token, output * gates[token, slot, None].to(output.dtype))
    return result


def gate_heads(heads: torch.Tensor, gates: torch.Tensor, key_value_heads: int) -> torch.Tensor:
    """Scale each attention expert's heads by its gate: the g_i o_i of sum_i g_i o_i W_i (arXiv:2408.08274, section 3).

    `heads [B, S, H * N * d]`, ordered (key/value head, expert, head in its group), and `gates [B, S, N]`, to the shape
    of `heads`.
    """
    by_expert = heads.reshape(*heads.shape[:-1], key_value_heads, gates.shape[-1], -1)
    return (by_expert * gates.to(heads.dtype)[..., None, :, None]).flatten(-3)
