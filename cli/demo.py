"""`upcycle demo`: a tiny seed and its specialists trained from real text, mixed, trained on and measured."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import output
from .merge import RecipeName

if TYPE_CHECKING:
    from rich.table import Table

    from upcycle.demo import DemoResult


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
    Console().print(_loss_table(result))
    output.data_line(f"Held-out code: {result.prompt!r}\nThe mixture goes on: {result.sample!r}")
    output.data_line(f"\n{result.seconds:.0f} s. Load the mixture with\n")
    for line in output.loading_lines(result.mixture, remote_code=True):
        output.data_line(f"  {line}")


def _loss_table(result: "DemoResult") -> "Table":
    """Models by domains, and their mean; the best of each column is bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    domains = list(next(iter(result.losses.values())))
    rows = {model: [*losses.values(), sum(losses.values()) / len(losses)] for model, losses in result.losses.items()}
    best = [min(column) for column in zip(*rows.values(), strict=True)]
    caption = "best of each column in bold"
    grid = Table(title="Held-out loss, nats per token", caption=caption, box=box.SIMPLE_HEAD)
    grid.add_column("model")
    for column in (*domains, "mean"):
        grid.add_column(column, justify="right")
    for model, losses in rows.items():
        styles = ["bold" if loss == lowest else "" for loss, lowest in zip(losses, best, strict=True)]
        grid.add_row(Text(model), *(Text(f"{loss:.3f}", style) for loss, style in zip(losses, styles, strict=True)))
    return grid
