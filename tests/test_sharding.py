"""What a sharded model refuses to read; that it reads and trains right is shown in test_distributed.py."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import upcycle.sharding
from upcycle.checkpoint import TensorInfo
from upcycle.errors import CheckpointError
from upcycle.sharding import _pieces

STACK = torch.empty(2, 6, 5, device="meta")


def pieces(monkeypatch: pytest.MonkeyPatch, stored: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, int | None]:
    """Where the pieces of a stack of two experts lie, for a model that stores it as `stored` says."""
    monkeypatch.setattr(upcycle.sharding, "as_stored", lambda _, tensors: stored(tensors["stack"]))
    sources = {name: TensorInfo("F32", shape, Path("x"), 0, 0) for name, shape in shapes.items()}
    return _pieces(None, "stack", STACK, Path("folder"), sources)


def by_expert(stack: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{kind}.{e}": half for e in range(2) for kind, half in zip("gu", stack[e].chunk(2), strict=True)}


def test_pieces_are_told_by_their_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = {f"{kind}.{e}": (3, 5) for e in range(2) for kind in "gu"}
    assert pieces(monkeypatch, by_expert, halves) == {"g.0": 0, "u.0": 3, "g.1": 6, "u.1": 9}
    assert pieces(monkeypatch, lambda stack: {"stack": stack}, {"stack": (2, 6, 5)}) == {"stack": None}


@pytest.mark.parametrize(
    ("stored", "shapes", "message"),
    [
        (by_expert, {"g.0": (3, 5)}, "tensor 'u.0': expected shape [3, 5], found nothing"),
        (lambda stack: {"x": stack[0]}, {"x": (6, 4)}, "tensor 'x': expected shape [6, 5], found [6, 4]"),
        (lambda stack: {"x": stack.flip(1)}, {"x": (2, 6, 5)}, "'x' holds what memory has in 'stack' otherwise"),
        (lambda stack: {"x": stack.flatten(0, 1)}, {"x": (12, 5)}, "'x' holds what memory has in 'stack' otherwise"),
        (lambda stack: {"x": stack[0][::2]}, {"x": (3, 5)}, "'x' holds what memory has in 'stack' otherwise"),
    ],
    ids=["missing", "shape", "order", "across", "gaps"],
)
def test_what_is_no_expert_s_rows_is_refused(
    stored: Any, shapes: dict[str, tuple[int, ...]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        pieces(monkeypatch, stored, shapes)
