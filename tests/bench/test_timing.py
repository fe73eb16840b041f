"""Every figure's arithmetic, by a clock that the tests set; and what is judged to be fine, throttled or shared."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_frame.bench.sensors import Reading, Readings, Sensors
from torch_frame.bench.suite import matmul_flops, rate
from torch_frame.bench.timing import MAX_CALLS, EventClock, HostClock, Timing, clock_of, time_calls
from torch_frame.bench.verdict import judge


class Work:
    """Takes the given seconds, call by call; the last of them from then on."""

    def __init__(self, *seconds: float) -> None:
        self.now = 0.0
        self.seconds = list(seconds)
        self.calls = 0

    def __call__(self) -> None:
        self.now += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1

    @property
    def clock(self) -> HostClock:
        return HostClock(lambda: self.now)


def test_the_warm_up_is_not_in_the_times() -> None:
    work = Work(100.0, 50.0, 1.0)
    timing = time_calls(work, work.clock, 10.0, warm_up=3, min_calls=6)
    assert timing.seconds == [1.0] * 10
    assert work.calls == 13


@pytest.mark.parametrize(("one_call", "num_calls"), [(100.0, 6), (0.5, 20), (1e-6, MAX_CALLS)])
def test_the_number_of_calls_follows_from_the_time_and_has_two_ends(one_call: float, num_calls: int) -> None:
    work = Work(one_call)
    assert len(time_calls(work, work.clock, 10.0, min_calls=6).seconds) == num_calls


@pytest.mark.parametrize(("at_most", "num_calls"), [(65.0, 2), (45.0, 1), (-1.0, 1)])
def test_a_time_that_is_nearly_over_goes_before_the_least_number_of_calls(at_most: float, num_calls: int) -> None:
    work = Work(10.0)  # 4 calls of warm-up
    assert len(time_calls(work, work.clock, 30.0, min_calls=6, at_most_s=at_most).seconds) == num_calls


def test_the_warm_up_ends_when_the_time_is_over() -> None:
    work = Work(10.0)
    assert len(time_calls(work, work.clock, 30.0, warm_up=4, min_calls=6, at_most_s=15.0).seconds) == 1
    assert work.calls == 3


def test_a_slow_warm_up_is_no_reason_to_time_less_than_the_least_number_of_calls() -> None:
    work = Work(10.0, 1.0)
    assert time_calls(work, work.clock, 3.0, warm_up=1, min_calls=6, at_most_s=20.0).seconds == [1.0] * 6


def test_each_call_has_its_own_time() -> None:
    work = Work(1.0, 1.0, 2.0, 3.0, 4.0)
    assert time_calls(work, work.clock, 4.0, warm_up=1, min_calls=1).seconds == [1.0, 2.0, 3.0, 4.0]


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles_are_numpys(seconds: list[float], percent: float) -> None:
    assert Timing(seconds).percentile(percent) == pytest.approx(np.percentile(seconds, percent))


def test_rates_are_amounts_over_times() -> None:
    timing = Timing([0.1, 0.2, 0.4])
    found = rate(timing, 64)
    assert found["median"] == 320
    assert found["p10"] == pytest.approx(64 / timing.percentile(90), abs=1e-3)
    assert found["p90"] == pytest.approx(64 / timing.percentile(10), abs=1e-3)
    assert found["p10"] < found["median"] < found["p90"]


def test_a_matrix_product_has_two_operations_for_each_multiply_add() -> None:
    assert matmul_flops((8192, 8192, 8192)) == 2 * 8192**3


def test_drift_is_the_last_third_over_the_first() -> None:
    assert Timing([1, 1, 1, 5, 5, 5, 2, 2, 2]).drift == 2
    assert Timing([3.0]).drift == 1


def test_the_cpu_is_timed_by_the_hosts_clock() -> None:
    assert isinstance(clock_of(torch.device("cpu")), HostClock)


# ---------------------------------------------------------------- verdicts


def readings(*megahertz: float) -> Readings:
    return Readings([Reading(value, 300.0) for value in megahertz])


EVEN, SLOWER, UNEVEN = Timing([1.0] * 30), Timing([1.0] * 15 + [1.2] * 15), Timing([1.0, 1.5] * 15)


@pytest.mark.parametrize(
    ("timing", "clocks", "busy_percent", "word"),
    [
        (EVEN, [], None, "fine"),
        (EVEN, [1980] * 9, 0, "fine"),
        (EVEN, [1980] * 3 + [1000] * 6, 0, "fine"),  # a clock that fell and cost nothing
        (SLOWER, [1980] * 3 + [1600] * 6, 0, "throttled"),
        (SLOWER, [], None, "throttled"),
        (SLOWER, [1980] * 9, 0, "shared"),
        (UNEVEN, [], None, "shared"),
        (UNEVEN, [1980] * 9, 0, "shared"),
        (EVEN, [1980] * 9, 9.0, "fine"),
        (EVEN, [1980] * 9, 10.0, "shared"),
    ],
)
def test_the_verdict(timing: Timing, clocks: list[float], busy_percent: float | None, word: str) -> None:
    assert judge(timing, readings(*clocks), busy_percent).word == word


def test_the_verdict_gives_its_reason() -> None:
    assert (
        judge(SLOWER, readings(*[2000] * 3, *[1500] * 3)).reason
        == "the last third took +20 %, and the clock fell to 75%"
    )
    assert judge(EVEN, Readings(), 45).reason == "the card was 45 % busy before the bench began"


def test_medians_of_clock_and_watts() -> None:
    found = Readings([Reading(1000, 100), Reading(2000, 300), Reading(1500, 700)])
    assert (found.sm_mhz, found.watts, found.clock_drift) == (1500, 300, None)
    assert (Readings().sm_mhz, Readings().watts) == (None, None)


def test_a_cpu_has_no_sensors_and_says_so() -> None:
    sensors = Sensors(torch.device("cpu"))
    found = Readings()
    with sensors.watching(found):
        pass
    assert found.readings == []
    assert sensors.busy_percent() is None
    assert sensors.missing == "Clocks and watts are read on NVIDIA cards only; this is cpu."


def test_readings_are_taken_while_something_runs_and_no_longer() -> None:
    sensors, found = Sensors(torch.device("cpu")), Readings()
    sensors.read = lambda: Reading(1980.0, 700.0)
    with sensors.watching(found):
        time.sleep(0.2)
    num_taken = len(found.readings)
    assert num_taken >= 2
    time.sleep(0.1)
    assert len(found.readings) == num_taken
    assert found.watts == 700.0


def test_a_card_that_stops_answering_ends_the_readings_only() -> None:
    sensors, found = Sensors(torch.device("cpu")), Readings()

    def read() -> Reading:
        raise OSError("gone")

    sensors.read = read
    with sensors.watching(found):
        time.sleep(0.01)
    assert found.readings == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_what_is_missing_to_read_a_card_is_said() -> None:
    assert Sensors(torch.device("cuda")).missing.startswith("Clocks and watts are not read: ")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_devices_own_events_tell_the_time() -> None:
    device = torch.device("cuda:0")
    clock = clock_of(device)
    assert isinstance(clock, EventClock)
    found = time_calls(lambda: torch.cuda._sleep(20_000_000), clock, 0.1)  # some 10 ms, and 0.01 for the host
    assert 0.002 < found.median < 0.05
    assert found.spread < 0.5
