"""`upcycle inspect`: what a checkpoint is, from its config and headers."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import output
from .merge import Json


def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a mixture or of a dense checkpoint.")], as_json: Json = False
) -> None:
    """Show what a checkpoint is: family, experts, recipe, sizes and cost; reads no weights."""
    from upcycle.inspect import inspect_checkpoint
    from upcycle.scaling import DEFAULT_CONTEXT

    found = inspect_checkpoint(path)
    if as_json:
        output.data_object(
            {
                "path": str(path),
                "format": found.format,
                "model_type": found.model_type,
                "family": found.family,
                "num_experts": found.num_experts,
                "experts": found.experts,
                "recipe": found.recipe,
                "recipes": found.recipes,
                "dtype": found.dtype,
                **asdict(found.cost),
            }
        )
        return
    mixed = f"{found.recipe} of {', '.join(found.experts)}, " if found.experts else "dense, "
    dense = found.dense if found.experts else None
    output.cost_table(f"{path}: {mixed}{found.family}, {found.dtype}", found.cost, dense, DEFAULT_CONTEXT)
    if found.recipes:
        output.data_line(f"As a seed it fits the recipes {', '.join(found.recipes)}.")
