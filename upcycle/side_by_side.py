"""Attention and FFN of a parallel block at the same time: both read the same normalised input (arXiv:2408.08274, 3).

The family's code calls one after the other. Here the FFN starts on a stream of its own as soon as the attention has
its input, and the block finds the result when it comes to ask for it. Autograd runs each backward on the stream of its
forward, so that the backward overlaps, too.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from upcycle.modeling.modeling_bam import BamForCausalLM


def run_side_by_side(model: Any, streams: "CudaStreams | None" = None) -> int:
    """Let each parallel block of a mixture run its halves at the same time; the number of such blocks.

    Blocks that norm their FFN's input apart (GPT-NeoX) are not served: that input is not there yet.
    """
    if not isinstance(model, BamForCausalLM) or not _reads_the_same(model):
        return 0
    layers = model.dense.base_model.layers
    streams = streams or CudaStreams()
    for layer in layers:
        _Overlap(layer.mlp, streams).install(getattr(layer, model.config.dense_layout["attention"]))
    return len(layers)


def _reads_the_same(model: Any) -> bool:
    """Whether attention and FFN are given one tensor: tried on two tokens."""
    layer = model.dense.base_model.layers[0]
    inputs: list[Any] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(kwargs.get("hidden_states", args[0] if args else None))

    modules = (getattr(layer, model.config.dense_layout["attention"]), layer.mlp)
    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return len(inputs) == 2 and inputs[0] is inputs[1]


class CudaStreams:
    """The stream of the FFNs, and how it and the current one wait for each other."""

    def __init__(self) -> None:
        self._side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def begin(self, given: torch.Tensor) -> AbstractContextManager[Any]:
        """A block whose work runs aside, after all that was asked for so far."""
        self._side.wait_stream(torch.cuda.current_stream(given.device))
        given.record_stream(self._side)  # its memory must not go to others while the side stream reads it
        return torch.cuda.stream(self._side)

    def end(self, made: torch.Tensor) -> None:
        """Wait for what was made aside."""
        current = torch.cuda.current_stream(made.device)
        current.wait_stream(self._side)
        made.record_stream(current)


class _Overlap:
    """One block's FFN, begun with the attention's input and handed out when the block asks for it."""

    def __init__(self, mlp: Any, streams: CudaStreams) -> None:
        self.forward: Callable[[torch.Tensor], torch.Tensor] = mlp.forward
        self.streams = streams
        self.given: torch.Tensor | None = None
        self.made: torch.Tensor | None = None
        self.mlp = mlp

    def install(self, attention: Any) -> None:
        attention.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.mlp.forward = self._end

    def _begin(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        with self.streams.begin(self.given):
            self.made = self.forward(self.given)

    def _end(self, hidden_states: torch.Tensor) -> torch.Tensor:
        made, given = self.made, self.given
        self.made = self.given = None
        if made is None or given is not hidden_states:  # the FFN alone
            return self.forward(hidden_states)
        self.streams.end(made)
        return made
