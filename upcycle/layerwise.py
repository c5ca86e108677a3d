"""One pass over a text, layer by layer: each router is set on its own true input before anything behind it is computed.

A forward of the whole model would give a router's input only with every earlier router as it is now, so setting L
layers would take L passes. Here all windows go through one layer before any goes through the next: their states wait in
memory, `[windows, length, D]`, and each layer is computed once.

Axes: W windows, S their length, T tokens, N experts, D hidden.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from upcycle.errors import CheckpointError
from upcycle.expert_modules import attention_experts, ffn_experts
from upcycle.modeling.modeling_bam import BamFeedForward
from upcycle.weights import decoder_layers


@dataclass(frozen=True)
class Router:
    """A router in a model.

    Attributes:
        layer: number of its decoder layer.
        kind: "attention" or "ffn".
        module: what holds its `weight [N, D]` (and, BAM's, maybe a `bias [N]`), and is called with its input.
    """

    layer: int
    kind: str
    module: Any

    @property
    def where(self) -> str:
        """For messages."""
        return f"layer {self.layer}, {self.kind} router"


def find_routers(model: Any) -> list[Router]:
    """All routers, layer by layer in the order in which a forward calls them, an attention's before an FFN's.

    Raises:
        CheckpointError: the model has FFN experts but no plain router before them, whose logits are `weight x`, and in
            BAM `weight x + bias`.
    """
    attention, ffn = attention_experts(model), ffn_experts(model)
    layers = decoder_layers(model)
    routers = []
    for number, layer in enumerate(layers):
        if number in attention:
            routers.append(Router(number, "attention", attention[number].router))
        if number in ffn:
            routers.append(Router(number, "ffn", _ffn_router(layer, ffn[number], number)))
    if not routers:
        raise CheckpointError("the model has no experts that upcycle knows, so it has no routers to set")
    return routers


def _ffn_router(layer: Any, experts: Any, number: int) -> Any:
    """The plain linear map, or module like one, beside a layer's experts."""
    shape = (experts.down_proj.shape[0], experts.down_proj.shape[1])
    block = next(module for module in layer.modules() if experts in module.children())
    found = [
        module
        for module in block.modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and tuple(weight.shape) == shape
    ]
    biased = not isinstance(block, BamFeedForward) and any(getattr(one, "bias", None) is not None for one in found)
    if len(found) != 1 or biased:
        raise CheckpointError(
            f"layer {number} has {len(found)} modules with a weight {list(shape)} that could be its FFN router, "
            "expected one, without a bias; upcycle cannot set routers of this architecture"
        )
    return found[0]


class _ReachedError(Exception):
    """Raised to leave a layer where the router's input is known."""


@torch.no_grad()
def set_layer_by_layer(
    model: Any,
    windows: torch.Tensor,
    set_router: Callable[[Router, torch.Tensor], None],
    *,
    kinds: Collection[str] = ("attention", "ffn"),
    batch: int,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Let `set_router` set each router's weight from its inputs `[T, D]`, all earlier ones set already.

    Each layer is computed once: what its attention answered on the way to the FFN's router is used again.

    Args:
        windows: int64 `[W, S]`, without padding.
        kinds: of the routers that are set; others stay as they are.
        batch: windows a forward.
        progress: called with the number of tokens that have passed one layer.
    """
    by_layer: dict[int, list[Router]] = {}
    for router in find_routers(model):
        if router.kind in kinds:
            by_layer.setdefault(router.layer, []).append(router)
    layers = list(decoder_layers(model))
    batches: list[torch.Tensor] = list(torch.split(windows, batch))
    states, calls = _enter(model, layers, batches)
    for number, layer in enumerate(layers):
        call = calls[number]
        replay = _Replay(_attention(model, layer))
        for router in by_layer.get(number, []):
            set_router(router, _inputs(layer, call, states, router.module, replay))
        for index, state in enumerate(states):
            with replay.of(index):
                outputs = _run(layer, call, state)
            states[index] = outputs[0] if isinstance(outputs, tuple) else outputs
            progress(batches[index].numel())


# How a model calls a layer beside the states, by the number of windows: positions, masks and the like.
_Call = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]


def _run(layer: Any, call: _Call, states: torch.Tensor) -> Any:
    rest, keywords = call[len(states)]
    return layer(states, *rest, **keywords)


def _enter(
    model: Any, layers: Sequence[Any], batches: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[_Call]]:
    """The states that enter the first layer, by batch, and how each layer is called; computes no layer."""
    calls: list[_Call] = [{} for _ in layers]
    states: list[torch.Tensor] = []
    in_tuple = _answers_in_tuple(model, layers, batches[0][:1, :2])

    def stand_in(number: int) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *rest: Any, **keywords: Any) -> Any:
            calls[number].setdefault(len(hidden_states), (rest, keywords))
            if number == 0:
                states.append(hidden_states)
            return (hidden_states,) if in_tuple else hidden_states

        return forward

    try:
        for number, layer in enumerate(layers):
            layer.forward = stand_in(number)
        for tokens in batches:
            # One logit: the head over a whole vocabulary and all windows would cost more than a layer.
            # Router logits are not asked for, whatever the config says: no layer is computed that would give any.
            model(input_ids=tokens, use_cache=False, logits_to_keep=1, output_router_logits=False)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
    return states, calls


def _answers_in_tuple(model: Any, layers: Sequence[Any], tokens: torch.Tensor) -> bool:
    """Whether the family's layers answer with a tuple, whose first element are the states."""
    answers: list[Any] = []
    handle = layers[0].register_forward_hook(lambda _, __, answer: answers.append(answer))
    try:
        model(input_ids=tokens, use_cache=False, output_router_logits=False)
    finally:
        handle.remove()
    return isinstance(answers[0], tuple)


def _attention(model: Any, layer: Any) -> Any:
    layout = getattr(model.config, "dense_layout", None)
    return getattr(layer, layout["attention"] if layout else "self_attn", None)


class _Replay:
    """An attention's answers by batch: kept on the way to a router behind it, given back as the layer is computed."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.answers: dict[int, Any] = {}

    @contextmanager
    def keeping(self, index: int) -> Iterator[None]:
        """Keep what the attention answers within the block."""
        if self.attention is None:
            yield
            return

        def keep(_: Any, __: Any, answer: Any) -> None:
            self.answers[index] = answer

        handle = self.attention.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Answer as before within the block, where an answer was kept."""
        if index not in self.answers:
            yield
            return
        answer = self.answers.pop(index)
        self.attention.forward = lambda *_, **__: answer
        try:
            yield
        finally:
            del self.attention.forward


def _inputs(layer: Any, call: _Call, states: Sequence[torch.Tensor], module: Any, replay: _Replay) -> torch.Tensor:
    """What a router is given for all tokens, `[T, D]`."""
    inputs: list[torch.Tensor] = []

    def take(_: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = args[0] if args else keywords["hidden_states"]
        inputs.append(given.reshape(-1, given.shape[-1]))
        raise _ReachedError

    handle = module.register_forward_pre_hook(take, with_kwargs=True)
    try:
        for index, state in enumerate(states):
            with replay.keeping(index):
                try:
                    _run(layer, call, state)
                except _ReachedError:
                    continue
                raise CheckpointError(f"{type(layer).__name__} never called the router that lies in it")
    finally:
        handle.remove()
    return torch.cat(inputs)
