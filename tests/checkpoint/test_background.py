"""Work in the background: one piece at a time, none dropped, no failure unseen."""

from __future__ import annotations

import threading
import time

import pytest

from torch_frame.checkpoint.background import Background


def test_the_next_job_waits_for_the_one_before_and_none_is_dropped() -> None:
    background, order = Background(lambda: None), []

    def job(number: int) -> None:
        order.append(("begin", number))
        time.sleep(0.02)
        order.append(("end", number))

    for number in range(4):
        background.start(lambda number=number: job(number))  # type: ignore[misc]  # bound early
    background.wait()
    assert order == [(what, number) for number in range(4) for what in ("begin", "end")]
    assert not background.busy


def test_start_returns_while_the_job_runs() -> None:
    background, go_on = Background(lambda: None), threading.Event()
    background.start(lambda: go_on.wait(10) and None)
    assert background.busy
    go_on.set()
    background.wait()


@pytest.mark.parametrize("how", ["wait", "start", "raise_failure"])
def test_a_failure_is_told_once_and_somebody_is_called(how: str) -> None:
    called = threading.Event()
    background = Background(called.set)

    def fail() -> None:
        raise OSError("the disk is full")

    background.start(fail)
    assert called.wait(10)
    ask = {
        "wait": background.wait,
        "raise_failure": background.raise_failure,
        "start": lambda: background.start(lambda: None),
    }[how]
    with pytest.raises(OSError, match="the disk is full"):
        ask()
    background.wait()


def test_a_job_that_looks_can_be_cancelled() -> None:
    background, seen = Background(lambda: None), []

    def job() -> None:
        while not background.is_cancelled():
            time.sleep(0.001)
        seen.append("cancelled")

    background.start(job)
    background.cancel()
    background.wait()
    assert seen == ["cancelled"]
    background.start(lambda: seen.append(background.is_cancelled()))
    background.wait()
    assert seen == ["cancelled", False]
