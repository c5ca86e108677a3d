"""Several models measured on the same held-out text, and compared: the object that `upcycle eval --json` prints."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from upcycle.checkpoint import read_tensors
from upcycle.data import load_tokenizer
from upcycle.documents import find_files
from upcycle.errors import CheckpointError, DataError, UpcycleError
from upcycle.evaluate import token_losses
from upcycle.heldout import Heldout, read_heldout
from upcycle.numeric import Array
from upcycle.relatives import Relatives, find_relatives
from upcycle.resampling import draw_losses, interval
from upcycle.routing import RoutingTally
from upcycle.seeds import tokenizer_hash
from upcycle.similarity import MAX_TOKENS, expert_similarity
from upcycle.tasks import check_tasks, run_tasks
from upcycle.training_settings import MAX_SEQUENCE, ModelFacts, read_facts
from upcycle.verdict import Scores, verdict
from upcycle.weights import load_model, quiet_transformers

BATCH_TOKENS: Final = {"cpu": 4096}  # a forward; elsewhere:
GPU_BATCH_TOKENS: Final = 32_768
MAX_LOGITS: Final = 2**28  # of a forward, unless --batch-tokens says otherwise: 1 GiB in fp32
DIGITS: Final = 6

Progress = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class EvaluationOptions:
    """What the user asked for; None where the default is to be found (`upcycle eval --help` describes each)."""

    models: Sequence[str]
    data: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None
    sequence_length: int | None = None
    stride: int | None = None
    windows: int | None = None
    batch_tokens: int | None = None
    precision: str | None = None
    device: str | None = None
    tasks: Sequence[str] = ()
    task_limit: int | None = None


@dataclass(frozen=True)
class _Sums:
    """Per document, `[documents]` each: summed NLL in nats, targets, bytes of their text (None where unknown)."""

    nll: Array
    tokens: Array
    text_bytes: Array | None


def evaluate_models(options: EvaluationOptions, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Measure every model on every domain, and say what follows.

    Args:
        progress: called with the model, what is measured on it, and how many windows (of how many) are done in all.

    Returns:
        Plain data: `models`, path → `domains` (each with `loss` in nats per token, its `ci95` over documents,
        `perplexity`, `bits_per_byte`, `tokens`, `documents`), `mean_loss` over the domains, `role`, `seconds`, for
        mixtures `routing` (see `RoutingTally.means` and `expert_similarity`), and `tasks`; `measure`, by which the
        models may be compared ("loss" or "bits_per_byte"); and `verdict`, sentences.

    Raises:
        UpcycleError: input that cannot be served; all that can be seen without loading a model is seen first.
    """
    models = list(dict.fromkeys([*options.models, *([options.base] if options.base else [])]))
    quiet_transformers()
    _check_different(models)
    facts = {model: read_facts(Path(model)) for model in models}
    for model in models:
        read_tensors(Path(model))
    if options.tasks:
        check_tasks(options.tasks)
    device = _device(options.device)
    heldout, comparable = _read_all(options, facts)
    mixtures = [model for model in models if facts[model].top_k is not None]
    relatives = find_relatives(models, mixtures, options.base)
    total = sum(len(part.tokens) for parts in heldout.values() for part in parts.values())
    done = 0

    def windows_done(model: str, domain: str, count: int) -> None:
        nonlocal done
        done += count
        progress(model, domain, done, total)

    results, sums = {}, {}
    for model in models:
        began = time.perf_counter()
        measurement = _Measurement(model, facts[model], options, device)
        results[model], sums[model] = measurement.run(heldout[model], windows_done)
        results[model]["seconds"] = round(time.perf_counter() - began, 3)
        results[model]["role"] = _role(model, relatives)
    return _compared(models, list(options.data), results, sums, relatives, comparable)


def _check_different(models: Sequence[str]) -> None:
    places: dict[Path, str] = {}
    for model in models:
        place = Path(model).resolve()
        if place in places:
            raise CheckpointError(f"{model} and {places[place]} are the same folder; name each model once")
        places[place] = model


def _device(name: str | None) -> torch.device:
    try:
        if name is None:
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            return device or torch.device("cpu")
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UpcycleError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


