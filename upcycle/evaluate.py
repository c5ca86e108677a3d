"""Held-out loss and what the routers do, domain by domain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upcycle.data import prepare_domain, read_array
from upcycle.documents import find_files
from upcycle.errors import DataError
from upcycle.losses import forward_losses
from upcycle.numeric import Array


@dataclass(frozen=True)
class Heldout:
    """One domain's held-out text: int64 `[windows, length]`; each token but a window's first is predicted."""

    name: str
    tokens: Array
    counted: Array | None = None  # bool `[windows, length - 1]`: the targets that count, or None for all


def heldout_windows(
    name: str,
    source: str,
    folder: Path,
    tokenizer: Any,
    config: Mapping[str, Any],
    *,
    length: int,
    count: int,
    longest: int | None = None,
    multiple: int = 1,
    writes: bool = True,
) -> Heldout:
    """At most `count` windows of a domain, evenly spaced; the rows of a `.npy` file are windows as they stand.

    Args:
        longest: positions that the model has.
        multiple: their number is one of it, so that processes share them evenly.

    Raises:
        DataError: data that cannot be read, or too little of it for one window.
    """
    files = find_files("--eval-data", name, source)
    array = (
        read_array("--eval-data", name, files[0], config["vocab_size"]) if files and files[0].suffix == ".npy" else None
    )
    counted = None
    if array is None:
        domain = prepare_domain(
            "--eval-data",
            name,
            source,
            folder,
            tokenizer,
            config,
            random_seed=0,
            enough=count * length,
            writes=writes,
        )
        array, counted = domain.tokens, domain.counted
    rows = array if array.ndim == 2 else array[: array.size // length * length].reshape(-1, length)
    found = min(count, len(rows)) // multiple * multiple
    if not found or rows.shape[1] < 2:
        raise DataError(
            f"--eval-data {name}={source} holds {array.size} tokens, too few for {multiple} windows of {length}; give "
            "more text or a shorter --sequence-length"
        )
    if longest is not None and rows.shape[1] > longest:
        raise DataError(
            f"--eval-data {name}={source}: rows of {rows.shape[1]} tokens, but the model has positions for {longest}"
        )
    chosen = np.linspace(0, len(rows) - 1, found).round().astype(int)
    if counted is not None:
        counted = counted[: len(rows) * length].reshape(-1, length)[chosen, 1:]
    return Heldout(name, np.asarray(rows[chosen], np.int64), counted)


@torch.no_grad()
def measure(
    model: Any, heldout: Sequence[Heldout], top_k: int | None, batch_size: int, accelerator: Any
) -> dict[str, dict[str, Any]]:
    """By domain: `loss` in nats per token, and for mixtures `load` and `gates` by layer and expert.

    Every process measures its share of the windows.
    """
    result: dict[str, dict[str, Any]] = {}
    for domain in heldout:
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        windows, marks = domain.tokens[mine], None if domain.counted is None else domain.counted[mine]
        total = np.zeros(2)
        load: Any = 0.0
        gates: Any = 0.0
        for start in range(0, len(windows), batch_size):
            rows = slice(start, start + batch_size)
            tokens = torch.from_numpy(windows[rows]).to(accelerator.device)
            counted = None if marks is None else torch.from_numpy(marks[rows]).to(accelerator.device)
            nll, routers = forward_losses(model, tokens, counted, top_k)
            targets = tokens[:, 1:].numel() if counted is None else int(counted.sum())
            total += (float(nll), targets)
            if routers:
                load = load + routers.load * len(tokens)
                gates = gates + routers.gates * len(tokens)
        if accelerator.num_processes > 1:
            total = accelerator.reduce(torch.from_numpy(total).to(accelerator.device), "sum").cpu().numpy()
        result[domain.name] = {"loss": float(total[0] / max(1.0, total[1]))}
        for name, value in (("load", load), ("gates", gates)):
            if isinstance(value, torch.Tensor) and value.numel():
                mean = accelerator.reduce(value, "sum") / len(domain.tokens)
                result[domain.name][name] = [[round(share, 5) for share in row] for row in mean.tolist()]
    return result
