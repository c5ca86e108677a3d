"""Rows of embeddings and heads matched by token: seeds with added tokens, padding, or other ids of the same tokens.

The result has the first seed's tokens with their ids, then those that only others have, in the order of the seeds and
of their ids there. A row is mixed of the seeds that have its token; new tokens may take rows that pad the first seed's
vocabulary. A row without a token is mixed of the seeds in which it has none either, so seeds that need no alignment
give the same bytes as without it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from upcycle.checkpoint import TOKENIZER_CONFIG, read_json, write_json
from upcycle.dense_config import DenseModel
from upcycle.errors import CheckpointError, SeedError
from upcycle.numeric import Array
from upcycle.seeds import MAX_TOKENIZER, MAX_TOKENIZER_VALUES, Seed, same_file

TOKENIZER: Final = "tokenizer.json"
ADDED: Final = "added_tokens.json"
TABLES: Final = ("embedding", "head")  # the roles with a row for each token
FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
MAX_ID: Final = 2**24
MAX_WORDS: Final = 1_000_000  # of a model: the largest have some 260,000
MAX_ADDED: Final = 50_000
MAX_TOKEN: Final = 1000  # characters of an added token
MAX_PIECES: Final = 100_000  # stretches of rows, of all seeds together: vocabularies of one ancestor have a few
LISTED: Final = 100  # tokens in upcycle.json
SHOWN: Final = 5  # tokens in a message


@dataclass(frozen=True)
class Run:
    """Rows of the result that lie one after another in every seed that has them.

    Attributes:
        rows: how many.
        starts: by seed where they begin in its table; None where it has none of them.
    """

    rows: int
    starts: tuple[int | None, ...]

    def mixed(self, indices: Sequence[int], weights: Sequence[float]) -> tuple[list[int], tuple[float, ...]]:
        """Of the seeds that a role is mixed of, those that have the rows, their weights summing to 1 again.

        Where none of them has any weight it is the mean of all seeds that have the rows.
        """
        having = [(index, weight) for index, weight in zip(indices, weights, strict=True) if self.has(index)]
        total = sum(weight for _, weight in having)
        if not total:
            indices = [index for index in range(len(self.starts)) if self.has(index)]
            return indices, (1 / len(indices),) * len(indices)
        if len(having) == len(indices):
            return list(indices), tuple(weights)
        return [index for index, _ in having], tuple(weight / total for _, weight in having)

    def has(self, seed: int) -> bool:
        """Whether a seed has the rows."""
        return self.starts[seed] is not None


@dataclass(frozen=True)
class Change:
    """What aligning one seed means: tokens that the first seed lacks, tokens of other ids, rows that it does not have.

    `rowless` are tokens that its tokenizer names, but its embedding has no row for: as good as not there.
    """

    seed: str
    new: tuple[str, ...]
    moved: tuple[str, ...]
    lacking: int
    rowless: int


@dataclass(frozen=True)
class Alignment:
    """Where the rows of the result's embedding and head come from.

    Attributes:
        size: their number, the result's vocab_size.
        runs: laid end to end they are all rows.
        added: entries for the result's tokenizer.json, of the tokens that the first seed's lacks.
        changes: by seed, in their order.
    """

    size: int
    runs: tuple[Run, ...]
    added: tuple[Mapping[str, Any], ...]
    changes: tuple[Change, ...]

    def model(self, first: DenseModel) -> DenseModel:
        """The result's dense model."""
        return replace(
            first, sizes=replace(first.sizes, vocab=self.size), values={**first.values, "vocab_size": self.size}
        )

    def config(self, first: Mapping[str, Any], model: DenseModel) -> dict[str, Any]:
        """Its config.json: the first seed's, with another vocab_size if need be."""
        return {**first} if self.size == model.sizes.vocab else {**first, "vocab_size": self.size}

    def record(self) -> dict[str, Any]:
        """What upcycle.json says of it."""
        text = json.dumps([self.size, self.added], sort_keys=True)
        return {
            "aligned": True,
            "size": self.size,
            "added": [entry["content"] for entry in self.added[:LISTED]],
            "added_count": len(self.added),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "seeds": {
                change.seed: {"new": len(change.new), "moved": len(change.moved), "lacking": change.lacking}
                for change in self.changes
            },
        }

    def notes(self) -> list[str]:
        """For the user, a sentence a seed of which there is anything to say."""
        said = []
        for change in self.changes:
            parts = [
                _counted(change.new, "new to the first seed"),
                _counted(change.moved, "moved"),
                f"{change.lacking:,} of the result's are not its own" if change.lacking else "",
                f"{change.rowless:,} have no row in its embedding and are left out" if change.rowless else "",
            ]
            if any(parts):
                said.append(f"tokens of seed '{change.seed}': {'; '.join(part for part in parts if part)}")
        return said or ["--align-vocab: all seeds have the same tokens with the same ids"]


