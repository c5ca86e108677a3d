"""The order of training sequences: seeded, exact shares, each window once an epoch, a position that can be saved."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from upcycle.data import Domain
from upcycle.errors import DataError
from upcycle.stream import TokenStream

LENGTH = 4


def domain(name: str, windows: int, first: int = 0, counted: bool = False) -> Domain:
    tokens = np.arange(first, first + windows * LENGTH + 1)
    return Domain(name, f"{name}.npy", tokens, tokens % 2 == 0 if counted else None, None)


def stream(*domains: Domain, shares: dict[str, float], batch: int = 8, random_seed: int = 0) -> TokenStream:
    return TokenStream(domains, shares, LENGTH, batch, random_seed)


def test_every_window_comes_once_an_epoch_and_epochs_differ() -> None:
    source = stream(domain("a", 12), shares={"a": 1.0}, batch=6)
    epochs = [[row[0] for _ in range(2) for row in source.next_batch().tokens.tolist()] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(0, 48, LENGTH))] * 2
    assert epochs[0] != epochs[1]


def test_windows_share_the_one_token_that_the_first_target_is_predicted_from() -> None:
    rows = stream(domain("a", 3), shares={"a": 1.0}, batch=3).next_batch().tokens
    targets = sorted(token for row in rows[:, 1:].tolist() for token in row)
    assert targets == list(range(1, 13))


def test_shares_are_exact_at_every_step() -> None:
    source = stream(domain("a", 50), domain("b", 50, 1000), shares={"a": 0.75, "b": 0.25}, batch=8)
    for _ in range(5):
        assert Counter(source.next_batch().domains) == {0: 6, 1: 2}
    uneven = stream(domain("a", 50), domain("b", 50, 1000), shares={"a": 2 / 3, "b": 1 / 3}, batch=4)
    drawn: Counter[int] = Counter()
    for step in range(1, 10):
        drawn.update(uneven.next_batch().domains)
        assert abs(drawn[0] - step * 4 * 2 / 3) < 1


def test_a_share_of_zero_is_never_drawn() -> None:
    source = stream(domain("a", 9), domain("b", 9, 500), shares={"a": 1.0, "b": 0.0})
    assert {index for _ in range(4) for index in source.next_batch().domains} == {0}


def test_the_seed_decides_the_order_and_a_position_goes_on() -> None:
    def make(random_seed: int) -> TokenStream:
        parts = domain("a", 30), domain("b", 20, 1000)
        return stream(*parts, shares={"a": 0.5, "b": 0.5}, random_seed=random_seed)

    one, other = make(1), make(1)
    rows = [one.next_batch().tokens for _ in range(9)]
    assert all((batch == other.next_batch().tokens).all() for batch in rows)
    assert (make(2).next_batch().tokens != rows[0]).any()
    resumed = make(1)
    for _ in range(4):
        resumed.next_batch()
    later = make(1)
    later.load_state(resumed.state())
    assert all((batch == later.next_batch().tokens).all() for batch in rows[4:])


def test_counted_targets_stand_beside_their_tokens() -> None:
    source = stream(domain("a", 9, counted=True), domain("b", 9, 500), shares={"a": 0.5, "b": 0.5})
    batch = source.next_batch()
    assert batch.counted is not None
    for tokens, counted, index in zip(batch.tokens, batch.counted, batch.domains, strict=True):
        expected = tokens[1:] % 2 == 0 if index == 0 else np.ones(LENGTH, bool)
        assert (counted == expected).all()


def test_epochs_are_counted() -> None:
    source = stream(domain("a", 10), domain("b", 40, 500), shares={"a": 0.5, "b": 0.5})
    assert source.epochs(80) == {"a": 4.0, "b": 1.0}


def test_a_domain_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    short = Domain("a", "a.txt", np.arange(LENGTH), None, 1)
    with pytest.raises(DataError, match=r"'a' \(a.txt\) holds 4 tokens, but one sequence needs 5"):
        stream(short, shares={"a": 1.0})
