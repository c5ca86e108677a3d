"""Documents for training: rows of files, or of a Hub dataset, each with its place for messages."""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from upcycle.errors import DataError

SUFFIXES: Final = (".jsonl", ".parquet", ".txt", ".npy")
SHUFFLE_BUFFER: Final = 1000  # documents of a streamed dataset among which the next one is drawn


@dataclass(frozen=True)
class Document:
    """A document and its place for messages: a text, or the turns of a chat."""

    place: str
    content: str | list[Any]


def find_files(option: str, name: str, source: str) -> list[Path]:
    """The files of a pattern, or none where `source` must be a Hub dataset.

    Raises:
        DataError: a pattern that matches nothing, a missing file, a kind of file that is not read.
    """
    if glob.has_magic(source) and not os.path.exists(source):
        files = [Path(path) for path in sorted(glob.glob(source, recursive=True)) if os.path.isfile(path)]
        if not files:
            raise DataError(f"{option} {name}={source}: the pattern matches no file")
    elif os.path.isfile(source):
        files = [Path(source)]
    elif os.path.exists(source) and not os.path.isdir(source):
        raise DataError(f"{option} {name}={source} is no plain file")
    elif os.path.isdir(source):
        raise DataError(f"{option} {name}={source} is a folder; name its files, as in {name}='{source}/*.jsonl'")
    elif Path(source).suffix in SUFFIXES or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise DataError(f"{option} {name}={source}: there is no such file")
    else:
        return []
    kinds = {file.suffix for file in files}
    if len(kinds) > 1 or not kinds <= set(SUFFIXES):
        raise DataError(
            f"{option} {name}={source}: expected files of one kind ({', '.join(SUFFIXES)}), "
            f"found {', '.join(sorted(kinds))}"
        )
    return files


def read_documents(option: str, name: str, source: str, files: Sequence[Path], random_seed: int) -> Iterator[Document]:
    """The documents of text files, or of a Hub dataset's split "train", streamed in a seeded order.

    Raises:
        DataError: a file, and the line in it, that cannot be read, or a dataset that cannot be had.
    """
    if not files:
        yield from _hub_documents(option, name, source, random_seed)
    for file in files:
        try:
            if file.stat().st_size == 0:
                raise DataError(f"{option} {name}: {file} is empty")
            yield from {".jsonl": _json_lines, ".txt": _plain_text, ".parquet": _parquet_rows}[file.suffix](file)
        except OSError as error:
            raise DataError(f"{option} {name}: {file} cannot be read: {error.strerror}") from error


def _json_lines(file: Path) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{file}, line {number}: expected one JSON object a line, found {line[:40]!r} ({error})"
                ) from error
            yield _document(f"{file}, line {number}", row)


def _plain_text(file: Path) -> Iterator[Document]:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: no UTF-8 text ({error.reason}); is it a binary file?") from error
    if "\0" in text:
        raise DataError(f"{file}, line {text.count(chr(10), 0, text.index(chr(0))) + 1}: a zero byte; a binary file?")
    yield Document(str(file), text)


def _parquet_rows(file: Path) -> Iterator[Document]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    # Opened by name: `datasets` would take a name with brackets or stars for a pattern.
    try:
        with ParquetFile(file) as table:
            names = [name for name in table.schema_arrow.names if name in ("text", "messages")]
            found = {} if names else dict.fromkeys(table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield _document(f"{file}, row {number}", row or found)
    except (ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet: {error}") from error


def _hub_documents(option: str, name: str, source: str, random_seed: int) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(source, split="train", streaming=True)
        for number, row in enumerate(rows.shuffle(seed=random_seed, buffer_size=SHUFFLE_BUFFER), 1):
            yield _document(f"dataset {source}, row {number}", row)
    except DataError:
        raise
    except Exception as error:  # of the client, the network or the dataset
        raise DataError(
            f"{option} {name}={source} is no file, and cannot be had as a Hub dataset (split 'train'): {error}"
        ) from error


def _document(place: str, row: Any) -> Document:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object with 'text' or 'messages', found {type(row).__name__}")
    text, messages = row.get("text"), row.get("messages")
    if isinstance(text, str) and messages is None:
        return Document(place, text)
    if isinstance(messages, list) and text is None:
        for turn, message in enumerate(messages, 1):
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise DataError(f"{place}, turn {turn}: expected 'role' and 'content', both strings")
        return Document(place, messages)
    columns = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items()) or "no column"
    raise DataError(
        f"{place}: expected a column 'text' (a string) or 'messages' (a list), one of them; found {columns}"
    )
