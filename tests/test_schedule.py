"""The learning rate is a pure function of the step."""

import math

import pytest

from train.schedule import learning_rate

SETTINGS = {"total": 100, "peak": 1.0, "warmup": 10, "floor": 0.1, "decay_fraction": 0.2}


def rates(schedule: str) -> list[float]:
    return [learning_rate(s, schedule=schedule, **SETTINGS) for s in range(101)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warms_up_in_equal_parts_and_reaches_the_peak(schedule):
    assert rates(schedule)[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates(schedule)) == 1.0


def test_values_by_hand():
    assert rates("cosine")[55] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down half a cosine
    assert rates("cosine")[32] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 22 / 90)))
    assert rates("linear")[55] == pytest.approx(0.55)
    assert rates("constant")[99] == 1.0
    assert rates("wsd")[79] == 1.0
    assert rates("wsd")[90] == pytest.approx(0.55)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_ends_at_the_floor_and_stays_there(schedule):
    assert rates(schedule)[100] == pytest.approx(0.1)
    assert learning_rate(5000, schedule=schedule, **SETTINGS) == pytest.approx(0.1)


def test_no_warmup_and_one_step_are_fine():
    assert learning_rate(0, total=1, peak=2.0, warmup=0, schedule="cosine", floor=0.1, decay_fraction=0.2) == 2.0
