"""Was the device itself while it was timed? fine, throttled or shared."""

from __future__ import annotations

from typing import NamedTuple

from torch_frame.bench.sensors import Readings
from torch_frame.bench.timing import Timing

SLOWER = 1.05
"""A last third that took so many times the first one's time is not the same device any more."""
UNEVEN = 0.15
"""Calls of one and the same work whose 10th and 90th percentile lie further apart (as a fraction of the median) are disturbed."""
CLOCK_FELL = 0.97
"""A clock that fell to this fraction explains a slower last third."""
BUSY_PERCENT = 10
ENOUGH_CALLS = 6
"""Two in each third."""


class Verdict(NamedTuple):
    """What was judged.

    Attributes:
        word: "fine", "throttled" or "shared".
        reason: why.
    """

    word: str
    reason: str


def judge(timing: Timing, readings: Readings, busy_percent: float | None = None) -> Verdict:
    """Judge one long measurement by its first and last third.

    - throttled: the last third is more than 5 % slower and either the clock fell too, or no clock is known and the calls
      within each third are even: heat and power limits slow a device evenly.
    - shared: the times are uneven, or became slower while the clock did not fall, or the card was busy before.
    - fine: all else.

    Args:
        timing: many calls of the same work.
        readings: of the card meanwhile; may be empty.
        busy_percent: of the card before the bench began, if known.
    """
    clock = readings.clock_drift
    percent = f"{(timing.drift - 1) * 100:+.0f} %"
    if busy_percent is not None and busy_percent >= BUSY_PERCENT:
        return Verdict("shared", f"the card was {busy_percent:.0f} % busy before the bench began")
    if timing.drift > SLOWER:
        if clock is not None and clock <= CLOCK_FELL:
            return Verdict("throttled", f"the last third took {percent}, and the clock fell to {clock:.0%}")
        if clock is None and max(third.spread for third in timing.thirds()) <= UNEVEN:
            return Verdict("throttled", f"the last third took {percent}, evenly; no clock can be read")
        return Verdict(
            "shared", f"the last third took {percent}" + ("" if clock is None else ", and the clock did not fall")
        )
    if timing.spread > UNEVEN:
        return Verdict("shared", f"calls of the same work lie {timing.spread:.0%} apart (p10 to p90)")
    return Verdict("fine", f"last third {percent}, p10 to p90 {timing.spread:.0%} apart")
