"""Which of several checkpoints a mixture was made from, recognised by the fingerprints in its `upcycle.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upcycle.ancestry import fingerprint, sample
from upcycle.checkpoint import PROVENANCE, read_json
from upcycle.errors import UpcycleError
from upcycle.recipe import MEAN
from upcycle.run_folder import RECORD
from upcycle.seeds import read_seed


@dataclass(frozen=True)
class Relatives:
    """Which models a mixture comes from.

    Attributes:
        seeds: every seed's name, and its model where there is one.
        ancestor: the model that the specialists were trained from, if it is known and there.
        average: the plain mean of the same seeds, if it is there.
        recorded_ancestor: the seed that the mixture's own record names, where the user names another one.
    """

    seeds: Mapping[str, str | None] = field(default_factory=dict)
    ancestor: str | None = None
    average: str | None = None
    recorded_ancestor: str | None = None


def find_relatives(models: Sequence[str], mixtures: Sequence[str], base: str | None) -> dict[str, Relatives]:
    """The relatives of each mixture among `models`.

    Args:
        models: folders.
        mixtures: those of them that are mixtures.
        base: the ancestor, where the user names it; of mixtures that do not tell their seeds it says nothing.
    """
    records = {model: _provenance(Path(model)) for model in models}
    dense = [model for model in models if model not in mixtures]
    prints = {model: _fingerprint(Path(model)) for model in dense}
    found = {}
    for mixture in mixtures:
        record = records[mixture]
        seeds = _models_of(_seeds(record), prints)
        recorded = str(record.get("ancestor"))
        ancestor = (base if seeds else None) or seeds.get(recorded)
        other = recorded if base and recorded in seeds and _seeds(record)[recorded] != prints.get(base) else None
        means = [model for model in dense if _is_mean(records[model]) and not _trained(model)]
        same = [model for model in means if seeds and _same_seeds(records[model], record)]
        found[mixture] = Relatives(seeds, ancestor, same[0] if same else None, other)
    return found


def _models_of(seeds: Mapping[str, str], prints: Mapping[str, str | None]) -> dict[str, str | None]:
    """The model of each seed; of several with the same weights the one of its name, else one that no other seed has."""
    found: dict[str, str | None] = {}
    for name, fingerprint_of_seed in seeds.items():
        same = [model for model, one in prints.items() if one == fingerprint_of_seed]
        named = [model for model in same if Path(model).name == name]
        free = [model for model in same if model not in found.values()]
        found[name] = next(iter([*named, *free, *same]), None)
    return found


def _provenance(folder: Path) -> Mapping[str, Any]:
    path = folder / PROVENANCE
    return read_json(path) if path.is_file() else {}


def _fingerprint(folder: Path) -> str | None:
    """A dense checkpoint's fingerprint as a merge records it, or None where upcycle does not know its family."""
    try:
        seed = read_seed("model", str(folder))
        return fingerprint(seed, sample(seed))
    except UpcycleError:
        return None


def _seeds(record: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprints of a result's seeds by name."""
    seeds = record.get("seeds")
    rows = [seed for seed in seeds if isinstance(seed, dict)] if isinstance(seeds, list) else []
    return {str(seed.get("name")): str(seed.get("fingerprint")) for seed in rows}


def _same_seeds(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return sorted(_seeds(one).values()) == sorted(_seeds(other).values())


def _trained(model: str) -> bool:
    return (Path(model) / RECORD).is_file()


def _is_mean(record: Mapping[str, Any]) -> bool:
    recipe = record.get("recipe")
    mix = recipe.get("mix") if isinstance(recipe, dict) else None
    return isinstance(mix, dict) and bool(mix) and all(value == MEAN for value in mix.values())
