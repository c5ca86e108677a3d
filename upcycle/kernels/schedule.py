"""Which rows each program of a grouped kernel works on, computed on the device without waiting for it.

A token that K experts serve takes K slots, numbered t * K + k. Sorting slots by expert makes each expert's rows
adjacent, and cutting each expert's rows into tiles of one height gives programs whose weights are all one expert's.
How many tiles there are depends on the routing, which only the device knows; the grid is sized by the upper bound
M // rows + N instead (each expert wastes less than one tile), and surplus programs leave at once.

Axes: T tokens, K experts per token, M = T * K slots, N experts.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """Routing metadata, all int32 on the device of the routing.

    `order [M]`: slots sorted by expert, in order of tokens within one; row r of a grouped matrix is slot `order[r]`.
    `offsets [N + 1]`: expert e's rows are `offsets[e]` to `offsets[e + 1]`.
    `tile_expert [tiles]`, `tile_start [tiles]`: a tile's expert, -1 for a surplus tile, and its first row.
    """

    order: torch.Tensor
    offsets: torch.Tensor
    tile_expert: torch.Tensor
    tile_start: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """All four, in their order."""
        return self.order, self.offsets, self.tile_expert, self.tile_start


def make_schedule(index: torch.Tensor, num_experts: int, rows: int) -> Schedule:
    """The schedule of a routing `index [T, K]` over `num_experts`, for tiles of `rows` rows."""
    # Narrow keys make the device's radix sort shorter.
    keys = index.reshape(-1).to(torch.int16 if num_experts < 2**15 else torch.int32)
    sorted_keys, order = torch.sort(keys, stable=True)
    bounds = torch.arange(num_experts + 1, dtype=keys.dtype, device=index.device)
    # In sorted ids, the place of e is the number of slots of the experts before it: histogram and prefix sum in one.
    offsets = torch.searchsorted(sorted_keys, bounds)
    tiles = (offsets.diff() + (rows - 1)).div(rows, rounding_mode="floor")
    last_tile = tiles.cumsum(0)
    tile = torch.arange(keys.numel() // rows + num_experts, device=index.device)
    expert = torch.searchsorted(last_tile, tile, right=True)  # N for surplus tiles
    first_tile = torch.nn.functional.pad(last_tile, (1, 0))
    start = offsets[expert] + (tile - first_tile[expert]) * rows
    return Schedule(
        order=order.to(torch.int32),
        offsets=offsets.to(torch.int32),
        tile_expert=expert.masked_fill(expert == num_experts, -1).to(torch.int32),
        tile_start=start.to(torch.int32),
    )
