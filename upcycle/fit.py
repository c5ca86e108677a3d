"""Whether a training fits: into a device's memory, and its checkpoints onto the disk."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import psutil
import torch

from upcycle.errors import OutputError, TrainingError
from upcycle.memory import TrainingMemory, training_memory
from upcycle.optimization import parse_trained
from upcycle.run_folder import KEPT
from upcycle.staging import free_bytes
from upcycle.training_settings import ModelFacts, Settings

STATE_BYTES: Final = 12  # of a parameter in the training state: its fp32 value and two moments
MARGIN: Final = 1.05


def free_memory(device: torch.device, processes: int) -> int:
    """Bytes that a process may take of its device's memory: a GPU's free ones, or its part of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // processes


def step_memory(settings: Settings, facts: ModelFacts) -> tuple[TrainingMemory, int] | None:
    """What a step takes of one device, part by part, and its peak; None for a family that upcycle does not know."""
    if facts.layout is None:
        return None
    memory = training_memory(
        facts.layout,
        facts.recipe,
        sequences=settings.micro_batch_size,
        sequence_length=settings.sequence_length,
        precision=settings.precision,
        optimizer=settings.optimizer,
        trained=parse_trained(settings.trained)[0],
        lora_rank=settings.lora,
        activation_checkpointing=settings.activation_checkpointing,
        loss_head=settings.liger,
        shards=settings.processes if settings.shard else 1,
    )
    # Where gradients are accumulated they are there beside the next forward's activations.
    return memory, memory.total + (memory.overlap if settings.accumulation > 1 else 0)


def fit_micro_batch(settings: Settings, facts: ModelFacts, free: int) -> Settings:
    """The settings with the largest forward that fits, found by halving."""
    while settings.micro_batch_size % 2 == 0:
        step = step_memory(settings, facts)
        if step is None or step[1] <= free:
            break
        settings = replace(settings, micro_batch_size=settings.micro_batch_size // 2)
    return settings


def check_memory(settings: Settings, facts: ModelFacts, free: int, device: torch.device) -> None:
    """Refuse what cannot fit into a device's memory.

    Raises:
        TrainingError: the arithmetic, and what would help.
    """
    step = step_memory(settings, facts)
    if step is None or step[1] <= free:
        return
    memory, needed = step
    ways = {
        "--micro-batch-size 1": settings.micro_batch_size > 1,
        "--liger": device.type == "cuda" and not settings.liger and not settings.shard,
        "--activation-checkpointing": not settings.activation_checkpointing,
        "--lora 16": not settings.lora,
        "--optimizer adamw-8bit": settings.optimizer == "adamw" and device.type == "cuda",
        "--optimizer adamw-offload": settings.optimizer != "adamw-offload" and device.type == "cuda",
        "--shard on several processes": not settings.shard,
        "a shorter --sequence-length": True,
    }
    raise TrainingError(
        f"this training takes {needed / 1e9:.2f} GB of a device (weights {memory.weights / 1e9:.2f}, gradients "
        f"{memory.gradients / 1e9:.2f}, optimizer {memory.optimizer / 1e9:.2f}, activations "
        f"{memory.activations / 1e9:.2f}), and {free / 1e9:.2f} GB are free; what helps: "
        + ", ".join(way for way, offered in ways.items() if offered)
    )


def check_space(out: Path, model: Path, state_parameters: int, existing: Sequence[Path]) -> None:
    """Refuse a training whose checkpoints the disk cannot hold: those kept, and the next while it is written.

    Args:
        state_parameters: how many are in the training state.
        existing: checkpoints that are there already.

    Raises:
        OutputError: what it takes and what is free.
    """
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    one = weights + STATE_BYTES * state_parameters
    needed, free = int(MARGIN * one * (KEPT + 1 - min(KEPT, len(existing)))), free_bytes(out)
    if needed > free:
        raise OutputError(
            f"{out}: its checkpoints, {one / 1e9:.2f} GB each with their training state, take {needed / 1e9:.2f} GB "
            f"more ({KEPT} are kept while the next is written), and the disk has {free / 1e9:.2f} GB free"
        )
