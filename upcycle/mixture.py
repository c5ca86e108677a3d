"""A finished mixture, read by its headers, and the way back: one expert as a dense checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upcycle.checkpoint import CONFIG, PROVENANCE, TensorInfo, read_json, read_tensors
from upcycle.companions import FORMAT_VERSION, copied_files, dense_config
from upcycle.dense_config import read_dense
from upcycle.errors import CheckpointError
from upcycle.layout import PREFIX, Layout, Piece, make_layout
from upcycle.numeric import FLOATS
from upcycle.plan import MergePlan, Part, PlannedGroup, PlannedTensor, Source, SourceCheckpoint
from upcycle.recipe import EXPERTS, MEAN, ROLES, FfnRouter, Recipe
from upcycle.version import __version__


@dataclass(frozen=True)
class Mixture:
    """A finished BAM checkpoint, read by its headers; `provenance` is empty where training saved it without."""

    folder: Path
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    experts: Sequence[str]
    tensors: Mapping[str, TensorInfo]
    layout: Layout
    recipe: Recipe


def read_mixture(folder: Path, tensors: Mapping[str, TensorInfo] | None = None) -> Mixture:
    """Read a BAM checkpoint's config and, unless its `tensors` are given, headers; merged or trained.

    Raises:
        CheckpointError, SeedError: it is none, or is damaged.
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
    provenance = read_json(folder / PROVENANCE) if (folder / PROVENANCE).exists() else {}
    recipe, experts = _recipe(folder, config, provenance), config["expert_names"]
    layout = make_layout(read_dense(config["dense_config"], f"mixture {folder}"), recipe, len(experts))
    scales = config.get("ffn_scale")
    if scales is not None and len(scales) != layout.model.sizes.layers:
        raise CheckpointError(
            f"{folder / CONFIG}: ffn_scale has {len(scales)} numbers, but there are {layout.model.sizes.layers} layers"
        )
    tensors = read_tensors(folder) if tensors is None else tensors
    for tensor in layout.mixture:
        info = tensors.get(tensor.name)
        if info is None or info.shape != tensor.shape or info.dtype not in FLOATS:
            found = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise CheckpointError(
                f"{folder}: tensor '{tensor.name}': expected floats of shape {list(tensor.shape)}, found {found}; "
                "the mixture is damaged or its config.json belongs to another"
            )
    return Mixture(folder, config, provenance, experts, tensors, layout, recipe)


def _recipe(folder: Path, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> Recipe:
    """What the config says of the mixing; the provenance adds the recipe's name."""
    kinds = {
        "num_experts": int,
        "num_experts_per_tok": int,
        "expert_names": list,
        "dense_config": dict,
        "norm_topk_prob": bool,
        "attention_experts": bool,
        "shared_key_value": bool,
    }
    for key, kind in kinds.items():
        if type(config.get(key)) is not kind:
            raise CheckpointError(f"{folder / CONFIG}: {key} is {config.get(key)!r}, expected {kind.__name__}")
    names, count = config["expert_names"], config["num_experts"]
    named = len(names) == count and all(type(name) is str for name in names)
    if not named or not 1 <= config["num_experts_per_tok"] <= count:
        raise CheckpointError(
            f"{folder / CONFIG}: num_experts is {count}, but expert_names lists {len(names)} "
            f"and num_experts_per_tok is {config['num_experts_per_tok']}"
        )
    scales = config.get("ffn_scale") or [1.0]
    if not (isinstance(scales, list) and scales and all(type(one) is float and 0 < one < 1e6 for one in scales)):
        raise CheckpointError(f"{folder / CONFIG}: ffn_scale is {str(scales)[:80]}, expected a list of numbers above 0")
    attention = EXPERTS if config["attention_experts"] else MEAN
    key_value = MEAN if config["shared_key_value"] else attention
    mix = dict.fromkeys(ROLES, MEAN) | {
        "ffn": EXPERTS,
        "attention.query": attention,
        "attention.output": attention,
        "attention.key": key_value,
        "attention.value": key_value,
    }
    recorded = provenance.get("recipe")
    name = recorded.get("name") if isinstance(recorded, dict) else None
    router = FfnRouter(top_k=config["num_experts_per_tok"], normalize=config["norm_topk_prob"])
    return Recipe(name=str(name or "a mixture"), summary="", mix=mix, ffn_router=router)


def router_records(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What upcycle.json says of routers that were set from text, by kind; nothing where they were not."""
    found = provenance.get("routers")
    return dict(found) if isinstance(found, dict) else {}


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
        if mixture.layout.model.family.qkv_by_head and len(parts) > 1:
            groups = [PlannedGroup(parts[0][0], tuple(part for _, part in parts))]
        else:
            groups = [PlannedGroup(rows, (part,)) for rows, part in parts]
        tensors.append(PlannedTensor(name, dtype, shape, tuple(groups)))
    name, family = mixture.experts[expert], mixture.layout.model.family
    main_dtype = mixture.tensors[f"{PREFIX}{family.base}.{family.embedding}.weight"].dtype
    provenance = {
        "upcycle_version": __version__,
        "format": "dense",
        "extracted": {"expert": expert, "name": name, "plan": mixture.provenance.get("plan")},
        "seeds": mixture.provenance.get("seeds", []),  # shared parameters come of all of them
    }
    return MergePlan(
        format="dense",
        num_experts=1,
        sources=(SourceCheckpoint(mixture.folder.name, mixture.folder, mixture.tensors),),
        tensors=tuple(tensors),
        config=dense_config(mixture.config["dense_config"], main_dtype),
        provenance=provenance,
        random_seed=0,
        copied=copied_files(mixture.folder, with_code=False),
        tokenizer_config=None,
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
    if expert in [str(index) for index in range(len(names))]:
        return int(expert)
    listed = ", ".join(f"{index} {name}" for index, name in enumerate(names))
    raise CheckpointError(f"{mixture.folder} has no expert '{expert}'; there are: {listed}")
