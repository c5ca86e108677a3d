"""What a model costs: parameters, FLOPs, bytes, cache. Counted from layouts, so no weights are needed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from upcycle.checkpoint import MAX_SHARD_SIZE, plan_shards, read_json
from upcycle.dense_config import read_dense
from upcycle.errors import RecipeError
from upcycle.layout import Layout, make_layout
from upcycle.memory import BF16, FP32, held, training_memory
from upcycle.numeric import TORCH_NAMES
from upcycle.plan import MergePlan, choose_format
from upcycle.recipe import MEAN, ROLES, Recipe
from upcycle.recipe_checks import check_recipe

DEFAULT_CONTEXT: Final = 2048
DENSE: Final = Recipe(name="dense", summary="One dense model.", mix=dict.fromkeys(ROLES, MEAN))


@dataclass(frozen=True)
class Cost:
    """A model's cost.

    Attributes:
        total_parameters: all weights, each once.
        active_parameters: those one token touches; the input embedding counts whole.
        flops_per_token: forward, one token at the given context: 2 x the active weights that multiply (the output head,
            not the input embedding) + 4 x query heads of all experts x head_dim x context.
        training_flops_per_token: three times that.
        checkpoint_bytes: the weight files.
        cache_bytes_per_token: keys and values in bf16, all layers, sliding windows counted as full.
    """

    total_parameters: int
    active_parameters: int
    flops_per_token: int
    training_flops_per_token: int
    checkpoint_bytes: int
    cache_bytes_per_token: int


def layout_cost(layout: Layout, recipe: Recipe, checkpoint_bytes: int, context: int) -> Cost:
    """Cost of the mixture that a layout describes (arXiv:2408.08274, table 10, counts the same products)."""
    sizes = layout.model.sizes
    total = active = multiplying = 0
    for tensor in layout.mixture:
        routed = tensor.active == "top_k"
        touched = tensor.size * recipe.ffn_router.top_k // recipe.ffn_groups(layout.experts) if routed else tensor.size
        total += tensor.size
        active += touched
        multiplying += touched if tensor.multiplies else 0
    # Attentions of all layers: of those with experts, as many each.
    wide = (layout.experts - 1) * len(layout.mixed) * recipe.attention_experts + sizes.layers
    cached = sizes.layers if recipe.shared_key_value else wide
    flops = 2 * multiplying + 4 * wide * sizes.heads * sizes.head_dim * context
    return Cost(
        total_parameters=total,
        active_parameters=active,
        flops_per_token=flops,
        training_flops_per_token=3 * flops,
        checkpoint_bytes=checkpoint_bytes,
        cache_bytes_per_token=2 * 2 * cached * sizes.key_value_heads * sizes.head_dim,
    )


def _files(layout: Layout, dtype: str, max_shard_size: int) -> int:
    """Bytes of the weight files of a layout, headers included."""
    shards = plan_shards([(tensor.name, dtype, tensor.shape) for tensor in layout.mixture], max_shard_size)
    return sum(shard.size for shard in shards)


def plan_cost(plan: MergePlan, max_shard_size: int, context: int) -> tuple[Cost, Cost]:
    """Cost of a plan's result, and of one dense seed beside it."""
    shards = plan_shards([(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors], max_shard_size)
    cost = layout_cost(plan.layout, plan.recipe, sum(shard.size for shard in shards), context)
    first = plan.sources[0].tensors.values()
    return cost, replace(dense_cost(plan.layout, "BF16", context), checkpoint_bytes=sum(info.nbytes for info in first))


def dense_cost(layout: Layout, dtype: str, context: int, max_shard_size: int = MAX_SHARD_SIZE) -> Cost:
    """Cost of one dense model of a layout's family and sizes."""
    dense = make_layout(layout.model, DENSE, 1)
    return layout_cost(dense, DENSE, _files(dense, dtype, max_shard_size), context)


@dataclass(frozen=True)
class Estimate:
    """The cost of a recipe on models of which only the config.json is known, and of one such model."""

    format: str
    model_type: str
    architecture: str
    num_experts: int
    cost: Cost
    dense: Cost


def config_cost(
    recipe: Recipe,
    config_file: Path,
    num_experts: int | None,
    dtype: str | None,
    max_shard_size: int,
    context: int,
    format: str = "auto",
) -> Estimate:
    """Cost of mixing `num_experts` models of this config.json.

    Raises:
        RecipeError: no number of experts, or a recipe that cannot serve the family.
        SeedError, CheckpointError: a config that cannot be read.
    """
    return estimate(
        recipe, read_json(config_file), str(config_file), num_experts, dtype, max_shard_size, context, format
    )


def estimate(
    recipe: Recipe,
    config: Mapping[str, Any],
    where: str,
    num_experts: int | None,
    dtype: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    context: int = DEFAULT_CONTEXT,
    format: str = "auto",
) -> Estimate:
    """`config_cost` of a config.json that is read already; `where` names it in messages."""
    layout = _config_layout(recipe, config, where, num_experts, format)
    written = dtype or _dtype_of(config)
    return Estimate(
        format="native" if layout.native else "bam" if recipe.ffn_experts else "dense",
        model_type=layout.model.family.native
        if layout.native
        else "bam"
        if recipe.ffn_experts
        else config["model_type"],
        architecture=layout.model.family.architecture,
        num_experts=recipe.ffn_count(layout.experts) if recipe.ffn_experts else 1,
        cost=layout_cost(layout, recipe, _files(layout, written, max_shard_size), context),
        dense=dense_cost(layout, written, context, max_shard_size),
    )


def _config_layout(
    recipe: Recipe, config: Mapping[str, Any], where: str, num_experts: int | None, format: str
) -> Layout:
    """The layout of mixing models of a config.json."""
    model = read_dense(config, where)
    if num_experts is None or num_experts < 2:
        raise RecipeError(f"--config needs --num-experts, 2 or more; found {num_experts}")
    check_recipe(recipe, model, num_experts)
    native, _ = choose_format(recipe, model, format, from_text=bool(recipe.from_text()))
    return make_layout(model, recipe, num_experts, native)


@dataclass(frozen=True)
class ParallelTraining:
    """Bytes of each of several GPUs in one training step with AdamW, everything trained.

    Attributes:
        ddp, fsdp2: `weights_bytes`, `gradients_bytes`, `optimizer_bytes`, `activations_bytes`, the peak `total_bytes`
            (below their sum, since activations go as gradients come) and `communication_bytes`, sent in a step.
        expert_parallel: `communication_bytes` of its all-to-alls.
    """

    gpus: int
    ddp: dict[str, int]
    fsdp2: dict[str, int]
    expert_parallel: dict[str, int]


def config_training(
    recipe: Recipe,
    config_file: Path,
    num_experts: int | None,
    gpus: int,
    sequences: int,
    sequence_length: int,
    precision: str = "bf16",
) -> ParallelTraining:
    """What training the mixture of `config_cost` takes of each GPU; `sequences` are those of one GPU and forward.

    Communication: DDP all-reduces the fp32 gradients in a ring, 2 (N - 1) / N of their bytes. FSDP2 gathers the weights
    in bf16 twice and reduce-scatters the gradients in fp32, (N - 1) / N of each, padding included. Expert parallelism
    sends each token to its experts and back, in every layer, and again in the backward: 4 k D numbers in bf16, (N - 1)
    / N of them away.

    Raises:
        RecipeError, SeedError, CheckpointError: as `config_cost`.
    """
    config = read_json(config_file)
    layout = _config_layout(recipe, config, str(config_file), num_experts, "bam" if recipe.ffn_experts else "auto")
    parameters = sum(tensor.size for tensor in layout.mixture)
    padded = gpus * sum(held(tensor, tensor.size, gpus) for tensor in layout.mixture)

    def each(shards: int, sent: int) -> dict[str, int]:
        memory = training_memory(
            layout,
            recipe,
            sequences=sequences,
            sequence_length=sequence_length,
            precision=precision,
            shards=shards,
        )
        return {
            "weights_bytes": memory.weights,
            "gradients_bytes": memory.gradients,
            "optimizer_bytes": memory.optimizer,
            "activations_bytes": memory.activations,
            "total_bytes": memory.total,
            "communication_bytes": sent * (gpus - 1) // gpus,
        }

    sizes, top_k = layout.model.sizes, recipe.ffn_router.top_k if recipe.ffn_experts else 0
    away = 4 * BF16 * sizes.layers * sequences * sequence_length * top_k * sizes.hidden
    return ParallelTraining(
        gpus=gpus,
        ddp=each(1, 2 * FP32 * parameters),
        fsdp2=each(gpus, (2 * BF16 + FP32) * padded),
        expert_parallel={"communication_bytes": away * (gpus - 1) // gpus},
    )


def _dtype_of(config: Mapping[str, Any]) -> str:
    name = config.get("dtype") or config.get("torch_dtype")
    return next((key for key, value in TORCH_NAMES.items() if value == name), "BF16")
