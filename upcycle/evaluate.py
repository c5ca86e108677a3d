"""Held-out loss and what the routers do, domain by domain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upcycle.data import find_files, prepare_domain, read_array
from upcycle.errors import DataError
from upcycle.losses import forward_losses
from upcycle.numeric import Array


@dataclass(frozen=True)
class Heldout:
    """One domain's held-out text: int64 `[windows, length]`; each token but a window's first is predicted."""

    name: str
    tokens: Array


def heldout_windows(
    name: str,
    source: str,
    folder: Path,
    tokenizer: Any,
    config: Mapping[str, Any],
    *,
    length: int,
    count: int,
    multiple: int = 1,
) -> Heldout:
    """At most `count` windows of a domain, evenly spaced; the rows of a `.npy` file are windows as they stand.

    Args:
        multiple: their number is one of it, so that processes share them evenly.

    Raises:
        DataError: data that cannot be read, or too little of it for one window.
    """
    files = find_files("--eval-data", name, source)
    array = (
        read_array("--eval-data", name, files[0], config["vocab_size"]) if files and files[0].suffix == ".npy" else None
    )
    if array is None:
        array = prepare_domain(
            "--eval-data",
            name,
            source,
            folder,
            tokenizer,
            config,
            random_seed=0,
            enough=count * length,
        ).tokens
    rows = array if array.ndim == 2 else array[: array.size // length * length].reshape(-1, length)
    found = min(count, len(rows)) // multiple * multiple
    if not found or rows.shape[1] < 2:
        raise DataError(
            f"--eval-data {name}={source} holds {array.size} tokens, too few for {multiple} windows of {length}; give "
            "more text or a shorter --sequence-length"
        )
    chosen = rows[np.linspace(0, len(rows) - 1, found).round().astype(int)]
    return Heldout(name, np.asarray(chosen, np.int64))


@torch.no_grad()
def measure(
    model: Any, heldout: Sequence[Heldout], top_k: int | None, batch_size: int, accelerator: Any
) -> dict[str, dict[str, Any]]:
    """By domain: `loss` in nats per token, and for mixtures `load` and `gates` by layer and expert.

    Every process measures its share of the windows.
    """
    result: dict[str, dict[str, Any]] = {}
    for domain in heldout:
        mine = domain.tokens[accelerator.process_index :: accelerator.num_processes]
        total = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
        load: Any = 0.0
        gates: Any = 0.0
        for start in range(0, len(mine), batch_size):
            tokens = torch.from_numpy(mine[start : start + batch_size]).to(accelerator.device)
            nll, routers = forward_losses(model, tokens, None, top_k)
            total += torch.stack([nll.double(), torch.tensor(tokens[:, 1:].numel(), device=nll.device).double()])
            if routers:
                load = load + routers.load * len(tokens)
                gates = gates + routers.gates * len(tokens)
        total = accelerator.reduce(total, "sum")
        result[domain.name] = {"loss": float(total[0] / total[1])}
        for name, value in (("load", load), ("gates", gates)):
            if isinstance(value, torch.Tensor) and value.numel():
                mean = accelerator.reduce(value, "sum") / len(domain.tokens)
                result[domain.name][name] = [[round(share, 5) for share in row] for row in mean.tolist()]
    return result
