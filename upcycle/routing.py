"""What a mixture's routers do with text: loads, gates, entropies, and how often a text meets its own expert.

Axes: T tokens, K experts a token uses, L layers with experts, N FFN experts, A attention experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from upcycle.errors import CheckpointError


def told_logits(outputs: Any) -> Sequence[torch.Tensor]:
    """The FFN routers' logits `[T, N]`, one a layer, of a forward that was asked for them.

    Raises:
        CheckpointError: the model's class does not tell them.
    """
    logits = getattr(outputs, "router_logits", None)
    if not logits:
        raise CheckpointError(
            "the mixture tells no router logits, which routing losses and loads are made of; a newer version of "
            "transformers may (GraniteMoe's does from 5.24 on)"
        )
    return tuple(logits)


class RoutingTally:
    """Sums over the tokens seen so far, in float64, so that neither batches nor their order show in the means."""

    def __init__(self, top_k: int, own_experts: Sequence[int] = ()) -> None:
        """Args:
        top_k: experts a token uses.
        own_experts: numbers of those that came from the text's domain: none, one, or the parts of one that was split.
        """
        self.top_k, self.own_experts = top_k, own_experts
        self.sums: dict[str, torch.Tensor] = {}

    def add(
        self, ffn: Sequence[torch.Tensor], attention: Sequence[torch.Tensor], counted: torch.Tensor | None = None
    ) -> None:
        """Count tokens from the routers' logits `[T, N]`, one a layer; `counted` is bool `[T]`, or None for all."""
        gates, soft = ([_gates(logits, counted) for logits in routers] for routers in (ffn, attention))
        chosen = [gate.topk(self.top_k, dim=-1).indices for gate in gates]
        experts = gates[0].shape[-1]
        self._sum("tokens", torch.tensor(len(gates[0])))
        self._sum("load", torch.stack([torch.bincount(one.flatten(), minlength=experts) for one in chosen]))
        self._sum("entropy", torch.stack([torch.special.entr(gate).sum() for gate in gates]))
        if self.own_experts:
            self._sum("own_share", torch.stack([self._own_share(one) for one in chosen]))
        if attention:
            self._sum("gates", torch.stack([gate.sum(0) for gate in soft]))
            self._sum("attention_entropy", torch.stack([torch.special.entr(gate).sum() for gate in soft]))

    def _own_share(self, chosen: torch.Tensor) -> torch.Tensor:
        """Tokens that use the own expert, of one that was split the part of it that they use; `chosen [T, K]`."""
        own = torch.tensor(self.own_experts, device=chosen.device)
        return torch.isin(chosen, own).double().sum() / len(own)

    def _sum(self, name: str, value: torch.Tensor) -> None:
        value = value.cpu().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums) -> dict[str, list[Any]]:
        """What the routers did, one value a layer.

        Args:
            reduce: adds up the sums of several processes.

        Returns:
            `load [L][N]`: the share of the selections that went to each expert. `entropy [L]`: the mean entropy in nats
            of a token's FFN gates. `own_share [L]`: the share of the tokens for which the router picks the expert of
            their domain, where there is one. With attention experts `gates [L][A]`, their mean gates before a top-k,
            and `attention_entropy [L]`.
        """
        sums = {name: reduce(value) for name, value in self.sums.items()}
        if not sums:
            return {}
        tokens = sums.pop("tokens").clamp(min=1)
        return {name: (value / tokens / (self.top_k if name == "load" else 1)).tolist() for name, value in sums.items()}


def _gates(logits: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    chosen = logits if counted is None else logits[counted.to(logits.device)]
    return chosen.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
