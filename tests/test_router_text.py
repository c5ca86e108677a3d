"""Text for routers: one for each expert, in windows of one length; what is refused; how often each has each token."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import VOCAB
from upcycle.errors import DataError
from upcycle.router_text import RouterText, read_router_text

CONFIG = {"vocab_size": VOCAB, "eos_token_id": 2}


def read(base: Path, sources: dict[str, Any], **options: Any) -> RouterText:
    return read_router_text(sources, list(sources), base, CONFIG, **options)


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_texts_of_every_kind_become_windows_of_one_length(base_seed: Path, tmp_path: Path) -> None:
    words = " ".join(f"word{number % 80 + 3}" for number in range(100))
    np.save(tmp_path / "flat.npy", np.arange(1000, dtype=np.uint16) % 90)
    np.save(tmp_path / "rows.npy", (np.arange(40 * 30) % 90).reshape(40, 30).astype(np.uint16))
    (tmp_path / "plain.txt").write_text(words)
    sources = {
        "flat": str(tmp_path / "flat.npy"),
        "rows": str(tmp_path / "rows.npy"),
        "lines": jsonl(tmp_path / "lines.jsonl", [words, words]),
        "plain": str(tmp_path / "plain.txt"),
        "prompts": ["word5 word6 word7"] * 12,
    }
    text = read(base_seed, sources, tokens=64)
    assert text.experts == list(sources)
    assert {one.shape[1] for one in text.windows} == {30}  # no window is cut out of two rows
    assert [len(one) for one in text.windows] == [2, 2, 2, 2, 1]
    np.testing.assert_array_equal(text.windows[1], np.load(tmp_path / "rows.npy")[[0, 39]])  # from all over it
    np.testing.assert_array_equal(text.windows[4][0, :8], [5, 6, 7, 2, 5, 6, 7, 2])
    assert text.record()["plain"]["tokens"] == 60


def test_positions_bound_the_windows(base_seed: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.arange(1000, dtype=np.uint16) % 90)
    text = read(base_seed, {"a": str(tmp_path / "flat.npy")}, longest=20)
    assert text.windows[0].shape == (50, 20)


def test_usage_is_each_texts_share_of_a_tokens_occurrences() -> None:
    text = RouterText(["a", "b"], [np.array([[1, 1, 1, 2]]), np.array([[2, 2], [2, 2], [2, 3], [3, 3]])])
    usage = text.usage(5)
    np.testing.assert_allclose(usage.sum(1), 1)
    np.testing.assert_allclose(usage[0], [0.5, 0.5])  # nobody has it
    # As if both texts had 6 tokens: a has token 1 4.5 times, b 0 times; each once more.
    np.testing.assert_allclose(usage[1], [5.5 / 6.5, 1 / 6.5])
    np.testing.assert_allclose(usage[3], [1 / (1 + 3.25), 3.25 / (1 + 3.25)])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": "X"}, "gives expert 'b' no text; add b=FILE"),
        ({"a": "X", "b": "X", "c": "X"}, "there is no expert 'c'; known: a, b"),
        ({"a": "X", "bb": "X"}, r"there is no expert 'bb'; did you mean 'b'\?"),
        ({"a": "X", "b": ["word5"]}, "b: 2 tokens of text, expected at least 16"),
        ({"a": "X", "b": "missing.jsonl"}, "b=missing.jsonl: there is no such file"),
    ],
)
def test_text_without_an_expert_and_an_expert_without_text_are_refused(
    sources: dict[str, Any], message: str, base_seed: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "flat.npy", np.arange(1000, dtype=np.uint16) % 90)
    given = {name: str(tmp_path / "flat.npy") if source == "X" else source for name, source in sources.items()}
    with pytest.raises(DataError, match=message):
        read_router_text(given, ["a", "b"], base_seed, CONFIG)


def test_text_without_a_tokenizer_is_refused(base_seed: Path, tmp_path: Path) -> None:
    for file in base_seed.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(DataError, match="has no tokenizer to read text with"):
        read(base_seed, {"a": jsonl(tmp_path / "a.jsonl", ["word5 " * 50])})


def test_a_long_text_is_read_no_further_than_needed(base_seed: Path, tmp_path: Path) -> None:
    """What comes after a multiple of the tokens that are wanted is not even parsed."""
    file = tmp_path / "long.jsonl"
    jsonl(file, ["word5 " * 1000] * 300)
    with file.open("a") as lines:
        lines.write("{no json\n")
    text = read(base_seed, {"a": str(file)}, tokens=32)
    assert text.windows[0].shape == (1, 32)
