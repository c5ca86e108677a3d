"""Routed FFN experts on fused kernels, with their gradients; `reference.experts` is the definition.

Forward and backward are one custom operator each, so that torch.compile takes a layer whole. Kept for the backward: the
pre-activation `[M, W]`, over which autograd's backward writes its gradient, and the inputs. Every sum has one fixed
order, so the same inputs give the same bits.

Axes: T tokens, K experts per token, M = T * K slots, N experts, D hidden, I inner, W = 2I (gated) or I.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .backward import activation_backward_kernel, weight_backward_kernel
from .blocks import Blocks, Tile, blocks_on
from .reference import ACTIVATIONS, Activation
from .rowwise import rowwise_kernel, sum_kernel
from .schedule import Schedule, make_schedule
from .up import up_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Layout:
    """What the kernels must know besides tensors. `save`: whether a backward will follow."""

    experts_per_token: int
    gated: bool
    activation: str
    blocks: Blocks
    save: bool


def fused_experts(
    hidden: torch.Tensor,
    index: torch.Tensor,
    gates: torch.Tensor,
    wide_in: torch.Tensor,
    down: torch.Tensor,
    gated: bool,
    activation: Activation,
) -> torch.Tensor:
    """`reference.experts` in the type of `hidden [T, D]`: bf16, fp16 or fp32, which both weights share; sums in fp32.

    Runs on CUDA, or on the CPU under Triton's interpreter. Raises ValueError for other types, shapes that do not belong
    together, or an unknown activation. An index outside 0..N-1 is not checked: that would make the host wait for the
    device.
    """
    _check(hidden, index, gates, wide_in, down, gated, activation)
    if hidden.shape[0] == 0:
        return hidden + 0 * (gates.sum() + wide_in.sum() + down.sum()).to(hidden.dtype)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, gates, wide_in, down))
    schedule = make_schedule(index, down.shape[0], blocks_on(hidden.dtype, hidden.device).rows)
    output: torch.Tensor
    output, _ = routed_experts(hidden, gates, wide_in, down, *schedule.tensors(), gated, activation, save, True)
    return output


def _check(
    hidden: torch.Tensor,
    index: torch.Tensor,
    gates: torch.Tensor,
    wide_in: torch.Tensor,
    down: torch.Tensor,
    gated: bool,
    activation: str,
) -> None:
    tokens, width = hidden.shape
    experts, _, inner = down.shape
    expected = {
        "gates": (gates.shape, index.shape),
        "index": (index.shape[:1], (tokens,)),
        "wide_in": (wide_in.shape, (experts, 2 * inner if gated else inner, width)),
        "down": (down.shape, (experts, width, inner)),
    }
    for name, (found, wanted) in expected.items():
        if tuple(found) != tuple(wanted):
            raise ValueError(f"{name} is shaped {tuple(found)}, expected {tuple(wanted)}")
    if hidden.dtype not in DTYPES or {wide_in.dtype, down.dtype} != {hidden.dtype}:
        raise ValueError(
            f"hidden states are {hidden.dtype}, weights {wide_in.dtype} and {down.dtype}; expected one type in all, "
            "bfloat16, float16 or float32"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}; known: {', '.join(ACTIVATIONS)}")


def forward(
    hidden: torch.Tensor,
    gates: torch.Tensor,
    wide_in: torch.Tensor,
    down: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    tile_expert: torch.Tensor,
    tile_start: torch.Tensor,
    gated: bool,
    activation: str,
    save: bool,
    overwrite: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[T, D]`, and the pre-activation `[M, W]` (empty if no backward follows), for a given schedule.

    `overwrite`: nobody else reads the pre-activation, so that the backward may write its gradient over it.
    """
    layout = Layout(gates.shape[1], gated, activation, blocks_on(hidden.dtype, hidden.device), save)
    schedule = Schedule(order, offsets, tile_expert, tile_start)
    hidden, gates, wide_in, down = (tensor.contiguous() for tensor in (hidden, gates, wide_in, down))
    with torch.cuda.device_of(hidden):
        before, inner = _up(hidden, wide_in, down.shape[2], schedule, layout)
        slots = _rowwise(inner, down, True, schedule, layout)
        return _sum(slots, gates, layout), before