def _read_all(
    options: EvaluationOptions, facts: Mapping[str, ModelFacts]
) -> tuple[dict[str, dict[str, Heldout]], bool]:
    """Every model's windows by domain, read once for each tokenizer; and whether all models read the same tokens.

    Raises:
        DataError: data that cannot be read, or not by one of the models.
    """
    longest = min((fact.positions for fact in facts.values() if fact.positions), default=None)
    length = options.sequence_length or min(longest or MAX_SEQUENCE, MAX_SEQUENCE)
    if longest and length > longest:
        raise DataError(f"--sequence-length {length}: the models have positions for {longest} tokens")
    if options.stride and options.stride > length:
        raise DataError(f"--stride {options.stride} would leave tokens out of windows of {length}")
    groups: dict[str | None, list[str]] = {}
    for model in facts if options.data else ():
        groups.setdefault(tokenizer_hash(Path(model)), []).append(model)
    heldout: dict[str, dict[str, Heldout]] = {model: {} for model in facts}
    arrays = [name for name, source in options.data.items() if _is_array(name, source)]
    needed = len(groups) > 1 or len(arrays) < len(options.data)
    tokenizers = {members[0]: load_tokenizer(Path(members[0])) if needed else None for members in groups.values()}
    for name, source in options.data.items():
        if name in arrays:
            _check_one_tokenizer(name, source, tokenizers)
        for members in groups.values():
            part = read_heldout(
                name,
                source,
                tokenizers[members[0]],
                {**facts[members[0]].dense, "vocab_size": max(fact.dense["vocab_size"] for fact in facts.values())},
                length=length,
                stride=options.stride,
                count=options.windows,
                longest=longest,
            )
            for model in members:
                size, highest = facts[model].dense["vocab_size"], int(part.tokens.max())
                if highest >= size:
                    raise DataError(
                        f"{model} has a vocabulary of {size} tokens, but --data {name}={source} holds token {highest}; "
                        "it was made with another tokenizer"
                    )
                heldout[model][name] = part
    first = next(iter(heldout.values()))
    comparable = all(
        np.array_equal(parts[name].tokens, first[name].tokens) for parts in heldout.values() for name in first
    )
    return heldout, comparable


def _is_array(name: str, source: str) -> bool:
    files = find_files("--data", name, source)
    return bool(files) and files[0].suffix == ".npy"


def _check_one_tokenizer(name: str, source: str, tokenizers: Mapping[str, Any]) -> None:
    known = [(model, tokenizer.get_vocab()) for model, tokenizer in tokenizers.items() if tokenizer is not None]
    for model, vocabulary in known[1:]:
        if vocabulary != known[0][1]:
            raise DataError(
                f"--data {name}={source} holds tokens of one tokenizer, but {known[0][0]} and {model} have different "
                "ones; give text (.jsonl, .txt, .parquet), which each reads in its own way"
            )


