"""A finished mixture, read by its headers, and the way back: one expert as a dense checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upcycle.checkpoint import CONFIG, PROVENANCE, TensorInfo, read_json, read_tensors
from upcycle.companions import FORMAT_VERSION, copied_files, dense_config
from upcycle.dense_config import read_dense
from upcycle.errors import CheckpointError, RecipeError
from upcycle.layout import PREFIX, Layout, Piece, make_layout
from upcycle.native import NATIVE
from upcycle.numeric import FLOATS
from upcycle.plan import MergePlan, SourceCheckpoint
from upcycle.planned import Part, PlannedGroup, PlannedTensor, Source
from upcycle.recipe import EXPERTS, MEAN, ROLES, AttentionRouter, Experts, FfnRouter, Recipe
from upcycle.recipe_checks import check_recipe
from upcycle.recipe_file import MAX_EXPERTS, MAX_LAYERS, parse_recipe
from upcycle.version import __version__


@dataclass(frozen=True)
class Mixture:
    """A finished mixture, read by its headers; `provenance` is empty where training saved it without.

    Attributes:
        dense_config: the config.json of the models that it was made of.
        experts: the names of its FFN experts.
    """

    folder: Path
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    dense_config: Mapping[str, Any]
    experts: Sequence[str]
    tensors: Mapping[str, TensorInfo]
    layout: Layout
    recipe: Recipe

    @property
    def groups(self) -> list[str]:
        """The names of the FFNs that were made experts: those of the experts, unless each was split into several."""
        shards = self.recipe.experts.granularity
        return [name.removesuffix(".0") if shards > 1 else name for name in self.experts[::shards]]


def own_experts(experts: Sequence[str], groups: Sequence[str], name: str) -> range:
    """The numbers of the experts that the FFN of a name became: one, several where it was split, none of no name."""
    shards = len(experts) // max(1, len(groups))
    first = groups.index(name) * shards if name in groups else 0
    return range(first, first + shards if name in groups else first)


def is_mixture(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is BAM's, or a native one whose upcycle.json says of which models it was made."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type == "bam":
        return model_type == "bam"
    return model_type in NATIVE and isinstance(_provenance(folder).get("dense_config"), dict)


def _provenance(folder: Path) -> dict[str, Any]:
    return read_json(folder / PROVENANCE) if (folder / PROVENANCE).exists() else {}


def read_mixture(folder: Path, tensors: Mapping[str, TensorInfo] | None = None) -> Mixture:
    """Read a mixture's config and, unless its `tensors` are given, headers; merged or trained, BAM's or native.

    Raises:
        CheckpointError, SeedError: it is none, or is damaged.
    """
    config, provenance = read_json(folder / CONFIG), _provenance(folder)
    if not is_mixture(folder, config):
        of_ours = "a BAM mixture (model_type 'bam') or a native one with its upcycle.json"
        raise CheckpointError(f"{folder} is a {config.get('model_type')!r} checkpoint, expected {of_ours}")
    try:
        read = _read_bam if config["model_type"] == "bam" else _read_native
        recipe, names, dense_config, count = read(folder, config, provenance)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} or {PROVENANCE} holds a value of a wrong kind: {error!r}") from error
    model = read_dense(dense_config, f"mixture {folder}")
    try:
        check_recipe(recipe, model, count)
        layout = make_layout(model, recipe, count, NATIVE.get(config["model_type"]))
    except RecipeError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
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
    return Mixture(folder, config, provenance, dense_config, names, tensors, layout, recipe)


_Read = tuple[Recipe, list[str], Mapping[str, Any], int]


def _read_native(folder: Path, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> _Read:
    """Recipe, experts' names, the dense config and how many models were mixed."""
    table = dict(provenance["recipe"])
    recipe, native = parse_recipe(str(table.pop("name")), table), NATIVE[config["model_type"]]
    shards, names, count = recipe.experts.granularity, list(provenance["experts"]), config[native.count]
    named = all(type(name) is str for name in names)
    if not named or type(count) is not int or len(names) != count:
        raise CheckpointError(
            f"{folder / CONFIG}: {native.count} is {str(count)[:80]}, but {PROVENANCE} names {len(names)} experts"
        )
    if count % shards or config["num_experts_per_tok"] % shards:
        raise CheckpointError(
            f"{folder / CONFIG}: {native.count} is {count!r}, but {PROVENANCE} lists {len(names)} experts of "
            f"{shards} shards each"
        )
    normalize = native.rescales or config["norm_topk_prob"]
    router = replace(recipe.ffn_router, top_k=config["num_experts_per_tok"] // shards, normalize=normalize)
    recipe = replace(recipe, ffn_router=router)
    return recipe, names, provenance["dense_config"], count // shards - recipe.experts.extra


def _read_bam(folder: Path, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> _Read:
    """The same of a BAM mixture, all from its config; the provenance adds the recipe's name."""
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: format_version is {config.get('format_version')!r}, this upcycle reads {FORMAT_VERSION}"
        )
    _check_kinds(folder, config)
    names, count, shards = config["expert_names"], config["num_experts"], config.get("granularity", 1)
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
    models = config.get("num_attention_experts", count // shards)
    if not config["attention_experts"]:  # then the config does not tell those apart that were added
        models -= _extra(recorded, count // shards)
    layers = config.get("mixed_layers")
    bias = {"an expert": 0.0} if config.get("router_bias") else {}
    active = config.get("num_attention_experts_per_tok")
    recipe = Recipe(
        name=str(name or "a mixture"),
        summary="",
        mix=mix,
        layers="all" if layers is None else ",".join(map(str, layers)),
        experts=Experts(
            granularity=shards, extra=count // shards - models, shared=(MEAN,) * config.get("num_shared_experts", 0)
        ),
        ffn_router=FfnRouter(
            top_k=config["num_experts_per_tok"] // shards, normalize=config["norm_topk_prob"], bias=bias
        ),
        attention_router=AttentionRouter(routing="soft" if active is None else "top-k", top_k=active or 1),
    )
    return recipe, names, config["dense_config"], models


def _extra(recipe: Any, groups: int) -> int:
    """How many of so many FFNs were added to the seeds', by a recorded recipe, which may be anybody's."""
    experts = recipe.get("experts") if isinstance(recipe, dict) else None
    extra = experts.get("extra") if isinstance(experts, dict) else None
    return extra if type(extra) is int and 0 < extra < groups else 0


def _check_kinds(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse values that no BAM config has."""
    kinds = {
        "num_experts": int,
        "num_experts_per_tok": int,
        "expert_names": list,
        "dense_config": dict,
        "norm_topk_prob": bool,
        "attention_experts": bool,
        "shared_key_value": bool,
    }
    rare = {
        "num_attention_experts": int,
        "num_attention_experts_per_tok": int,
        "granularity": int,
        "num_shared_experts": int,
        "router_bias": bool,
        "mixed_layers": list,
    }
    for key, kind in {**kinds, **{key: kind for key, kind in rare.items() if key in config}}.items():
        sound = type(config.get(key)) is kind and (kind is not int or 0 <= config[key] <= MAX_EXPERTS)
        if not sound:
            raise CheckpointError(f"{folder / CONFIG}: {key} is {str(config.get(key))[:80]}, expected {kind.__name__}")
    names, count, shards = config["expert_names"], config["num_experts"], config.get("granularity", 1)
    named = len(names) == count and all(type(name) is str for name in names)
    if not named or not 1 <= config["num_experts_per_tok"] <= count:
        raise CheckpointError(
            f"{folder / CONFIG}: num_experts is {count}, but expert_names lists {len(names)} "
            f"and num_experts_per_tok is {config['num_experts_per_tok']}"
        )
    whole = shards > 0 and count % shards == 0 and config["num_experts_per_tok"] % shards == 0
    if not whole or not 1 <= config.get("num_attention_experts", 1) <= count // shards:
        raise CheckpointError(
            f"{folder / CONFIG}: {count} experts, {config['num_experts_per_tok']} a token, granularity {shards} and "
            f"{config.get('num_attention_experts')} attention experts do not belong together"
        )
    layers = config.get("mixed_layers", [0])
    if not layers or len(layers) > MAX_LAYERS or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise CheckpointError(f"{folder / CONFIG}: mixed_layers is {str(layers)[:80]}, expected numbers of layers")
    scales = config.get("ffn_scale") or [1.0]
    if not (isinstance(scales, list) and scales and all(type(one) is float and 0 < one < 1e6 for one in scales)):
        raise CheckpointError(f"{folder / CONFIG}: ffn_scale is {str(scales)[:80]}, expected a list of numbers above 0")


def router_records(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What upcycle.json says of routers that were set from text, by kind; nothing where they were not."""
    found = provenance.get("routers")
    return dict(found) if isinstance(found, dict) else {}


def plan_extract(mixture: Mixture, expert: int) -> MergePlan:
    """Plan the way back: expert number `expert` as a dense checkpoint, with the mixture's shared parameters.

    Raises:
        CheckpointError: the expert is an FFN that was added to those of the seeds, without an attention of its own.
    """
    pieces: dict[str, list[tuple[Piece, Source]]] = {}
    for tensor in (tensor for tensor in mixture.layout.mixture if not tensor.shared):
        base = 0
        for group in tensor.groups:
            if group.expert is None or group.expert <= expert < group.expert + group.copies:
                copy = 0 if group.expert is None else expert - group.expert
                offset = base + copy * group.width
                for piece in group.pieces:
                    source = Source(0, tensor.name, offset, group.copies * group.width)
                    pieces.setdefault(piece.tensor, []).append((piece, source))
                    offset += piece.block
            base += group.size
    tensors = []
    for name, shape in mixture.layout.dense.items():
        if name not in pieces:
            raise CheckpointError(
                f"expert '{mixture.groups[expert]}' of {mixture.folder} is an FFN that was added to the seeds', so it "
                f"has no '{name}' of its own and is no whole model"
            )
        dtype = mixture.tensors[pieces[name][0][1].tensor].dtype
        tensors.append(PlannedTensor(name, dtype, shape, _dense_groups(pieces[name])))
    name, family = mixture.groups[expert], mixture.layout.model.family
    prefix = "" if mixture.layout.native else PREFIX
    main_dtype = mixture.tensors[f"{prefix}{family.base}.{family.embedding}.weight"].dtype
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
        config=dense_config(mixture.dense_config, main_dtype),
        provenance=provenance,
        random_seed=0,
        copied=copied_files(mixture.folder, with_code=False),
        tokenizer_config=None,
        layout=mixture.layout,
        recipe=replace(mixture.recipe, mix=dict.fromkeys(mixture.recipe.mix, "mean")),
    )


def _dense_groups(members: Sequence[tuple[Piece, Source]]) -> tuple[PlannedGroup, ...]:
    """A dense tensor put together from its pieces: rows of several side by side, or one piece after another."""
    by_start: dict[int, list[tuple[Piece, Source]]] = {}
    for piece, source in sorted(members, key=lambda member: member[0].start):
        by_start.setdefault(piece.start, []).append((piece, source))
    rows, parts = [], []
    for same in by_start.values():  # several where each shard of an FFN has its whole bias
        piece, count = same[0][0], len(same)
        rows.append(piece)
        parts.append(
            Part(piece.block, tuple(source for _, source in same), (1 / count,) * count, scale=1 / piece.scale)
        )
    if len(parts) > 1 and rows[0].stride > rows[0].block:
        return (PlannedGroup(rows[0].rows, tuple(parts)),)
    return tuple(PlannedGroup(piece.rows, (part,)) for piece, part in zip(rows, parts, strict=True))


def find_expert(mixture: Mixture, expert: str) -> int:
    """The number of an expert given by number or name.

    Raises:
        CheckpointError: there is none such; the message lists them.
    """
    names = mixture.groups
    if expert in names:
        return names.index(expert)
    if expert in [str(index) for index in range(len(names))]:
        return int(expert)
    listed = ", ".join(f"{index} {name}" for index, name in enumerate(names))
    raise CheckpointError(f"{mixture.folder} has no expert '{expert}'; there are: {listed}")
