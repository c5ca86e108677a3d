"""Text and tokens for training: files and Hub datasets become one flat run of tokens a domain.

Every document ends with the end-of-text token, and documents are packed one after another: sequences are cut from the
run without padding or masks, so attention may cross from one document into the next, as in most pre-training.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from upcycle.checkpoint import read_json, write_json
from upcycle.documents import Document, find_files, read_documents
from upcycle.errors import DataError, OutputError, did_you_mean
from upcycle.numeric import Array

BATCH_CHARACTERS: Final = 1_000_000  # tokenised at once
CHECKED: Final = 16_000_000  # tokens of a .npy file looked at in one piece


@dataclass(frozen=True)
class Domain:
    """The tokens of one domain.

    Attributes:
        tokens: `[tokens]`, unsigned, mapped from disk.
        counted: `[tokens]` bool: the tokens that the loss counts, or None for all.
        documents: how many there are; for a `.npy` file None, since it does not say.
    """

    name: str
    source: str
    tokens: Array
    counted: Array | None
    documents: int | None


def split_names(option: str, words: Sequence[str]) -> dict[str, str]:
    """`name=source` by name; a source without a name is called by its file's name up to the first dot.

    Raises:
        DataError: no source, or a name that stands twice.
    """
    sources: dict[str, str] = {}
    for word in words:
        name, equals, source = word.partition("=")
        if not equals or "/" in name or os.path.exists(word):
            name, source = Path(word).name.partition(".")[0], word
        if not re.fullmatch(r"(?!\.+$)[\w.+-]{1,100}", name) or not source:
            raise DataError(
                f"{option} {word!r}: expected NAME=FILE, as in {option} code=code.jsonl; a name has letters, digits "
                "and ._+- alone"
            )
        if name in sources:
            raise DataError(
                f"{option}: the domain '{name}' is named twice, for {sources[name]} and {source}; give each a name of "
                f"its own, or one pattern for both: {option} {name}='{name}*.jsonl'"
            )
        sources[name] = source
    return sources


def parse_shares(words: Sequence[str], domains: Iterable[str]) -> dict[str, float]:
    """`--mix code=2 law=1` as shares that sum to 1; equal ones where nothing is given (arXiv:2408.08274).

    Raises:
        DataError: an unknown domain, one that is left out, a share that is no number of 0 or more.
    """
    names = list(domains)
    weights = dict.fromkeys(names, 1.0)
    if words:
        weights = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in names:
                raise DataError(f"--mix {word}: there is no domain '{name}' in --data{did_you_mean(name, names)}")
            if name in weights:
                raise DataError(f"--mix: the domain '{name}' is named twice")
            try:
                weights[name] = float(value)
            except ValueError:
                weights[name] = -1
            if not 0 <= weights[name] < float("inf"):
                raise DataError(f"--mix {word}: expected a number of 0 or more, found {value!r}")
        missing = [name for name in names if name not in weights]
        if missing:
            raise DataError(f"--mix leaves out the domain '{missing[0]}'; give it a share too, or {missing[0]}=0")
    total = sum(weights.values())
    if total == float("inf"):
        raise DataError("--mix: the shares' sum is no finite number")
    if not total:
        raise DataError("--mix: every share is 0, so there is nothing to train on")
    return {name: weights[name] / total for name in names}


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer, or None where there is none (pre-tokenised data needs none)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # whatever it meets; text without a tokenizer is refused where it is read
        return None


@dataclass(frozen=True)
class Encoded:
    """A document's tokens, the last of which ends it.

    Attributes:
        counted: the tokens that the loss counts, or None for all.
        text_bytes: the UTF-8 bytes of text that each token adds, of texts where they were asked for. A chat has none:
            its template's marks are no text.
    """

    ids: list[int]
    counted: list[bool] | None = None
    text_bytes: Array | None = None


def encoded_batches(
    documents: Iterable[Document], tokenizer: Any, end_of_text: int, vocab_size: int, with_bytes: bool = False
) -> Iterator[list[Encoded]]:
    """Documents, texts or chats, tokenised about a million characters at once; empty texts are left out.

    Raises:
        DataError: texts and chats in one domain, what the tokenizer or the chat template refuses, a token outside the
            vocabulary; with the document's place.
    """
    for batch in _batches(documents):
        if isinstance(batch[0].content, list):
            encoded = [encode_chat(document, tokenizer, end_of_text) for document in batch]
        else:
            encoded = encode_texts(batch, tokenizer, end_of_text, with_bytes)
        for document, one in zip(batch, encoded, strict=True):
            if max(one.ids) >= vocab_size:
                raise DataError(
                    f"{document.place}: token {max(one.ids)} lies outside the model's vocabulary of {vocab_size}; the "
                    "tokenizer beside the model is not the model's own"
                )
        yield encoded


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    chat: bool | None = None
    for document in documents:
        is_chat = isinstance(document.content, list)
        if isinstance(document.content, str) and not document.content.strip():
            continue  # end-of-text tokens alone would be nothing to learn
        if chat is not None and is_chat != chat:
            raise DataError(f"{document.place}: 'text' and 'messages' in one domain; split it into two")
        chat = is_chat
        batch.append(document)
        size += len(document.content) if not is_chat else 1000
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_texts(
    documents: Sequence[Document], tokenizer: Any, end_of_text: int, with_bytes: bool = False
) -> list[Encoded]:
    """Texts, each ended by `end_of_text`; only fast tokenizers say where a token's bytes lie."""
    with_bytes = with_bytes and tokenizer.is_fast
    texts = [str(document.content) for document in documents]
    try:
        found = tokenizer(texts, return_attention_mask=False, return_offsets_mapping=with_bytes, verbose=False)
    except Exception as error:  # of characters that are none (lone surrogates)
        for document in documents if len(documents) > 1 else ():
            encode_texts([document], tokenizer, end_of_text, with_bytes)
        raise DataError(f"{documents[0].place}: the tokenizer refuses it: {error}") from error
    encoded = []
    for number, ids in enumerate(found["input_ids"]):
        whole = ids if ids and ids[-1] == end_of_text else [*ids, end_of_text]
        sizes = text_bytes(texts[number], found["offset_mapping"][number], len(whole)) if with_bytes else None
        encoded.append(Encoded(whole, None, sizes))
    return encoded


