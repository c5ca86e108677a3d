"""NaN, gradient spikes and idle experts."""

import pytest

from upcycle.errors import TrainingError
from upcycle.watchdog import DROPPED_STEPS, ENOUGH, MAX_SKIPPED, Watchdog


def calm(steps: int = ENOUGH) -> Watchdog:
    dog = Watchdog(["code", "law"])
    for step in range(steps):
        assert dog.objection(step, 2.0, 1.0 + step % 3) is None
    return dog


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (2.0, float("nan"))])
def test_nan_is_never_let_through(loss: float, norm: float) -> None:
    assert "nan" in str(calm().objection(1, loss, norm)) or loss == float("inf")
    assert Watchdog([]).objection(1, loss, norm)


def test_a_spike_is_told_from_the_usual() -> None:
    dog = calm()
    assert "a gradient spike: norm 21, the median is 2" in str(dog.objection(20, 2.0, 21.0))
    assert dog.objection(21, 2.0, 19.0) is None
    assert Watchdog([]).objection(0, 2.0, 1e6) is None  # the first steps say nothing yet


def test_what_stays_high_is_no_spike() -> None:
    dog = calm(64)
    skipped = 0
    for step in range(3):
        skipped += dog.objection(step, 2.0, 30.0) is not None
        for _ in range(15):
            dog.objection(step, 2.0, 15.0)
    assert skipped < 3


def test_several_in_a_row_end_the_training() -> None:
    dog = calm()
    for step in range(MAX_SKIPPED - 1):
        assert dog.objection(step, float("nan"), 1.0)
    with pytest.raises(TrainingError, match=r"step 99: the loss is nan, and so were the 4 steps before"):
        dog.objection(99, float("nan"), 1.0)
    other = calm()
    for step in range(3 * MAX_SKIPPED):
        other.objection(step, float("nan") if step % 2 else 2.0, 1.0)


def test_an_idle_expert_is_named_once() -> None:
    dog = Watchdog(["code", "law"])
    said = [dog.idle_experts(step, [[0.5, 0.5], [0.995, 0.005]]) for step in range(3 * DROPPED_STEPS)]
    assert [len(messages) for messages in said if messages] == [1]
    assert "layer 1 has sent expert 1 (law) under 1% of its tokens for 50 steps" in said[DROPPED_STEPS - 1][0]
    dog.idle_experts(0, [[0.5, 0.5], [0.9, 0.1]])  # it came back
    assert not any(dog.idle_experts(step, [[0.5, 0.5], [1.0, 0.0]]) for step in range(DROPPED_STEPS - 1))


def test_its_memory_goes_on() -> None:
    dog, other = calm(), Watchdog(["code", "law"])
    dog.idle_experts(0, [[1.0, 0.0]])
    other.load_state(dog.state())
    assert other.state() == dog.state()
    assert dog.objection(1, 2.0, 50.0) == other.objection(1, 2.0, 50.0) is not None
