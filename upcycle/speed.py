"""How fast this machine multiplies matrices: the bound against which a training's speed is stated."""

import time
from typing import Final

import torch

SIDE: Final = {"cpu": 1024, "cuda": 8192}  # of square matrices, large enough to reach the rate
SECONDS: Final = 0.2


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOPs a second of a square matrix product, measured: the best of the runs that fit into a fifth of a second."""
    side = SIDE.get(device.type, 2048)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best, ends = float("inf"), time.perf_counter() + SECONDS
    torch.mm(left, right)  # the first call loads what it needs
    while True:
        _wait(device)
        began = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        now = time.perf_counter()
        best = min(best, now - began)
        if now > ends:
            return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
