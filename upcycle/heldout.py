"""Held-out text, cut into windows: for a look while training, or whole, with its documents and bytes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.data import encoded_batches, end_of_text_token, prepare_domain, read_array
from upcycle.documents import Document, find_files, read_documents
from upcycle.errors import DataError
from upcycle.numeric import Array


@dataclass(frozen=True)
class Heldout:
    """One domain's held-out text: each token but a window's first is predicted.

    Attributes:
        tokens: int64 `[windows, length]`.
        counted: bool `[windows, length - 1]`: the targets that count, or None for all.
        documents: int32 `[windows, length - 1]`: the document that each target belongs to, or None where nothing tells;
            a window stands for a document then.
        text_bytes: int32 `[windows, length - 1]`: the UTF-8 bytes of text that each target adds, or None.
    """

    name: str
    tokens: Array
    counted: Array | None = None
    documents: Array | None = None
    text_bytes: Array | None = None


def evenly_spaced(available: int, wanted: int | None) -> Array:
    """Numbers of the windows that are taken: at most `wanted`, the first and the last among them."""
    count = available if wanted is None else min(wanted, available)
    return np.linspace(0, available - 1, count).astype(int)


def heldout_windows(
    name: str,
    source: str,
    folder: Path,
    tokenizer: Any,
    config: Mapping[str, Any],
    *,
    length: int,
    count: int,
    longest: int | None = None,
    multiple: int = 1,
    writes: bool = True,
) -> Heldout:
    """At most `count` windows of a domain, evenly spaced; the rows of a `.npy` file are windows as they stand.

    Args:
        longest: positions that the model has.
        multiple: their number is one of it, so that processes share them evenly.

    Raises:
        DataError: data that cannot be read, or too little of it for one window.
    """
    files = find_files("--eval-data", name, source)
    array = (
        read_array("--eval-data", name, files[0], config["vocab_size"]) if files and files[0].suffix == ".npy" else None
    )
    counted = None
    if array is None:
        domain = prepare_domain(
            "--eval-data",
            name,
            source,
            folder,
            tokenizer,
            config,
            random_seed=0,
            enough=count * length,
            writes=writes,
        )
        array, counted = domain.tokens, domain.counted
    rows = array if array.ndim == 2 else array[: array.size // length * length].reshape(-1, length)
    found = min(count, len(rows)) // multiple * multiple
    if not found or rows.shape[1] < 2:
        raise DataError(
            f"--eval-data {name}={source} holds {array.size} tokens, too few for {multiple} windows of {length}; give "
            "more text or a shorter --sequence-length"
        )
    _check_length("--eval-data", name, source, rows.shape[1], longest)
    chosen = evenly_spaced(len(rows), found)
    if counted is not None:
        counted = counted[: len(rows) * length].reshape(-1, length)[chosen, 1:]
    return Heldout(name, np.asarray(rows[chosen], np.int64), counted)


def _check_length(
    option: str, name: str, source: str, length: int, longest: int | None, owner: str = "the model"
) -> None:
    if longest is not None and length > longest:
        raise DataError(f"{option} {name}={source}: rows of {length} tokens, but {owner} has positions for {longest}")


def read_heldout(
    name: str,
    source: str,
    tokenizer: Any,
    config: Mapping[str, Any],
    *,
    length: int,
    stride: int | None = None,
    count: int | None = None,
    longest: int | None = None,
    owner: str = "the model",
) -> Heldout:
    """All of a domain's files, or `count` of its windows, evenly spaced; documents follow one another, packed.

    Every token but a window's first is predicted once. With a `stride` windows overlap: each begins so many tokens
    after the one before, and only what is new in it counts, so that every token has at least `length - stride` before
    it.

    Args:
        tokenizer: the model's; of `.npy` tokens it is not asked.
        config: the (dense) model's.
        longest: positions that the model has, or the one of several that has the fewest.
        owner: that model, for messages.

    Raises:
        DataError: data that cannot be read, or nothing in it.
    """
    files = find_files("--data", name, source)
    if files and files[0].suffix == ".npy":
        if len(files) > 1:
            raise DataError(f"--data {name}={source}: {len(files)} .npy files match, expected one")
        array = read_array("--data", name, files[0], config["vocab_size"])
        if array.ndim == 2:
            if stride:
                raise DataError(f"--data {name}={source}: its rows are windows already; --stride needs a flat array")
            if array.shape[1] < 2:
                raise DataError(f"--data {name}={source}: rows of one token, so there is nothing to predict")
            _check_length("--data", name, source, array.shape[1], longest, owner)
            return Heldout(name, np.asarray(array[evenly_spaced(len(array), count)], np.int64))
        run = _Run(array)
    elif not files:
        raise DataError(
            f"--data {name}={source} is no file; download the held-out text of a Hub dataset, and give its files"
        )
    else:
        documents = read_documents("--data", name, source, files, 0)
        run = _encode(documents, tokenizer, end_of_text_token(tokenizer, config), config["vocab_size"])
        if not run.tokens.size:
            raise DataError(f"--data {name}={source} holds no text")
    if run.tokens.size < 2:
        raise DataError(f"--data {name}={source} holds one token, so there is nothing to predict")
    return _cut(name, run, length, stride or length, count)


@dataclass(frozen=True)
class _Run:
    """Documents one after another; every array is `[tokens]`."""

    tokens: Array
    counted: Array | None = None
    documents: Array | None = None
    text_bytes: Array | None = None


def _encode(documents: Iterable[Document], tokenizer: Any, end_of_text: int, vocab_size: int) -> _Run:
    batches = encoded_batches(documents, tokenizer, end_of_text, vocab_size, with_bytes=True)
    found = [one for batch in batches for one in batch]
    if not found:
        return _Run(np.zeros(0, np.int64))
    sizes = [one.text_bytes for one in found if one.text_bytes is not None]
    return _Run(
        tokens=np.concatenate([np.array(one.ids, np.int32) for one in found]),
        counted=np.concatenate([np.array(one.counted or [True] * len(one.ids), np.bool_) for one in found]),
        documents=np.repeat(np.arange(len(found), dtype=np.int32), [len(one.ids) for one in found]),
        text_bytes=np.concatenate(sizes) if len(sizes) == len(found) else None,
    )


def _cut(name: str, run: _Run, length: int, stride: int, count: int | None) -> Heldout:
    """Windows that begin every `stride` tokens; the last may be shorter, and is filled up with what does not count."""
    size = run.tokens.size
    length = min(length, size)
    starts = np.arange(0, max(1, size - max(1, length - stride)), stride)
    starts = starts[evenly_spaced(len(starts), count)]
    places = starts[:, None] + np.arange(length)
    inside = places < size
    places = np.minimum(places, size - 1)
    # The first window predicts all but its first token, a later one what the one before it did not reach.
    fresh = np.arange(1, length) >= np.where(starts == 0, 1, max(1, length - stride))[:, None]
    counted = inside[:, 1:] & fresh
    if run.counted is not None:
        counted &= run.counted[places[:, 1:]]
    if not counted.any():
        raise DataError(f"--data {name}: none of the tokens chosen counts (an assistant's words); take more windows")
    # What follows the end, the last token over and over, reaches nothing before it.
    tokens = run.tokens[places].astype(np.int64)
    owners, sizes = (None if part is None else part[places[:, 1:]] for part in (run.documents, run.text_bytes))
    return Heldout(name, tokens, counted, owners, sizes)