def text_bytes(text: str, offsets: Sequence[tuple[int, int]], tokens: int) -> Array:
    """UTF-8 bytes of text that each of `tokens` tokens adds, int32: they sum to the text's.

    A character split among tokens counts for the first of them; what no token covers, for the last.

    Args:
        offsets: where each token begins and ends, in characters; tokens after them add nothing of their own.
    """
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = 1 + (characters > 0x7F).astype(np.int64) + (characters > 0x7FF) + (characters > 0xFFFF)
    until = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.full(tokens, len(characters))
    ends[: len(offsets)] = [end for _, end in offsets]
    ends[-1] = len(characters)
    return np.diff(until[np.maximum.accumulate(ends)], prepend=0).astype(np.int32)


def encode_chat(document: Document, tokenizer: Any, end_of_text: int) -> Encoded:
    """Tokens of a chat by the tokenizer's own template, and which of them are the assistant's.

    An assistant's turn is what the template adds to the text before it (with the assistant's header, which the model is
    given and need not learn), so any template serves.

    Raises:
        DataError: a chat that the template refuses, or one that it rewrites as it grows.
    """
    messages = document.content
    assert isinstance(messages, list)
    spans = []
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
            if not whole.startswith(after) or not after.startswith(before):
                raise DataError(
                    f"{document.place}: the chat template rewrites earlier turns, so the assistant's words cannot be "
                    f"told from the rest (turn {turn + 1}); give 'text' instead, or another template"
                )
            spans.append((len(before), len(after)))
    except DataError:
        raise
    except Exception as error:  # a template may raise anything
        raise DataError(f"{document.place}: the chat template refuses it: {error}") from error
    if not spans:
        raise DataError(f"{document.place}: no turn of the assistant, so there is nothing to learn")
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counted = [any(start <= begin < end for start, end in spans) for begin, _ in encoded["offset_mapping"]]
    ids = list(encoded["input_ids"])
    if not ids:
        raise DataError(f"{document.place}: the chat template makes no text of it")
    if ids[-1] != end_of_text:
        ids, counted = [*ids, end_of_text], [*counted, counted[-1]]
    return Encoded(ids, counted)


