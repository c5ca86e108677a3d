"""The smoke test's own text: short documents of four domains from templates, the same at every run."""

import random
from collections.abc import Callable, Mapping
from typing import Final

COUNTS: Final = {"train": 80, "heldout": 16}  # documents of each domain
SENTENCES: Final = 6  # of a document

_NAMES: Final = ("total", "width", "count", "left", "right", "first", "last", "rate", "size", "step")
_OPTIONS: Final = ("--limit", "--depth", "--cache", "--retry", "--level", "--window", "--batch", "--rate")
_EFFECTS: Final = ("save memory", "go faster", "keep every file", "see more detail", "stop early", "share the work")
_PEOPLE: Final = ("fisherman", "baker", "widow", "soldier", "teacher", "child", "doctor", "sailor", "stranger")
_PLACES: Final = ("harbour", "market", "church", "river", "garden", "old mill", "window", "forest", "station")
_MOODS: Final = ("quiet", "tired", "cold", "bright", "lonely", "gentle", "grey", "patient", "proud")


def documents(domain: str, split: str) -> list[str]:
    """The documents of a domain ("docs", "code", "math", "prose") for a split, "train" or "heldout"."""
    draw = random.Random(f"{domain} {split}")
    sentence = _SENTENCES[domain]
    return ["".join(sentence(draw) for _ in range(SENTENCES)) for _ in range(COUNTS[split])]


def _docs(draw: random.Random) -> str:
    option, value = draw.choice(_OPTIONS), draw.randrange(1, 65)
    return f"Set `{option}` to {value} to {draw.choice(_EFFECTS)}; the default is {draw.randrange(1, 65)}.\n"


def _code(draw: random.Random) -> str:
    name, one, other = draw.sample(_NAMES, 3)
    return f"def {name}({one}, {other}):\n    return {one} {draw.choice('+-*')} {other}\n\n"


def _math(draw: random.Random) -> str:
    one, other = draw.randrange(2, 50), draw.randrange(2, 50)
    return f"{one} + {other} = {one + other}, therefore {one + other} - {other} = {one}.\n"


def _prose(draw: random.Random) -> str:
    person, place, (mood, other) = draw.choice(_PEOPLE), draw.choice(_PLACES), draw.sample(_MOODS, 2)
    return f"The {mood} {person} walked slowly towards the {place}, and the evening was {other}. "


_SENTENCES: Final[Mapping[str, Callable[[random.Random], str]]] = {
    "docs": _docs,
    "code": _code,
    "math": _math,
    "prose": _prose,
}
