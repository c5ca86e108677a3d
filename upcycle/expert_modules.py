"""Where a model keeps its experts, and what they are given in a forward."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from upcycle.modeling.modeling_bam import BamFeedForward, GatedOutput
from upcycle.weights import decoder_layers


def ffn_experts(model: Any) -> dict[int, Any]:
    """By layer the module that holds its FFN experts, stacked `[N, …]`, of those layers that have some."""
    return {
        number: module
        for number, layer in enumerate(decoder_layers(model))
        for module in layer.modules()
        if isinstance(down := getattr(module, "down_proj", None), nn.Parameter) and down.dim() == 3
    }


def attention_experts(model: Any) -> dict[int, GatedOutput]:
    """By layer the gated output projection of a BAM mixture's attention experts."""
    return {
        number: module
        for number, layer in enumerate(decoder_layers(model))
        for module in layer.modules()
        if isinstance(module, GatedOutput)
    }


def ffn_scales(model: Any) -> dict[int, torch.Tensor]:
    """By layer the scale of its FFN's gates, where the layer has one (`ffn_scale` of a BAM mixture's config)."""
    return {
        number: module.scale
        for number, layer in enumerate(decoder_layers(model))
        for module in layer.modules()
        if isinstance(module, BamFeedForward) and module.scale is not None
    }


@contextmanager
def inputs_of(modules: Sequence[Any]) -> Iterator[Mapping[Any, Sequence[torch.Tensor]]]:
    """What each module is given in a forward within the block, in order."""
    seen: dict[Any, Sequence[torch.Tensor]] = {}

    def keep(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen[module] = [*args, *kwargs.values()]

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def selections_are_told(model: Any, window: torch.Tensor, top_k: int) -> bool:
    """Whether a model's `router_logits` say which experts its routers select: the k largest, in each such layer.

    Some of transformers' mixtures add a bias before they select, or choose within groups, or tell nothing.

    Args:
        window: int64 `[1, length]`, on which it is tried.
    """
    stacks = list(ffn_experts(model).values())
    with inputs_of(stacks) as seen:
        outputs = model(input_ids=window, use_cache=False, output_router_logits=True)
    told = getattr(outputs, "router_logits", None)
    if not stacks or not isinstance(told, tuple) or len(told) != len(stacks):
        return False
    for logits, stack in zip(told, stacks, strict=True):
        given = seen.get(stack, ())
        if len(given) < 3 or not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[-1] < top_k:
            return False
        selected = given[1]
        largest = logits.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1).indices
        if selected.shape != largest.shape or not torch.equal(selected.sort(-1).values, largest.sort(-1).values):
            return False
    return True