def _counted(tokens: Sequence[str], what: str) -> str:
    if not tokens:
        return ""
    more = ", …" if len(tokens) > SHOWN else ""
    return f"{len(tokens):,} {what} ({', '.join(map(_short, tokens[:SHOWN]))}{more})"


def _short(token: str) -> str:
    return repr(token if len(token) <= 40 else f"{token[:39]}…")


def own_shapes(seed: Seed, dense: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the result's dense tensors, with as many rows as a seed has of its own."""
    family = seed.model.family
    tables = (f"{family.base}.{family.embedding}.weight", f"{family.head}.weight")
    return {name: (seed.model.sizes.vocab, *shape[1:]) if name in tables else shape for name, shape in dense.items()}


def usage_of(usage: Array, seeds: Sequence[int]) -> Array:
    """Of shares `[rows, all seeds]` those of the seeds that have these rows, summing to 1 again; all 0 is the mean."""
    if len(seeds) == usage.shape[1]:
        return usage
    shares: Array = usage[:, list(seeds)]
    totals = shares.sum(1, keepdims=True)
    return np.where(totals > 0, shares / np.where(totals > 0, totals, 1), 1 / len(seeds))


def extend_tokenizer(folder: Path, added: Sequence[Mapping[str, Any]]) -> None:
    """Add tokens to the tokenizer files in a folder, wherever these list added tokens."""
    if not added:
        return
    table = read_json(folder / TOKENIZER, MAX_TOKENIZER, MAX_TOKENIZER_VALUES, MAX_TOKENIZER)
    write_json(folder / TOKENIZER, {**table, "added_tokens": [*(table.get("added_tokens") or []), *added]})
    if (folder / TOKENIZER_CONFIG).is_file():
        table = read_json(folder / TOKENIZER_CONFIG)
        if isinstance(table.get("added_tokens_decoder"), dict):
            new = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in added}
            decoder = {**table["added_tokens_decoder"], **new}
            write_json(folder / TOKENIZER_CONFIG, {**table, "added_tokens_decoder": decoder})
    if (folder / ADDED).is_file():
        write_json(folder / ADDED, {**read_json(folder / ADDED), **{entry["content"]: entry["id"] for entry in added}})


def was_aligned(provenance: Mapping[str, Any]) -> bool:
    """Whether an upcycle.json says that the seeds were aligned."""
    return isinstance(provenance.get("vocabulary"), dict)


def align(seeds: Sequence[Seed]) -> Alignment:
    """Align the seeds' vocabularies by their tokens.

    Raises:
        SeedError: a seed without tokenizer.json, tokenizers that differ in more than added tokens and ids, or that
            cannot be read.
    """
    first = _read(seeds[0])
    tokens, new = [first.ids], dict[str, Mapping[str, Any]]()
    for seed in seeds[1:]:
        if seed.holds(TOKENIZER) and same_file(seeds[0], seed, TOKENIZER):
            tokens.append(first.ids)
            continue
        other = _read(seed)
        _check_same_words(seeds[0], first, seed, other)
        tokens.append(other.ids)
        for token, entry in sorted(other.added.items(), key=lambda item: other.ids[item[0]]):
            if token not in first.ids and other.ids[token] < seed.model.sizes.vocab:
                new.setdefault(token, entry)
    ids = first.ids | {token: first.next_id + number for number, token in enumerate(new)}
    _check_no_token_twice(seeds[0], ids)
    size = _size(seeds, tokens, ids)
    tables = [_rows(seed, own, ids, size) for seed, own in zip(seeds, tokens, strict=True)]
    return Alignment(
        size,
        tuple(_runs(seeds, tables)),
        tuple({"id": ids[token], **entry} for token, entry in new.items()),
        tuple(_change(seed, own, first.ids, ids, size) for seed, own in zip(seeds, tokens, strict=True)),
    )


