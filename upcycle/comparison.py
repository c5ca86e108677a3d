"""Several models measured on the same held-out text, and compared: the object that `upcycle eval --json` prints."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.evaluation_inputs import EvaluationOptions, check_tokenizers, read_models, read_windows
from upcycle.measurement import DIGITS, DocumentSums, Measurement, find_device
from upcycle.numeric import Array
from upcycle.relatives import Relatives, find_relatives
from upcycle.resampling import draw_losses, effective_documents, interval
from upcycle.tasks import check_tasks
from upcycle.verdict import Scores, verdict
from upcycle.weights import checkpoint_fingerprint, quiet_transformers

MAX_LOSS = 700.0  # nats, of which the exponential is still a float

Progress = Callable[[str, str, int, int], None]


def evaluate_models(options: EvaluationOptions, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Measure every model on every domain, and say what follows.

    Args:
        progress: called with the model, the domain, and how many windows (of how many) are done in all; for tasks with
            "tasks" and the model's requests.

    Returns:
        Plain data: `models`, path → `domains` (each with `loss` in nats per token, its `ci95` over documents,
        `perplexity`, `bits_per_byte`, `tokens`, `documents`), `mean_loss` over the domains, `role`, `fingerprint`,
        `seconds`, for mixtures `routing` (see `RoutingTally.means` and `expert_similarity`), and `tasks`; `measure`, by
        which the models may be compared ("loss" or "bits_per_byte"); and `verdict`, sentences.

    Raises:
        UpcycleError: input that cannot be served; all that can be seen without loading a model is seen first.
    """
    quiet_transformers()
    facts, base = read_models(options)
    models = list(facts)
    if options.tasks:
        check_tasks(options.tasks)
        check_tokenizers(models)
    device = find_device(options.device)
    heldout, comparable = read_windows(options, facts)
    relatives = find_relatives(models, [model for model in models if facts[model].kind != "dense"], base)
    total = sum(len(part.tokens) for parts in heldout.values() for part in parts.values())
    done = 0

    def windows_done(model: str, domain: str, count: int) -> None:
        nonlocal done
        done += count
        progress(model, domain, done, total)

    def tasks_done(model: str, count: int, requests: int) -> None:
        progress(model, "tasks", count, requests)

    results, sums = {}, {}
    for model in models:
        began = time.perf_counter()
        measurement = Measurement(model, facts[model], options, device)
        results[model], sums[model] = measurement.run(heldout[model], windows_done, tasks_done)
        results[model]["seconds"] = round(time.perf_counter() - began, 3)
        results[model]["role"] = _role(model, relatives)
        results[model]["fingerprint"] = checkpoint_fingerprint(Path(model))
    return _compared(models, list(options.data), results, sums, relatives, comparable)


def _role(model: str, relatives: Mapping[str, Relatives]) -> str:
    """What a model is to the mixtures."""
    if model in relatives:
        return "mixture"
    for family in relatives.values():
        names = [name for name, seed in family.seeds.items() if seed == model]
        if family.ancestor == model:
            return "ancestor"
        if names:
            return f"seed {names[0]}"
        if family.average == model:
            return "plain average"
    return "dense"


def _compared(
    models: Sequence[str],
    domains: Sequence[str],
    results: Mapping[str, dict[str, Any]],
    sums: Mapping[str, Mapping[str, DocumentSums]],
    relatives: Mapping[str, Relatives],
    comparable: bool,
) -> dict[str, Any]:
    """The whole result from every model's own, with intervals and the verdict."""
    told = {model: {key: value for key, value in results[model].items() if value is not None} for model in models}
    entries = {model: {"domains": {}, "mean_loss": None, **told[model]} for model in models}
    losses, all_draws, documents = [], [], []
    for number, domain in enumerate(domains):
        table = _Table.of([sums[model][domain] for model in models])
        by_token = _Measure.of(table.nll, table.tokens, number)
        by_byte = table.text_bytes is not None and _Measure.of(table.nll / math.log(2), table.text_bytes, number)
        for column, model in enumerate(models):
            loss = float(by_token.means[column])
            entries[model]["domains"][domain] = {
                "loss": round(loss, DIGITS),
                "ci95": by_token.interval(column),
                "perplexity": round(math.exp(loss), DIGITS) if loss < MAX_LOSS else None,
                "bits_per_byte": round(float(by_byte.means[column]), DIGITS) if by_byte else None,
                "bits_per_byte_ci95": by_byte.interval(column) if by_byte else None,
                "tokens": int(table.tokens[:, column].sum()),
                "documents": len(table.nll),
            }
        chosen = by_token if comparable else by_byte
        assert chosen, "models of several tokenizers are measured on text alone"
        losses.append(chosen.means)
        all_draws.append(chosen.draws)
        documents.append(float(effective_documents(table.tokens).min()))
    for entry in entries.values() if domains else ():
        entry["mean_loss"] = round(float(np.mean([found["loss"] for found in entry["domains"].values()])), DIGITS)
    sentences: list[str] = []
    if domains:
        unit = "nats per token" if comparable else "bits per byte"
        scores = Scores(models, domains, unit, np.stack(losses), all_draws, documents)
        routing = {model: result["routing"] for model, result in results.items() if "routing" in result}
        sentences = verdict(scores, relatives, routing)
    return {"models": entries, "measure": "loss" if comparable else "bits_per_byte", "verdict": sentences}


@dataclass(frozen=True)
class _Measure:
    """What models are compared by: means over a domain, `[models]`, and draws of them, `[draws, models]`."""

    means: Array
    draws: Array | None

    @classmethod
    def of(cls, sums: Array, sizes: Array, random_seed: int) -> "_Measure":
        """Of the summed losses and sizes of documents, `[documents, models]` each."""
        return cls(sums.sum(0) / sizes.sum(0), draw_losses(sums, sizes, random_seed))

    def interval(self, column: int) -> list[float] | None:
        """One model's, as plain numbers."""
        return None if self.draws is None else [round(end, DIGITS) for end in interval(self.draws[:, column])]


@dataclass(frozen=True)
class _Table:
    """One domain: `[documents, models]` each, as in `DocumentSums`; no bytes where some model knows none."""

    nll: Array
    tokens: Array
    text_bytes: Array | None

    @classmethod
    def of(cls, parts: Sequence[DocumentSums]) -> "_Table":
        """Put models side by side, documents that no window of any model holds left out."""
        rows = max(len(part.nll) for part in parts)

        def beside(columns: Sequence[Array]) -> Array:
            return np.stack([np.pad(column, (0, rows - len(column))) for column in columns], axis=1)

        tokens = beside([part.tokens for part in parts])
        seen = tokens.any(1)
        sizes = [part.text_bytes for part in parts if part.text_bytes is not None and part.text_bytes.any()]
        text_bytes = beside(sizes)[seen] if len(sizes) == len(parts) else None
        return cls(beside([part.nll for part in parts])[seen], tokens[seen], text_bytes)
