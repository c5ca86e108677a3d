"""The plan of a merge: every output tensor with its sources, made from headers and checked before a byte moves."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from upcycle.ancestry import check_related, find_ancestor, fingerprint, sample
from upcycle.chat_template import take_template
from upcycle.checkpoint import TensorInfo
from upcycle.companions import bam_config, copied_files, dense_config, tokenizer_config, tokenizer_note
from upcycle.dense_config import DenseModel
from upcycle.errors import RecipeError, SeedError, did_you_mean
from upcycle.layout import Layout, make_layout
from upcycle.licenses import seed_records
from upcycle.native import NATIVE, NativeClass, native_config, native_misfit
from upcycle.numeric import Array
from upcycle.planned import PlannedTensor, Source
from upcycle.planner import Planner
from upcycle.recipe import Recipe
from upcycle.recipe_checks import check_names, check_recipe, count_experts
from upcycle.seeds import Seed, adapter_record, check_tensors, read_license
from upcycle.version import __version__
from upcycle.vocabulary import Alignment, own_shapes

FORMATS: Final = ("auto", "native", "bam")


@dataclass(frozen=True)
class SourceCheckpoint:
    """What a plan reads from: a seed's (or a mixture's) name, folder and tensors."""

    name: str
    folder: Path
    tensors: Mapping[str, TensorInfo]

    @property
    def files(self) -> set[Path]:
        """Every file that its weights are read from."""
        return {file for info in self.tensors.values() for file in info.files}

    @property
    def folders(self) -> set[Path]:
        """Its folder, and those of these files."""
        return {self.folder, *(file.parent for file in self.files)}


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge does, as plain data.

    Attributes:
        format: "bam", "native" (a mixture class of transformers' own) or "dense".
        num_experts: FFN experts of a layer; 1 for a dense result.
        native_misfit: why it could not be native, where no class of transformers' own fits.
        sources: the checkpoints that `Source.checkpoint` counts.
        tensors: the output tensors in the order in which they are written.
        config: the output's config.json.
        provenance: its upcycle.json, without the plan's hash.
        random_seed: from which routers are initialised.
        usage: `[vocabulary, seeds]`, the weights of each row of what is mixed by usage; None where nothing is, or where
            a plan is made again without the text.
        copied: files taken over byte for byte, by the output's name.
        tokenizer_config: the output's tokenizer_config.json where it must differ from the seed's, else None.
        notes: sentences for whoever merges.
        added_tokens: what the output's tokenizer has beyond the first seed's, as its tokenizer.json lists it.
    """

    format: str
    num_experts: int
    sources: tuple[SourceCheckpoint, ...]
    tensors: tuple[PlannedTensor, ...]
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    random_seed: int
    copied: Mapping[str, Path]
    tokenizer_config: Mapping[str, Any] | None
    layout: Layout
    recipe: Recipe
    usage: Array | None = None
    native_misfit: str | None = None
    notes: tuple[str, ...] = ()
    added_tokens: tuple[Mapping[str, Any], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def digest(self) -> str:
        """SHA-256 of what the plan does; no path, no time and no name of a repository enters it."""
        table = [
            {
                "name": t.name,
                "dtype": t.dtype,
                "shape": t.shape,
                "groups": [asdict(g) for g in t.groups],
                "init": t.init and asdict(t.init),
            }
            for t in self.tensors
        ]
        provenance = dict(self.provenance)
        # Not where seeds came from: their fingerprints say what they are.
        provenance["seeds"] = [
            {key: seed.get(key) for key in ("name", "fingerprint", "dropped")} for seed in seed_records(provenance)
        ]
        text = json.dumps([table, dict(self.config), provenance, self.random_seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def plan_merge(
    recipe: Recipe,
    seeds: Sequence[Seed],
    *,
    dtype: str | None = None,
    num_experts: int | None = None,
    random_seed: int = 0,
    allow_unrelated: bool = False,
    text: Mapping[str, Any] | None = None,
    usage: Array | None = None,
    format: str = "auto",
    alignment: Alignment | None = None,
    chat_template: str | None = None,
) -> MergePlan:
    """Plan the merge of `seeds` by `recipe`; reads nothing but headers and 2048 elements of every tensor.

    Of seeds whose weights are still on the Hub only four tensors are sampled, and the plan is one to look at: it lacks
    their fingerprints, and is made again when they are downloaded.

    Args:
        recipe: how each role is mixed.
        seeds: the experts, in their order; with `recipe.copies` the one seed to copy.
        dtype: "BF16", "F16" or "F32" to convert every tensor, None to keep the seeds' own.
        num_experts: copies of the seed; only with `recipe.copies`.
        random_seed: for the routers.
        allow_unrelated: skip the check that the seeds share an ancestor.
        text: what is recorded of the text that routers are set from after the merge; None if there is none.
        usage: `[vocabulary, seeds]`, how the rows of embedding and head are weighted where the recipe mixes them by
            usage; rows sum to 1.
        format: "native" for a mixture class of transformers' own, "bam", or "auto": native where one fits exactly.
        alignment: `vocabulary.align(seeds)` for seeds that were read to be aligned, else None.
        chat_template: the name of the seed whose chat template is taken; None for the first seed's.

    Raises:
        RecipeError, SeedError, CheckpointError: what cannot be served, before anything is written.
    """
    recipe = recipe.settled(text is not None)
    experts = count_experts(recipe, len(seeds), num_experts)
    first = seeds[0]
    check_recipe(recipe, first.model, experts)
    check_names(recipe, [seed.name for seed in seeds])
    native, misfit = choose_format(recipe, first.model, format, text is not None and bool(recipe.from_text()))
    model = alignment.model(first.model) if alignment else first.model
    layout = make_layout(model, recipe, experts, native)
    dropped = [check_tensors(seed, own_shapes(seed, layout.dense)) for seed in seeds]
    _check_dtypes(seeds, layout.dense, dtype)
    samples = [sample(seed) for seed in seeds]
    if not allow_unrelated:
        check_related(seeds, samples)

    main_dtype = dtype or first.tensors[f"{first.model.family.base}.{first.model.family.embedding}.weight"].dtype
    ancestor = seeds[0].name if recipe.copies else find_ancestor(seeds, samples)
    planner = Planner(recipe, layout, seeds, dtype, main_dtype, ancestor, alignment)
    tensors = tuple(planner.tensor(tensor) for tensor in layout.mixture)
    unused = _check_complete(tensors, layout, len(seeds))
    made = "native" if native else "bam" if recipe.ffn_experts else "dense"
    own = alignment.config(first.config, first.model) if alignment else dict(first.config)
    copied, own_tokenizer_config = take_template(
        seeds,
        chat_template,
        copied_files(first.folder, with_code=made == "bam"),
        tokenizer_config(first, made == "native") if recipe.ffn_experts else None,
    )
    recorded = {
        "dense_config": own if native else None,
        "router_text": None if text is None else dict(text),
        "vocabulary": alignment.record() if alignment else None,
        "chat_template": chat_template,
    }
    return MergePlan(
        format=made,
        num_experts=recipe.ffn_count(experts) if recipe.ffn_experts else 1,
        sources=tuple(SourceCheckpoint(seed.name, seed.folder, seed.tensors) for seed in seeds),
        tensors=tensors,
        config=_config(planner, own, dtype),
        provenance={"upcycle_version": __version__, "format": made}
        | _provenance(planner, samples, dropped, unused, random_seed)
        | {key: value for key, value in recorded.items() if value is not None},
        random_seed=random_seed,
        copied=copied,
        tokenizer_config=own_tokenizer_config,
        layout=layout,
        recipe=recipe,
        usage=usage,
        native_misfit=misfit,
        notes=tuple(note for note in (tokenizer_note(first) if native else None,) if note),
        added_tokens=alignment.added if alignment else (),
    )


def _config(planner: Planner, own: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The result's config.json, made of a dense model's own."""
    recipe, layout = planner.recipe, planner.layout
    if layout.native:
        return native_config(own, layout.model, recipe, layout.experts, planner.main_dtype)
    if recipe.ffn_experts:
        return bam_config(own, layout, recipe, planner.expert_names(), planner.main_dtype)
    return dense_config(own, dtype)


def choose_format(
    recipe: Recipe, model: DenseModel, wanted: str, from_text: bool
) -> tuple[NativeClass | None, str | None]:
    """The native class that is taken, and else why none fits; neither where BAM's format is asked for.

    Raises:
        RecipeError: a format that there is not, or that cannot be.
    """
    if wanted not in FORMATS:
        raise RecipeError(f"there is no format '{wanted}'{did_you_mean(wanted, FORMATS)}")
    if wanted != "auto" and not recipe.ffn_experts:
        raise RecipeError(f"recipe '{recipe.name}' makes a dense model, which has one format; leave --format out")
    if wanted == "bam":
        return None, None
    misfit = native_misfit(model, recipe, from_text)
    if misfit is None:
        return NATIVE[model.family.native], None
    if wanted == "native":
        raise RecipeError(f"--format native: {misfit}; --format auto takes BAM's format there")
    return None, misfit


def _provenance(
    planner: Planner,
    samples: Sequence[Mapping[str, bytes]],
    dropped: Sequence[Sequence[str]],
    unused: Sequence[set[str]],
    random_seed: int,
) -> dict[str, Any]:
    """What `upcycle.json` says but for the plan's hash."""
    recipe, seeds = planner.recipe, planner.seeds
    records = [
        {
            "name": seed.name,
            "repository": seed.repository,
            "revision": seed.revision,
            "license": read_license(seed.folder),
            "fingerprint": fingerprint(seed, samples[index]) if seed.here else None,
            "dropped": sorted({*dropped[index], *unused[index]}),
            **({"adapter": adapter_record(seed.adapter)} if seed.adapter else {}),
        }
        for index, seed in enumerate(seeds)
    ]
    return {
        "recipe": recipe.resolved(),
        "seeds": records,
        "ancestor": planner.ancestor,
        "experts": planner.expert_names() if recipe.ffn_experts else [],
        "random_seed": random_seed,
    }


def _check_dtypes(seeds: Sequence[Seed], dense: Mapping[str, tuple[int, ...]], dtype: str | None) -> None:
    if dtype:
        return
    for seed in seeds[1:]:
        for name in dense:
            found, expected = seed.tensors[name].dtype, seeds[0].tensors[name].dtype
            if found != expected:
                raise SeedError(
                    f"{seed.where}: tensor '{name}' is {found}, but {seeds[0].where} has it in {expected}; "
                    "--dtype bf16 (or fp16, fp32) converts every seed"
                )


def _check_complete(tensors: Sequence[PlannedTensor], layout: Layout, num_sources: int) -> list[set[str]]:
    """Every output tensor is filled whole and once: our own promise. Returns each source's unused tensors."""
    assert len({tensor.name for tensor in tensors}) == len(tensors), "an output tensor is planned twice"
    used = [set[str]() for _ in range(num_sources)]
    for tensor in tensors:
        filled = sum(group.rows * group.width for group in tensor.groups)
        assert tensor.init or filled == prod(tensor.shape), f"{tensor.name}: {filled} planned for {tensor.shape}"
        for source in _sources(tensor):
            used[source.checkpoint].add(source.tensor)
    assert set().union(*used) == set(layout.dense), "a tensor of the seeds is forgotten"
    return [set(layout.dense) - names for names in used]


def _sources(tensor: PlannedTensor) -> Iterator[Source]:
    for group in tensor.groups:
        for part in group.parts:
            yield from part.sources
