"""`upcycle generate`: a quick look at what a model says."""

from typing import Annotated

import typer

from . import output
from .fetch import fetched


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of a mixture or dense checkpoint.")],
    text: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 64,
) -> None:
    """Continue a text greedily; a quick look, no code from the checkpoint is run.

    Example: upcycle generate bam-kv-shared-3x "def main():"
    """
    from upcycle.generation import continue_text

    output.data_line(continue_text(fetched(model), text, max_new_tokens))