class _Measurement:
    """One model, loaded, measured on each domain, and let go."""

    def __init__(self, model: str, facts: ModelFacts, options: EvaluationOptions, device: torch.device) -> None:
        self.name, self.facts, self.options, self.device = model, facts, options, device
        precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model = load_model(Path(model), dtype).eval()
        self._guarded(self.model.to, device)

    def run(
        self, heldout: Mapping[str, Heldout], windows_done: Callable[[str, str, int], None]
    ) -> tuple[dict[str, Any], dict[str, _Sums]]:
        """The model's entry of the result, and its sums by domain; call once."""
        sums: dict[str, _Sums] = {}
        routing: dict[str, Any] = {}
        for name, part in heldout.items():
            tally = None
            if self.facts.top_k is not None:
                experts = list(self.facts.experts)
                tally = RoutingTally(self.facts.top_k, experts.index(name) if name in experts else None)
            done = partial(windows_done, self.name, name)
            losses = self._guarded(token_losses, self.model, part, self._batch(part), self.device, tally, done)
            sums[name] = _document_sums(losses, part)
            if not np.isfinite(sums[name].nll).all():
                raise CheckpointError(
                    f"{self.name}: its loss on {name} is no finite number; its weights are damaged, or too large for "
                    "bf16 (--precision fp32)"
                )
            if tally:
                routing[name] = _rounded(tally.means()) | {"own_expert": None if tally.own_expert is None else name}
                routing[name].setdefault("own_share", None)
        result: dict[str, Any] = {}
        if routing:
            windows = [torch.from_numpy(part.tokens[:1, :MAX_TOKENS]).to(self.device) for part in heldout.values()]
            similarity = self._guarded(expert_similarity, self.model, windows)
            result["routing"] = {
                "experts": list(self.facts.experts),
                "top_k": self.facts.top_k,
                "domains": routing,
                "similarity": _rounded(similarity),
            }
        if self.options.tasks:
            tokenizer = load_tokenizer(Path(self.name))
            result["tasks"] = run_tasks(self.model, tokenizer, self.options.tasks, limit=self.options.task_limit)
        self.model.to("meta")  # lets the memory go at once, whoever still holds the model
        return result, sums

    def _batch(self, part: Heldout) -> int:
        """Windows a forward."""
        tokens = self.options.batch_tokens or min(
            BATCH_TOKENS.get(self.device.type, GPU_BATCH_TOKENS), MAX_LOGITS // int(self.facts.dense["vocab_size"])
        )
        return max(1, tokens // int(part.tokens.shape[1]))

    def _guarded(self, work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except torch.OutOfMemoryError as error:
            raise UpcycleError(
                f"{self.name} does not fit into the memory of {self.device}; a smaller --batch-tokens, --precision "
                "bf16 or --device cpu may help"
            ) from error


def _document_sums(losses: Array, part: Heldout) -> _Sums:
    """Token losses `[windows, length - 1]` summed by document; without documents each window is one."""
    windows = np.arange(len(losses), dtype=np.int64)[:, None]
    owners = np.broadcast_to(windows, losses.shape) if part.documents is None else part.documents
    counted = np.ones(losses.shape, np.bool_) if part.counted is None else part.counted
    owner, documents = owners[counted], int(owners.max()) + 1

    def total(values: Array) -> Array:
        summed: Array = np.bincount(owner, values, minlength=documents)
        return summed

    sizes = None if part.text_bytes is None else total(part.text_bytes[counted].astype(np.float64))
    return _Sums(total(losses[counted].astype(np.float64)), total(np.ones(len(owner))), sizes)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, DIGITS) if isinstance(value, float) else value


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
    sums: Mapping[str, Mapping[str, _Sums]],
    relatives: Mapping[str, Relatives],
    comparable: bool,
) -> dict[str, Any]:
    """The whole result from every model's own, with intervals and the verdict."""
    tables = {domain: _Table.of([sums[model][domain] for model in models]) for domain in domains}
    entries = {model: {"domains": {}, "mean_loss": None, **results[model]} for model in models}
    for domain, table in tables.items():
        draws = draw_losses(table.nll, table.tokens)
        for column, model in enumerate(models):
            loss = float(table.losses()[column])
            entries[model]["domains"][domain] = {
                "loss": round(loss, DIGITS),
                "ci95": None if draws is None else [round(end, DIGITS) for end in interval(draws[:, column])],
                "perplexity": round(math.exp(min(loss, 700.0)), DIGITS),
                "bits_per_byte": None if table.text_bytes is None else round(float(table.bits()[column]), DIGITS),
                "tokens": int(table.tokens[:, column].sum()),
                "documents": len(table.nll),
            }
    for entry in entries.values() if domains else ():
        entry["mean_loss"] = round(float(np.mean([found["loss"] for found in entry["domains"].values()])), DIGITS)
    sentences: list[str] = []
    if domains:
        scores = Scores(
            models=models,
            domains=domains,
            unit="nats per token" if comparable else "bits per byte",
            losses=np.stack([table.losses() if comparable else table.bits() for table in tables.values()]),
            draws=[table.draws(comparable) for table in tables.values()],
            documents=[len(table.nll) for table in tables.values()],
        )
        routing = {model: result["routing"] for model, result in results.items() if "routing" in result}
        sentences = verdict(scores, relatives, routing)
    return {"models": entries, "measure": "loss" if comparable else "bits_per_byte", "verdict": sentences}


@dataclass(frozen=True)
class _Table:
    """One domain: `[documents, models]` each, as in `_Sums`."""

    nll: Array
    tokens: Array
    text_bytes: Array | None

    @classmethod
    def of(cls, parts: Sequence[_Sums]) -> "_Table":
        """Put models side by side, documents that no window of any model holds left out."""
        rows = max(len(part.nll) for part in parts)

        def beside(columns: Sequence[Array]) -> Array:
            return np.stack([np.pad(column, (0, rows - len(column))) for column in columns], axis=1)

        tokens = beside([part.tokens for part in parts])
        seen = tokens.any(1)
        sizes = [part.text_bytes for part in parts if part.text_bytes is not None]
        text_bytes = beside(sizes)[seen] if len(sizes) == len(parts) else None
        return cls(beside([part.nll for part in parts])[seen], tokens[seen], text_bytes)

    def losses(self) -> Array:
        """Nats per token, `[models]`."""
        found: Array = self.nll.sum(0) / self.tokens.sum(0)
        return found

    def bits(self) -> Array:
        """Bits per byte, `[models]`."""
        assert self.text_bytes is not None, "tokens alone are compared by their own loss"
        found: Array = self.nll.sum(0) / math.log(2) / self.text_bytes.sum(0)
        return found

    def draws(self, comparable: bool) -> Array | None:
        """Draws of what the models are compared by."""
        if comparable:
            return draw_losses(self.nll, self.tokens)
        assert self.text_bytes is not None, "tokens alone are compared by their own loss"
        return draw_losses(self.nll / math.log(2), self.text_bytes)
