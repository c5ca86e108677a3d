"""`upcycle verify`: a checkpoint against its checksums, its plan and its seeds."""

from typing import TYPE_CHECKING, Annotated

import typer

from . import output
from .fetch import fetch_seeds, fetched
from .merge import Json

if TYPE_CHECKING:
    from upcycle.verify import Verification

SHOWN = 20


def verify(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder or Hub name of a mixture or a dense model.")
    ],
    seeds: Annotated[
        list[str] | None,
        typer.Option(
            "--seeds",
            metavar="[NAME=]SEED ...",
            help="What it was merged from, in the same order: every tensor is made again and compared to the bit.",
        ),
    ] = None,
    load: Annotated[bool, typer.Option("--load", help="Load it with transformers, and run one forward.")] = False,
    as_json: Json = False,
) -> None:
    """Verify a checkpoint: every file against its checksum, every tensor against the config, all numbers finite.

    Exit code 0 if all is well, 1 if anything is not.

    Example: upcycle verify bam-3x --seeds code law math
    """
    from upcycle.checkpoint import PROVENANCE, read_json, read_tensors
    from upcycle.errors import UpcycleError
    from upcycle.seeds import read_seeds
    from upcycle.verify import verify as run
    from upcycle.vocabulary import was_aligned

    folder = fetched(checkpoint)
    if seeds:
        fetch_seeds(read_seeds(seeds, was_aligned(read_json(folder / PROVENANCE))))
    try:
        size = sum(info.nbytes for info in read_tensors(folder).values())
    except UpcycleError:  # it will be said with everything else
        size = 0
    with output.byte_progress(f"verifying {checkpoint}", size) as progress:
        found = run(folder, seeds or [], load, progress)
    if as_json:
        output.data_object(
            {
                "folder": str(found.folder),
                "files": found.files,
                "tensors": found.tensors,
                "checksums": not found.unsummed,
                "finite": found.finite,
                "remade": found.remade,
                "from_text": found.from_text,
                "loaded": found.loaded,
                "problems": found.problems,
                "seconds": round(found.seconds, 3),
            }
        )
    else:
        _show(found)
    if found.problems:
        raise typer.Exit(1)


def _show(found: "Verification") -> None:
    if found.unsummed:
        output.note("it has no checksums, so damage that leaves it loadable cannot be seen")
    for problem in found.problems[:SHOWN]:
        output.error(problem)
    if len(found.problems) > SHOWN:
        output.error(f"and {len(found.problems) - SHOWN} more problems; --json lists all")
    done = [f"{found.finite} tensors of finite numbers"]
    if not found.unsummed:
        done.insert(0, f"{found.files} files and {found.tensors} tensors have their checksums")
    if found.remade is not None:
        done.append(f"{found.remade} are what the seeds give, to the bit")
    if found.from_text:
        done.append(f"{found.from_text} come from text and have no seed to be compared with")
    if found.loaded:
        done.append("it loads, and a forward is finite")
    count = len(found.problems)
    state = "1 problem" if count == 1 else f"{count} problems" if count else "all is well"
    output.data_line(f"{found.folder}: {state}; {'; '.join(done)}; {found.seconds:.2f} s")
