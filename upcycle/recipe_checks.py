"""What a recipe asks of the seeds' number, of their names and of their architecture."""

from collections.abc import Sequence

from upcycle.dense_config import DenseModel
from upcycle.errors import RecipeError, did_you_mean
from upcycle.recipe import SEED_PREFIX, Recipe, mixed_layers
from upcycle.recipe_file import MAX_EXPERTS


def count_experts(recipe: Recipe, num_seeds: int, num_experts: int | None) -> int:
    """How many experts a recipe makes of so many seeds.

    Raises:
        RecipeError: a number of seeds or experts that the recipe cannot take.
    """
    if recipe.copies:
        if num_seeds != 1:
            raise RecipeError(
                f"recipe '{recipe.name}' copies one seed, but {num_seeds} are given; give one and --num-experts"
            )
        if num_experts is None or not 2 <= num_experts <= 1024:
            found = "none is given" if num_experts is None else f"found {num_experts}"
            raise RecipeError(f"recipe '{recipe.name}' needs --num-experts, from 2 to 1024; {found}")
        return num_experts
    if num_experts is not None and num_experts != num_seeds:
        raise RecipeError(
            f"--num-experts {num_experts} with {num_seeds} seeds: recipe '{recipe.name}' makes each seed one expert; "
            "leave the option out, or take a recipe that copies one seed (sparse-upcycling)"
        )
    if num_seeds < 2:
        raise RecipeError(
            f"recipe '{recipe.name}' needs at least 2 seeds, found {num_seeds}; to copy one seed, take sparse-upcycling"
        )
    return num_seeds


def check_recipe(recipe: Recipe, model: DenseModel, num_experts: int) -> None:
    """Refuse a recipe that a family or a number of experts cannot serve.

    Raises:
        RecipeError: and why.
    """
    family, shards = model.family, recipe.experts.granularity
    groups = recipe.ffn_groups(num_experts)
    if recipe.ffn_experts:
        mixed_layers(recipe.layers, model.sizes.layers)
        if recipe.ffn_router.top_k > groups:
            raise RecipeError(
                f"recipe '{recipe.name}': router.ffn.top_k is {recipe.ffn_router.top_k}, "
                f"but there are only {groups} experts"
            )
        if model.sizes.inner % shards:
            raise RecipeError(
                f"recipe '{recipe.name}': experts.granularity is {shards}, which does not divide the FFN's "
                f"{model.sizes.inner} inner units (intermediate_size)"
            )
        if recipe.ffn_count(num_experts) > MAX_EXPERTS:
            raise RecipeError(
                f"recipe '{recipe.name}': {groups} FFNs in {shards} shards each are {groups * shards} experts, "
                f"expected at most {MAX_EXPERTS}"
            )
    attention = recipe.attention_router
    if recipe.attention_experts and attention.routing == "top-k" and attention.top_k > num_experts:
        raise RecipeError(
            f"recipe '{recipe.name}': router.attention.top_k is {attention.top_k}, "
            f"but there are only {num_experts} attention experts"
        )
    if recipe.shared_key_value and not family.grouped_queries:
        raise RecipeError(
            f"recipe '{recipe.name}' shares keys and values among experts, but {model.model_type}'s attention has no "
            "grouped queries: it gives every query head a key/value head of its own; take recipe 'bam'"
        )


def check_names(recipe: Recipe, names: Sequence[str]) -> None:
    """Refuse a recipe that speaks of seeds that are not given, or gives some no share.

    Raises:
        RecipeError: the first such name.
    """
    ways = (*recipe.mix.values(), *recipe.experts.shared, recipe.experts.extra_from)
    wanted = {way.removeprefix(SEED_PREFIX) for way in ways if way.startswith(SEED_PREFIX)}
    wanted |= {*recipe.weights, *recipe.ffn_router.bias}
    for name in sorted(wanted):
        if name not in names:
            by = "its weights speak" if name in recipe.weights else "it speaks"
            raise RecipeError(
                f"recipe '{recipe.name}': {by} of seed '{name}', which is not given{did_you_mean(name, names)}"
            )
    for name in names if recipe.weights else ():
        if name not in recipe.weights:
            raise RecipeError(
                f"recipe '{recipe.name}': its weights give seed '{name}' no share; add one, {name} = 1 in [weights] or "
                f"--weights … {name}=1"
            )
