"""Intervals that hold as often as they say, and probabilities that mean what they say."""

import numpy as np
import pytest

from upcycle.resampling import DRAWS, FEW, MAX_GROUPS, draw_losses, interval, probability_below


def documents(random_seed: int, count: int, models: int = 1, spread: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses and tokens of documents whose mean loss is 3, in each of several models."""
    random = np.random.default_rng(random_seed)
    tokens = np.repeat(random.lognormal(5, spread, (count, 1)), models, 1)
    shared = random.normal(0, 0.5, (count, 1))
    return (3 + shared + random.normal(0, 0.05, (count, models))) * tokens, tokens


@pytest.mark.parametrize(("count", "low"), [(FEW, 0.87), (60, 0.91), (200, 0.92)])
def test_intervals_hold_about_as_often_as_they_say(count: int, low: float) -> None:
    held = 0
    for trial in range(300):
        draws = draw_losses(*documents(trial + 1000, count), 0)
        assert draws is not None
        begin, end = interval(draws[:, 0])
        held += begin < 3 < end
    assert low < held / 300 < 0.985


@pytest.mark.parametrize(("count", "low"), [(40, 0.86), (200, 0.91)])
def test_intervals_hold_less_often_where_long_documents_are_easier(count: int, low: float) -> None:
    """As in real text: lengths that differ by half an order of magnitude, and losses that fall with them."""

    def some(random_seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(random_seed)
        length = random.normal(0, 1, (size, 1))
        tokens = 500 * np.exp(0.8 * length)
        return (3 + 0.5 * (-0.4 * length + 0.92 * random.normal(0, 1, (size, 1)))) * tokens, tokens

    sums, tokens = some(1, 400_000)
    truth = sums.sum() / tokens.sum()
    held = 0
    for trial in range(300):
        draws = draw_losses(*some(trial + 10, count), trial)
        assert draws is not None
        begin, end = interval(draws[:, 0])
        held += begin < truth < end
    assert low < held / 300 < 0.985


def test_probabilities_are_uniform_where_nothing_differs() -> None:
    found = []
    for trial in range(300):
        draws = draw_losses(*documents(trial, 60, models=2), 0)
        assert draws is not None
        found.append(probability_below(draws[:, 0] - draws[:, 1]))
    assert np.mean(np.array(found) > 0.95) < 0.09  # expected 0.05
    assert np.mean(np.array(found) < 0.05) < 0.09
    assert np.mean(np.array(found) > 0.5) == pytest.approx(0.5, abs=0.1)


def test_pairing_finds_what_intervals_alone_would_hide() -> None:
    """Both models find the same documents hard; 0.05 nats between them are far less than either's interval."""
    sums, tokens = documents(0, 60, models=2)
    sums[:, 1] += 0.05 * tokens[:, 1]
    draws = draw_losses(sums, tokens, 0)
    assert draws is not None
    low, high = interval(draws[:, 0])
    assert high - low > 0.15
    assert probability_below(draws[:, 0] - draws[:, 1]) > 0.99


def test_many_documents_are_grouped_without_losing_their_spread() -> None:
    sums, tokens = documents(0, 5 * MAX_GROUPS)
    draws = draw_losses(sums, tokens, 0)
    assert draws is not None
    assert draws.shape == (DRAWS, 1)
    single = np.std(sums / tokens) / np.sqrt(len(sums) * 0.78)  # unequal documents count for fewer: e^(-0.25)
    assert draws.std() == pytest.approx(single, rel=0.15)
    assert draws.mean() == pytest.approx(sums.sum() / tokens.sum(), abs=single / 10)


def test_domains_do_not_swing_together() -> None:
    """The mean of two domains is as sure as two independent ones make it, with the documents in whatever order."""
    ratios = []
    for trial in range(40):
        both = [draw_losses(*documents(2 * trial + domain, 30), domain) for domain in (0, 1)]
        one, other = (draws[:, 0] for draws in both if draws is not None)
        ratios.append((one + other).std() / np.hypot(one.std(), other.std()))
    assert max(abs(np.array(ratios) - 1)) < 0.05


def test_one_document_allows_no_interval_and_the_same_call_gives_the_same() -> None:
    assert draw_losses(np.ones((1, 2)), np.ones((1, 2)), 0) is None
    one, other = (draw_losses(*documents(3, 20), 5) for _ in range(2))
    assert np.array_equal(one, other)
