"""What ranks exchange beside the gradients, and what they are told when one of them does not come."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.processes import on_processes, start, wait
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


def test_nested_tensors_go_to_the_cpu() -> None:
    value = {"a": [torch.ones(2, requires_grad=True), (1, "b")]}
    moved = on_cpu(value)
    assert moved["a"][1] == (1, "b")
    assert not moved["a"][0].requires_grad
