"""A model's weights between disk and memory: fp32 to train, back in the checkpoint's own dtypes."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upcycle.checkpoint import (
    CONFIG,
    INDEX,
    MAX_SHARD_SIZE,
    TensorInfo,
    index_json,
    plan_shards,
    read_json,
    read_tensors,
    write_json,
)
from upcycle.checksums import sums_of, write_sums
from upcycle.errors import CheckpointError, SeedError
from upcycle.layout import takes_grouped_product
from upcycle.mixture import is_mixture, read_mixture
from upcycle.numeric import TORCH_NAMES

_LAYER = re.compile(r"(.*\.\d+)\.")


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model on the CPU; the checkpoint's own code is not run.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one whose tensors are not the model's.
    """
    classes = auto_class(folder)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, **experts_option(folder, dtype.itemsize)}
    try:
        model, info = classes.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except Exception as error:  # transformers raises whatever it meets in a damaged file
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
    for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "holds, but no model of its config has")):
        if info[kind]:
            raise CheckpointError(
                f"{folder} {what} {len(info[kind])} tensors, among them '{min(info[kind])}'; its config.json belongs "
                "to another checkpoint, or it is damaged"
            )
    for name, found, expected in sorted(info["mismatched_keys"])[:1]:
        raise CheckpointError(
            f"{folder}: tensor '{name}' has shape {list(found)}, expected {list(expected)} by its config.json; the two "
            "do not belong together"
        )
    return model


def experts_option(folder: Path, itemsize: int) -> dict[str, str]:
    """What `from_pretrained` must be told of a mixture's experts, where its default would not serve them."""
    if not is_mixture(folder, read_json(folder / CONFIG)):
        return {}
    mixture = read_mixture(folder)
    return (
        {} if takes_grouped_product(mixture.layout, mixture.recipe, itemsize) else {"experts_implementation": "eager"}
    )


def check_plain(folder: Path) -> None:
    """Refuse a folder from which transformers would load other weights than the ones that are checked.

    Raises:
        CheckpointError: an adapter lies there, or the config names another file.
    """
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json), which would be added to the weights; merge it into them "
            "(merge_and_unload) and save the model without it"
        )
    if "transformers_weights" in read_json(folder / CONFIG):
        raise CheckpointError(
            f"{folder / CONFIG} names a weight file of its own (transformers_weights); save the model anew with "
            "save_pretrained"
        )


def auto_class(folder: Path) -> Any:
    """transformers' class that builds what a folder's config names, once the folder is known to be sound."""
    check_plain(folder)
    if is_mixture(folder, read_json(folder / CONFIG)):
        read_mixture(folder)  # says what is wrong with it, in which tensor
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    return AutoModelForCausalLM


def quiet_transformers() -> None:
    """Register the BAM model, and silence what transformers tells of every model it loads."""
    from transformers.utils import logging

    import upcycle

    upcycle.register()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def checkpoint_fingerprint(folder: Path) -> str:
    """SHA-256 over a checkpoint's config, headers and a spread of its weights: the same model or not."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for name, info in sorted(read_tensors(folder).items()):
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        with info.file.open("rb") as file:
            file.seek(info.offset + info.nbytes // 2)
            digest.update(file.read(min(4096, info.nbytes // 2)))
    return digest.hexdigest()


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a dense model or of a mixture."""
    for name, module in model.named_modules():
        if name.endswith("layers") and isinstance(module, nn.ModuleList):
            return module
    raise CheckpointError(f"{type(model).__name__} has no decoder layers")


