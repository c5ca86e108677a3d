"""The jobs that make tensors; what they make is shown in test_merge.py and test_matrix.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import upcycle.assemble
from tests.tiny import BY_NAME, make_seeds
from upcycle.assemble import _init_jobs
from upcycle.errors import SeedError
from upcycle.merge import merge
from upcycle.plan import plan_merge
from upcycle.planned import PlannedTensor, RandomInit
from upcycle.reader import Buffers
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds


@pytest.mark.parametrize("repeat", [1, 4])
def test_a_large_router_is_drawn_in_pieces_that_are_small(monkeypatch: pytest.MonkeyPatch, repeat: int) -> None:
    init = RandomInit(0.02, repeat=repeat)
    tensor = PlannedTensor("router", "F32", (64, 32), init=init)
    (whole,) = (job(Buffers()).tobytes() for job in _init_jobs(0, tensor, init))
    monkeypatch.setattr(upcycle.assemble, "CHUNK", 2048)
    pieces = [job(Buffers()) for job in _init_jobs(0, tensor, init)]
    assert max(piece.nbytes for piece in pieces) <= 1024  # drawn in float64
    assert b"".join(piece.tobytes() for piece in pieces) == whole
    rows = np.frombuffer(whole, np.float32).reshape(64, 32)
    assert np.array_equal(rows[::repeat].repeat(repeat, 0), rows)
    assert len(np.unique(rows[:, 0])) == 64 // repeat


def refused(tmp_path: Path, values: Any, recipe: str, *overrides: str, **options: Any) -> str:
    """What is said of seeds whose first FFN has such weights."""
    paths = make_seeds(BY_NAME["llama"], tmp_path)
    for path, value in zip(paths, values, strict=True):
        state = load_file(path / "model.safetensors")
        state["model.layers.0.mlp.down_proj.weight"][0, 0] = value
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    plan = plan_merge(
        load_recipe(recipe, overrides), read_seeds([str(path) for path in paths]), allow_unrelated=True, **options
    )
    with pytest.raises(SeedError) as error:
        merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_what_a_dtype_cannot_hold_is_told_from_what_the_seed_holds(tmp_path: Path) -> None:
    """A down projection is multiplied by the number of its FFN's shards."""
    options = ("btx", "experts.granularity=4")
    message = refused(tmp_path, (30_000.0, 0.0, 0.0), *options, dtype="F16", format="bam")
    assert "'a': tensor 'model.layers.0.mlp.down_proj.weight' would become 120000 in the mixture, which F16" in message


def test_a_sum_that_fp32_cannot_hold_is_refused_as_such(tmp_path: Path) -> None:
    message = refused(tmp_path, (2e38, 2e38, 2e38), "average")
    assert message.startswith("seed 'a', 'b', 'c': tensor 'model.layers.0.mlp.down_proj.weight' has weights so large")
    assert "--dtype" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("recipe", ["average", "btx"])
def test_what_is_not_finite_is_named_where_it_stands(tmp_path: Path, value: float, recipe: str) -> None:
    """Of a mean, too, of which only the sum is looked at, and of an infinity that another takes back."""
    message = refused(tmp_path, (0.0, value, -value), recipe)
    place = "tensor 'model.layers.0.mlp.down_proj.weight'"
    assert message.startswith(f"seed 'b': {place} holds {value} at [0, 0], expected finite numbers")
