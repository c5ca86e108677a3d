"""What a result's licence may be, by those that its seeds state."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from upcycle.errors import OutputError

# The Hub's own names (hf.co/docs/hub/repositories-licenses); any other is `other` there, with a name of its own.
PERMISSIVE: Final = frozenset(
    {
        *("afl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause"),
        *("bsd-3-clause-clear", "bsl-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc0-1.0"),
        *("cdla-permissive-1.0", "cdla-permissive-2.0", "ecl-2.0", "etalab-2.0", "isc", "mit", "ms-pl"),
        *("ncsa", "odc-by", "openmdw-1.0", "pddl", "postgresql", "unlicense", "wtfpl", "zlib"),
    }
)
SHARE_ALIKE: Final = frozenset(
    {
        *("agpl-3.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-sa-3.0"),
        *("cc-by-sa-4.0", "cdla-sharing-1.0", "epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2", "gfdl", "gpl"),
        *("gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "lppl-1.3c", "mpl-2.0", "odbl"),
        *("ofl-1.1", "osl-3.0"),
    }
)
OWN_TERMS: Final = frozenset(
    {
        *("apple-amlr", "apple-ascl", "bigcode-openrail-m", "bigscience-bloom-rail-1.0"),
        *("bigscience-openrail-m", "c-uda", "cc", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"),
        *("cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "creativeml-openrail-m"),
        *("deepfloyd-if-license", "fair-noncommercial-research-license", "gemma", "grok2-community"),
        *("h-research", "intel-research", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
        *("openrail", "openrail++", "other", "unknown"),
    }
)
HUB_LICENSES: Final = PERMISSIVE | SHARE_ALIKE | OWN_TERMS


@dataclass(frozen=True)
class Licensing:
    """What follows from the seeds' licences.

    Attributes:
        license: what the result may state by itself: the permissive licence that all seeds have, else None.
        problems: why it may state none.
    """

    license: str | None
    problems: list[str]


def seed_records(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What an `upcycle.json` says of each seed; none where it names none."""
    seeds = provenance.get("seeds")
    return [seed for seed in seeds if isinstance(seed, dict)] if isinstance(seeds, list) else []


def adapter_of(seed: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a seed's record says of its adapter; None if it had none."""
    adapter = seed.get("adapter")
    return adapter if isinstance(adapter, dict) else None


def licensing(provenance: Mapping[str, Any]) -> Licensing:
    """What the seeds' licences, as an `upcycle.json` records them, allow the result to state."""
    seeds: dict[str | None, list[str]] = {}
    for seed in seed_records(provenance):
        for record, label in ((seed, str(seed.get("name"))), (adapter_of(seed), f"adapter of {seed.get('name')}")):
            if record is not None:
                found = record.get("license")
                name = found.lower() if isinstance(found, str) and found.lower() not in ("", "unknown") else None
                seeds.setdefault(name, []).append(label)
    if not seeds:
        lost = "it is an expert of a mixture, and upcycle.json does not say under which licences its seeds are"
        return Licensing(None, [lost] if "extracted" in provenance else [])
    problems = []
    if len(seeds) > 1:
        all_of_them = "; ".join(f"{name or 'none stated'} ({', '.join(names)})" for name, names in seeds.items())
        problems.append(f"the seeds' licences differ: {all_of_them}")
    for name, names in seeds.items():
        problems += [f"{', '.join(names)}: {trouble}" for trouble in _troubles(name)]
    return Licensing(None if problems else next(iter(seeds)), problems)


def _troubles(name: str | None) -> list[str]:
    """Why a licence cannot simply be handed on."""
    if name is None:
        return ["no licence is stated, which allows nothing by itself"]
    if name in PERMISSIVE:
        return []
    parts = name.split("-")
    troubles = {
        f"{name} does not allow commercial use": "nc" in parts or "noncommercial" in name,
        f"{name} does not allow changed works to be shared": "nd" in parts,
        f"{name} wants what is made from it to be shared alike": name in SHARE_ALIKE or "sa" in parts,
    }
    found = [text for text, holds in troubles.items() if holds]
    return found or [f"{name} has terms of its own, which have to be read"]


def check_licenses(provenance: Mapping[str, Any], license: str | None) -> str | None:
    """The licence to state for a result: the one given, else what its seeds allow.

    Returns:
        None only where nothing is known of any seed.

    Raises:
        OutputError: none is given, and the seeds' differ, or do not simply go over to the result.
    """
    if license:
        return license
    found = licensing(provenance)
    if found.problems:
        raise OutputError(
            f"the result's licence does not follow from its seeds: {'. '.join(found.problems)}. Read their terms, and "
            "give the licence with --license (--license unknown states that it is not known)"
        )
    return found.license
