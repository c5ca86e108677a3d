"""`upcycle demo`: a tiny seed and its specialists trained from real text, mixed, trained on and measured."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import output
from .evaluate import show_losses, show_verdict
from .merge import RecipeName


def demo(
    family: Annotated[
        Literal["llama", "cohere2"], typer.Option(help="Sequential (llama) or parallel (cohere2) blocks.")
    ] = "llama",
    work: Annotated[Path, typer.Option(help="Folder for the models; a second run finds them there.")] = Path(".demo"),
    data: Annotated[Path, typer.Option(help="Folder of DOMAIN.train.jsonl and DOMAIN.heldout.jsonl.")] = Path(
        "tests/data/text"
    ),
    recipe: RecipeName = "bam-kv-shared",
) -> None:
    """Train a tiny seed and three specialists from real text, mix them, train the mixture, and measure each.

    Example: upcycle demo --family cohere2
    """
    from rich.console import Console

    from upcycle.demo import run_demo

    progress = Console(stderr=True)

    def report(message: str) -> None:
        if progress.is_terminal:
            progress.print(message, markup=False, highlight=False, soft_wrap=True)

    result = run_demo(family, data, work, recipe=recipe, progress=report)
    show_losses(result.evaluation)
    show_verdict(result.evaluation)
    output.data_line(f"\nHeld-out code: {result.prompt!r}\nThe mixture goes on: {result.sample!r}")
    output.data_line(f"\n{result.seconds:.0f} s. Load the mixture with\n")
    for line in output.loading_lines(result.mixture, remote_code=True):
        output.data_line(f"  {line}")
    output.data_line(f"\nReport: {result.report}")