def write_weights(model: Any, source: Path, out: Path, *, writes: bool = True) -> int:
    """Write a model's weights as `source` stores them: its names, its dtypes, its order; returns the bytes written.

    The checksums of the weights, and of the files that `out` holds already, go beside them.

    Tensors are gathered, converted and written a layer at a time, so no process ever holds the whole model. Every
    process of a sharded model must call this; the one with `writes` writes. LoRA's factors are added to their weights.

    Raises:
        CheckpointError: a parameter that `source` has no tensor for, or one of another shape.
    """
    stored = _in_file_order(read_tensors(source))
    entries = _memory_tensors(model)
    shapes = {
        name: tuple(tensor.shape)
        for group in _groups(entries)
        for name, tensor in as_stored(model, {key: _meta(entries[key]) for key in group}).items()
    }
    _check_names(model, source, stored, shapes)
    names = [name for name in stored if name in shapes]
    shards = plan_shards([(name, stored[name].dtype, shapes[name]) for name in names], MAX_SHARD_SIZE)
    place = {name: (out / shard.name, offset) for shard in shards for name, offset in shard.offsets.items()}
    handles: dict[Path, int] = {}
    sums: dict[str, list[str]] = {}
    try:
        for shard in shards if writes else ():
            handles[out / shard.name] = os.open(out / shard.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.pwrite(handles[out / shard.name], shard.header, 0)
        for group in _groups(entries):
            whole = {key: _gather(entries[key], writes) for key in group}
            for name, tensor in as_stored(model, whole).items() if writes else ():
                if name in place:
                    file, offset = place[name]
                    sums[name] = write_tensor(handles[file], offset, tensor, stored[name].dtype)
        for handle in handles.values():
            os.fsync(handle)
    finally:
        for handle in handles.values():
            os.close(handle)
    if writes and len(shards) > 1:
        write_json(out / INDEX, index_json(shards))
    if writes:
        write_sums(out, {name: sums[name] for name in place})
    return sum(shard.size for shard in shards)


def _in_file_order(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    return dict(sorted(tensors.items(), key=lambda item: (item[1].file.name, item[1].offset)))


def _memory_tensors(model: Any) -> dict[str, Any]:
    """Every parameter by the name that a plain model gives it: a tensor, or the layer of LoRA that changes it."""
    if not hasattr(model, "peft_config"):
        return dict(model.state_dict())
    from peft.tuners.lora import LoraLayer

    entries: dict[str, Any] = {}
    base = model.get_base_model()
    for name, tensor in base.state_dict().items():
        if ".lora_" not in name:
            entries[name.replace(".base_layer", "")] = tensor
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", None) or "weight"
            entries[f"{name.replace('.base_layer', '')}.{parameter}"] = module
    return entries


def _groups(entries: Mapping[str, Any]) -> Iterator[list[str]]:
    """Names layer by layer: what a conversion stacks or splits lies in one layer."""
    groups: dict[str, list[str]] = {}
    for name in entries:
        match = _LAYER.match(name)
        groups.setdefault(_outer_layer(match.group(1)) if match else name, []).append(name)
    return iter(groups.values())


def _outer_layer(name: str) -> str:
    head, _, rest = name.partition(".layers.")
    return f"{head}.layers.{rest.partition('.')[0]}"


def _meta(entry: Any) -> torch.Tensor:
    weight = entry if isinstance(entry, torch.Tensor) else _lora_weight(entry)
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")


def _lora_weight(layer: Any) -> torch.Tensor:
    inner = layer.get_base_layer()
    weight: torch.Tensor = getattr(inner, getattr(layer, "parameter_name", None) or "weight")
    return weight


@torch.no_grad()
def _gather(entry: Any, wanted: bool) -> torch.Tensor:
    """A tensor whole on the CPU, LoRA's product added; every process takes part, one gets the tensor."""
    if not wanted:
        if hasattr(entry, "full_tensor"):
            entry.full_tensor()
        return torch.empty(0)
    if not isinstance(entry, torch.Tensor):
        merged: torch.Tensor = _lora_weight(entry) + entry.get_delta_weight(entry.active_adapters[0])
        return merged.cpu()
    tensor: torch.Tensor = entry.full_tensor() if hasattr(entry, "full_tensor") else entry
    return tensor.cpu()


def as_stored(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of one layer under the names and in the shapes of the published format (Mixtral's `experts.3.w1`)."""
    from transformers.core_model_loading import revert_weight_conversion

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    converted: dict[str, torch.Tensor] = revert_weight_conversion(base, tensors)
    return converted


def _check_names(model: Any, source: Path, stored: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, shape in shapes.items():
        if name not in stored and name not in tied:
            raise CheckpointError(f"{source} stores no tensor '{name}', which the model has; it cannot be written back")
        if name in stored and stored[name].shape != shape:
            raise CheckpointError(
                f"{source}: tensor '{name}' is {list(stored[name].shape)} there and {list(shape)} in memory"
            )


def write_tensor(handle: int, offset: int, tensor: torch.Tensor, dtype: str) -> list[str]:
    """Write a tensor at its place; its checksums."""
    if dtype not in TORCH_NAMES:
        raise SeedError(f"dtype {dtype} cannot be trained; expected one of {', '.join(TORCH_NAMES)}")
    converted = tensor.to(getattr(torch, TORCH_NAMES[dtype])).contiguous()
    view = memoryview(converted.flatten().view(torch.uint8).numpy().data)
    sums = sums_of([view])
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written
    return sums
