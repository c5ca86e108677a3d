"""What a model costs: parameters, FLOPs, bytes, cache. Counted from a layout, so no weights are needed."""

from dataclasses import dataclass

from upcycle.layout import Layout
from upcycle.recipe import Recipe

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class Cost:
    """A model's cost.

    Attributes:
        total_parameters: all weights, each once.
        active_parameters: those one token touches; the input embedding counts whole.
        flops_per_token: forward, one token at `context`: 2 x the active weights that multiply (the output head, not the
            input embedding) + 4 x query heads of all experts x head_dim x context.
        training_flops_per_token: three times that.
        checkpoint_bytes: the weight files, in `dtype`'s size.
        cache_bytes_per_token: keys and values in bf16, all layers, sliding windows counted as full.
    """

    total_parameters: int
    active_parameters: int
    flops_per_token: int
    training_flops_per_token: int
    checkpoint_bytes: int
    cache_bytes_per_token: int


def cost(layout: Layout, recipe: Recipe, num_experts: int, item_size: int, context: int = DEFAULT_CONTEXT) -> Cost:
    """Cost of the mixture that `recipe` makes, from its layout; arXiv:2408.08274, table 10, counts the same products."""
    sizes = layout.sizes
    top_k = recipe.ffn_router.top_k
    total = active = multiplying = 0
    for tensor in layout.mixture:
        touched = tensor.size * top_k // num_experts if tensor.active == "top_k" else tensor.size
        total += tensor.size
        active += touched
        multiplying += touched if tensor.multiplies else 0
    experts = num_experts if recipe.attention_experts else 1
    cached = 1 if recipe.shared_key_value else experts
    flops = 2 * multiplying + 4 * sizes.layers * experts * sizes.heads * sizes.head_dim * context
    return Cost(
        total_parameters=total,
        active_parameters=active,
        flops_per_token=flops,
        training_flops_per_token=3 * flops,
        checkpoint_bytes=total * item_size,
        cache_bytes_per_token=2 * 2 * sizes.layers * cached * sizes.key_value_heads * sizes.head_dim,
    )
