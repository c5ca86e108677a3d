"""Held-out loss and what the routers do, domain by domain."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from upcycle.heldout import Heldout
from upcycle.losses import token_nll
from upcycle.numeric import Array
from upcycle.routing import RoutingTally, told_logits


@torch.no_grad()
def token_losses(
    model: Any,
    heldout: Heldout,
    batch_size: int,
    device: torch.device,
    tally: RoutingTally | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Array:
    """-log p of every target in nats, fp32 `[windows, length - 1]`, counted or not.

    Args:
        model: in evaluation mode; dense, a BAM mixture or one of transformers' own.
        batch_size: windows a forward.
        tally: takes what the routers do with the tokens whose target counts.
        progress: called with the number of windows done.
    """
    losses = np.empty((len(heldout.tokens), heldout.tokens.shape[1] - 1), np.float32)
    switches = {"output_router_logits": True} if tally else {}
    for start in range(0, len(losses), batch_size):
        rows = slice(start, start + batch_size)
        tokens = torch.from_numpy(heldout.tokens[rows]).to(device)
        outputs = model(input_ids=tokens[:, :-1], use_cache=False, **switches)
        losses[rows] = token_nll(outputs.logits, tokens[:, 1:]).cpu().numpy()
        if tally:
            counted = None if heldout.counted is None else torch.from_numpy(heldout.counted[rows]).flatten()
            attention = getattr(outputs, "attention_router_logits", None) or ()
            tally.add(told_logits(outputs), attention, counted)
        progress(len(tokens))
    return losses


def measure(
    model: Any, heldout: Sequence[Heldout], top_k: int | None, batch_size: int, accelerator: Any
) -> dict[str, dict[str, Any]]:
    """While training, by domain: `loss` in nats per token, and for mixtures `load` and `gates` by layer and expert.

    Every process measures its share of the windows.
    """

    def summed(sums: torch.Tensor) -> torch.Tensor:
        if accelerator.num_processes == 1:
            return sums
        total: torch.Tensor = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        return total

    result: dict[str, dict[str, Any]] = {}
    for domain in heldout:
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        marks = None if domain.counted is None else domain.counted[mine]
        share = Heldout(domain.name, domain.tokens[mine], marks)
        tally = None if top_k is None else RoutingTally(top_k)
        losses = token_losses(model, share, batch_size, accelerator.device, tally).astype(np.float64)
        weights = np.ones_like(losses) if marks is None else marks.astype(np.float64)
        total, targets = summed(torch.tensor([float((losses * weights).sum()), float(weights.sum())])).tolist()
        result[domain.name] = {"loss": total / max(1.0, targets)}
        means = tally.means(summed) if tally else {}
        for name in ("load", "gates"):
            if name in means:
                result[domain.name][name] = [[round(share, 5) for share in row] for row in means[name]]
    return result