def backward(
    output_gradient: torch.Tensor,
    hidden: torch.Tensor,
    gates: torch.Tensor,
    wide_in: torch.Tensor,
    down: torch.Tensor,
    before: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    tile_expert: torch.Tensor,
    tile_start: torch.Tensor,
    gated: bool,
    activation: str,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden states, gates and both weights, those that are `wanted`; the others are empty."""
    schedule = Schedule(order, offsets, tile_expert, tile_start)
    inputs = output_gradient, hidden, gates, wide_in, down
    return _backward(*inputs, before, torch.empty_like(before), schedule, gated, activation, wanted)


def _backward(
    output_gradient: torch.Tensor,
    hidden: torch.Tensor,
    gates: torch.Tensor,
    wide_in: torch.Tensor,
    down: torch.Tensor,
    before: torch.Tensor,
    before_gradient: torch.Tensor,
    schedule: Schedule,
    gated: bool,
    activation: str,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`backward`, which writes the pre-activation's gradient to `before_gradient`; that may be `before` itself."""
    layout = Layout(gates.shape[1], gated, activation, blocks_on(hidden.dtype, hidden.device), True)
    output_gradient, hidden, gates, wide_in, down = (
        tensor.contiguous() for tensor in (output_gradient, hidden, gates, wide_in, down)
    )
    hidden_gradient, _, wide_in_gradient, down_gradient = (x.new_empty(0) for x in (hidden, gates, wide_in, down))
    with torch.cuda.device_of(hidden):
        gated_inner, gates_gradient = _activation_backward(
            output_gradient, down, before, gates, before_gradient, schedule, layout
        )
        if wanted[3]:
            down_gradient = _weight_backward(output_gradient, gated_inner, down, True, schedule, layout)
        del gated_inner  # before the next large allocation
        if wanted[2]:
            wide_in_gradient = _weight_backward(before_gradient, hidden, wide_in, False, schedule, layout)
        if wanted[0]:
            hidden_gradient = _sum(_rowwise(before_gradient, wide_in, False, schedule, layout), None, layout)
    return hidden_gradient, gates_gradient if wanted[1] else gates.new_empty(0), wide_in_gradient, down_gradient


routed_experts = torch.library.custom_op("upcycle::routed_experts", forward, mutates_args=())
routed_experts_backward = torch.library.custom_op("upcycle::routed_experts_backward", backward, mutates_args=())


@routed_experts.register_fake
def _(hidden: Any, gates: Any, wide_in: Any, down: Any, order: Any, *others: Any) -> Any:
    *_, save, _ = others
    before = hidden.new_empty(order.shape[0] if save else 0, wide_in.shape[1])
    return hidden.new_empty(hidden.shape), before


@routed_experts_backward.register_fake
def _(output_gradient: Any, hidden: Any, gates: Any, wide_in: Any, down: Any, *others: Any) -> Any:
    wanted = others[-1]
    return tuple(x.new_empty(x.shape if w else 0) for x, w in zip((hidden, gates, wide_in, down), wanted, strict=True))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.gated, ctx.activation, _, ctx.overwrite = inputs
    ctx.set_materialize_grads(False)  # the pre-activation has no gradient, and zeros of its size would be made for it
    ctx.save_for_backward(*tensors[:4], output[1], *tensors[4:])
    ctx.overwritten = False


def _gradients(ctx: Any, output_gradient: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
    if output_gradient is None:
        return (None,) * 12
    wanted = list(ctx.needs_input_grad[:4])
    hidden, gates, wide_in, down, before, *schedule = ctx.saved_tensors
    if ctx.overwritten:  # by a former backward through the same graph (retain_graph=True)
        before = routed_experts(hidden, gates, wide_in, down, *schedule, ctx.gated, ctx.activation, True, True)[1]
    if ctx.overwrite and type(output_gradient) is torch.Tensor and not torch.is_grad_enabled():
        # Autograd itself, neither a compiler's trace nor a graph of gradients: M * W numbers less at a step's peak.
        ctx.overwritten = True
        places = before, before, Schedule(*schedule)
        found = _backward(output_gradient, hidden, gates, wide_in, down, *places, ctx.gated, ctx.activation, wanted)
    else:
        tensors = output_gradient, hidden, gates, wide_in, down, before, *schedule
        found = routed_experts_backward(*tensors, ctx.gated, ctx.activation, wanted)
    return *(gradient if w else None for gradient, w in zip(found, wanted, strict=True)), *[None] * 8


routed_experts.register_autograd(_gradients, setup_context=_keep)


def _metadata(schedule: Schedule) -> tuple[torch.Tensor | int, ...]:
    tiles = schedule.tile_expert
    return schedule.order, schedule.offsets, tiles, schedule.tile_start, tiles.numel()


def _settings(tile: Tile, rows: int, tensor: torch.Tensor) -> dict[str, Any]:
    """A matrix kernel's constants; on the CPU it is the interpreter that runs it."""
    return {
        "BLOCK_M": rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.inner,
        "WIDEN": not tensor.is_cuda,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _up(
    hidden: torch.Tensor, wide_in: torch.Tensor, inner_size: int, schedule: Schedule, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activation `[M, W]` (empty if no backward follows) and activation `[M, I]`, rows sorted by expert."""
    slots, tile = schedule.order.numel(), layout.blocks.up
    before = torch.empty(slots if layout.save else 0, wide_in.shape[1], dtype=hidden.dtype, device=hidden.device)
    inner = torch.empty(slots, inner_size, dtype=hidden.dtype, device=hidden.device)
    grid = (schedule.tile_expert.numel() * triton.cdiv(inner_size, tile.columns),)
    up_kernel[grid](
        *(hidden, wide_in, before if layout.save else inner, inner, *_metadata(schedule)),
        D=hidden.shape[1],
        I=inner_size,
        K=layout.experts_per_token,
        GATED=layout.gated,
        ACTIVATION=layout.activation,
        SAVE=layout.save,
        **_settings(tile, layout.blocks.rows, hidden),
    )
    return before, inner


def _rowwise(
    rows: torch.Tensor, weight: torch.Tensor, transposed: bool, schedule: Schedule, layout: Layout
) -> torch.Tensor:
    """Row r times its expert's matrix, at slot order[r]: `[M, OUT]` from `rows [M, IN]`."""
    width = weight.shape[1 if transposed else 2]
    slots = torch.empty(rows.shape[0], width, dtype=rows.dtype, device=rows.device)
    tile = layout.blocks.rowwise
    grid = (schedule.tile_expert.numel() * triton.cdiv(width, tile.columns),)
    rowwise_kernel[grid](
        *(rows, weight, slots, *_metadata(schedule)),
        IN=rows.shape[1],
        OUT=width,
        TRANSPOSED=transposed,
        **_settings(tile, layout.blocks.rows, rows),
    )
    return slots


def _sum(slots: torch.Tensor, gates: torch.Tensor | None, layout: Layout) -> torch.Tensor:
    """Each token's sum over its slots, times their gates if given: `[T, D]` from `[M, D]`."""
    tokens, width = slots.shape[0] // layout.experts_per_token, slots.shape[1]
    total = torch.empty(tokens, width, dtype=slots.dtype, device=slots.device)
    grid = (tokens, triton.cdiv(width, layout.blocks.vector))
    sum_kernel[grid](
        *(slots, slots if gates is None else gates, total),
        D=width,
        K=layout.experts_per_token,
        WEIGHTED=gates is not None,
        BLOCK=layout.blocks.vector,
    )
    return total


def _activation_backward(
    output_gradient: torch.Tensor,
    down: torch.Tensor,
    before: torch.Tensor,
    gates: torch.Tensor,
    before_gradient: torch.Tensor,
    schedule: Schedule,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the pre-activation's gradient; return gate * activation `[M, I]` and the gates' gradient `[T, K]`."""
    slots, (_, width, inner_size), tile = before.shape[0], down.shape, layout.blocks.activation
    column_tiles = triton.cdiv(inner_size, tile.columns)
    gated_inner = torch.empty(slots, inner_size, dtype=before.dtype, device=before.device)
    gate_parts = torch.empty(column_tiles, slots, dtype=torch.float32, device=before.device)
    activation_backward_kernel[(schedule.tile_expert.numel() * column_tiles,)](
        *(output_gradient, down, before, gates, before_gradient, gated_inner, gate_parts, *_metadata(schedule)),
        slots,
        D=width,
        I=inner_size,
        K=layout.experts_per_token,
        GATED=layout.gated,
        ACTIVATION=layout.activation,
        **_settings(tile, layout.blocks.rows, before),
    )
    return gated_inner, gate_parts.sum(0).to(gates.dtype).reshape(gates.shape)


def _weight_backward(
    left: torch.Tensor,
    right: torch.Tensor,
    weight: torch.Tensor,
    gather_left: bool,
    schedule: Schedule,
    layout: Layout,
) -> torch.Tensor:
    """A weight's gradient, shaped as it: sum over each expert's rows of left^T right, one of them read by token."""
    gradient = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    tile, rows = layout.blocks.weight, layout.blocks.weight_rows
    experts, left_size, right_size = weight.shape
    grid = (experts * triton.cdiv(left_size, rows) * triton.cdiv(right_size, tile.columns),)
    weight_backward_kernel[grid](
        *(left, right, gradient, schedule.order, schedule.offsets),
        LEFT=left_size,
        RIGHT=right_size,
        K=layout.experts_per_token,
        GATHER_LEFT=gather_left,
        GATHER_RIGHT=not gather_left,
        **_settings(tile, rows, left),
    )
    return gradient
