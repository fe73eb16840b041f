"""Timing work on a device: warm-up, a mark between any two calls, and what the times say."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

WARM_UP_CALLS = 4
MIN_CALLS = 6
"""So that the first and the last third hold two calls each."""
MAX_CALLS = 2000


class Clock(Protocol):
    """Marks moments in the order in which the device comes to them."""

    def mark(self) -> Any:
        """This moment in the device's queue; returns at once."""
        ...

    def wait(self) -> None:
        """Return when the device has done all that it was given."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """Between two marks; all is done by then."""
        ...


class HostClock:
    """For devices that are done when a call returns: the CPU.

    Args:
        now: returns seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def mark(self) -> float:
        return self._now()

    def wait(self) -> None:
        """Nothing is under way."""

    def seconds(self, first: float, last: float) -> float:
        return last - first


class EventClock:
    """Events in the device's own queue, so the host's launches are not in the times unless the device waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.Event:
        event = torch.Event(self.device.type, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return event

    def wait(self) -> None:
        torch.accelerator.synchronize(self.device)

    def seconds(self, first: torch.Event, last: torch.Event) -> float:
        return float(first.elapsed_time(last)) / 1e3  # milliseconds


class WaitingClock(HostClock):
    """For accelerators without events that tell time (MPS): the host's clock, and each mark waits for the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def mark(self) -> float:
        self.wait()
        return super().mark()

    def wait(self) -> None:
        torch.accelerator.synchronize(self.device)


def clock_of(device: torch.device) -> Clock:
    """The clock that suits a device."""
    if device.type == "cpu":
        return HostClock()
    try:
        events = EventClock(device)
        first, last = events.mark(), events.mark()
        events.wait()
        events.seconds(first, last)
    except (RuntimeError, NotImplementedError):
        return WaitingClock(device)
    return events


@dataclass(frozen=True)
class Timing:
    """How long each call took.

    Attributes:
        seconds: one for each call, in order, without the warm-up.
    """

    seconds: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def percentile(self, percent: float) -> float:
        """Between the two nearest calls, linearly (numpy's default).

        >>> Timing([1.0, 2.0, 3.0, 4.0, 5.0]).percentile(10)
        1.4
        """
        ordered = sorted(self.seconds)
        place = (len(ordered) - 1) * percent / 100
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (place - below)

    @property
    def spread(self) -> float:
        """The 90th percentile less the 10th, as a fraction of the median."""
        return (self.percentile(90) - self.percentile(10)) / self.median

    @property
    def drift(self) -> float:
        """The median of the last third over that of the first: 1.1 is a device that became 10 % slower."""
        first, last = self.thirds()
        return last.median / first.median

    def thirds(self) -> tuple[Timing, Timing]:
        """The first third of the calls, and the last."""
        third = max(len(self.seconds) // 3, 1)
        return Timing(self.seconds[:third]), Timing(self.seconds[-third:])


def time_calls(
    work: Callable[[], object],
    clock: Clock,
    seconds: float,
    *,
    warm_up: int = WARM_UP_CALLS,
    min_calls: int = MIN_CALLS,
    at_most_s: float = math.inf,
    during: AbstractContextManager[object] | None = None,
) -> Timing:
    """Call `work` again and again, for about so many seconds.

    All calls are queued without a wait between them, each between two marks of the clock.

    Args:
        work: gives the device something to do.
        seconds: for all calls together, the warm-up aside. How many calls that are is estimated from the last one of the
            warm-up; at least `min_calls`, at most `MAX_CALLS`.
        at_most_s: the warm-up included: it goes before `warm_up` and `min_calls`, but one call warms up and one is timed in any
            case.
        warm_up: calls before the timed ones, 1 or more: kernels are chosen, memory is found, clocks rise.
        during: entered around the timed calls.
    """
    begun, in_calls = time.perf_counter(), 0.0

    def left() -> float:
        return at_most_s - max(time.perf_counter() - begun, in_calls)

    for _ in range(warm_up):
        one_call = max(_timed(work, clock, 1)[0], 1e-9)
        in_calls += one_call
        if left() < 0:
            break
    num_calls = min(max(int(seconds / one_call), min_calls), MAX_CALLS)
    times: list[float] = []
    with during or contextlib.nullcontext():
        while not times or (len(times) < num_calls and left() >= one_call):
            before = len(times)
            fit = num_calls if at_most_s == math.inf else max(int(left() / one_call), 1)
            times += _timed(work, clock, min(num_calls - len(times), fit))
            in_calls, one_call = in_calls + sum(times[before:]), max(times[-1], 1e-9)
            num_calls = min(num_calls, max(len(times), min_calls))  # calls that got slower: no more than have to be
    return Timing(times)


def _timed(work: Callable[[], object], clock: Clock, num_calls: int) -> list[float]:
    """Seconds of calls that are queued one behind the other."""
    marks = [clock.mark()]
    for _ in range(num_calls):
        work()
        marks.append(clock.mark())
    clock.wait()
    return [clock.seconds(first, last) for first, last in itertools.pairwise(marks)]
