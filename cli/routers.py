"""`upcycle routers`: a mixture's routers, set from a little text for each expert."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import output
from .fetch import fetched

if TYPE_CHECKING:
    from upcycle.router_checkpoint import RoutersResult
    from upcycle.router_text import RouterText

SHOWN = 8  # warnings
RouterTokens = Annotated[
    int, typer.Option(min=16, max=2**24, help="Tokens of each text that routers are set from, at most.")
]


def routers(
    mixture: Annotated[str, typer.Argument(metavar="MIXTURE", help="Folder or Hub name of a mixture.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="NAME=FILE ...", help="A text for each expert: .jsonl, .txt, .parquet or .npy tokens."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make: the mixture with its new routers.")],
    init: Annotated[
        Literal["fit", "prototypes"], typer.Option(help="A logistic regression, or differences of means.")
    ] = "fit",
    softness: Annotated[
        float | None, typer.Option(min=0, max=100, help="Below 1 gates are softer than the fit's.", show_default="0.3")
    ] = None,
    only: Annotated[
        Literal["ffn", "attention"] | None, typer.Option(help="Leave the other routers as they are.")
    ] = None,
    router_tokens: RouterTokens = 16_384,
    yes: Annotated[bool, typer.Option("--yes", help="Overwrite a former result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Set a mixture's routers from text: each learns which expert's text a token comes from.

    Example: upcycle routers bam-3x --data code=code.jsonl law=law.jsonl math=math.jsonl --out bam-routed
    """
    import time

    from upcycle.data import split_names
    from upcycle.router_checkpoint import init_routers, router_settings
    from upcycle.router_text import read_router_text
    from upcycle.staging import check_target
    from upcycle.training_settings import read_facts
    from upcycle.weights import quiet_transformers

    began = time.monotonic()
    source = fetched(mixture)
    check_target(out, yes, [source])
    facts = read_facts(source)
    settings = router_settings(source, facts, init, softness, only)
    quiet_transformers()
    text = read_router_text(
        split_names("--data", data),
        list(facts.groups),
        source,
        facts.dense,
        tokens=router_tokens,
        longest=facts.positions,
        option="--data",
    )
    size = sum(file.stat().st_size for file in source.iterdir() if file.is_file())
    steps = fitting_steps(text, int(facts.dense["num_hidden_layers"]))
    with (
        output.byte_progress(f"{mixture} → {out}", size) as copying,
        output.share_progress("setting the routers", steps, after=copying) as setting,
    ):
        result = init_routers(source, out, text, settings, overwrite=yes, copying=copying, progress=setting)
    show_warnings(result)
    if as_json:
        seconds = round(time.monotonic() - began, 3)
        output.data_object({"out": str(out), "router_accuracy": result.accuracy, "seconds": seconds})
        return
    output.data_line(f"{out}: {result.summary()}")


def fitting_steps(text: "RouterText | None", layers: int) -> int:
    """How many tokens pass a layer while routers are set, all layers together."""
    return layers * text.tokens if text else 0


def show_warnings(result: "RoutersResult") -> None:
    """Say which routers tell nothing apart."""
    for warning in result.warnings[:SHOWN]:
        output.warning(warning)
    if len(result.warnings) > SHOWN:
        output.warning(f"and {len(result.warnings) - SHOWN} more like these")
