"""How large a tile each kernel computes at once, by number format and by the card's shared memory.

A tile needs (its rows + its columns) * inner * bytes * stages of shared memory, and its fp32 sums live in registers:
128 x 256 sums over 8 warps take 128 of a thread's 255.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch


@dataclass(frozen=True)
class Tile:
    """One matrix kernel's tile: output `columns`, the summed axis' step `inner`, `warps`, pipeline `stages`."""

    columns: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Blocks:
    """The tiles of all kernels. `rows`: the height of each tile of rows, that of the schedule.

    `up`: gather, matrix, activation. `rowwise`: the down projection and the gradient of the input. `activation`: the
    gradient of the activation. `weight`: the gradients of the weights, whose tiles are `weight_rows` high. `vector`:
    the columns that a kernel without a matrix product takes at once.
    """

    rows: int
    up: Tile
    rowwise: Tile
    activation: Tile
    weight_rows: int
    weight: Tile
    vector: int


# Keyed by (bytes per number, KiB of shared memory that one program may take): sm_90 and sm_100 offer 227, sm_80 163,
# consumer cards 99. fp32 is summed without tensor cores, so its tiles are small.
_BLOCKS: Final = {
    (2, 227): Blocks(
        rows=128,
        up=Tile(128, 64, 8, 4),
        rowwise=Tile(256, 64, 8, 4),
        activation=Tile(128, 64, 8, 4),
        weight_rows=128,
        weight=Tile(256, 64, 8, 5),
        vector=1024,
    ),
    (2, 163): Blocks(
        rows=128,
        up=Tile(128, 32, 8, 4),
        rowwise=Tile(256, 32, 8, 4),
        activation=Tile(128, 32, 8, 4),
        weight_rows=128,
        weight=Tile(256, 32, 8, 5),
        vector=1024,
    ),
    (2, 99): Blocks(
        rows=128,
        up=Tile(64, 32, 8, 3),
        rowwise=Tile(128, 32, 8, 3),
        activation=Tile(64, 32, 8, 3),
        weight_rows=128,
        weight=Tile(128, 32, 8, 3),
        vector=1024,
    ),
    (4, 99): Blocks(
        rows=64,
        up=Tile(32, 32, 8, 2),
        rowwise=Tile(64, 32, 8, 2),
        activation=Tile(32, 32, 8, 2),
        weight_rows=64,
        weight=Tile(64, 32, 8, 2),
        vector=1024,
    ),
}


def blocks_for(dtype: torch.dtype, shared_memory: int) -> Blocks:
    """The tiles for a number format on a card that offers `shared_memory` bytes to one program."""
    fitting = _fitting(dtype, shared_memory)
    if not fitting:
        raise ValueError(f"no tiles for {dtype} and {shared_memory} bytes of shared memory; use another backend")
    return _BLOCKS[max(fitting)]


def has_blocks(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a CUDA device has shared memory enough for a number format's tiles."""
    return bool(_fitting(dtype, _shared_memory(device)))


def _fitting(dtype: torch.dtype, shared_memory: int) -> list[tuple[int, int]]:
    return [key for key in _BLOCKS if key[0] == dtype.itemsize and key[1] * 1024 <= shared_memory]


def blocks_on(dtype: torch.dtype, device: torch.device) -> Blocks:
    """The tiles for a number format on a CUDA device; ValueError elsewhere."""
    if device.type != "cuda":
        raise ValueError(f"the fused kernels run on CUDA, not on {device.type}; use another backend")
    return blocks_for(dtype, _shared_memory(device))


@torch.compiler.assume_constant_result
def _shared_memory(device: torch.device) -> int:
    """Bytes that a device offers to one program; a compiler need not look into how that is found."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the field
    return int(properties.shared_memory_per_block_optin)
