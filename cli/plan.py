"""`upcycle plan`: what a merge would produce and cost, from seeds or from a config.json alone."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import output
from .merge import (
    DTYPES,
    AlignVocab,
    ChatTemplate,
    Dtype,
    Format,
    Json,
    MaxShardSize,
    NumExperts,
    Overrides,
    RecipeName,
    Unrelated,
    Weights,
    parse_size,
    read_merge,
    show_plan,
)


def plan(
    recipe: RecipeName,
    seeds: Annotated[
        list[str] | None,
        typer.Option(
            "--seeds", metavar="[NAME=]SEED ...", help="Folders, or Hub repositories: repo@revision; BASE+ADAPTER."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A dense model's config.json instead of seeds, with --num-experts.")
    ] = None,
    num_experts: NumExperts = None,
    format: Format = "auto",
    overrides: Overrides = None,
    weights: Weights = None,
    dtype: Dtype = None,
    context: Annotated[
        int, typer.Option(min=1, max=2**31, help="Tokens of context at which FLOPs are counted.")
    ] = 2048,
    gpus: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="Show what training takes of each of so many GPUs, too.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="Sequences a GPU and forward.", show_default="1")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, max=2**31, help="Tokens a sequence.", show_default="--context")
    ] = None,
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of the training's products.")] = "bf16",
    max_shard_size: MaxShardSize = "5GB",
    allow_unrelated: Unrelated = False,
    align_vocab: AlignVocab = False,
    chat_template: ChatTemplate = None,
    as_json: Json = False,
) -> None:
    """Show what a merge would produce and cost; writes nothing.

    Example: upcycle plan --config config.json --num-experts 4 --recipe bam --gpus 8
    """
    if (seeds is None) == (config is None):
        raise typer.BadParameter("give either --seeds or --config (a dense model's config.json)")
    if gpus is None and (batch_size or sequence_length):
        raise typer.BadParameter("--batch-size and --sequence-length are those of a training; give --gpus, too")
    if seeds and gpus:
        raise typer.BadParameter("--gpus needs --config; give the config.json of one of the seeds")
    if weights and config:
        raise typer.BadParameter("--weights are shares of seeds, which change no cost; leave them out with --config")
    if seeds:
        made = read_merge(
            seeds,
            recipe,
            overrides or [],
            weights or [],
            dtype,
            num_experts,
            0,
            allow_unrelated,
            format,
            align_vocab,
            chat_template,
        )
        wants_text = made.recipe.from_text() or made.recipe.prompts
        planned = made.plan(made.seeds, text={} if wants_text else None)
        show_plan(planned, made.seeds, parse_size(max_shard_size), as_json, context=context)
        return
    from upcycle.recipe_file import load_recipe
    from upcycle.scaling import config_cost, config_training

    assert config is not None
    resolved = load_recipe(recipe, overrides or [])
    written = DTYPES[dtype] if dtype else None
    estimate = config_cost(resolved, config, num_experts, written, parse_size(max_shard_size), context, format)
    training, length = None, sequence_length or context
    if gpus:
        training = config_training(resolved, config, num_experts, gpus, batch_size or 1, length, precision)
    if as_json:
        about = {"format": estimate.format, "model_type": estimate.model_type, "num_experts": estimate.num_experts}
        result = {"recipe": resolved.name, "config": str(config), **about, **asdict(estimate.cost)}
        output.data_object({**result, "training": asdict(training)} if training else result)
        return
    title = f"{resolved.name} of {num_experts} × {config} ({estimate.architecture}), format {estimate.format}"
    output.cost_table(title, estimate.cost, estimate.dense, context)
    if training:
        output.training_table(training, batch_size or 1, length, precision)
