"""What ranks exchange beside the gradients, and what they are told when one of them does not come."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.processes import free_port, on_processes, start, wait
from tests.small_runs import environment
from torch_frame.distributed.channel import Channel, RanksError, on_cpu


def exchange(folder: Path) -> dict[str, Any]:
    channel = Channel()
    rank = channel.rank
    value = {"rank": rank, "data": [torch.arange(rank + 1), (1.5, None, "a")]}
    results = {
        "agree": [channel.agree(False), channel.agree(rank == 1), channel.agree(True)],
        "sum": [channel.sum(0.1 * (rank + 1)), channel.sum(float("inf") if rank else 1.0)],
        "gather": [channel.gather(value)[1]["data"][0].tolist(), channel.gather("x" * rank)],
        "collect": channel.collect(rank),
        "broadcast": [channel.broadcast(value)["rank"], channel.broadcast(list(range(5)) if rank == 0 else None)],
        "timeout": channel.timeout_s,
    }
    try:
        Channel().gather(1) if rank == 0 else Channel().agree(True)
    except RanksError as error:
        results["different"] = str(error)
    late = Channel(timeout_s=1.0)
    try:
        if rank == 0:
            late.agree(True)
        else:
            time.sleep(3.0)
    except RanksError as error:
        results["late"] = str(error)
    return results


def test_ranks_exchange_values_and_are_told_what_is_wrong(tmp_path: Path) -> None:
    results = on_processes(exchange, tmp_path, 3, tmp_path, group_timeout_s=77.0)
    for rank, result in enumerate(results):
        assert result["agree"] == [False, True, True]
        assert result["sum"] == [pytest.approx(0.6, abs=0, rel=1e-15), float("inf")]
        assert result["sum"][0] == results[0]["sum"][0]
        assert result["gather"] == [[0, 1], ["", "x", "xx"]]
        assert result["collect"] == ([0, 1, 2] if rank == 0 else [])
        assert result["broadcast"] == [0, [0, 1, 2, 3, 4]]
        assert "rank 0 does 'gather', rank 1 does 'agree', rank 2 does 'agree'" in result["different"]
    assert "waited 1 s for the other ranks to 'agree'" in results[0]["late"]


def test_the_time_out_is_that_of_the_group(tmp_path: Path) -> None:
    results = on_processes(timeout, tmp_path, 2, group_timeout_s=77.0)
    assert results == [77.0, 77.0]


def timeout() -> float:
    return Channel().timeout_s


def die_or_wait(folder: Path) -> None:
    channel = Channel()
    if channel.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        channel.agree(True)
    except RanksError:
        (folder / "told").touch()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_the_death_of_a_rank_is_noticed_at_once(tmp_path: Path) -> None:
    context = start(die_or_wait, tmp_path, 2, tmp_path)
    started = time.monotonic()
    wait(context)
    assert time.monotonic() - started < 30
    assert (tmp_path / "told").exists()


SCRIPT = """
import sys, time
from torch_frame.distributed.channel import Channel, RanksError
from torch_frame.distributed.launch import join_group

join_group()
channel = Channel()
if channel.rank == 1:
    channel.tell_failure("ValueError: as a user's code fails")
    print("alive", flush=True)
    sys.stdin.read()  # a process that has failed, and does not end
else:
    try:
        channel.agree(True)
    except RanksError as error:
        sys.exit(str(error))
"""


def test_a_process_ends_though_a_rank_that_has_failed_is_alive() -> None:
    """At its end torch waits for what a group still does, which is done when the other process has ended."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", SCRIPT]
    ranks = [
        subprocess.Popen(
            command,
            env=environment(**variables, RANK=str(rank)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        assert ranks[1].stdout is not None
        assert ranks[1].stdout.readline() == "alive\n"
        _, told = ranks[0].communicate(timeout=30)
        assert ranks[0].returncode == 1
        assert "rank 1: ValueError: as a user's code fails" in told
        assert ranks[1].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_nested_tensors_go_to_the_cpu() -> None:
    value = {"a": [torch.ones(2, requires_grad=True), (1, "b")]}
    moved = on_cpu(value)
    assert moved["a"][1] == (1, "b")
    assert not moved["a"][0].requires_grad


def leave() -> tuple[int, int, int]:
    """Threads of the process before a channel is made, while it stands, and when Python has run what it runs at its end."""
    before = num_threads()
    channel = Channel()
    channel.gather(torch.zeros(1000))
    standing = num_threads()
    atexit._run_exitfuncs()
    return before, standing, num_threads()


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts the process's threads in /proc")
def test_no_thread_of_a_channel_outlives_python(tmp_path: Path) -> None:
    # One that frees a tensor when Python is gone aborts the process: 134, "terminate called without an active exception".
    for before, standing, after in on_processes(leave, tmp_path):
        assert standing > before
        assert after < standing
        assert after <= before
