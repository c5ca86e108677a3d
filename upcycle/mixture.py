"""A finished mixture, read by its headers, and the way back: one expert as a dense checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upcycle.checkpoint import CONFIG, PROVENANCE, TensorInfo, read_json, read_tensors
from upcycle.dense_config import config_values, find_family, read_sizes
from upcycle.errors import CheckpointError, RecipeError
from upcycle.layout import Layout, Piece, make_layout
from upcycle.plan import (
    FORMAT_VERSION,
    MergePlan,
    Part,
    PlannedGroup,
    PlannedTensor,
    Source,
    SourceCheckpoint,
    copied_files,
)
from upcycle.recipe import Recipe, parse_recipe
from upcycle.version import __version__


@dataclass(frozen=True)
class Mixture:
    """A finished BAM checkpoint, read by its headers."""

    folder: Path
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    layout: Layout
    recipe: Recipe

    @property
    def experts(self) -> list[str]:
        """The experts' names in their order."""
        return list(self.provenance["experts"])


def read_mixture(folder: Path) -> Mixture:
    """Read a BAM checkpoint's config, provenance and headers.

    Raises:
        CheckpointError: it is none, or is damaged.
    """
    config = read_json(folder / CONFIG)
    if config.get("model_type") != "bam":
        raise CheckpointError(
            f"{folder} is a {config.get('model_type')!r} checkpoint, expected a BAM mixture (model_type 'bam')"
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: format_version is {config.get('format_version')!r}, this upcycle reads {FORMAT_VERSION}"
        )
    provenance = read_json(folder / PROVENANCE)
    dense = config.get("dense_config")
    if not isinstance(dense, dict):
        raise CheckpointError(f"{folder / CONFIG}: 'dense_config' is missing")
    where = f"mixture {folder}"
    family = find_family(dense, where)
    try:
        recipe = _recipe_of(provenance["recipe"])
        experts = [str(name) for name in provenance["experts"]]
    except (KeyError, TypeError, RecipeError) as error:
        raise CheckpointError(f"{folder / PROVENANCE} is damaged: {error!r}") from error
    if len(experts) != config.get("num_experts"):
        raise CheckpointError(
            f"{folder}: {PROVENANCE} names {len(experts)} experts, {CONFIG} says {config.get('num_experts')}"
        )
    layout = make_layout(family, read_sizes(family, dense, where), config_values(family, dense), recipe, len(experts))
    tensors = read_tensors(folder)
    for tensor in layout.mixture:
        info = tensors.get(tensor.name)
        if info is None or info.shape != tensor.shape:
            found = "nothing" if info is None else list(info.shape)
            raise CheckpointError(
                f"{folder}: tensor '{tensor.name}': expected shape {list(tensor.shape)}, found {found}"
            )
    return Mixture(folder, config, {**provenance, "experts": experts}, tensors, layout, recipe)


def _recipe_of(resolved: Mapping[str, Any]) -> Recipe:
    table = {key: value for key, value in resolved.items() if key != "name"}
    return parse_recipe(resolved["name"], table)


def plan_extract(mixture: Mixture, expert: int) -> MergePlan:
    """Plan the way back: expert number `expert` as a dense checkpoint, with the mixture's shared parameters."""
    pieces: dict[str, list[tuple[Piece, Source]]] = {}
    for tensor in mixture.layout.mixture:
        base = 0
        for group in tensor.groups:
            copy = expert if group.copies > 1 else 0
            offset = base + copy * group.width
            for piece in group.pieces:
                source = Source(0, tensor.name, offset, group.copies * group.width)
                pieces.setdefault(piece.tensor, []).append((piece, source))
                offset += piece.block
            base += group.size
    tensors = []
    for name, shape in mixture.layout.dense.items():
        members = sorted(pieces[name], key=lambda member: member[0].start)
        dtype = mixture.tensors[members[0][1].tensor].dtype
        parts = [(piece.rows, Part(piece.block, (source,))) for piece, source in members]
        if mixture.layout.family.qkv_by_head and len(parts) > 1:
            groups = [PlannedGroup(parts[0][0], tuple(part for _, part in parts))]
        else:
            groups = [PlannedGroup(rows, (part,)) for rows, part in parts]
        tensors.append(PlannedTensor(name, dtype, shape, tuple(groups)))
    name = mixture.experts[expert]
    config = {**mixture.config["dense_config"], "dtype": mixture.config["dtype"]}
    config.pop("torch_dtype", None)
    provenance = {
        "upcycle_version": __version__,
        "format": "dense",
        "extracted": {"expert": expert, "name": name, "plan": mixture.provenance.get("plan")},
    }
    return MergePlan(
        format="dense",
        num_experts=1,
        sources=(SourceCheckpoint(mixture.folder.name, mixture.folder, mixture.tensors),),
        tensors=tuple(tensors),
        config=config,
        provenance=provenance,
        random_seed=0,
        copied=copied_files(mixture.folder, with_code=False),
        layout=mixture.layout,
        recipe=replace(mixture.recipe, mix=dict.fromkeys(mixture.recipe.mix, "mean")),
    )


def find_expert(mixture: Mixture, expert: str) -> int:
    """The number of an expert given by number or name.

    Raises:
        CheckpointError: there is none such; the message lists them.
    """
    names = mixture.experts
    if expert in names:
        return names.index(expert)
    if expert.isdecimal() and int(expert) < len(names):
        return int(expert)
    listed = ", ".join(f"{index} {name}" for index, name in enumerate(names))
    raise CheckpointError(f"{mixture.folder} has no expert '{expert}'; there are: {listed}")
