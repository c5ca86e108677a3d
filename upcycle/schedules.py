"""Learning rates: how they change over a training, and what they and the batch size are when nobody says."""

import math
from dataclasses import dataclass
from typing import Final

FINAL_SHARE: Final = 0.1  # of the peak, at the end of a cosine (arXiv:2408.08274)
WARM_UP_SHARE: Final = 0.1  # of all steps
ROUTED_WARM_UP_SHARE: Final = 0.25  # where routers were set from text: docs/routers.md, what keeps what the merge gave
ROUTED_RATE_SHARE: Final = 0.7  # of the default rate, there too
MAX_WARM_UP: Final = 1500  # steps (arXiv:2408.08274, the small model)
DECAY_SHARE: Final = 0.1  # the last part of wsd and power, down to 0 (arXiv:2408.13359)
POWER: Final = (4.6, -0.51)  # a and b of arXiv:2408.13359, for a batch counted in sequences of 4096 tokens
POWER_SEQUENCE: Final = 4096
MIN_BATCH: Final = 8  # sequences
# Peak rates at which mixtures trained well, by the seed's parameters without embeddings: measured here on the smallest
# (README, "Is it worth it?"), and the paper's two (arXiv:2408.08274, whose pre-training rate gave gradient spikes).
MEASURED_RATES: Final = ((2.9e6, 1e-3), (6.3e7, 1.2e-4), (1.4e9, 1e-4))


def schedule(kind: str, step: int, steps: int, warm_up: int, peak: float, batch_tokens: int) -> float:
    """The learning rate of a step.

    Args:
        kind: "cosine": down to 10 % of the peak. "wsd": constant, then linearly to 0 over the last tenth. "power":
            min(peak, b a n^-0.51) with b sequences a batch and n tokens so far (arXiv:2408.13359), and the same end.
        step: from 0.
        steps: of the whole training.
        warm_up: steps over which the rate rises linearly.
        peak: the highest rate.
        batch_tokens: tokens a step.
    """
    rise = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
    if kind == "cosine":
        done = max(0, step - warm_up) / max(1, steps - 1 - warm_up)
        return peak * rise * (FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * min(1.0, done))) / 2)
    fall = min(1.0, (steps - step) / max(1.0, DECAY_SHARE * steps))
    if kind == "power":
        a, b = POWER
        peak = min(peak, batch_tokens / POWER_SEQUENCE * a * ((step + 1) * batch_tokens) ** b)
    return peak * rise * fall


@dataclass(frozen=True)
class Choice:
    """A default value and why it is that."""

    value: float
    reason: str


def default_warm_up(steps: int, routed: bool) -> Choice:
    """A tenth of the steps, at most as many as the paper's small model had; a quarter where routers work already.

    Args:
        routed: whether the model's routers were set from text.
    """
    share = ROUTED_WARM_UP_SHARE if routed else WARM_UP_SHARE
    why = "routers were set from text, and a slow rise keeps what they give" if routed else "arXiv:2408.08274's at most"
    return Choice(min(MAX_WARM_UP, math.ceil(share * steps)), f"{share:.0%} of the steps ({why})")


def default_batch_size(steps: int, sequence_length: int, domains: int, granularity: int) -> Choice:
    """Sequences a step by the step law, B = 0.58 D^0.571 tokens (arXiv:2503.04715), with D = steps * B solved for B.

    Args:
        domains: at least two sequences of each should stand in a batch.
        granularity: the number of processes, which must share a batch evenly.
    """
    tokens = (0.58 * steps**0.571) ** (1 / (1 - 0.571))
    law = tokens / sequence_length
    floor = max(MIN_BATCH, 2 * domains)
    size = math.ceil(max(law, floor) / granularity) * granularity
    why = f"step law: {tokens:,.0f} tokens, {law:.1f} sequences (arXiv:2503.04715)"
    return Choice(size, why if law >= floor else f"{why}; raised to {size}, so that each domain stands in every batch")


def default_learning_rate(parameters: int, tokens: int, routed: bool = False) -> Choice:
    """The peak rate: the step law, 1.79 N^-0.713 D^0.307 (arXiv:2503.04715), under what continued training bears.

    The cap goes, in log-log, through the peak rates at which mixtures of three sizes trained well (`MEASURED_RATES`):
    the routed model goes on from finished seeds, whose own final rates are far below those of a fresh start.

    Args:
        parameters: of one seed, without embeddings and output head.
        tokens: of the whole training.
        routed: whether the model's routers were set from text; the rate is then `ROUTED_RATE_SHARE` of the usual one.
    """
    if routed:
        plain = default_learning_rate(parameters, tokens)
        why = f"{ROUTED_RATE_SHARE:g} of it, as routers were set from text and a lower rate keeps what they give"
        return Choice(ROUTED_RATE_SHARE * plain.value, f"{plain.reason}; {why}")
    law = 1.79 * parameters**-0.713 * tokens**0.307
    cap = rate_cap(parameters)
    if law <= cap:
        return Choice(law, f"step law: {law:.2g} for {parameters:,} parameters, {tokens:,} tokens (arXiv:2503.04715)")
    return Choice(
        cap,
        f"step law: {law:.2g} (arXiv:2503.04715), capped at {cap:.2g}: a mixture goes on from finished seeds "
        "(arXiv:2408.08274 saw spikes at the rate of pre-training)",
    )


def rate_cap(parameters: int) -> float:
    """The highest default rate for a size, between `MEASURED_RATES` in log-log and level beyond them."""
    sizes = [math.log(size) for size, _ in MEASURED_RATES]
    rates = [math.log(rate) for _, rate in MEASURED_RATES]
    at = math.log(max(1, parameters))
    if at <= sizes[0]:
        return math.exp(rates[0])
    for index in range(1, len(sizes)):
        if at <= sizes[index]:
            share = (at - sizes[index - 1]) / (sizes[index] - sizes[index - 1])
            return math.exp(rates[index - 1] + share * (rates[index] - rates[index - 1]))
    return math.exp(rates[-1])
