"""What an evaluation is asked for: which models, and which windows each of them is measured on."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from upcycle.checkpoint import CONFIG, read_json, read_tensors
from upcycle.data import load_tokenizer
from upcycle.documents import find_files
from upcycle.errors import CheckpointError, DataError, TrainingError
from upcycle.heldout import Heldout, read_heldout
from upcycle.run_folder import CHECKPOINTS, RECORD
from upcycle.seeds import VOCABULARIES
from upcycle.training_settings import MAX_SEQUENCE, ModelFacts, read_facts
from upcycle.weights import check_plain

# Beside the vocabulary: marks between documents, and the chat's.
TOKENIZER_FILES: Final = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


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
    experts_backend: str = "auto"
    tasks: Sequence[str] = ()
    task_limit: int | None = None
    few_shot: int | None = None


def read_models(options: EvaluationOptions) -> tuple[dict[str, ModelFacts], str | None]:
    """What each model's config says, each folder once, however often and however it is named; and the base.

    Raises:
        CheckpointError: a folder that holds no checkpoint, a damaged one, or one whose weights are not all its own.
        DataError: a base that is a mixture.
    """
    names: dict[Path, str] = {}
    for model in [*options.models, *([] if options.base is None else [options.base])]:
        names.setdefault(_place(model), model)
    facts = {name: _read_model(Path(name)) for name in names.values()}
    base = None if options.base is None else names[_place(options.base)]
    if base is not None and facts[base].kind != "dense":
        raise DataError(
            f"--base {options.base} is a mixture; expected the dense model that the seeds were trained from"
        )
    return facts, base


def _place(model: str) -> Path:
    try:
        place = Path(model).resolve()
        if not model or (place.exists() and not place.is_dir()):
            raise CheckpointError(f"{model!r} is no folder; expected that of a checkpoint")
    except (OSError, RuntimeError, ValueError) as error:  # links that lead to themselves, a zero byte
        raise CheckpointError(f"{model!r} is no folder of a checkpoint: {error}") from error
    return place


def _read_model(folder: Path) -> ModelFacts:
    if (folder / RECORD).is_file() and not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is a training that is not finished; name one of {folder / CHECKPOINTS}/step-*")
    check_plain(folder)
    read_tensors(folder)
    try:
        return read_facts(folder)
    except TrainingError:  # a mixture whose routers cannot be trained here; its loss can be measured
        return ModelFacts(kind="native", config=read_json(folder / CONFIG))


def check_tokenizers(models: Iterable[str]) -> None:
    """Refuse models that cannot read a text.

    Raises:
        DataError: which one has no tokenizer, or one without an end of text.
    """
    for model in models:
        tokenizer = load_tokenizer(Path(model))
        if tokenizer is None or tokenizer.eos_token_id is None:
            what = "no tokenizer to read text with, or a damaged one" if tokenizer is None else "no eos_token"
            raise DataError(f"{model} has {what}; put its tokenizer files beside the weights")


def read_windows(
    options: EvaluationOptions, facts: Mapping[str, ModelFacts]
) -> tuple[dict[str, dict[str, Heldout]], bool]:
    """Every model's windows by domain, read once for each tokenizer; and whether all models read the same tokens.

    Raises:
        DataError: data that cannot be read, or not by one of the models, or not by all of them alike.
    """
    length, shortest = _length(options, facts)
    groups: dict[str, list[str]] = {}
    for model in facts if options.data else ():
        groups.setdefault(_tokenizer_hash(Path(model)), []).append(model)
    arrays = [name for name, source in options.data.items() if _is_array(name, source)]
    is_text = len(arrays) < len(options.data)
    tokenizers = {
        members[0]: load_tokenizer(Path(members[0])) if is_text or len(groups) > 1 else None
        for members in groups.values()
    }
    for model, tokenizer in tokenizers.items():
        if is_text and tokenizer is None:
            raise DataError(
                f"{model} has no tokenizer to read text with, or a damaged one; put its tokenizer files beside the "
                "weights, or give .npy tokens"
            )
    heldout: dict[str, dict[str, Heldout]] = {model: {} for model in facts}
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
                longest=None if shortest is None else facts[shortest].positions,
                owner=shortest or "the model",
            )
            for model in members:
                _check_vocabulary(model, facts[model], part, source)
                heldout[model][name] = part
    return heldout, _comparable(options, heldout)


def _length(options: EvaluationOptions, facts: Mapping[str, ModelFacts]) -> tuple[int, str | None]:
    """Tokens of a window, and the model that has the fewest positions, if any says how many."""
    known = {model: fact.positions for model, fact in facts.items() if fact.positions}
    shortest = min(known, key=lambda model: known[model], default=None)
    longest = known[shortest] if shortest else None
    length = options.sequence_length or min(longest or MAX_SEQUENCE, MAX_SEQUENCE)
    if longest and length > longest:
        raise DataError(f"--sequence-length {length}: {shortest} has positions for {longest} tokens")
    if options.stride and options.stride > length:
        raise DataError(f"--stride {options.stride} would leave tokens out of windows of {length}")
    return length, shortest


def _tokenizer_hash(folder: Path) -> str:
    """SHA-256 of the files that decide how a text is read: the same, the same tokens."""
    digest = hashlib.sha256()
    for name in (*VOCABULARIES, *TOKENIZER_FILES):
        if (folder / name).is_file():
            digest.update(name.encode())
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


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


def _check_vocabulary(model: str, facts: ModelFacts, part: Heldout, source: str) -> None:
    size, highest = facts.dense["vocab_size"], int(part.tokens.max())
    if highest >= size:
        raise DataError(
            f"{model} has a vocabulary of {size} tokens, but --data {part.name}={source} holds token {highest}; it was "
            "made with another tokenizer"
        )


def _comparable(options: EvaluationOptions, heldout: Mapping[str, Mapping[str, Heldout]]) -> bool:
    """Whether all models read the same tokens; else they must be comparable by bytes, over the same text.

    Raises:
        DataError: they are not.
    """
    first, *others = heldout
    for other in others:
        if all(np.array_equal(heldout[first][name].tokens, heldout[other][name].tokens) for name in heldout[first]):
            continue
        why = (
            f"{first} and {other} read text as different tokens, so they are compared by bits per byte of the same text"
        )
        if options.windows:
            raise DataError(f"{why}; leave out --windows, which chooses other text for each")
        for name in heldout[first]:
            sizes = (heldout[first][name].text_bytes, heldout[other][name].text_bytes)
            if any(part is None or not part.any() for part in sizes):
                raise DataError(f"{why}; leave out {name}: tokens and chats, and some tokenizers, tell no bytes of it")
        return False
    return True
