"""A little text for each expert, cut into windows: what routers are initialised from, before any training."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from upcycle.data import encoded_batches, end_of_text_token, load_tokenizer, read_array
from upcycle.documents import Document, find_files, read_documents
from upcycle.errors import DataError, did_you_mean
from upcycle.heldout import evenly_spaced
from upcycle.numeric import Array

OPTION: Final = "--router-data"
DEFAULT_TOKENS: Final = 16_384  # an expert
MAX_WINDOW: Final = 512  # tokens: longer ones cost more and tell a router hardly more of where a text comes from
MIN_TOKENS: Final = 16  # of an expert's text
SMOOTHING: Final = 1.0  # occurrences
CHARACTERS: Final = 16  # a token has fewer: of a document no more is tokenised than is needed
READ_AHEAD: Final = 8  # times the tokens that are wanted are read, so that those taken are spread over the text


@dataclass(frozen=True)
class RouterText:
    """Each expert's text.

    Attributes:
        experts: their names, in their order.
        windows: int64 `[windows, length]` an expert, all of one length.
    """

    experts: Sequence[str]
    windows: Sequence[Array]

    @property
    def tokens(self) -> int:
        """In all."""
        return sum(windows.size for windows in self.windows)

    def usage(self, vocab_size: int) -> Array:
        """Each text's share of each token's occurrences: `[vocabulary, experts]`, rows sum to 1.

        Every text counts as if it were as long as the others, and has each token `SMOOTHING` times more than it does: a
        token that none has falls to all alike.
        """
        counts = np.stack([np.bincount(windows.reshape(-1), minlength=vocab_size) for windows in self.windows], axis=1)
        totals = counts.sum(0)
        smoothed: Array = counts * (totals.mean() / totals) + SMOOTHING
        shares: Array = smoothed / smoothed.sum(1, keepdims=True)
        return shares

    def record(self) -> dict[str, Any]:
        """For `upcycle.json`, by expert: how many tokens, and which ones."""
        return {
            name: {"tokens": windows.size, "sha256": hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest()}
            for name, windows in zip(self.experts, self.windows, strict=True)
        }


def check_names(names: Sequence[str], experts: Sequence[str], option: str = OPTION) -> None:
    """Refuse text that no expert is for, and experts without text.

    Raises:
        DataError: one of the two, with the names that there are.
    """
    for name in names:
        if name not in experts:
            raise DataError(
                f"{option} {name}: there is no expert '{name}'{did_you_mean(name, experts)} (experts have their "
                "seeds' names)"
            )
    missing = [name for name in experts if name not in names]
    if missing:
        raise DataError(
            f"{option} gives expert '{missing[0]}' no text; add {missing[0]}=FILE with text of what it is good at "
            "(of an ancestor: general text)"
        )


def read_router_text(
    sources: Mapping[str, str | Sequence[str]],
    experts: Sequence[str],
    folder: Path,
    config: Mapping[str, Any],
    *,
    tokens: int = DEFAULT_TOKENS,
    longest: int | None = None,
    option: str = OPTION,
) -> RouterText:
    """At most `tokens` tokens for each expert, from all over its text, in windows of one length.

    Of files of text a stretch of `READ_AHEAD` times as many tokens is read, of `.npy` tokens the whole array; windows
    are taken evenly spaced.

    Args:
        sources: by expert a file or pattern (`.jsonl`, `.txt`, `.parquet`, `.npy`), a Hub dataset, or prompts.
        folder: where the tokenizer lies.
        config: the dense model's, for `vocab_size` and `eos_token_id`.
        longest: positions that the model has.

    Raises:
        DataError: names that do not match the experts, data that cannot be read, too little of it.
    """
    check_names(list(sources), experts, option)
    files = {
        name: find_files(option, name, source) if isinstance(source, str) else None for name, source in sources.items()
    }
    needs_tokenizer = any(found is None or not found or found[0].suffix != ".npy" for found in files.values())
    tokenizer = load_tokenizer(folder) if needs_tokenizer else None
    if needs_tokenizer and tokenizer is None:
        raise DataError(f"{folder} has no tokenizer to read text with; put its files there, or give .npy tokens")
    runs = []
    for name in experts:
        source, found = sources[name], files[name]
        if found and found[0].suffix == ".npy":
            if len(found) > 1:
                raise DataError(f"{option} {name}={source}: {len(found)} .npy files match, expected one")
            runs.append(read_array(option, name, found[0], config["vocab_size"]))
            continue
        if isinstance(source, str):
            documents = read_documents(option, name, source, found or [], 0)
        else:
            documents = (Document(f"prompt {number} of {name}", text) for number, text in enumerate(source, 1))
        runs.append(_tokenised(documents, tokenizer, config, READ_AHEAD * tokens))
    for name, run in zip(experts, runs, strict=True):
        if run.shape[-1] < MIN_TOKENS:
            what = "tokens a row" if run.ndim == 2 else "tokens of text"
            raise DataError(f"{option} {name}: {run.shape[-1]} {what}, expected at least {MIN_TOKENS}; give more")
    length = min([MAX_WINDOW, tokens, *(run.size for run in runs), *([longest] if longest else [])])
    # Rows of a .npy file are windows: where they are long enough none is cut out of two.
    rows = [run.shape[1] for run in runs if run.ndim == 2]
    length = min([length, *rows])
    return RouterText(list(experts), [_spread(run, length, tokens) for run in runs])


def _tokenised(documents: Iterator[Document], tokenizer: Any, config: Mapping[str, Any], enough: int) -> Array:
    """Documents one after another, int64 `[tokens]`, at most about `enough` of them."""
    end_of_text = end_of_text_token(tokenizer, config)
    parts: list[Array] = []
    size = 0
    for batch in encoded_batches(_short(documents, CHARACTERS * enough), tokenizer, end_of_text, config["vocab_size"]):
        parts += [np.array(one.ids[:enough], np.int64) for one in batch]
        size += sum(len(one.ids) for one in batch)
        if size >= enough:
            break
    return np.concatenate(parts)[:enough] if parts else np.zeros(0, np.int64)


def _short(documents: Iterator[Document], characters: int) -> Iterator[Document]:
    """Documents, of long texts the beginning."""
    for document in documents:
        content = document.content
        yield Document(document.place, content[:characters] if isinstance(content, str) else content)


def _spread(run: Array, length: int, tokens: int) -> Array:
    """Windows of `length` tokens, int64, evenly spaced over a run or over the rows of an array."""
    rows = run if run.ndim == 2 else run.reshape(1, -1)
    in_row = rows.shape[1] // length
    chosen = evenly_spaced(len(rows) * in_row, max(1, tokens // length))
    # One by one, as the array may be far larger than memory.
    windows = [rows[at // in_row, at % in_row * length : (at % in_row + 1) * length] for at in chosen]
    return np.stack(windows).astype(np.int64)
