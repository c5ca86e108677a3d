"""What a checkpoint is, read off its config and headers."""

from dataclasses import dataclass
from pathlib import Path

from upcycle.checkpoint import CONFIG, read_json, read_tensors
from upcycle.dense_config import config_values, find_family, read_sizes
from upcycle.errors import RecipeError
from upcycle.layout import Layout, make_layout
from upcycle.mixture import read_mixture
from upcycle.numeric import TORCH_NAMES
from upcycle.plan import check_recipe
from upcycle.recipe import builtin_recipes
from upcycle.scaling import DEFAULT_CONTEXT, DENSE, Cost, dense_cost, layout_cost


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is."""

    format: str
    model_type: str
    family: str
    num_experts: int
    experts: list[str]
    recipe: str | None
    recipes: list[str]
    dtype: str
    cost: Cost
    dense: Cost


def inspect_checkpoint(folder: Path) -> Inspection:
    """Read a mixture's or a dense checkpoint's config and headers.

    Raises:
        CheckpointError, SeedError: neither, or a damaged one.
    """
    config = read_json(folder / CONFIG)
    if config.get("model_type") == "bam":
        mixture = read_mixture(folder)
        tensors, layout, recipe, experts = mixture.tensors, mixture.layout, mixture.recipe, mixture.experts
    else:
        family, where = find_family(config, str(folder)), str(folder)
        values = config_values(family, config)
        layout = make_layout(family, read_sizes(family, config, where), values, DENSE, 1)
        tensors, recipe, experts = read_tensors(folder), DENSE, []
    files = sum({info.file: info.file.stat().st_size for info in tensors.values()}.values())
    dtype = max(
        (sum(i.nbytes for i in tensors.values() if i.dtype == kind), kind)
        for kind in {i.dtype for i in tensors.values()}
    )[1]
    count = max(1, len(experts))
    cost = layout_cost(layout, recipe, count, files, DEFAULT_CONTEXT)
    return Inspection(
        format="bam" if experts else "dense",
        model_type=config["model_type"],
        family=layout.family.architecture,
        num_experts=count,
        experts=experts,
        recipe=recipe.name if experts else None,
        recipes=[] if experts else _fitting(layout, config["model_type"]),
        dtype=dtype,
        cost=cost,
        dense=dense_cost(layout, dtype if dtype in TORCH_NAMES else "BF16", DEFAULT_CONTEXT),
    )


def _fitting(layout: Layout, model_type: str) -> list[str]:
    """The recipes that a family can serve."""
    fitting = []
    for name, recipe in builtin_recipes().items():
        try:
            check_recipe(recipe, layout.family, 1024, model_type)
        except RecipeError:
            continue
        fitting.append(name)
    return fitting
