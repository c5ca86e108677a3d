"""Learning rates and defaults, against figures worked out by hand."""

import math

import pytest

from upcycle.schedules import (
    MEASURED_RATES,
    default_batch_size,
    default_learning_rate,
    default_warm_up,
    rate_cap,
    schedule,
)


def rates(kind: str, steps: int = 100, warm_up: int = 10, peak: float = 1.0, batch_tokens: int = 1000) -> list[float]:
    return [schedule(kind, step, steps, warm_up, peak, batch_tokens) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "power"])
def test_warm_up_is_linear_and_nothing_exceeds_the_peak(kind: str) -> None:
    values = rates(kind, peak=1e-6)  # power's own bound lies above
    assert values[:10] == pytest.approx([1e-7 * step for step in range(1, 11)])
    assert max(values) == pytest.approx(1e-6)
    assert min(values) > 0


def test_cosine_ends_at_a_tenth_and_is_halfway_in_the_middle() -> None:
    values = rates("cosine", steps=111)
    assert values[-1] == pytest.approx(0.1)
    assert values[60] == pytest.approx(0.55)


def test_wsd_is_constant_until_its_last_tenth() -> None:
    values = rates("wsd")
    assert values[10:91] == [1.0] * 81
    assert values[95] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.1)


def test_power_is_the_papers_formula() -> None:
    # 1024 sequences of 4096 tokens, step 250,000: n = 1.05e12 tokens, 1024 * 4.6 * n^-0.51
    tokens = 1024 * 4096
    value = schedule("power", 249_999, 1_000_000, 10, 0.02, tokens)
    assert value == pytest.approx(1024 * 4.6 * (250_000 * tokens) ** -0.51)
    assert value == pytest.approx(3.5e-3, rel=0.02)


def test_no_warm_up() -> None:
    assert schedule("cosine", 0, 10, 0, 2.0, 1) == 2.0
    assert schedule("cosine", 0, 1, 1, 2.0, 1) == 2.0


def test_warm_up_is_a_tenth_up_to_the_papers_1500() -> None:
    assert [default_warm_up(steps, False).value for steps in (1, 120, 15_000, 100_000)] == [1, 12, 1500, 1500]
    assert [default_warm_up(steps, True).value for steps in (1, 160, 15_000)] == [1, 40, 1500]


def test_routers_that_were_set_from_text_are_trained_more_gently():
    plain, routed = (default_learning_rate(2_900_000, 327_680, routed) for routed in (False, True))
    assert routed.value == pytest.approx(0.7 * plain.value)
    assert plain.reason in routed.reason
    assert "set from text" in routed.reason


def test_the_cap_goes_through_what_was_measured() -> None:
    for size, rate in MEASURED_RATES:
        assert rate_cap(int(size)) == pytest.approx(rate)
    assert rate_cap(1000) == pytest.approx(1e-3)
    assert rate_cap(70 * 10**9) == pytest.approx(1e-4)
    assert 1.2e-4 < rate_cap(10**7) < 1e-3


def test_the_default_rate_is_the_step_law_under_the_cap() -> None:
    free = default_learning_rate(2_900_000, 8192)
    assert free.value == pytest.approx(1.79 * 2.9e6**-0.713 * 8192**0.307)
    assert "step law" in free.reason
    capped = default_learning_rate(10**9, 10**11)
    assert capped.value == rate_cap(10**9)
    assert "capped" in capped.reason


def test_the_default_batch_solves_the_step_law() -> None:
    choice = default_batch_size(20_000, 512, 4, 1)
    tokens = choice.value * 512
    assert tokens == pytest.approx(0.58 * (20_000 * tokens) ** 0.571, rel=0.02)
    assert default_batch_size(100, 256, 4, 1).value == 8
    assert default_batch_size(100, 256, 6, 1).value == 12
    assert default_batch_size(100, 256, 4, 3).value == 9
    assert math.isfinite(default_batch_size(1, 1, 1, 1).value)
