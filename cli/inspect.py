"""`upcycle inspect`: what a checkpoint is, from its config and headers."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import output
from .fetch import fetched
from .merge import Json


def inspect(
    path: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of a mixture or dense checkpoint.")],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is: family, experts, recipe, sizes and cost; reads no weights."""
    from upcycle.hub import is_offline, is_repository_name
    from upcycle.inspect import inspect_checkpoint, inspect_repository
    from upcycle.scaling import DEFAULT_CONTEXT

    if os.path.lexists(path) or not is_repository_name(path):
        found = inspect_checkpoint(Path(path))
    elif is_offline():
        found = inspect_checkpoint(fetched(path))
    else:
        found = inspect_repository(path)
    if as_json:
        output.data_object(
            {
                "path": path,
                "format": found.format,
                "model_type": found.model_type,
                "family": found.family,
                "num_experts": found.num_experts,
                "experts": found.experts,
                "groups": found.groups,
                "layers": found.layers,
                "recipe": found.recipe,
                "recipes": found.recipes,
                "dtype": found.dtype,
                **asdict(found.cost),
            }
        )
        return
    mixed = f"{found.recipe} of {', '.join(found.groups)}, " if found.experts else "dense, "
    if len(found.groups) < len(found.experts):
        mixed = f"{mixed}each split into {len(found.experts) // len(found.groups)} experts, "
    if found.experts:
        kind = f"native ({found.model_type})" if found.format == "native" else found.format
        mixed = f"{mixed}format {kind}, "
    dense = found.dense if found.experts else None
    output.cost_table(f"{path}: {mixed}{found.family}, {found.dtype}", found.cost, dense, DEFAULT_CONTEXT)
    if found.recipes:
        output.data_line(f"As a seed it fits the recipes {', '.join(found.recipes)}.")