def prepare_domain(
    option: str,
    name: str,
    source: str,
    folder: Path,
    tokenizer: Any,
    config: Mapping[str, Any],
    *,
    random_seed: int,
    enough: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    writes: bool = True,
) -> Domain:
    """Tokenise one domain into `folder`, or find it there from an earlier start of the same run.

    Args:
        folder: gets `NAME.tokens` (unsigned integers), `NAME.counted` for chats, and `NAME.json`, written last.
        tokenizer: the model's, or None where it has none.
        config: the (dense) model's, for `vocab_size` and, if the tokenizer names none, `eos_token_id`.
        enough: of a Hub dataset, stop after so many tokens.
        progress: called with the number of tokens added.
        writes: whether this process tokenises; the others find what it wrote.

    Raises:
        DataError: data that cannot be read or that holds tokens outside the vocabulary, with file and line.
    """
    files = find_files(option, name, source)
    if files and files[0].suffix == ".npy":
        return _array_domain(option, name, source, files, config["vocab_size"])
    record = folder / f"{name}.json"
    # What was read, wherever it lies: a dataset's name, or names, sizes and times of files.
    read = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files] or source
    if not record.is_file():
        if not writes:
            raise DataError(f"{record} is missing: --out must lie on a disk that all processes share")
        if tokenizer is None:
            raise DataError(
                f"{option} {name}={source}: the model has no tokenizer to read text with; put its tokenizer files "
                "beside the weights, or give .npy tokens"
            )
        end_of_text = end_of_text_token(tokenizer, config)
        folder.mkdir(parents=True, exist_ok=True)
        documents = read_documents(option, name, source, files, random_seed)
        enough = None if files else enough
        try:
            written = _write_tokens(
                folder / name, documents, tokenizer, end_of_text, config["vocab_size"], enough, progress
            )
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror}") from error
        if not written["tokens"]:
            raise DataError(f"{option} {name}={source} holds no text")
        write_json(record, {"read": read, **written})
    about = read_json(record)
    if about["read"] != read:
        raise DataError(
            f"{option} {name}={source}: other files than when this training began, or changed ones; give the same "
            "data, or start a new training with another --out"
        )
    tokens = np.memmap(folder / f"{name}.tokens", dtype=about["dtype"], mode="r")
    counted = np.memmap(folder / f"{name}.counted", dtype=np.bool_, mode="r") if about["chat"] else None
    return Domain(name, source, tokens, counted, about["documents"])


def _write_tokens(
    path: Path,
    documents: Iterable[Document],
    tokenizer: Any,
    end_of_text: int,
    vocab_size: int,
    enough: int | None,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    count = total = 0
    chat = False
    with open(f"{path}.tokens", "wb") as file, open(f"{path}.counted", "wb") as marks:
        for batch in encoded_batches(documents, tokenizer, end_of_text, vocab_size):
            count += len(batch)
            np.concatenate([np.array(one.ids, dtype) for one in batch]).tofile(file)
            counted = [np.array(one.counted, np.bool_) for one in batch if one.counted is not None]
            if counted:
                chat = True
                np.concatenate(counted).tofile(marks)
            added = sum(len(one.ids) for one in batch)
            total += added
            progress(added)
            if enough is not None and total >= enough:
                break
    if not chat:
        os.unlink(f"{path}.counted")
    return {"documents": count, "tokens": total, "dtype": dtype.name, "chat": chat}


def _array_domain(option: str, name: str, source: str, files: Sequence[Path], vocab_size: int) -> Domain:
    if len(files) > 1:
        raise DataError(f"{option} {name}={source}: {len(files)} .npy files match, expected one")
    return Domain(name, source, read_array(option, name, files[0], vocab_size).reshape(-1), None, None)


def read_array(option: str, name: str, file: Path, vocab_size: int) -> Array:
    """Tokens of a `.npy` file, flat or one row a window, mapped from disk; every one checked.

    Raises:
        DataError: no array of integers of one or two dimensions, an empty one, a token outside the vocabulary.
    """
    try:
        array: Array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses a damaged header with whatever that raises
        raise DataError(f"{option} {name}: {file} cannot be read as a .npy array: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise DataError(f"{option} {name}: {file}: expected integers in one or two dimensions, found {found}")
    if not array.size:
        raise DataError(f"{option} {name}: {file} is empty")
    flat = array.reshape(-1)
    for start in range(0, flat.size, CHECKED):
        part = flat[start : start + CHECKED]
        wrong = np.flatnonzero((part < 0) | (part >= vocab_size))
        if wrong.size:
            at = start + int(wrong[0])
            where = f"row {at // array.shape[1]}, column {at % array.shape[1]}" if array.ndim == 2 else f"position {at}"
            raise DataError(
                f"{option} {name}: {file}, {where}: token {flat[at]} lies outside the model's vocabulary of "
                f"{vocab_size}; it was made with another tokenizer"
            )
    return array


def fingerprint(domains: Iterable[Domain]) -> str:
    """SHA-256 over names, sizes and tokens (of long runs the ends and a spread of pieces): the same data or not."""
    digest = hashlib.sha256()
    for domain in domains:
        digest.update(f"{domain.name} {domain.tokens.size} {domain.counted is None}".encode())
        step = max(1, domain.tokens.size // 64)
        for start in range(0, domain.tokens.size, step):
            digest.update(np.ascontiguousarray(domain.tokens[start : start + min(step, 65_536)], np.uint32).tobytes())
    return digest.hexdigest()


def end_of_text_token(tokenizer: Any, config: Mapping[str, Any]) -> int:
    """The id that ends a document: the tokenizer's end of sequence, or the config's.

    Raises:
        DataError: neither names one.
    """
    found = getattr(tokenizer, "eos_token_id", None)
    if found is None:
        found = config.get("eos_token_id")
    found = found[0] if isinstance(found, (list, tuple)) and found else found
    if not isinstance(found, int):
        raise DataError("neither the tokenizer nor the config names an end-of-sequence token to put between documents")
    return found
