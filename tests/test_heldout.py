"""Held-out text cut into windows, its documents and its bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import VOCAB
from upcycle.errors import DataError
from upcycle.heldout import evenly_spaced, heldout_windows, read_heldout


def windows(source: Path, folder: Path, **changes: Any) -> Any:
    values = {"length": 8, "count": 4, **changes}
    return heldout_windows("code", str(source), folder, None, {"vocab_size": VOCAB}, **values)


def read(source: Path | str, tokenizer: Any = None, vocab_size: int = 300, **changes: Any) -> Any:
    values = {"length": 4, **changes}
    return read_heldout("code", str(source), tokenizer, {"vocab_size": vocab_size, "eos_token_id": 256}, **values)


@pytest.fixture
def byte_tokenizer() -> Any:
    """Every byte a token, so that a character may take several; the end of text is token 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def jsonl(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_windows_are_evenly_spaced_from_the_first_to_the_last() -> None:
    assert evenly_spaced(1000, 100).tolist() == np.linspace(0, 999, 100).astype(int).tolist()
    assert evenly_spaced(3, None).tolist() == evenly_spaced(3, 99).tolist() == [0, 1, 2]


def test_rows_of_an_array_are_windows(tmp_path: Path) -> None:
    array = np.arange(70, dtype=np.uint16).reshape(14, 5)
    np.save(tmp_path / "a.npy", array)
    assert windows(tmp_path / "a.npy", tmp_path, count=3).tokens.tolist() == array[[0, 6, 13]].tolist()
    assert windows(tmp_path / "a.npy", tmp_path, count=99, multiple=4).tokens.shape == (12, 5)
    assert read(tmp_path / "a.npy", count=3).tokens.tolist() == array[[0, 6, 13]].tolist()
    assert read(tmp_path / "a.npy").tokens.tolist() == array.tolist()
    with pytest.raises(DataError, match="its rows are windows already; --stride needs a flat array"):
        read(tmp_path / "a.npy", stride=2)
    with pytest.raises(DataError, match="rows of 5 tokens, but the model has positions for 4"):
        read(tmp_path / "a.npy", longest=4)


def test_a_flat_run_is_cut_without_overlap(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(35))
    assert windows(tmp_path / "a.npy", tmp_path).tokens.tolist() == np.arange(32).reshape(4, 8).tolist()
    with pytest.raises(DataError, match="holds 35 tokens, too few for 1 windows of 36"):
        windows(tmp_path / "a.npy", tmp_path, length=36)


def test_windows_of_a_run_are_spaced_over_all_of_it(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(101))
    part = read(tmp_path / "a.npy", length=10, count=3)
    assert part.tokens[:, 0].tolist() == [0, 40, 90]


@pytest.mark.parametrize("size", range(2, 30))
@pytest.mark.parametrize("stride", [None, 1, 3, 7])
def test_every_token_is_predicted_once_with_the_context_promised(size: int, stride: int | None, tmp_path: Path) -> None:
    """But for the windows' first ones, where they do not overlap."""
    length = 8
    np.save(tmp_path / "a.npy", np.arange(size))
    part = read(tmp_path / "a.npy", length=length, stride=stride)
    targets = part.tokens[:, 1:][part.counted]
    starts = set(range(0, size, stride or length)) if stride is None else {0}
    assert sorted(targets.tolist()) == [token for token in range(size) if token not in starts]
    for row, marks in zip(part.tokens, part.counted, strict=True):
        for place in np.flatnonzero(marks) + 1:
            before = row[:place]
            assert before.tolist() == list(range(row[place] - place, row[place]))
            assert len(before) >= (1 if row[0] == 0 or stride is None else length - stride)


def test_documents_and_bytes_belong_to_the_targets(tmp_path: Path, byte_tokenizer: Any) -> None:
    file = jsonl(tmp_path / "a.jsonl", "ab", " ", "é€x")  # the second is no text
    part = read(file, byte_tokenizer, length=99)
    assert part.tokens.shape == (1, 10)  # 2 + end, 2 + 3 + 1 bytes + end
    assert part.documents.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1]]
    # A character's bytes count for the first of its tokens; the first token of all, "a", is not predicted.
    assert part.text_bytes.tolist() == [[1, 0, 2, 0, 3, 0, 0, 1, 0]]
    whole = read(jsonl(tmp_path / "b.jsonl", "aé€𝄞" * 50), byte_tokenizer, length=7)
    assert whole.text_bytes[whole.counted].sum() <= 500
    assert read(file, byte_tokenizer, length=3).counted.tolist()[-1] != []


def test_bytes_sum_to_the_texts_own(tmp_path: Path, byte_tokenizer: Any) -> None:
    text = "aé€𝄞 z\n" * 20
    part = read(jsonl(tmp_path / "a.jsonl", "", "x" + text), byte_tokenizer, length=2000)
    assert part.text_bytes[part.counted].sum() == len(text.encode())


def test_a_chat_counts_the_assistants_words(tmp_path: Path, byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}a{% endif %}"
    )
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yé"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    part = read(tmp_path / "a.jsonl", byte_tokenizer, length=99)
    counted = part.tokens[:, 1:][part.counted].tolist()
    assert byte_tokenizer.decode(counted[:-1]) == "yé"
    assert counted[-1] == byte_tokenizer.eos_token_id
    assert part.text_bytes is None  # the marks of a template are no text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ("", "is empty"),
        ('{"text": "  "}\n', "holds no text"),
        ('{"texts": "a"}\n', "line 1: expected a column 'text'"),
    ],
)
def test_nothing_to_measure_is_refused(content: str | None, message: str, tmp_path: Path, byte_tokenizer: Any) -> None:
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl", byte_tokenizer)


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(1))
    np.save(tmp_path / "rows.npy", np.zeros((5, 1), np.int64))
    np.save(tmp_path / "none.npy", np.zeros((0, 8), np.int64))
    for name, message in (("a", "holds one token"), ("rows", "rows of one token"), ("none", "is empty")):
        with pytest.raises(DataError, match=message):
            read(tmp_path / f"{name}.npy")
    with pytest.raises(DataError, match="download the held-out text of a Hub dataset"):
        read("someone/dataset")
