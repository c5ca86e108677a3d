"""What a training minimises: NLL + sum over layers of (alpha * L_LB + beta * L_z) (arXiv:2408.08274), each term apart.

Axes: B sequences, S positions, T tokens (B * S), L layers, N experts, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from upcycle.liger import LossHead
from upcycle.modeling.modeling_bam import load_balance_loss, z_loss
from upcycle.routing import told_logits

# Logits whose loss and gradient are made at once: on a CPU what its cache holds, on a GPU what keeps it busy.
PIECE: Final = {"cpu": 2**18, "cuda": 2**26}


@dataclass(frozen=True)
class RouterLosses:
    """The routers' losses and what they did, one value a layer.

    Attributes:
        load_balance: `[L]`, L_LB of each FFN router.
        z: `[L]`, L_z of each FFN router.
        attention_z: `[L]`, L_z of each attention router; empty without attention experts.
        load: `[L, N]`, the share of the selections that went to each expert; no gradient.
        gates: `[L, N]`, the attention routers' mean gates; no gradient; empty without attention experts.
        entropy: `[L]`, the mean entropy in nats of a token's FFN gates; no gradient.
        attention_entropy: `[L]`, the same of its attention gates; empty without attention experts.
    """

    load_balance: torch.Tensor
    z: torch.Tensor
    attention_z: torch.Tensor
    load: torch.Tensor
    gates: torch.Tensor
    entropy: torch.Tensor
    attention_entropy: torch.Tensor

    def total(self, alpha: float, beta: float) -> torch.Tensor:
        """Sum over layers of alpha * L_LB + beta * L_z, attention routers included in the latter."""
        return alpha * self.load_balance.sum() + beta * (self.z.sum() + self.attention_z.sum())


def next_token_nll(logits: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of `token_nll` over the targets that are counted: bool `[B, S]`, or None for all."""
    losses = token_nll(logits, targets)
    return losses.sum() if counted is None else (losses * counted).sum()


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target) in nats, `[B, S]`, in fp32 or better.

    Args:
        logits: `[B, S, V]`.
        targets: int64 `[B, S]`, the token that follows each position.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    losses: torch.Tensor = _TokenNll.apply(logits, targets.flatten())  # type: ignore[no-untyped-call]
    return losses.view(targets.shape)


class _TokenNll(torch.autograd.Function):
    """NLL whose gradient, softmax less the target's one, is made in the forward, piece by piece.

    Log-probabilities are never there as a whole: half the memory of log_softmax and its backward, and a piece stays in
    the cache from the exponential to the gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = logits.new_empty(len(logits))
        rows = max(1, PIECE.get(logits.device.type, PIECE["cuda"]) // logits.shape[-1])
        for begin in range(0, len(logits), rows):
            part, target = logits[begin : begin + rows], targets[begin : begin + rows]
            highest = part.amax(-1, keepdim=True)
            powers = torch.sub(part, highest, out=None if gradient is None else gradient[begin : begin + rows]).exp_()
            sums = powers.sum(-1, keepdim=True)
            chosen = part.gather(-1, target[:, None])
            losses[begin : begin + rows] = (sums.log() + highest - chosen)[:, 0]
            if gradient is not None:
                powers.div_(sums)
                powers.scatter_add_(-1, target[:, None], -torch.ones_like(sums))
        ctx.gradient = gradient
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(outer[0][:, None]), None


def router_losses(
    ffn: Sequence[torch.Tensor], attention: Sequence[torch.Tensor], top_k: int, device: torch.device
) -> RouterLosses:
    """The routers' losses from their logits `[T, N]`, one a layer, over the tokens of one forward."""
    ffn, attention = [logits.to(device) for logits in ffn], [logits.to(device) for logits in attention]
    nothing = ffn[0].new_zeros(0, dtype=torch.promote_types(ffn[0].dtype, torch.float32))
    with torch.no_grad():
        ffn_gates, gates = [_gates(logits) for logits in ffn], [_gates(logits) for logits in attention]
        load = []
        for gate in ffn_gates:
            # Not bincount: a GPU would have to be waited for.
            chosen = torch.zeros_like(gate).scatter(-1, gate.topk(top_k, dim=-1).indices, 1.0).sum(0)
            load.append(chosen / chosen.sum())
        entropy = [_entropy(gate) for gate in ffn_gates]
    return RouterLosses(
        load_balance=torch.stack([load_balance_loss(logits, top_k) for logits in ffn]),
        z=torch.stack([z_loss(logits) for logits in ffn]),
        attention_z=torch.stack([z_loss(logits) for logits in attention]) if attention else nothing,
        load=torch.stack(load),
        gates=torch.stack([gate.mean(0) for gate in gates]) if gates else nothing,
        entropy=torch.stack(entropy),
        attention_entropy=torch.stack([_entropy(gate) for gate in gates]) if gates else nothing,
    )


def _gates(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _entropy(gates: torch.Tensor) -> torch.Tensor:
    entropy: torch.Tensor = torch.special.entr(gates).sum(-1).mean()
    return entropy


def forward_losses(
    model: Any,
    tokens: torch.Tensor,
    counted: torch.Tensor | None,
    top_k: int | None,
    loss_head: LossHead | None = None,
) -> tuple[torch.Tensor, RouterLosses | None]:
    """One forward over `tokens [B, S + 1]`: the NLL summed over counted targets, and the routers' losses.

    Args:
        model: a dense model, a BAM mixture or one of transformers' own mixtures.
        counted: bool `[B, S]`, or None for all.
        top_k: experts a token uses, or None for a dense model.
        loss_head: computes the NLL where the model's forward leaves out its output head.
    """
    switches: Mapping[str, Any] = {} if top_k is None else {"output_router_logits": True}
    outputs = model(input_ids=tokens[:, :-1], use_cache=False, **switches)
    nll = (loss_head.nll if loss_head else next_token_nll)(outputs.logits, tokens[:, 1:], counted)
    if top_k is None:
        return nll, None
    attention = getattr(outputs, "attention_router_logits", None) or ()
    return nll, router_losses(told_logits(outputs), attention, top_k, outputs.logits.device)
