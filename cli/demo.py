"""`upcycle demo`: a tiny seed and its specialists trained from real text, mixed, trained on and measured."""

import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import output
from .evaluate import show_losses, show_verdict
from .merge import RecipeName

TEXT = Path("tests/data/text")


def demo(
    family: Annotated[
        Literal["llama", "cohere2"], typer.Option(help="Sequential (llama) or parallel (cohere2) blocks.")
    ] = "llama",
    work: Annotated[Path, typer.Option(help="Folder for the models; a second run finds them there.")] = Path(".demo"),
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of DOMAIN.train.jsonl and DOMAIN.heldout.jsonl.", show_default=str(TEXT)),
    ] = None,
    recipe: RecipeName = "bam-kv-shared",
    tiny: Annotated[
        bool,
        typer.Option(
            "--tiny",
            help="A smoke test within a minute: toy models, text of its own, checks; exit code 1 if one fails.",
        ),
    ] = False,
) -> None:
    """Train a tiny seed and three specialists from real text, mix them, train the mixture, and measure each.

    Example: upcycle demo --family cohere2
    """
    if tiny:
        if data:
            raise typer.BadParameter("--tiny makes its own text, so --data would have no effect; leave one of them out")
        _smoke(family, work, recipe)
        return
    from upcycle.demo import run_demo

    result = run_demo(family, data or TEXT, work, recipe=recipe, progress=_on_terminal())
    show_losses(result.evaluation)
    show_verdict(result.evaluation)
    output.data_line(f"\nHeld-out code: {result.prompt!r}\nThe mixture goes on: {result.sample!r}")
    output.data_line(f"\n{result.seconds:.0f} s. Load the mixture with\n")
    for line in output.loading_lines(result.mixture, remote_code=any(result.mixture.glob("modeling_*.py"))):
        output.data_line(f"  {line}")
    output.data_line(f"\nReport: {result.report}")


def _smoke(family: str, work: Path, recipe: str) -> None:
    """Run the smoke test; each line is printed when its check is passed, so that a log shows how far it came."""
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "huggingface_hub", "upcycle")]
    _now(f"python {platform.python_version()}, {', '.join(versions)}")
    began = time.monotonic()
    from upcycle.smoke import run_smoke

    run_smoke(family, work, recipe=recipe, tell=lambda line: _now(f"ok  {line}"), progress=_on_terminal())
    _now(f"all is well, {time.monotonic() - began:.0f} s")


def _now(line: str) -> None:
    output.data_line(line)
    sys.stdout.flush()  # before what an error prints on stderr


def _on_terminal() -> Callable[[str], None]:
    """A function that shows messages on stderr where that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)

    def show(message: str) -> None:
        if console.is_terminal:
            console.print(message, markup=False, highlight=False, soft_wrap=True)

    return show
