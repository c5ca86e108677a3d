"""One exception tree. A message says what failed, in which seed and tensor, what was expected and found, what to do."""

import difflib
from collections.abc import Iterable


class UpcycleError(Exception):
    """Something the user gave cannot be served; the command line prints the message and exits with 1."""


class RecipeError(UpcycleError):
    """A recipe that does not exist, does not parse, or asks for what cannot be mixed."""


class SeedError(UpcycleError):
    """A seed that cannot be read, or that does not belong with the others."""


class CheckpointError(UpcycleError):
    """A file of a checkpoint that is missing, truncated or damaged."""


class OutputError(UpcycleError):
    """An output that cannot be written: it exists, the disk is full, permission is missing."""


class DataError(UpcycleError):
    """Training or evaluation data that cannot be read, or that does not fit the model."""


class HubError(UpcycleError):
    """The Hugging Face Hub refuses, lacks or cannot be asked for what is needed."""


class TrainingError(UpcycleError):
    """A training that cannot start, go on or be resumed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` with the nearest of `known`, or all of them when none is near."""
    known, word = sorted(known), word[:80]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"