@dataclass(frozen=True)
class _Tokenizer:
    """What a tokenizer.json says: `words` are those of its model, with their scores if it has any."""

    kind: str
    words: Mapping[str, Any]
    merges: Sequence[str]
    ids: dict[str, int]
    added: Mapping[str, Mapping[str, Any]]  # what an entry says beside its id
    next_id: int  # which one more added token would get


def _read(seed: Seed) -> _Tokenizer:
    if not seed.holds(TOKENIZER):
        raise SeedError(
            f"{seed.where} has no {TOKENIZER}, by which --align-vocab matches tokens; put one beside its weights "
            "(AutoTokenizer.from_pretrained(…).save_pretrained writes it), or leave the seed out"
        )
    try:
        table = read_json(seed.get(TOKENIZER), MAX_TOKENIZER, MAX_TOKENIZER_VALUES, MAX_TOKENIZER)
        model = table["model"]
        vocabulary, entries = model["vocab"], table.get("added_tokens") or []
        if len(vocabulary) > MAX_WORDS or len(entries) > MAX_ADDED:
            raise ValueError(
                f"{len(vocabulary):,} words and {len(entries):,} added tokens, expected at most {MAX_WORDS:,} and "
                f"{MAX_ADDED:,}"
            )
        if isinstance(vocabulary, list):  # unigram: [token, score] in the order of ids
            words: dict[str, Any] = {token: score for token, score in vocabulary}  # noqa: C416 - checks their number
            ids = {token: index for index, (token, _) in enumerate(vocabulary)}
        else:
            words, ids = dict.fromkeys(vocabulary), dict(vocabulary)
        if not all(type(token) is str and type(index) is int and 0 <= index < MAX_ID for token, index in ids.items()):
            raise ValueError(f"ids must be whole numbers from 0 to {MAX_ID - 1}")
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
        added = {entry["content"]: _entry(entry) for entry in entries}
        next_id = _add(seed, ids, entries, len(words))
    except CheckpointError as error:
        raise SeedError(f"{seed.where}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SeedError(f"{seed.where}: no vocabulary can be read from {TOKENIZER} ({error!r})") from error
    _check_no_token_twice(seed, ids)
    return _Tokenizer(str(model.get("type")), words, merges, ids, added, next_id)


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An added token without its id, checked: it may be written into the result."""
    content = entry["content"]
    content.encode()
    if not 0 < len(content) <= MAX_TOKEN or not all(type(entry.get(flag, False)) is bool for flag in FLAGS):
        raise ValueError(f"added token {content[:80]!r} is damaged, or above {MAX_TOKEN} characters")
    return {"content": content, **{flag: entry.get(flag, False) for flag in FLAGS}}


def _add(seed: Seed, ids: dict[str, int], entries: Iterable[Mapping[str, Any]], words: int) -> int:
    """Add added tokens' ids to those of a model's words; the id that the next one would get.

    The tokenizers library counts their ids itself and ignores what the file says where that is not the same.
    """
    highest = words - 1
    for entry in entries:
        token = entry["content"]
        expected = ids.get(token, highest + 1)
        if entry["id"] != expected or type(entry["id"]) is not int:
            raise SeedError(
                f"{seed.where}: {TOKENIZER} gives added token {_short(token)} the id {str(entry['id'])[:40]}, but "
                f"the tokenizers library gives it {expected}, so its row is not sure; load the tokenizer "
                "with AutoTokenizer, save it anew, and look whether it fits the weights"
            )
        ids[token] = expected
        highest = max(highest, expected)
    return highest + 1


def _check_no_token_twice(seed: Seed, ids: Mapping[str, int]) -> None:
    if len(set(ids.values())) == len(ids):
        return
    seen: dict[int, str] = {}
    for token, index in ids.items():
        if index in seen:
            raise SeedError(
                f"{seed.where}: {TOKENIZER} gives tokens {_short(seen[index])} and {_short(token)} one id, {index} "
                "(ids of added tokens follow the number of its words); which row is whose is not sure"
            )
        seen[index] = token


def _check_same_words(first: Seed, expected: _Tokenizer, seed: Seed, found: _Tokenizer) -> None:
    """Refuse tokenizers that were not trained as one: only added tokens can be joined."""
    what = ""
    if found.kind != expected.kind:
        what = f"is a {found.kind[:40]} tokenizer, but that of {first.where} is a {expected.kind[:40]} one"
    elif found.words.keys() != expected.words.keys():
        token = min(found.words.keys() ^ expected.words.keys())
        one, other = (seed, first) if token in found.words else (first, seed)
        what = f"differs in its model's words: {_short(token)} is among those of {one.where}, not of {other.where}"
    elif found.words != expected.words:
        token = min(word for word in found.words if found.words[word] != expected.words[word])
        scores = f"{str(found.words[token])[:40]}, expected {str(expected.words[token])[:40]}"
        what = f"differs from that of {first.where}: token {_short(token)} has the score {scores}"
    elif found.merges != expected.merges:
        pairs = zip([*found.merges, "nothing"], [*expected.merges, "nothing"], strict=False)
        number, (one_merge, other_merge) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        what = (
            f"differs from that of {first.where}: merge {number} is {_short(one_merge)}, expected {_short(other_merge)}"
        )
    if what:
        raise SeedError(
            f"{seed.where}: its {TOKENIZER} {what}; --align-vocab joins added tokens alone, as the rest reads text in "
            "another way, so leave the seed out"
        )


def _size(seeds: Sequence[Seed], tokens: Sequence[Mapping[str, int]], ids: Mapping[str, int]) -> int:
    """How many rows the result needs: no fewer than the first seed has."""
    limits = [seed.model.sizes.vocab for seed in seeds]
    beyond = {
        index
        for token, index in ids.items()
        if index >= limits[0] and any(own.get(token, limit) < limit for own, limit in zip(tokens, limits, strict=True))
    }
    size = max(beyond, default=limits[0] - 1) + 1
    if len(beyond) != size - limits[0]:
        missing = next(index for index in range(limits[0], size) if index not in beyond)
        token = next((token for token, index in ids.items() if index == missing), "")
        raise SeedError(
            f"{seeds[0].where}: no seed has a row for {f'token {_short(token)}' if token else 'a token'} of id "
            f"{missing}, and others come after it; config.json says vocab_size = {limits[0]:,}. Resize its embedding "
            "to its tokenizer, or name another seed first"
        )
    return size


def _rows(seed: Seed, own: Mapping[str, int], ids: Mapping[str, int], size: int) -> Array:
    """For each row of the result a seed's own row, or -1."""
    limit = seed.model.sizes.vocab
    here = np.array([(ids[token], index) for token, index in own.items() if index < limit], np.int32).reshape(-1, 2)
    rows = np.arange(size, dtype=np.int32)
    rows[limit:] = -1
    # A row with a token here or in the result is no padding.
    for named in (here[:, 1], np.fromiter(ids.values(), np.int64, len(ids))):
        rows[named[named < size]] = -1
    rows[here[:, 0]] = here[:, 1]
    return rows


def _runs(seeds: Sequence[Seed], tables: Sequence[Array]) -> list[Run]:
    size = len(tables[0])
    begins = np.zeros(size, bool)
    begins[0] = True
    for rows in tables:
        before, after = rows[:-1], rows[1:]
        begins[1:] |= np.where(before < 0, after >= 0, after != before + 1)
    starts = np.flatnonzero(begins)
    if len(starts) * len(seeds) > MAX_PIECES:
        raise SeedError(
            f"{seeds[0].where} and the others have their tokens in another order: {len(starts):,} stretches of rows, "
            f"expected at most {MAX_PIECES // len(seeds):,}; --align-vocab is for vocabularies of one ancestor, so "
            "leave out the seed whose ids are others"
        )
    lengths = np.diff(np.append(starts, size))
    columns = [rows[starts].tolist() for rows in tables]
    return [
        Run(rows, tuple(None if start < 0 else start for start in found))
        for rows, *found in zip(lengths.tolist(), *columns, strict=True)
    ]


def _change(seed: Seed, own: Mapping[str, int], first: Mapping[str, int], ids: Mapping[str, int], size: int) -> Change:
    limit = seed.model.sizes.vocab
    having = [token for token in sorted(own, key=own.__getitem__) if own[token] < limit]
    new = tuple(token for token in having if token not in first)
    moved = tuple(token for token in having if token in first and first[token] != own[token])
    return Change(
        seed.name, new, moved, sum(index < size for index in ids.values()) - len(having), len(own) - len(having)
    )
