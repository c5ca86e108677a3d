"""The gates of attention experts on their heads, and both gradients in one pass; `reference.gate_heads` defines it.

Axes: T tokens (B * S), H key/value heads of the seed, N experts, G = an expert's width within one key/value head.
"""

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # 128 threads with 16 bytes of bf16 each


@triton.jit
def scale_kernel(
    heads_ptr,  # [T, H, N, G]
    gates_ptr,  # [T, N]
    scaled_ptr,  # [T, H, N, G], written
    H: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token and expert, over the expert's H * G numbers in blocks that may span heads."""
    token = (tl.program_id(0) // N).to(tl.int64)
    expert = tl.program_id(0) % N
    gate = tl.load(gates_ptr + token * N + expert).to(tl.float32)
    base = token * (H * N * G) + expert * G
    for first in range(0, H * G, BLOCK):
        number = first + tl.arange(0, BLOCK)
        places = base + number // G * (N * G) + number % G
        value = tl.load(heads_ptr + places, mask=number < H * G, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + places, (gate * value).to(scaled_ptr.dtype.element_ty), mask=number < H * G)


@triton.jit
def scale_backward_kernel(
    scaled_gradient_ptr,  # [T, H, N, G]
    heads_ptr,  # [T, H, N, G]
    gates_ptr,  # [T, N]
    heads_gradient_ptr,  # [T, H, N, G], written
    gates_gradient_ptr,  # [T, N], written
    H: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dO_i = g_i d(g_i O_i), dg_i = <d(g_i O_i), O_i> over the expert's heads; programs as in `scale_kernel`."""
    token = (tl.program_id(0) // N).to(tl.int64)
    expert = tl.program_id(0) % N
    gate = tl.load(gates_ptr + token * N + expert).to(tl.float32)
    base = token * (H * N * G) + expert * G
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, H * G, BLOCK):
        number = first + tl.arange(0, BLOCK)
        places = base + number // G * (N * G) + number % G
        gradient = tl.load(scaled_gradient_ptr + places, mask=number < H * G, other=0.0).to(tl.float32)
        total += gradient * tl.load(heads_ptr + places, mask=number < H * G, other=0.0).to(tl.float32)
        element = heads_gradient_ptr.dtype.element_ty
        tl.store(heads_gradient_ptr + places, (gate * gradient).to(element), mask=number < H * G)
    gates_gradient = tl.sum(total, axis=0).to(gates_gradient_ptr.dtype.element_ty)
    tl.store(gates_gradient_ptr + token * N + expert, gates_gradient)


def gate_heads(heads: torch.Tensor, gates: torch.Tensor, key_value_heads: int) -> torch.Tensor:
    """`reference.gate_heads`: `heads [B, S, H * N * G]` scaled by `gates [B, S, N]`; products and sums in fp32.

    Runs on CUDA, or on the CPU under Triton's interpreter. Raises ValueError for shapes that do not belong together.
    """
    if heads.shape[:-1] != gates.shape[:-1] or heads.shape[-1] % (key_value_heads * gates.shape[-1]):
        raise ValueError(
            f"heads are shaped {tuple(heads.shape)}, gates {tuple(gates.shape)}: expected the same tokens, and a width "
            f"that {key_value_heads} key/value heads of {gates.shape[-1]} experts divide"
        )
    scaled: torch.Tensor = scaled_heads(heads, gates, key_value_heads)
    return scaled


def forward(heads: torch.Tensor, gates: torch.Tensor, key_value_heads: int) -> torch.Tensor:
    """Shaped as `heads [B, S, H * N * G]`; `gates [B, S, N]`."""
    heads, gates = heads.contiguous(), gates.contiguous()
    scaled = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    with torch.cuda.device_of(heads):
        if heads.numel():
            scale_kernel[(gates.numel(),)](heads, gates, scaled, **_sizes(heads, gates, key_value_heads))
    return scaled


def backward(
    scaled_gradient: torch.Tensor, heads: torch.Tensor, gates: torch.Tensor, key_value_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of heads and gates."""
    scaled_gradient, heads, gates = scaled_gradient.contiguous(), heads.contiguous(), gates.contiguous()
    heads_gradient = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    gates_gradient = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    with torch.cuda.device_of(heads):
        if heads.numel():
            scale_backward_kernel[(gates.numel(),)](
                *(scaled_gradient, heads, gates, heads_gradient, gates_gradient),
                **_sizes(heads, gates, key_value_heads),
            )
    return heads_gradient, gates_gradient


scaled_heads = torch.library.custom_op("upcycle::scaled_heads", forward, mutates_args=())
scaled_heads_backward = torch.library.custom_op("upcycle::scaled_heads_backward", backward, mutates_args=())


@scaled_heads.register_fake
def _(heads: Any, gates: Any, key_value_heads: int) -> Any:
    return heads.new_empty(heads.shape)


@scaled_heads_backward.register_fake
def _(scaled_gradient: Any, heads: Any, gates: Any, key_value_heads: int) -> Any:
    return heads.new_empty(heads.shape), gates.new_empty(gates.shape)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.key_value_heads = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, scaled_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *scaled_heads_backward(scaled_gradient, *ctx.saved_tensors, ctx.key_value_heads), None


scaled_heads.register_autograd(_gradients, setup_context=_keep)


def _sizes(heads: torch.Tensor, gates: torch.Tensor, key_value_heads: int) -> dict[str, int]:
    experts = gates.shape[-1]
    numbers = heads.shape[-1] // experts
    block = min(triton.next_power_of_2(numbers), _BLOCK)
    return {"H": key_value_heads, "N": experts, "G": numbers // key_value_heads, "BLOCK": block}
