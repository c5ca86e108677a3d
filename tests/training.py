"""A small training, as a call and as a command line, and what it left."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from upcycle.data import parse_shares
from upcycle.train import TrainingResult, train
from upcycle.training_settings import TrainingOptions

LENGTH = 16


def options(model: Path, data: Mapping[str, str], out: Path, **changes: Any) -> TrainingOptions:
    values: dict[str, Any] = {
        "steps": 6,
        "shares": parse_shares([], data),
        "sequence_length": LENGTH,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "save_every": 2,
        **changes,
    }
    return TrainingOptions(model=model, data=data, out=out, **values)


def run(model: Path, data: Mapping[str, str], out: Path, **changes: Any) -> TrainingResult:
    return train(options(model, data, out, **changes))


def arguments(model: Path, data: Mapping[str, str], out: Path, *more: object) -> list[str]:
    sources = [f"{name}={file}" for name, file in data.items()]
    sizes = ("--sequence-length", LENGTH, "--batch-size", 4, "--learning-rate", 1e-2)
    return [*map(str, ("train", model, "--data", *sources, "--out", out, *sizes, *more))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights in fp32 after a step."""
    file = folder / "checkpoints" / f"step-{step:06d}" / "training_state" / "state.pt"
    loaded: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["model"]
    return loaded


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(folder: Path, key: str = "nll") -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]
