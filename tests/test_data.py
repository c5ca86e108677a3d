"""What is read for training: files, documents, tokens, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tests.conftest import VOCAB, tokenizer_json
from upcycle.data import parse_shares, prepare_domain, read_array, split_names
from upcycle.documents import find_files
from upcycle.errors import DataError

EOS = 2
TEMPLATE = "{% for m in messages %} <{{ m.role }}> {{ m.content }} <end>{% endfor %}" + (
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """`wordN` is token N; the chat's marks are words 90 to 93; the end of text is token 2."""
    table = json.loads(tokenizer_json())
    vocabulary = table["model"]["vocab"]
    for place, mark in enumerate(("<user>", "<assistant>", "<end>", "<system>")):
        vocabulary[mark] = vocabulary.pop(f"word{90 + place}")
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="word2", chat_template=TEMPLATE
    )


def read(tokenizer: Any, tmp_path: Path, source: Path | str, **changes: Any) -> Any:
    config = {"vocab_size": VOCAB, **changes}
    return prepare_domain("--data", "code", str(source), tmp_path / "tokens", tokenizer, config, random_seed=0)


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_documents_are_packed_with_the_end_of_text_between_them(tokenizer: Any, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "word5 word6"}, {"text": "word7", "source": 1}, {"text": "word8 word2"})
    domain = read(tokenizer, tmp_path, file)
    assert domain.tokens.tolist() == [5, 6, EOS, 7, EOS, 8, EOS]
    assert (domain.documents, domain.counted) == (3, None)


def test_patterns_text_files_and_parquet_hold_the_same(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for name, text in (("x1", "word5 word6"), ("x2", "word7")):
        (tmp_path / f"{name}.txt").write_text(text)
        parquet.write_table(pyarrow.table({"text": [text], "other": [1]}), tmp_path / f"{name}.parquet")
        jsonl(tmp_path / f"{name}.jsonl", {"text": text})
    for kind in ("txt", "parquet", "jsonl"):
        domain = read(tokenizer, tmp_path / kind, f"{tmp_path}/x*.{kind}")
        assert domain.tokens.tolist() == [5, 6, EOS, 7, EOS], kind


def test_the_loss_of_a_chat_counts_the_assistants_turns_alone(tokenizer: Any, tmp_path: Path) -> None:
    turns = [("system", "word9"), ("user", "word5"), ("assistant", "word6 word7"), ("user", "word5")]
    turns += [("assistant", "word8")]
    rows = {"messages": [{"role": role, "content": text} for role, text in turns]}
    domain = read(tokenizer, tmp_path, jsonl(tmp_path / "a.jsonl", rows))
    user, assistant, end, system = 90, 91, 92, 93
    expected = [(system, 0), (9, 0), (end, 0), (user, 0), (5, 0), (end, 0), (assistant, 0), (6, 1), (7, 1), (end, 1)]
    expected += [(user, 0), (5, 0), (end, 0), (assistant, 0), (8, 1), (end, 1), (EOS, 1)]
    assert list(zip(domain.tokens.tolist(), domain.counted.tolist(), strict=True)) == expected


def test_a_second_start_finds_the_tokens(tokenizer: Any, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "word5 word6"})
    first = read(tokenizer, tmp_path, file).tokens.tolist()
    assert read(None, tmp_path, file).tokens.tolist() == first
    jsonl(file, {"text": "word7"})
    with pytest.raises(DataError, match="other files than when this training began, or changed ones"):
        read(tokenizer, tmp_path, file)


def test_a_document_longer_than_a_batch_is_whole(tokenizer: Any, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "word5 " * 300_000}, {"text": "word6"})
    tokens = read(tokenizer, tmp_path, file).tokens
    assert tokens.size == 300_001 + 2
    assert tokens[-2:].tolist() == [6, EOS]


def test_npy_is_taken_as_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(12, dtype=np.uint16).reshape(3, 4))
    assert read(None, tmp_path, tmp_path / "a.npy").tokens.tolist() == list(range(12))


