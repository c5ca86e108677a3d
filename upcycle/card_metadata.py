"""The metadata above a model card, for the Hub: what the files say, put together with what stood there."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml

from upcycle.errors import DataError
from upcycle.licenses import HUB_LICENSES, adapter_of, seed_records
from upcycle.run_records import Source, as_number, clean

# What stands above every card of ours.
WRITTEN_KEYS: Final = (
    *("license", "license_name", "license_link", "library_name", "pipeline_tag", "tags", "base_model"),
    *("base_model_relation", "model-index"),
)
HELDOUT: Final = "held-out"  # the dataset type of evaluations, by which they are found again
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_ARXIV: Final = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_MEASURES: Final = {
    "loss": "loss, nats per token",
    "perplexity": "perplexity, per token",
    "bits_per_byte": "bits per byte",
}


def repository_of(seed: Mapping[str, Any]) -> str | None:
    """The Hub repository that a seed came from, if its record names one."""
    name = seed.get("repository")
    valid = isinstance(name, str) and _REPOSITORY.fullmatch(name) and not re.search(r"--|\.\.", name)
    return str(name) if valid else None


def commit_of(seed: Mapping[str, Any]) -> str | None:
    """The commit that it was."""
    revision = seed.get("revision")
    return revision if isinstance(revision, str) and _COMMIT.fullmatch(revision) else None


def describe_metadata(
    source: Source, license: str | None, name: str, evaluated: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a checkpoint's files and its evaluation give.

    Args:
        license: what is stated for it.
        name: its own.
        evaluated: the evaluation's entry of this model.
    """
    seeds, recipe = seed_records(source.provenance), source.provenance.get("recipe")
    origins = [record for seed in seeds for record in (seed, adapter_of(seed)) if record]
    bases = list(dict.fromkeys(filter(None, map(repository_of, origins))))
    merged = len(seeds) > 1  # of one seed there are copies alone
    paper = _ARXIV.fullmatch(str(recipe.get("paper"))) if isinstance(recipe, dict) else None
    tags = {
        "upcycle": True,
        "moe": bool(source.experts),
        "mixture-of-experts": bool(source.experts),
        "merge": merged,
        "bam": source.config.get("model_type") == "bam",
        f"arxiv:{paper[1] if paper else ''}": bool(paper),
    }
    found = {
        **_license(source, license),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [tag for tag, holds in tags.items() if holds],
        "base_model": bases,
        "base_model_relation": "merge" if bases and merged else None,
        "model-index": _model_index(name, evaluated) if evaluated else None,
    }
    return {key: value for key, value in found.items() if value}


def _license(source: Source, license: str | None) -> dict[str, str]:
    if not license:
        return {}
    if license.lower() in HUB_LICENSES:
        return {"license": license.lower()}
    named = {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", license.lower()).strip("-") or "custom"}
    return {**named, "license_link": "LICENSE"} if (source.folder / "LICENSE").is_file() else named


def _model_index(name: str, evaluated: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The losses by domain, as the Hub lists results."""
    from huggingface_hub import EvalResult, ModelCardData  # which costs 0.3 s, as long as a small merge

    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=HELDOUT,
            dataset_name=f"held-out text, domain {clean(domain)}",
            dataset_config=clean(domain),
            metric_type=key,
            metric_name=title,
            metric_value=part[key],
        )
        for domain, part in evaluated["domains"].items()
        for key, title in _MEASURES.items()
        if math.isfinite(as_number(part.get(key)))
    ]
    if not results:
        return []
    data: Any = ModelCardData(model_name=clean(name), eval_results=results)  # which has no types
    return list(data.to_dict()["model-index"])


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """A former card's metadata and its text, byte for byte.

    Raises:
        DataError: metadata that cannot be read.
    """
    text = text.removeprefix("\ufeff")
    if not text.lstrip().startswith("---"):  # of which the client would warn
        return {}, text
    from huggingface_hub import RepoCard

    try:
        card: Any = RepoCard(text)
        return card.data.to_dict(), card.text
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"the former README.md's metadata cannot be read: {reason}; repair or remove it") from None


def join_metadata(former: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """What stood there with what the files say: keys that we know are ours, all others stay, and tags are added."""
    joined = {**former, **ours}
    for key in ("library_name", "pipeline_tag"):
        joined[key] = former.get(key, ours[key])
    if "license" in ours and not _same_license(former, ours):
        for key in {"license_name", "license_link"} - ours.keys():
            joined.pop(key, None)
    tags = former.get("tags")
    before = tags if isinstance(tags, list) else [tags] if isinstance(tags, str) else []
    joined["tags"] = [*before, *(tag for tag in ours["tags"] if tag not in before)]
    index = _join_index(former.get("model-index"), ours.get("model-index") or [])
    if index:
        return {**joined, "model-index": index}
    joined.pop("model-index", None)
    return joined


def _same_license(former: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    named = former.get("license_name")
    return bool(former.get("license") == ours["license"] and ours.get("license_name", named) == named)


def _join_index(former: Any, ours: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Other people's results, and ours in the place of former ones of ours."""
    joined = []
    for entry in former if isinstance(former, list) else []:
        results = entry.get("results") if isinstance(entry, dict) else None
        if not isinstance(results, list):
            joined.append(entry)
        elif others := [result for result in results if not _is_ours(result)]:
            joined.append({**entry, "results": others})
    return [*joined, *ours]


def _is_ours(result: Any) -> bool:
    dataset = result.get("dataset") if isinstance(result, dict) else None
    return isinstance(dataset, dict) and dataset.get("type") == HELDOUT


def front_matter(metadata: Mapping[str, Any]) -> str:
    """Metadata as they stand above a card."""
    lines = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{lines}---\n"
