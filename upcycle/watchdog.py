"""What goes wrong in a training, noticed while it runs: NaN, gradient spikes, experts that nobody uses."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from upcycle.errors import TrainingError

SPIKE: Final = 10.0  # times the median gradient norm
HISTORY: Final = 64  # steps whose norms make the median
ENOUGH: Final = 16  # steps before a spike can be told
MAX_SKIPPED: Final = 5  # steps in a row
DROPPED: Final = 0.01  # of the tokens: an expert below it is as good as gone
DROPPED_STEPS: Final = 50  # in a row, before it is said


class Watchdog:
    """Looks at each step before it reaches the weights; its memory is plain data and is saved with the training."""

    def __init__(self, experts: Sequence[str], layers: Sequence[int] = ()) -> None:
        """Args:
        experts: their names.
        layers: the numbers of those that have experts; none where all have.
        """
        self.experts, self.layers = experts, layers
        self.norms: list[float] = []
        self.skipped = 0
        self.idle: dict[str, int] = {}

    def objection(self, step: int, loss: float, norm: float) -> str | None:
        """Why this step must not reach the weights, or None.

        Raises:
            TrainingError: several steps in a row could not be taken.
        """
        reason = None
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(norm):
            reason = f"the gradient's norm is {norm}"
        else:
            if len(self.norms) >= ENOUGH and norm > SPIKE * statistics.median(self.norms):
                reason = f"a gradient spike: norm {norm:.3g}, the median is {statistics.median(self.norms):.3g}"
            # A spike enters the median, too: what keeps coming is no spike.
            self.norms = [*self.norms[-HISTORY + 1 :], norm]
        self.skipped = self.skipped + 1 if reason else 0
        if self.skipped >= MAX_SKIPPED:
            raise TrainingError(
                f"step {step}: {reason}, and so were the {MAX_SKIPPED - 1} steps before it; none of them was taken. "
                "Start again from the model that went in, with a lower --learning-rate"
            )
        return reason

    def forget_norms(self) -> None:
        """Begin anew with what a usual norm is."""
        self.norms = []

    def idle_experts(self, step: int, load: Sequence[Sequence[float]]) -> list[str]:
        """Warnings about experts that have just been below 1 % of a layer's tokens for long; each is said once."""
        warnings = []
        for layer, shares in zip(self.layers or range(len(load)), load, strict=True):
            for expert, share in enumerate(shares):
                key = f"{layer}.{expert}"
                self.idle[key] = self.idle.get(key, 0) + 1 if share < DROPPED else 0
                if self.idle[key] == DROPPED_STEPS:
                    warnings.append(
                        f"step {step}: layer {layer} has sent expert {expert} ({self.experts[expert]}) under "
                        f"{DROPPED:.0%} of its tokens for {DROPPED_STEPS} steps; a larger [loss] load_balance helps"
                    )
        return warnings

    def state(self) -> dict[str, Any]:
        """Its memory, as plain data."""
        return {"norms": self.norms, "skipped": self.skipped, "idle": self.idle}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.norms, self.skipped, self.idle = list(state["norms"]), state["skipped"], dict(state["idle"])