def test_a_hub_dataset_is_streamed_until_there_is_enough(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    seen = []

    def rows() -> Any:
        for number in range(100_000):
            seen.append(number)
            yield {"text": f"word{number % 80 + 5} " * 2000, "id": number}

    def load(name: str, split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("org/set", "train", True)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("upcycle.documents.SHUFFLE_BUFFER", 20)
    config = {"vocab_size": VOCAB}

    def first(folder: str, random_seed: int) -> Any:
        domain = prepare_domain(
            "--data", "code", "org/set", tmp_path / folder, tokenizer, config, random_seed=random_seed, enough=150_000
        )
        assert domain.tokens.size >= 150_000
        return domain.tokens[::2001].tolist()

    one = first("one", 1)
    assert len(seen) < 400, "more was read than needed"
    assert one == first("again", 1) != first("other", 2)


def test_a_hub_dataset_that_cannot_be_had(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data code=org/none is no file, and cannot be had as a Hub dataset"):
        read(tokenizer, tmp_path, "org/none")


BAD = {
    "an empty file": ("a.jsonl", b"", "a.jsonl is empty"),
    "binary junk": ("a.jsonl", b'{"text": "word1"}\n\xff\xfe\x00\n', "a.jsonl, line 2"),
    "no object": ("a.jsonl", b'{"text": "word1"}\n\n[1]\n', "a.jsonl, line 3: expected an object"),
    "a cut line": ("a.jsonl", b'{"text": "word1"}\n{"text": "wo', "a.jsonl, line 2: expected one JSON object"),
    "a missing column": (
        "a.jsonl",
        b'{"text": "a"}\n{"content": "b", "id": 1}\n',
        r"line 2: .* found content \(str\), id \(",
    ),
    "text that is none": ("a.jsonl", b'{"text": null}\n', "line 1: expected a column 'text'"),
    "text and chats": (
        "a.jsonl",
        b'{"text": "a"}\n{"messages": [{"role": "", "content": ""}]}\n',
        "line 2: 'text' and 'messages'",
    ),
    "a chat without answers": ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: no turn"),
    "a chat that is none": ("a.jsonl", b'{"messages": [1]}\n', "line 1, turn 1: expected 'role'"),
    "a chat of numbers": (
        "a.jsonl",
        b'{"messages": [{"role": "a", "content": 5}]}\n',
        "line 1, turn 1: expected 'role'",
    ),
    "both": ("a.jsonl", b'{"text": "a", "messages": []}\n', "line 1: expected .* one of them"),
    "half a character": ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: the tokenizer refuses it"),
    "empty texts": ("a.jsonl", b'{"text": ""}\n{"text": " "}\n', "holds no text"),
    "a header of parentheses": ("a.npy", b"\x93NUMPY\x01\x00\x10\x00((((((((((((((((", "cannot be read as a .npy"),
    "a binary text file": ("a.txt", b"word\nwo\xffrd", "a.txt, line 2: no UTF-8"),
    "a zero byte": ("a.txt", b"word\nwo\0rd", "a.txt, line 2: a zero byte"),
    "no parquet": ("a.parquet", b"PAR1 no", "a.parquet cannot be read as parquet"),
    "no array": ("a.npy", b"junk", "cannot be read as a .npy array"),
    "a kind that is not read": ("a.csv", b"text", "expected files of one kind"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_data_is_refused_with_file_and_line(what: str, tokenizer: Any, tmp_path: Path) -> None:
    name, content, message = BAD[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tokenizer, tmp_path, tmp_path / name)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1, 2], [3, VOCAB]]), f"row 1, column 1: token {VOCAB} lies outside .* of {VOCAB}"),
        (np.array([1, 2, -1]), "position 2: token -1 lies outside"),
        (np.array([1.0, 2.0]), "expected integers in one or two dimensions, found float64"),
        (np.zeros((2, 2, 2), np.uint16), r"found uint16 \[2, 2, 2\]"),
        (np.zeros(0, np.uint16), "is empty"),
    ],
)
def test_bad_arrays_are_refused(array: Any, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=message):
        read_array("--data", "code", tmp_path / "a.npy", VOCAB)


def test_pickled_arrays_are_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        read_array("--data", "code", tmp_path / "a.npy", VOCAB)


def test_a_tokenizer_of_another_model_is_noticed(tokenizer: Any, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "word1"}, {"text": "word60"})
    with pytest.raises(DataError, match="line 2: token 60 lies outside the model's vocabulary of 50"):
        read(tokenizer, tmp_path, file, vocab_size=50)


def test_text_needs_a_tokenizer_and_an_end_of_text(tokenizer: Any, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "word1"})
    with pytest.raises(DataError, match="no tokenizer"):
        read(None, tmp_path, file)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end-of-sequence"):
        read(tokenizer, tmp_path, file)
    assert read(tokenizer, tmp_path, file, eos_token_id=[7, 8]).tokens.tolist() == [1, 7]


def test_names(tmp_path: Path) -> None:
    assert split_names("--data", ["code=a.jsonl", "law.train.jsonl", "org=user/set"]) == {
        "code": "a.jsonl",
        "law": "law.train.jsonl",
        "org": "user/set",
    }
    with pytest.raises(DataError, match="'code' is named twice"):
        split_names("--data", ["code=a.jsonl", "code=b.jsonl"])
    with pytest.raises(DataError, match="expected NAME=FILE"):
        split_names("--data", ["code="])
    for name in ("..", "a/b", "a" * 101, "[/x]", "\x1b"):
        with pytest.raises(DataError, match="letters, digits"):
            split_names("--data", [f"{name}=file.jsonl"])
    with pytest.raises(DataError, match="no such file"):
        find_files("--data", "code", str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="matches no file"):
        find_files("--data", "code", str(tmp_path / "*.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        find_files("--data", "code", str(tmp_path))


def test_shares() -> None:
    assert parse_shares([], ["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert parse_shares(["b=1", "a=3"], ["a", "b"]) == {"a": 0.75, "b": 0.25}
    for words, message in (
        (["c=1"], "no domain 'c'"),
        (["a=1"], "leaves out the domain 'b'"),
        (["a=1", "a=2", "b=1"], "named twice"),
        (["a=-1", "b=1"], "a number of 0 or more"),
        (["a=x", "b=1"], "a number of 0 or more"),
        (["a=nan", "b=1"], "a number of 0 or more"),
        (["a=1e308", "b=1e308"], "no finite number"),
        (["a=0", "b=0"], "every share is 0"),
    ):
        with pytest.raises(DataError, match=message):
            parse_shares(words, ["a", "b"])
