"""A process that has trained is told from one that has got its number, and from what is left of it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from torch_frame.tracking.processes import is_alive

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


@pytest.fixture
def sleeping() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_a_process_that_was_there_at_the_time_is_alive(sleeping: "subprocess.Popen[bytes]") -> None:
    assert is_alive(sleeping.pid, time.time())
    assert is_alive(sleeping.pid, None)
    assert is_alive(os.getpid(), time.time())


@linux_only
def test_one_that_has_begun_later_has_the_number_of_another(sleeping: "subprocess.Popen[bytes]") -> None:
    assert not is_alive(sleeping.pid, time.time() - 3600)


@linux_only
def test_a_killed_process_that_nobody_has_waited_for_is_not_alive(sleeping: "subprocess.Popen[bytes]") -> None:
    sleeping.kill()
    os.waitid(os.P_PID, sleeping.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(sleeping.pid, time.time())


@pytest.mark.skipif(os.name == "nt", reason="Windows would end a process for the question")
@pytest.mark.parametrize("pid", [2**22 + 1, 10**30])
def test_a_number_that_no_process_has_is_not_alive(pid: int) -> None:
    assert not is_alive(pid, time.time())


@pytest.mark.parametrize("pid", [None, "7", 0, -1, 3.5])
def test_what_is_no_number_is_not_known_to_be_gone(pid: object) -> None:
    assert is_alive(pid, time.time())
