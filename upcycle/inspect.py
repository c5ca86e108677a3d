"""What a checkpoint is, read off its config and headers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from upcycle.checkpoint import CONFIG, ITEM_SIZE, PROVENANCE, TensorInfo, read_json, read_tensors
from upcycle.dense_config import DenseModel, read_dense
from upcycle.errors import CheckpointError, RecipeError
from upcycle.hub import look_up, read_remote_tensors
from upcycle.layout import make_layout, takes_grouped_product
from upcycle.mixture import is_mixture, read_mixture
from upcycle.numeric import TORCH_NAMES
from upcycle.recipe_checks import check_recipe
from upcycle.recipe_file import builtin_recipes
from upcycle.scaling import DEFAULT_CONTEXT, DENSE, Cost, dense_cost, layout_cost

ANY_EXPERTS: Final = 8  # as many as every recipe can take and needs


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is."""

    format: str
    model_type: str
    family: str
    num_experts: int
    experts: list[str]
    groups: list[str]  # what the experts are, or were before each was split
    layers: list[int]  # those that have experts
    grouped: bool  # whether transformers' default computes its experts (`takes_grouped_product`)
    recipe: str | None
    recipes: list[str]
    dtype: str
    cost: Cost
    dense: Cost


def inspect_repository(name: str) -> Inspection:
    """Read those of a model on the Hub; its weights are not downloaded.

    Raises:
        HubError, CheckpointError, SeedError: it cannot be had, is neither, or a damaged one.
    """
    repository = look_up(name)
    tensors = read_remote_tensors(repository)
    if PROVENANCE in repository.files:
        repository.get(PROVENANCE)
    return inspect_checkpoint(repository.folder, tensors)


def inspect_checkpoint(folder: Path, tensors: Mapping[str, TensorInfo] | None = None) -> Inspection:
    """Read a mixture's or a dense checkpoint's config and, unless its `tensors` are given, headers.

    Raises:
        CheckpointError, SeedError: neither, or a damaged one.
    """
    config = read_json(folder / CONFIG)
    if is_mixture(folder, config):
        mixture = read_mixture(folder, tensors)
        tensors, layout, recipe, experts = mixture.tensors, mixture.layout, mixture.recipe, mixture.experts
        groups = mixture.groups
    else:
        layout = make_layout(read_dense(config, str(folder)), DENSE, 1)
        tensors, recipe, experts = read_tensors(folder) if tensors is None else tensors, DENSE, []
        groups = []
    if not tensors:
        raise CheckpointError(f"{folder} holds no tensors")
    ends: dict[Path, int] = {}  # a file ends where its last tensor does
    for info in tensors.values():
        ends[info.file] = max(ends.get(info.file, 0), info.offset + info.nbytes)
    dtype = max(
        (sum(i.nbytes for i in tensors.values() if i.dtype == kind), kind)
        for kind in {i.dtype for i in tensors.values()}
    )[1]
    count = max(1, len(experts))
    cost = layout_cost(layout, recipe, sum(ends.values()), DEFAULT_CONTEXT)
    return Inspection(
        format="native" if layout.native else "bam" if experts else "dense",
        model_type=config["model_type"],
        family=layout.model.family.architecture,
        num_experts=count,
        experts=list(experts),
        groups=groups,
        layers=list(layout.mixed),
        grouped=takes_grouped_product(layout, recipe, ITEM_SIZE[dtype]),
        recipe=recipe.name if experts else None,
        recipes=[] if experts else _fitting(layout.model),
        dtype=dtype,
        cost=cost,
        dense=dense_cost(layout, dtype if dtype in TORCH_NAMES else "BF16", DEFAULT_CONTEXT),
    )


def _fitting(model: DenseModel) -> list[str]:
    """The recipes that a family can serve."""
    fitting = []
    for name, recipe in builtin_recipes().items():
        try:
            check_recipe(recipe, model, ANY_EXPERTS)
        except RecipeError:
            continue
        fitting.append(name)
    return fitting
