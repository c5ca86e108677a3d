"""`upcycle extract`: one expert of a mixture back as a dense checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from . import output
from .fetch import fetched
from .merge import Json, MaxShardSize, parse_size


def extract(
    mixture: Annotated[
        str, typer.Argument(metavar="MIXTURE", help="Folder or Hub name of a mixture that upcycle merged.")
    ],
    expert: Annotated[str, typer.Option(help="The expert's number or name.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    max_shard_size: MaxShardSize = "5GB",
    yes: Annotated[bool, typer.Option("--yes", help="Overwrite a former result.")] = False,
    as_json: Json = False,
) -> None:
    """Take an expert out of a mixture as a dense checkpoint, with the mixture's shared parameters.

    Example: upcycle extract bam-4x --expert law --out law-again
    """
    from upcycle.merge import merge
    from upcycle.mixture import find_expert, plan_extract, read_mixture

    source = read_mixture(fetched(mixture))
    plan = plan_extract(source, find_expert(source, expert))
    with output.byte_progress(f"{expert} → {out}", plan.nbytes) as progress:
        result = merge(plan, out, max_shard_size=parse_size(max_shard_size), overwrite=yes, progress=progress)
    if as_json:
        output.data_object(output.result_object(plan, out, result.bytes_written, result.seconds))
        return
    output.data_line(
        f"{out}: expert {expert} as a dense {plan.layout.model.family.architecture}, "
        f"{output.size(result.bytes_written)}"
    )
    output.data_line("\nLoad it with\n")
    for line in output.loading_lines(out, remote_code=False):
        output.data_line(f"  {line}")
