"""`upcycle report`: one page about mixtures, checkpoints and trainings."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import output
from .evaluate import Base, Data, Windows, window_progress
from .fetch import fetched_by_name
from .merge import Json


def report(
    paths: Annotated[
        list[str],
        typer.Argument(help="Folders or Hub names of trainings, mixtures or dense models.", metavar="RUN|MODEL ..."),
    ],
    data: Data = None,
    base: Base = None,
    windows: Windows = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="What `upcycle eval --json` printed, instead of --data: nothing is measured.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page; its pictures also go beside it, as PNGs.")] = Path("report.html"),
    yes: Annotated[bool, typer.Option("--yes", help="Overwrite a former report.")] = False,
    as_json: Json = False,
) -> None:
    """Write one self-contained page: what was merged, losses, curves, routing, speed.

    With --data the models are measured on it as `upcycle eval` does; without, the page shows what is recorded.

    Example: upcycle report trained code law --data code=held.jsonl law=law.jsonl --out report.html
    """
    from upcycle.report import check_output, read_evaluation, write_report

    check_output(out, yes)
    if evaluation and data:
        raise typer.BadParameter("--evaluation and --data exclude one another")
    with fetched_by_name([*paths, *([base] if base else [])]) as found:
        folders, base = [Path(found[path]) for path in paths], found[base] if base else None
        measured = _evaluate(folders, data, base, windows) if data else None
        if evaluation:
            measured = read_evaluation(evaluation)
        written = write_report(folders, out, measured, yes)
    if as_json:
        output.data_object(
            {"out": str(written.out), "bytes": written.bytes, "pictures": [str(path) for path in written.pictures]}
        )
        return
    output.data_line(f"{written.out}: {output.size(written.bytes)}, {len(written.pictures)} pictures")
    if written.pictures:
        output.data_line(f"{written.pictures[0].parent}: the same as PNGs")


def _evaluate(paths: list[Path], data: list[str], base: str | None, windows: int | None) -> dict[str, Any]:
    from upcycle.comparison import evaluate_models
    from upcycle.data import split_names
    from upcycle.evaluation_inputs import EvaluationOptions
    from upcycle.run_records import read_sources

    models = [str(source.checkpoint or source.folder) for source in read_sources(paths)]
    options = EvaluationOptions(models, split_names("--data", data), base=base, windows=windows)
    with window_progress() as progress:
        return evaluate_models(options, progress)
