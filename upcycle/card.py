"""A model card: the README.md of a checkpoint, written from what its own files say.

Between two marks stands what upcycle writes, and writes anew; all text outside them is people's and stays as it is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from upcycle.card_metadata import WRITTEN_KEYS, describe_metadata, front_matter, join_metadata, split_card
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
from upcycle.checkpoint import CARD, PROVENANCE, read_json
from upcycle.errors import CheckpointError, DataError
from upcycle.licenses import licensing, seed_records
from upcycle.markdown import plain
from upcycle.run_folder import RECORD
from upcycle.run_records import Source, read_sources

BEGIN: Final = "<!-- upcycle: begin -->"
END: Final = "<!-- upcycle: end -->"
MAX_CARD: Final = 1_000_000  # bytes
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


def write_card(folder: Path, former: str = "") -> None:
    """Write a checkpoint's card beside its weights; a `former` one that is damaged is left as it was.

    Raises:
        CheckpointError, SeedError: the folder is no checkpoint, or a damaged one.
    """
    # Called by what it is: the folder's name would make the same merge give other bytes elsewhere.
    name = title(read_json(folder / PROVENANCE), (folder / RECORD).is_file())
    card = make_card(folder, repository=name)
    try:
        if former not in ("", card) and is_handwritten(former):
            card = make_card(folder, existing=former, repository=name)
    except DataError:
        card = former
    temporary = folder / f".{CARD}.partial"
    temporary.write_bytes(card.encode())
    temporary.replace(folder / CARD)


def is_handwritten(card: str) -> bool:
    """Whether people wrote in it: more than a title outside the marks, or metadata of their own."""
    metadata, text = split_card(card)
    if metadata.keys() - {*WRITTEN_KEYS}:
        return True
    before, _, rest = text.partition(BEGIN)
    outside = before + (rest.partition(END)[2] if rest else "")
    return any(line.strip() and not line.startswith("# ") for line in outside.splitlines())


def read_card(folder: Path) -> str:
    """A folder's card, whoever wrote it; empty where it has none that can be read."""
    file = folder / CARD
    try:
        with file.open("rb") as handle:
            return handle.read(MAX_CARD).decode()
    except (OSError, ValueError):
        return ""


def title(provenance: Mapping[str, Any], trained: bool) -> str:
    """A result in a few words, from its upcycle.json, which may be anybody's."""
    recipe, extracted = provenance.get("recipe"), provenance.get("extracted")
    names = [str(seed.get("name")) for seed in seed_records(provenance)]
    name = recipe.get("name") if isinstance(recipe, dict) else None
    text = f"{name or 'a mixture'} of {', '.join(names[:8]) or 'unknown seeds'}"
    if isinstance(extracted, dict):
        text = f"{extracted.get('name')}, an expert of {text}"
    return f"{text[:190]}{', trained' if trained else ''}"


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
