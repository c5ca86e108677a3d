"""Gather, grouped matrix product and activation of the experts' first half, in one kernel.

Axes: M slots sorted by expert, N experts, D hidden, I inner, W = 2I (gated) or I.
"""

import triton
import triton.language as tl

from .tiles import activate, dot, load_inside, place


@triton.jit
def up_kernel(
    hidden_ptr,  # [T, D]
    wide_in_ptr,  # [N, W, D]
    before_ptr,  # [M, W], written: the pre-activation
    inner_ptr,  # [M, I], written: act(gate) * up, or act(gate)
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr,  # whether a backward will want the pre-activation
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program a tile: its tokens' rows times its expert's matrix, activated before they leave the registers."""
    W: tl.constexpr = 2 * I if GATED else I
    tile, column = place(tl.program_id(0), num_tiles, (I + BLOCK_N - 1) // BLOCK_N, 8)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    start = tl.load(tile_start_ptr + tile)
    end = tl.load(offsets_ptr + expert + 1)
    rows = start + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read a valid one and are not stored: cheaper than a mask in the loop.
    tokens = (tl.load(order_ptr + rows, mask=rows < end, other=0) // K).to(tl.int64)
    hidden_ptrs = hidden_ptr + tokens[:, None] * D + steps[None, :]
    weights = wide_in_ptr + expert.to(tl.int64) * (W * D)
    gate_ptrs = weights + tl.minimum(columns, I - 1)[None, :] * D + steps[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        inside = k + steps < D
        x = load_inside(hidden_ptrs, inside[None, :], D % BLOCK_K == 0)
        gate = dot(x, load_inside(gate_ptrs, inside[:, None], D % BLOCK_K == 0), gate, WIDEN)
        if GATED:
            up = dot(x, load_inside(gate_ptrs + I * D, inside[:, None], D % BLOCK_K == 0), up, WIDEN)
        hidden_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
    valid = (rows < end)[:, None] & (columns < I)[None, :]
    places = rows.to(tl.int64)[:, None]
    if SAVE:
        before_ptrs = before_ptr + places * W + columns[None, :]
        tl.store(before_ptrs, gate.to(before_ptr.dtype.element_ty), mask=valid)
        if GATED:
            tl.store(before_ptrs + I, up.to(before_ptr.dtype.element_ty), mask=valid)
    inner = activate(gate, ACTIVATION)
    if GATED:
        inner *= up
    tl.store(inner_ptr + places * I + columns[None, :], inner.to(inner_ptr.dtype.element_ty), mask=valid)
