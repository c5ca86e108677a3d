"""What a sharded model reads and refuses; that two processes train it right is shown in test_distributed.py."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

import upcycle.sharding
from tests.conftest import merge_and_load
from tests.tiny import BY_NAME, make_seeds
from upcycle.checkpoint import TensorInfo
from upcycle.errors import CheckpointError
from upcycle.sharding import _pieces, load_sharded
from upcycle.weights import load_model

CPU = torch.device("cpu")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One process, which is a group by itself."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_buffers_that_are_stored_are_read(mesh: DeviceMesh, tmp_path: Path) -> None:
    """A bias by which routers select, of which a gradient knows nothing."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "n_routed_experts": 4}
    more = {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **sizes, **more))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    assert buffers
    with torch.no_grad():
        for buffer in buffers.values():
            buffer.normal_()
    model.save_pretrained(tmp_path / "glm")
    found = dict(load_sharded(tmp_path / "glm", mesh, CPU, "fp32").named_buffers())
    for name, buffer in buffers.items():
        assert torch.equal(found[name], buffer), name


def test_tensors_that_no_model_of_the_config_has_are_refused(mesh: DeviceMesh, tmp_path: Path) -> None:
    merge_and_load(make_seeds(BY_NAME["llama-biases"], tmp_path / "seeds"), tmp_path / "mixture", "bam")
    load_sharded(tmp_path / "mixture", mesh, CPU, "fp32")
    file = tmp_path / "mixture" / "model.safetensors"
    save_file({**load_file(file), "dense.model.more.bias": torch.ones(3)}, file, metadata={"format": "pt"})
    messages = []
    for load in (lambda: load_model(file.parent), lambda: load_sharded(file.parent, mesh, CPU, "fp32")):
        with pytest.raises(CheckpointError, match=r"has 1 tensors, among them 'dense\.model\.more\.bias'") as refused:
            load()
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


def pieces(monkeypatch: pytest.MonkeyPatch, stored: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, int | None]:
    """Where the pieces of a stack of two experts lie, for a model that stores it as `stored` says."""
    monkeypatch.setattr(upcycle.sharding, "as_stored", lambda _, tensors: stored(tensors["stack"]))
    sources = {name: TensorInfo("F32", shape, Path("x"), 0, 0) for name, shape in shapes.items()}
    return _pieces(None, "stack", (2, 6, 5), Path("folder"), sources)


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
        (lambda stack: {"x": stack[0]}, {"x": (6, 5)}, "'x' holds what memory has in 'stack' otherwise"),
    ],
    ids=["missing", "shape", "order", "across", "gaps", "half"],
)
def test_what_is_no_expert_s_rows_is_refused(
    stored: Any, shapes: dict[str, tuple[int, ...]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        pieces(monkeypatch, stored, shapes)
