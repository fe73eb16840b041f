"""The alarm rings once, for the one that is sooner, and is never taken away from somebody else."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from torch_frame import alarm

pytestmark = [pytest.mark.skipif(os.name == "nt", reason="no alarm"), pytest.mark.usefixtures("free_alarm")]


def wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize("sooner_first", [True, False])
def test_it_rings_once_for_the_sooner_call_and_is_given_back(sooner_first: bool) -> None:
    rang: list[str] = []
    sooner, later = (lambda frame, name=name: rang.append(name) for name in ("sooner", "later"))
    calls = [(0.05, sooner), (30, later)]
    asked = [alarm.call_in(*call) for call in (calls if sooner_first else calls[::-1])]
    assert asked == [True, not sooner_first]
    wait(0.3)
    assert rang == ["sooner"]
    alarm.give_back(later)
    assert signal.getsignal(signal.SIGALRM) != signal.SIG_DFL, "it was given back by somebody who had it not"
    alarm.give_back(sooner)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_given_back_it_does_not_ring() -> None:
    rang: list[object] = []
    assert alarm.call_in(0.5, rang.append)
    alarm.give_back(rang.append)
    wait(0.6)  # a process dies of an alarm without a handler
    assert not rang


def test_the_users_is_left_alone() -> None:
    rang: list[int] = []
    signal.signal(signal.SIGALRM, lambda number, frame: rang.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    assert not alarm.call_in(0.01, lambda frame: None)
    alarm.give_back(lambda frame: None)
    wait(0.2)
    assert rang == [signal.SIGALRM]


def test_an_alarm_that_is_to_end_the_process_is_left_alone() -> None:
    signal.setitimer(signal.ITIMER_REAL, 60)
    assert not alarm.call_in(0.01, lambda frame: None)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 50


def test_outside_the_main_thread_there_is_none() -> None:
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(alarm.call_in(0.01, lambda frame: None)))
    thread.start()
    thread.join()
    assert answers == [False]
