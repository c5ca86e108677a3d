"""One model over several processes (FSDP2), of which each reads its share of the checkpoint alone."""

import re
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upcycle.checkpoint import TensorInfo, read_tensors
from upcycle.errors import CheckpointError
from upcycle.weights import as_stored, auto_class, decoder_layers, experts_option


def load_sharded(folder: Path, mesh: Any, device: torch.device, precision: str) -> Any:
    """The model spread over the processes of a one-dimensional device mesh; each reads its share alone.

    Every decoder layer is gathered when it computes and let go after, the rest (embeddings, final norm, head) as one
    more group. Weights are fp32; "bf16" gathers and computes in bf16.

    Raises:
        CheckpointError: as `load_model`; also a checkpoint whose tensors are not those of the model in memory.
    """
    from accelerate import init_empty_weights
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard
    from transformers import AutoConfig

    classes = auto_class(folder)
    with init_empty_weights(include_buffers=False):  # most buffers (rotary frequencies) are computed, not stored
        config = AutoConfig.from_pretrained(folder)
        model = classes.from_config(config, dtype=torch.float32, **experts_option(folder, torch.float32.itemsize))
    model.tie_weights()  # registered one by one, tied weights had come apart
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
    processes = mesh.size()

    def axis(parameter: nn.Parameter) -> Shard:
        # Stacked experts [N, rows, columns] by rows: split by expert, few experts would leave processes empty.
        return Shard(1 if parameter.dim() == 3 and parameter.shape[1] % processes == 0 else 0)

    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, shard_placement_fn=axis)
    fully_shard(model, mesh=mesh, mp_policy=policy, shard_placement_fn=axis)
    # Families return a slice of their logits; nothing here writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    _read_shares(model, folder)
    return model


@torch.no_grad()
def _read_shares(model: Any, folder: Path) -> None:
    """Fill what this process holds of each parameter, and each stored buffer whole, from what the checkpoint stores.

    Raises:
        CheckpointError: tensors that are not the model's.
    """
    from safetensors import safe_open

    sources = read_tensors(folder)
    unread = set(sources)
    files: dict[Path, Any] = {}
    kept = model.state_dict().keys()
    stored_buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
    for name, memory in (*model.named_parameters(), *stored_buffers):
        local = memory.to_local() if hasattr(memory, "to_local") else memory
        part = _local_part(memory) if hasattr(memory, "to_local") else tuple(slice(0, size) for size in memory.shape)
        for stored, first in _pieces(model, name, tuple(memory.shape), folder, sources).items():
            source = sources[stored]
            unread.discard(stored)
            if source.file not in files:
                files[source.file] = safe_open(source.file, framework="pt")
            tensor = files[source.file].get_slice(stored)
            if first is None:
                local.copy_(tensor[part] if part else files[source.file].get_tensor(stored))
                continue
            # One expert's rows of a stack [N, rows, columns]: what of them lies in this process's part.
            expert, row = divmod(first, memory.shape[1])
            experts, rows = part[0], part[1]
            begin, end = max(row, rows.start), min(row + source.shape[0], rows.stop)
            if begin < end and experts.start <= expert < experts.stop:
                mine = tensor[begin - row : end - row]
                local[expert - experts.start, begin - rows.start : end - rows.start].copy_(mine)
    _check_all_read(model, folder, unread)


def _check_all_read(model: Any, folder: Path, unread: set[str]) -> None:
    """Refuse tensors that the model has not, but for tied ones and those that its class leaves out."""
    known = set(getattr(model, "all_tied_weights_keys", None) or {})
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    left = sorted(name for name in unread - known if not any(pattern.search(name) for pattern in patterns))
    if left:
        raise CheckpointError(
            f"{folder} holds, but no model of its config has {len(left)} tensors, among them '{left[0]}'; its "
            "config.json belongs to another checkpoint, or it is damaged"
        )


def _pieces(
    model: Any, name: str, shape: tuple[int, ...], folder: Path, sources: Mapping[str, TensorInfo]
) -> dict[str, int | None]:
    """The stored tensors that make one in memory, each with the first of its rows that it is; None: it is all of them.

    What transformers would write of the rows' own numbers tells where they lie in the files.

    Raises:
        CheckpointError: the checkpoint lacks one of them, or they are no whole rows.
    """
    pieces: dict[str, int | None] = {}
    count = 0
    for stored, numbers in as_stored(model, {name: _numbered_rows(shape)}).items():
        rows = numbers[..., 0] if len(shape) > 1 else numbers
        source, expected = sources.get(stored), (*rows.shape, *shape[1:][-1:])
        if source is None or source.shape != expected:
            found = "nothing" if source is None else list(source.shape)
            raise CheckpointError(f"{folder}: tensor '{stored}': expected shape {list(expected)}, found {found}")
        flat, whole = rows.flatten().tolist(), expected == shape
        in_order = flat == list(range(flat[0], flat[0] + len(flat)))
        if not in_order or not (whole or (len(shape) == 3 and flat[0] % shape[1] + len(flat) <= shape[1])):
            raise _otherwise(folder, name, stored)
        pieces[stored] = None if whole else flat[0]
        count += len(flat)
    if count != prod(shape[:-1] or shape):
        raise _otherwise(folder, name, next(iter(pieces), name))
    return pieces


def _numbered_rows(shape: tuple[int, ...]) -> torch.Tensor:
    """The numbers of a tensor's rows, `[..., 2]`: axes of one element are dropped on the way to the names of files."""
    lead = shape[:-1] or shape
    numbers = torch.arange(prod(lead)).reshape(lead)
    return numbers.unsqueeze(-1).expand(*lead, 2) if len(shape) > 1 else numbers


def _otherwise(folder: Path, name: str, stored: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: tensor '{stored}' holds what memory has in '{name}' otherwise than row by row, as a sharded model "
        "is read; train it without --shard"
    )


def _local_part(parameter: Any) -> tuple[slice, ...]:
    """Which part of a sharded tensor this process holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))
