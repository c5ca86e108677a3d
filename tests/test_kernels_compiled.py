"""Every fused kernel compiled ahead of time as it would be launched on a card, which needs none.

The host's code runs on tensors without memory while its launches are recorded, so that types, tiles and constants are
the real ones; Triton's compiler then makes them into machine code, whose registers, spills and shared memory are read.
That happens in a process of its own, where no interpreter is about. With `-s` the table is printed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may take
MATRIX = {"up_kernel", "rowwise_kernel", "activation_backward_kernel", "weight_backward_kernel"}
KERNELS = MATRIX | {"sum_kernel", "scale_kernel", "scale_backward_kernel"}


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def record(dtype: Any, shared_memory: int, sizes: tuple[int, ...]) -> list[Launch]:
    """The launches of forward and backward, gated and plain, and of the attention's gates."""
    import torch

    from upcycle.kernels import ffn, heads
    from upcycle.kernels.blocks import blocks_for
    from upcycle.kernels.schedule import make_schedule

    blocks = blocks_for(dtype, shared_memory)
    ffn.blocks_on = lambda *_: blocks

    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(size > 0 for size in grid)
            return lambda *a, **options: launches.append(Launch(self.kernel, a, options))

    for module in (ffn, heads):
        for name in KERNELS & vars(module).keys():
            setattr(module, name, Recorder(getattr(module, name)))
    tokens, top_k, experts, hidden, inner = sizes

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    index = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
    for gated, activation in ((True, "silu"), (True, "gelu_tanh"), (False, "gelu")):
        weights = empty(experts, 2 * inner if gated else inner, hidden), empty(experts, hidden, inner)
        inputs = empty(tokens, hidden), empty(tokens, top_k), *weights
        schedule = make_schedule(index, experts, blocks.rows).tensors()
        output, before = ffn.forward(*inputs, *schedule, gated, activation, True, True)
        ffn.backward(output, *inputs, before, *schedule, gated, activation, [True] * 4)
    scaled = heads.forward(empty(1, tokens, experts * hidden), empty(1, tokens, experts), 8)
    heads.backward(scaled, empty(1, tokens, experts * hidden), empty(1, tokens, experts), 8)
    for module in (ffn, heads):
        for name, value in list(vars(module).items()):
            if isinstance(value, Recorder):
                setattr(module, name, value.kernel)
    return launches


def compiled(launch: Launch, arch: int) -> dict[str, Any]:
    """A launch's kernel as machine code: what it takes of the card."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    pointers = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
    types = {
        name: pointers[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        for name, value in zip(names, launch.arguments, strict=False)
    }
    constants = {**launch.options, "WIDEN": False}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: constants[name] for name in names if name in constants}
    assert types.keys() | constants.keys() == set(names)
    signature = {name: types.get(name, "constexpr") for name in names}
    # The allocator aligns memory far beyond 16 bytes, which the launcher would see.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = kernel.asm["ptx"]
    return {
        "kernel": launch.kernel.__name__,
        "constants": constants,
        **resources(kernel.asm["cubin"]),
        "shared": kernel.metadata.shared,
        "product": "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "",
        "asynchronous": re.search(r"cp\.async\.cg\.shared\.global [^;]*, 0x10,", ptx) is not None,  # 16 bytes a thread
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes that it spills to its stack, as the disassembler of the package says."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found, text
    return {"registers": int(found[1]), "spilled": int(found[2]) + int(found[3])}


def main(arch: int, dtype: str, sizes: tuple[int, ...]) -> None:
    """Print one JSON row a distinct kernel."""
    import torch

    done = {}
    for launch in record(getattr(torch, dtype), SHARED[arch], sizes):
        key = (launch.kernel.__name__, json.dumps(launch.options, sort_keys=True))
        if key not in done:
            done[key] = compiled(launch, arch)
    print(json.dumps(list(done.values())))


def compile_all(arch: int, dtype: str, sizes: tuple[int, ...], cache: Path) -> list[dict[str, Any]]:
    words = [sys.executable, "-m", "tests.test_kernels_compiled", str(arch), dtype, *map(str, sizes)]
    # Fusing a * b + c is Triton's own default up to 3.9, which from then on warns unless it is chosen.
    settings = {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | settings
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    print(f"\nsm_{arch} {dtype} T, K, N, D, I = {sizes}")
    for row in rows:
        shown = ("GATED", "ACTIVATION", "TRANSPOSED", "GATHER_LEFT", "WEIGHTED")
        what = " ".join(f"{name}={row['constants'][name]}" for name in shown if name in row["constants"])
        print(
            f"{row['kernel']:27} {row['registers']:3} registers, {row['spilled']} B spilled, "
            f"{row['shared']:6} B shared, "
            f"{row['product'] or '-':5} {'cp.async' if row['asynchronous'] else '-':8} {what}"
        )
    return rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("arch", SHARED)
def test_every_kernel_compiles_within_the_card(arch: int, dtype: str, tmp_path: Path) -> None:
    rows = compile_all(arch, dtype, (16384, 2, 8, 2048, 8192), tmp_path)
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED[arch], row
        if row["kernel"] in MATRIX:
            assert row["asynchronous"], row
            # fp32 is not rounded to TF32, so it stays off the tensor cores.
            assert row["product"] == ({80: "mma", 90: "wgmma"}[arch] if dtype == "bfloat16" else ""), row


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1000, 3, 5, 576, 1536), (1000, 3, 5, 1000, 2731)], ids=str)
def test_sizes_that_no_tile_divides_compile(sizes: tuple[int, ...], tmp_path: Path) -> None:
    rows = compile_all(90, "bfloat16", sizes, tmp_path)
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["shared"] <= SHARED[90], row
        assert (row["product"] == "wgmma") == (row["kernel"] in MATRIX), row
        if sizes[-1] % 16 == 0:  # rows of an odd length are unaligned: slower, and with more addresses to keep
            assert row["spilled"] == 0, row


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], tuple(map(int, sys.argv[3:])))
