"""Grouped rows times their expert's matrix, and the sum of each token's slots: no atomics, one order of summation.

Serves the down projection and the gradient of the experts' input. The product writes each row at its slot, so that the
sum reads a token's K rows side by side and needs no inverse permutation.
"""

import triton
import triton.language as tl

from .tiles import multiply, place


@triton.jit
def rowwise_kernel(
    rows_ptr,  # [M, IN], sorted by expert
    weight_ptr,  # [N, OUT, IN], or [N, IN, OUT] if not TRANSPOSED
    slots_ptr,  # [M, OUT], written: row r at slot order[r]
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program a tile: rows times their expert's matrix, written at their slots."""
    tile, column = place(tl.program_id(0), num_tiles, (OUT + BLOCK_N - 1) // BLOCK_N, 8)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    start = tl.load(tile_start_ptr + tile)
    end = tl.load(offsets_ptr + expert + 1)
    rows = start + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read a valid one and are not stored.
    row_ptrs = rows_ptr + tl.minimum(rows, end - 1).to(tl.int64)[:, None] * IN
    weights = weight_ptr + expert.to(tl.int64) * (IN * OUT)
    ACROSS: tl.constexpr = IN if TRANSPOSED else 1
    ALONG: tl.constexpr = 1 if TRANSPOSED else OUT
    weight_ptrs = weights + columns[None, :] * ACROSS
    total = multiply(row_ptrs, weight_ptrs, columns, IN, OUT, ALONG, BLOCK_M, BLOCK_N, BLOCK_K, WIDEN)
    slots = tl.load(order_ptr + rows, mask=rows < end, other=0).to(tl.int64)
    valid = (rows < end)[:, None] & (columns < OUT)[None, :]
    tl.store(slots_ptr + slots[:, None] * OUT + columns[None, :], total.to(slots_ptr.dtype.element_ty), mask=valid)


@triton.jit
def sum_kernel(
    slots_ptr,  # [T * K, D]
    gates_ptr,  # [T, K]
    total_ptr,  # [T, D], written: sum over k of gate * slot, or of the slots alone if not WEIGHTED
    D: tl.constexpr,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token and block of columns: its K slots, summed in their order."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(K):
        slot = token * K + k
        row = tl.load(slots_ptr + slot * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(gates_ptr + slot).to(tl.float32)
        total += row
    tl.store(total_ptr + token * D + columns, total.to(total_ptr.dtype.element_ty), mask=columns < D)
