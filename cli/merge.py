"""`upcycle merge`: several dense checkpoints into one mixture."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import output
from .fetch import fetch_seeds
from .push import License, PushTo, prepare_push, push_result
from .routers import RouterTokens, fitting_steps, show_warnings

if TYPE_CHECKING:
    from upcycle.plan import MergePlan
    from upcycle.recipe import Recipe
    from upcycle.router_checkpoint import RoutersResult
    from upcycle.router_text import RouterText
    from upcycle.scaling import Cost
    from upcycle.seeds import Seed

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}

Seeds = Annotated[
    list[str],
    typer.Option(
        "--seeds",
        metavar="[NAME=]SEED ...",
        help="Folders (or Hub repositories, repo@revision) of the dense checkpoints; BASE+ADAPTER with a LoRA adapter.",
    ),
]
RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe's name (see `upcycle recipes`) or a .toml file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's value: router.ffn.top_k=2.")
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        metavar="NAME=SHARE ...",
        help="Each seed's share in whatever the recipe averages; else equal ones.",
    ),
]
Dtype = Annotated[
    Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="Convert every tensor; else the seeds' own.")
]
NumExperts = Annotated[int | None, typer.Option(max=1024, help="Copies of the seed, for recipes that copy one.")]
Format = Annotated[
    Literal["auto", "native", "bam"],
    typer.Option(help="native: a mixture class of transformers' own; bam: ours; auto: native where that is exact."),
]
RandomSeed = Annotated[int, typer.Option(min=0, max=2**63, help="From which the routers are drawn.")]
Unrelated = Annotated[bool, typer.Option("--allow-unrelated", help="Mix seeds that share no ancestor.")]
AlignVocab = Annotated[
    bool, typer.Option("--align-vocab", help="Match rows of embedding and head by token where seeds have added tokens.")
]
ChatTemplate = Annotated[
    str | None,
    typer.Option("--chat-template", metavar="NAME", help="Take this seed's chat template.", show_default="the first's"),
]
MaxShardSize = Annotated[str, typer.Option(help="Bytes of weights in one file: 5GB, 500MB, ...")]
RouterData = Annotated[
    list[str] | None,
    typer.Option(
        "--router-data",
        metavar="NAME=FILE ...",
        help="A little text for each seed (.jsonl, .txt, .parquet, .npy), to which the routers are fitted.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def merge(
    seeds: Seeds,
    recipe: RecipeName,
    out: Annotated[Path | None, typer.Option(help="Folder to make.", show_default="RECIPE-Nx")] = None,
    dtype: Dtype = None,
    overrides: Overrides = None,
    weights: Weights = None,
    num_experts: NumExperts = None,
    format: Format = "auto",
    random_seed: RandomSeed = 0,
    router_data: RouterData = None,
    router_tokens: RouterTokens = 16_384,
    max_shard_size: MaxShardSize = "5GB",
    allow_unrelated: Unrelated = False,
    align_vocab: AlignVocab = False,
    chat_template: ChatTemplate = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be made and what it costs.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Overwrite a former result.")] = False,
    push_to: PushTo = None,
    license: License = None,
    as_json: Json = False,
) -> None:
    """Merge dense checkpoints of one ancestor into one mixture of experts.

    Example: upcycle merge --seeds code law math --recipe bam-kv-shared
    """
    from upcycle.data import split_names
    from upcycle.router_text import check_names, read_router_text
    from upcycle.staging import check_target

    if license and not push_to:
        raise typer.BadParameter("--license is for --push-to")
    made = read_merge(
        seeds,
        recipe,
        overrides or [],
        weights or [],
        dtype,
        num_experts,
        random_seed,
        allow_unrelated,
        format,
        align_vocab,
        chat_template,
    )
    make, read = made.plan, made.seeds
    names = [seed.name for seed in read]
    # Only the option and the recipe are looked at so far, and what can be planned before the text is read.
    sources = split_names("--router-data", router_data) if router_data else made.recipe.prompts
    option = "--router-data" if router_data else "[prompts]"
    if sources:
        check_names(list(sources), names, option)
    plan = make(read, text={} if sources else None)
    shard_bytes = parse_size(max_shard_size)
    experts = len(plan.sources) if plan.format == "dense" else plan.num_experts
    target = out or Path(f"{plan.recipe.name}-{experts}x")
    check_target(target, yes, [folder for source in plan.sources for folder in source.folders])
    if dry_run:
        show_plan(plan, read, shard_bytes, as_json, target)
        return
    if push_to:
        prepare_push(push_to, plan.provenance, license)
    if fetch_seeds(read):
        tell_template(read, chat_template)
        plan = plan if sources else make(read)
    text = None
    if sources:
        model = plan.layout.model
        longest = model.values["max_position_embeddings"]
        config = {**read[0].config, "vocab_size": model.sizes.vocab}
        text = read_router_text(
            sources, names, read[0].folder, config, tokens=router_tokens, longest=longest, option=option
        )
        plan = make(read, text=text.record(), usage=text.usage(model.sizes.vocab))
    if push_to:  # what is there is compared with the plan of what is here
        prepare_push(push_to, {**plan.provenance, "plan": plan.digest()}, license)
    run(plan, target, shard_bytes, yes, as_json, push_to, license, text)


@dataclass(frozen=True)
class Inputs:
    """What a merge is made of, and what plans it."""

    recipe: "Recipe"
    seeds: "list[Seed]"
    plan: "Callable[..., MergePlan]"


def read_merge(
    seeds: list[str],
    recipe: str,
    overrides: list[str],
    weights: list[str],
    dtype: str | None,
    num_experts: int | None,
    random_seed: int,
    allow_unrelated: bool,
    format: str,
    align_vocab: bool,
    chat_template: str | None,
) -> Inputs:
    """Read recipe and seeds, and say what becomes of tokens and chat templates that differ."""
    from upcycle.plan import plan_merge
    from upcycle.recipe_file import load_recipe
    from upcycle.seeds import read_seeds
    from upcycle.vocabulary import align

    loaded = load_recipe(recipe, overrides, weights)
    read = read_seeds(seeds, align_vocab)
    alignment = align(read) if align_vocab else None
    make = partial(
        plan_merge,
        loaded,
        dtype=DTYPES[dtype] if dtype else None,
        num_experts=num_experts,
        random_seed=random_seed,
        allow_unrelated=allow_unrelated,
        format=format,
        alignment=alignment,
        chat_template=chat_template,
    )
    for seed, spec in zip(read, seeds, strict=True):
        if seed.repository and seed.repository not in spec:
            output.note(f"{spec} is now {seed.repository} on the Hub")
    for line in alignment.notes() if alignment else []:
        output.note(line)
    tell_template(read, chat_template)
    return Inputs(loaded, read, make)


def tell_template(read: "Sequence[Seed]", chosen: str | None) -> None:
    """Say whose chat template is taken where seeds that are here have several."""
    from upcycle.chat_template import template_note

    note = template_note(read, chosen)
    if note:
        output.note(note)


def show_plan(
    plan: "MergePlan",
    read: "Sequence[Seed]",
    max_shard_size: int,
    as_json: bool,
    out: Path | None = None,
    context: int | None = None,
) -> None:
    """Print what a plan would make and what it costs."""
    from upcycle.scaling import DEFAULT_CONTEXT, plan_cost
    from upcycle.seeds import download_bytes

    context = context or DEFAULT_CONTEXT
    cost, dense = plan_cost(plan, max_shard_size, context)
    seeds = [source.name for source in plan.sources]
    if as_json:
        about = {"format": plan.format, "model_type": plan.config["model_type"], "num_experts": plan.num_experts}
        about |= {"download_bytes": download_bytes(read), "native_misfit": plan.native_misfit}
        output.data_object(
            {"recipe": plan.recipe.name, "seeds": seeds, "out": out and str(out), **about, **asdict(cost)}
        )
        return
    title = f"{plan.recipe.name} of {', '.join(seeds)} ({plan.layout.model.family.architecture}), format {plan.format}"
    output.cost_table(title, cost, dense, context)
    if plan.native_misfit and plan.format == "bam":
        output.data_line(f"Why BAM's format and no class of transformers' own: {plan.native_misfit}.")
    if any(seed.remotes for seed in read):
        output.data_line(f"To be downloaded: {output.size(download_bytes(read))}")


def run(
    plan: "MergePlan",
    out: Path,
    max_shard_size: int,
    overwrite: bool,
    as_json: bool,
    push_to: str | None = None,
    license: str | None = None,
    text: "RouterText | None" = None,
) -> None:
    """Write a plan's checkpoint with a progress bar, its routers set from `text` if there is one; say what was made
    and how to load it, and push it if asked to.
    """
    from upcycle.merge import merge
    from upcycle.scaling import DEFAULT_CONTEXT, plan_cost
    from upcycle.staging import partial_folder

    cost, _ = plan_cost(plan, max_shard_size, DEFAULT_CONTEXT)
    routers: RoutersResult | None = None
    steps = fitting_steps(text, plan.layout.model.sizes.layers)
    with (
        output.byte_progress(f"{plan.recipe.name} → {out}", plan.nbytes) as progress,
        output.share_progress("setting the routers", steps, after=progress) as setting,
    ):

        def finish(folder: Path) -> Mapping[str, list[str]]:
            from upcycle.router_checkpoint import set_checkpoint_routers

            nonlocal routers
            assert text is not None
            routers, sums = set_checkpoint_routers(folder, text, plan.recipe.from_text(), progress=setting)
            return sums

        try:
            result = merge(
                plan,
                out,
                max_shard_size=max_shard_size,
                overwrite=overwrite,
                progress=progress,
                tell=output.note,
                finish=finish if text and plan.recipe.from_text() else None,
            )
        except KeyboardInterrupt:
            output.note(f"the same command goes on from what was written, in {partial_folder(out)}")
            raise
    for note in plan.notes:
        output.note(note)
    if as_json:
        about = {**output.result_object(plan, out, result.bytes_written, result.seconds), **asdict(cost)}
        if routers:
            show_warnings(routers)
            about["router_accuracy"] = routers.accuracy
        if not push_to:
            output.data_object(about)
            return
        try:
            about["url"] = push_result(out, push_to, license).url
        finally:
            output.data_object(about)
        return
    _say(plan, out, result.bytes_written, result.seconds, cost, routers)
    if push_to:
        output.data_line(push_result(out, push_to, license).url)


def _say(
    plan: "MergePlan", out: Path, bytes_written: int, seconds: float, cost: "Cost", routers: "RoutersResult | None"
) -> None:
    """What was made, what is to be known of it, and how to load it."""
    from upcycle.checkpoint import ITEM_SIZE
    from upcycle.layout import takes_grouped_product

    mixed = plan.format != "dense"
    kind = f"native ({plan.config['architectures'][0]})" if plan.format == "native" else plan.format
    experts = f"{plan.num_experts} experts, format {kind}, " if mixed else "dense, "
    output.data_line(
        f"{out}: {experts}{output.count(cost.total_parameters)} parameters, "
        f"{output.count(cost.active_parameters)} active per token, "
        f"{output.size(bytes_written)}, in {seconds:.2f} s"
    )
    if routers:
        show_warnings(routers)
        output.data_line(f"Routers are set from text; {routers.summary()}.")
    elif mixed:
        text_helps = (
            ""
            if plan.recipe.copies or plan.recipe.experts.extra
            else ", or give a little text for each seed (--router-data) to set them from"
        )
        output.data_line(f"Its routers are untrained: train the mixture{text_helps}.")
    if mixed and plan.native_misfit:
        output.data_line(f"Why BAM's format and no class of transformers' own: {plan.native_misfit}.")
    if mixed and plan.recipe.ffn_active == 1 and plan.recipe.ffn_router.normalize:
        output.data_line(
            "With top_k = 1 and normalize = true every gate is 1: the language-model loss gives the FFN routers no "
            "gradient. To train them, take normalize = false, as the paper does."
        )
    output.data_line("\nLoad it with\n")
    itemsize = min(ITEM_SIZE[tensor.dtype] for tensor in plan.tensors)
    eager = not takes_grouped_product(plan.layout, plan.recipe, itemsize)
    for line in output.loading_lines(out, remote_code=plan.format == "bam", eager=eager):
        output.data_line(f"  {line}")


def parse_size(text: str) -> int:
    """`5GB`, `500 MB`, `1000000` in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    units = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    wanted = float(match[1]) * units[match[2]] if match else 0.0
    if not 1 <= wanted <= 10**18:
        raise typer.BadParameter(f"--max-shard-size {text}: expected a size like 5GB, 500MB or 1000000")
    return int(wanted)
