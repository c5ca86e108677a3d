"""The experts' gradients: one kernel for activation and gates, one for weights; the input's is `rowwise.py`'s.

Axes: M slots sorted by expert, N experts, D hidden, I inner, W = 2I (gated) or I.
"""

import triton
import triton.language as tl

from .tiles import activate_with_slope, dot, multiply, place


@triton.jit
def activation_backward_kernel(
    output_gradient_ptr,  # dY [T, D]
    down_ptr,  # [N, D, I]
    before_ptr,  # [M, W]: the pre-activation
    gates_ptr,  # [T, K]
    before_gradient_ptr,  # [M, W], written; may be `before_ptr`: a program reads and writes its own tile alone
    gated_inner_ptr,  # [M, I], written: g h, which the gradient of `down` reads
    gate_parts_ptr,  # [ceil(I / BLOCK_N), M] fp32, written: each column tile's share of the gates' gradient, by slot
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    num_slots,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """With u = W_down^T dY: dh = g u, and dg = <dY, W_down h> = <u, h>, so that no FFN output is kept for it."""
    tile, column = place(tl.program_id(0), num_tiles, (I + BLOCK_N - 1) // BLOCK_N, 8)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    start = tl.load(tile_start_ptr + tile)
    end = tl.load(offsets_ptr + expert + 1)
    rows = start + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read a valid one and are not stored.
    slots = tl.load(order_ptr + rows, mask=rows < end, other=0)
    y_ptrs = output_gradient_ptr + (slots // K).to(tl.int64)[:, None] * D
    down_ptrs = down_ptr + expert.to(tl.int64) * (D * I) + columns[None, :]
    u = multiply(y_ptrs, down_ptrs, columns, D, I, I, BLOCK_M, BLOCK_N, BLOCK_K, WIDEN)
    gate = tl.load(gates_ptr + slots, mask=rows < end, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # By quarters: whole, the sums with everything the activation needs beside them would not fit the registers.
    left, right = _halves(u, BLOCK_M, BLOCK_N)
    for half in tl.static_range(2):
        first, second = _halves(left if half == 0 else right, BLOCK_M, BLOCK_N // 2)
        for quarter in tl.static_range(2):
            part += _activation_gradient(
                first if quarter == 0 else second,
                gate,
                start,
                end,
                column * BLOCK_N + (2 * half + quarter) * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4),
                before_ptr,
                before_gradient_ptr,
                gated_inner_ptr,
                I,
                GATED,
                ACTIVATION,
                BLOCK_M,
            )
    tl.store(gate_parts_ptr + column.to(tl.int64) * num_slots + slots, part, mask=rows < end)


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _activation_gradient(
    u,
    gate,
    start,
    end,
    columns,
    before_ptr,
    before_gradient_ptr,
    gated_inner_ptr,
    I: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write the gradient of some rows and columns and g h; the sum of u h over these columns, by row."""
    W: tl.constexpr = 2 * I if GATED else I
    # The tile's place in 64 bits, the places within it in 32: half the registers for addresses.
    rows = tl.arange(0, BLOCK_M)
    valid = (rows < end - start)[:, None] & (columns < I)[None, :]
    places = rows[:, None] * W + columns[None, :]
    before_ptrs = before_ptr + start.to(tl.int64) * W + places
    gradient_ptrs = before_gradient_ptr + start.to(tl.int64) * W + places
    inner_ptrs = gated_inner_ptr + start.to(tl.int64) * I + (rows[:, None] * I + columns[None, :])
    element = before_gradient_ptr.dtype.element_ty
    gated_u = gate[:, None] * u
    a = tl.load(before_ptrs, mask=valid, other=0.0).to(tl.float32)
    h, slope = activate_with_slope(a, ACTIVATION)
    if GATED:
        b = tl.load(before_ptrs + I, mask=valid, other=0.0).to(tl.float32)  # before its gradient, which may replace it
        tl.store(gradient_ptrs + I, (gated_u * h).to(element), mask=valid)
        h *= b
        slope *= b
    tl.store(gradient_ptrs, (gated_u * slope).to(element), mask=valid)
    tl.store(inner_ptrs, (gate[:, None] * h).to(element), mask=valid)
    return tl.sum(u * h, axis=1)  # columns past the end have h = 0


@triton.jit
def weight_backward_kernel(
    left_ptr,  # [M, LEFT], or [T, LEFT] if GATHER_LEFT
    right_ptr,  # [M, RIGHT], or [T, RIGHT] if GATHER_RIGHT
    gradient_ptr,  # [N, LEFT, RIGHT], written: the sum over an expert's rows of left^T right
    order_ptr,
    offsets_ptr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program a tile of one expert's gradient, over all of the expert's rows; without rows it writes zeros."""
    num_left: tl.constexpr = (LEFT + BLOCK_M - 1) // BLOCK_M
    num_right: tl.constexpr = (RIGHT + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(0) // (num_left * num_right)
    i, j = place(tl.program_id(0) % (num_left * num_right), num_left, num_right, 8)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    left_columns = i * BLOCK_M + tl.arange(0, BLOCK_M)
    right_columns = j * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        inside = rows < end
        if GATHER_LEFT or GATHER_RIGHT:
            tokens = (tl.load(order_ptr + rows, mask=inside, other=0) // K).to(tl.int64)
        left_rows = tokens if GATHER_LEFT else rows.to(tl.int64)
        right_rows = tokens if GATHER_RIGHT else rows.to(tl.int64)
        left = tl.load(
            left_ptr + left_rows[:, None] * LEFT + left_columns[None, :],
            mask=inside[:, None] & (left_columns < LEFT)[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + right_rows[:, None] * RIGHT + right_columns[None, :],
            mask=inside[:, None] & (right_columns < RIGHT)[None, :],
            other=0.0,
        )
        total = dot(tl.trans(left), right, total, WIDEN)
    places = (
        gradient_ptr + expert.to(tl.int64) * (LEFT * RIGHT) + left_columns[:, None] * RIGHT + right_columns[None, :]
    )
    valid = (left_columns < LEFT)[:, None] & (right_columns < RIGHT)[None, :]
    tl.store(places, total.to(gradient_ptr.dtype.element_ty), mask=valid)
