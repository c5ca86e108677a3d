"""What several kernels share: the order of tiles, the matrix product, activations with their slopes."""

import triton
import triton.language as tl


@triton.jit
def place(program, num_rows, num_columns, GROUP: tl.constexpr):
    """The (row, column) of a program's tile. `GROUP` rows go together, so that their weights stay in the L2 cache."""
    per_group = GROUP * num_columns
    first = program // per_group * GROUP
    height = min(num_rows - first, GROUP)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def dot(a, b, total, WIDEN: tl.constexpr):
    """`total` + a b, summed in fp32. The interpreter multiplies bf16 wrongly, so there `WIDEN` makes it fp32 first."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # For fp32 operands the default would be TF32, with 10 bits of mantissa.
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_inside(ptrs, inside, WHOLE: tl.constexpr):
    """A tile with zeros where it is not `inside`; `WHOLE` says that it is everywhere, which spares the mask."""
    return tl.load(ptrs) if WHOLE else tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def multiply(
    row_ptrs,  # [BLOCK_M, 1]: the beginning of each row
    weight_ptrs,  # [1, BLOCK_N]: the beginning of each of the matrix's `columns`
    columns,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ALONG: tl.constexpr,  # from one number of a column to the next: 1, or OUT where columns lie side by side
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of rows `[., IN]` times a matrix `[IN, OUT]`, in fp32; columns past the end are 0."""
    steps = tl.arange(0, BLOCK_K)
    row_ptrs += steps[None, :]
    weight_ptrs += steps[:, None] * ALONG
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, IN, BLOCK_K):
        x = load_inside(row_ptrs, (k + steps < IN)[None, :], IN % BLOCK_K == 0)
        inside = (k + steps < IN)[:, None] & (columns < OUT)[None, :]
        w = load_inside(weight_ptrs, inside, IN % BLOCK_K == 0 and OUT % BLOCK_N == 0)
        total = dot(x, w, total, WIDEN)
        row_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * ALONG
    return total


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); where exp overflows, 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """act(x) and its derivative in fp32. GELU and its tanh form: arXiv:1606.08415; tanh(u) = 2 sigmoid(2u) - 1."""
    if ACTIVATION == "silu":
        s = sigmoid(x)
        value = x * s
        slope = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        normal = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * normal
        slope = normal + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        s = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * s
        slope = s + value * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return value, slope


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) in fp32; the derivative is dead code here, and the compiler drops it."""
    value, _ = activate_with_slope(x, ACTIVATION)
    return value
