"""A model card: the README.md of a checkpoint, written from what its own files say.

Between two marks stands what upcycle writes, and writes anew; all text outside them is people's and stays as it is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from upcycle.card_metadata import describe_metadata, front_matter, join_metadata, split_card
from upcycle.card_results import evaluation_section, find_evaluated, training
from upcycle.card_sections import (
    Subject,
    cost,
    how_to_load,
    how_to_tune,
    licences,
    limits,
    pictures,
    recipe_table,
    seed_table,
    what_it_is,
)
from upcycle.errors import CheckpointError, DataError
from upcycle.licenses import Licensing, check_licenses, licensing
from upcycle.markdown import plain
from upcycle.run_records import Source, read_sources

__all__ = ["BEGIN", "END", "Licensing", "check_licenses", "licensing", "make_card"]

BEGIN: Final = "<!-- upcycle: begin -->"
END: Final = "<!-- upcycle: end -->"
_HINT: Final = "<!-- upcycle writes what stands between these marks anew; what stands outside them stays. -->"


def make_card(
    folder: Path,
    *,
    existing: str = "",
    repository: str | None = None,
    license: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """Write the card of a finished checkpoint.

    Args:
        folder: the checkpoint.
        existing: a former card, whose metadata and text outside the marks stay.
        repository: `org/name` for the lines that load it; the folder's own name by default.
        license: the result's licence; by default what its seeds allow it to state (`licensing`).
        evaluation: what `upcycle eval --json` printed, of this model and others.
        pictures: PNGs by their paths from the card.

    Raises:
        CheckpointError, SeedError: the folder is no checkpoint, or a damaged one.
        DataError: the evaluation is of another model, or the former card is damaged.
    """
    source = _read(folder)
    name = repository or folder.resolve().name
    path = None if evaluation is None else find_evaluated(evaluation, source, name)
    former, text = split_card(existing)
    followed = license or licensing(source.provenance).license
    evaluated = evaluation["models"][path] if evaluation and path else None
    ours = describe_metadata(source, followed, name, evaluated)
    metadata = join_metadata(former, ours)
    stated = followed or former.get("license_name") or former.get("license")
    subject = Subject(source, name, str(stated) if stated else None, bool(license), evaluated is not None)
    results = evaluation_section(evaluation, path) if evaluation and path else ""
    block = "\n\n".join([f"{BEGIN}\n{_HINT}", *_sections(subject, results, pictures), END])
    return front_matter(metadata) + _place(text, block, f"# {plain(name)}")


def _read(folder: Path) -> Source:
    (source,) = read_sources([folder])
    if source.checkpoint != folder:
        raise CheckpointError(f"{folder} holds no finished checkpoint, so there is nothing to write a card of")
    if not source.inspection and not source.parameters:  # a training's record is there, its weights are damaged
        raise CheckpointError(f"{folder}: {'; '.join(source.notes)}")
    return source


def _sections(subject: Subject, results: str, paths: Sequence[str]) -> list[str]:
    """Every section that has something to say."""
    written = {
        "": what_it_is(subject),
        "Experts" if subject.source.experts else "Merged from": seed_table(subject),
        "Sizes and cost": cost(subject),
        "Recipe": recipe_table(subject),
        "Training": training(subject.source),
        "Evaluation": results,
        "Pictures": pictures(paths),
        "How to load it": how_to_load(subject),
        "How to fine-tune it": how_to_tune(subject),
        "Licences": licences(subject),
        "Limits": limits(subject),
    }
    return [f"## {title}\n\n{text}" if title else text for title, text in written.items() if text]


def _place(text: str, block: str, title: str) -> str:
    """The block in the place of a former one, else after the text that there is, else under a title.

    Raises:
        DataError: the marks are not one pair.
    """
    marks = text.count(BEGIN), text.count(END)
    if marks == (1, 1) and text.index(BEGIN) < text.index(END):
        return text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :]
    if marks != (0, 0):
        raise DataError(
            f"the former README.md has {BEGIN} {marks[0]} times and {END} {marks[1]} times; expected each once, in "
            "this order, or neither: repair it by hand"
        )
    if not text.strip():
        return f"\n{title}\n\n{block}\n"
    return f"{text}{'' if text.endswith(chr(10)) else chr(10)}\n{block}\n"
