"""Ranks as processes on gloo: what a function returns or raises on each of them."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 60.0


class Failed(Exception):
    """What a rank has raised, as text: its class, its message, its notes, its traceback."""

    def __init__(self, kind: str, message: str, notes: list[str], text: str) -> None:
        super().__init__(f"{kind}: {message}\n{text}")
        self.kind = kind
        self.message = message
        self.notes = notes
        self.text = text

    def __reduce__(self) -> Any:
        return Failed, (self.kind, self.message, self.notes, self.text)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(
    work: Callable[..., Any],
    folder: Path,
    world_size: int = 2,
    *args: Any,
    group_timeout_s: float = TIMEOUT_S,
    **kwargs: Any,
) -> mp.ProcessContext:
    """Start `work(*args, **kwargs)` on each rank, in a process group on gloo."""
    folder.mkdir(parents=True, exist_ok=True)
    given = (work, str(folder), world_size, free_port(), group_timeout_s, args, kwargs)
    multiprocessing.set_forkserver_preload(["tests.small_runs", "torch.nn.parallel"])  # imported once, for all ranks
    return mp.start_processes(_run, nprocs=world_size, join=False, args=given, start_method="forkserver")  # type: ignore[return-value]


def wait(context: Any, timeout_s: float = TIMEOUT_S) -> list[int | None]:
    """The exit codes; processes that do not end in time are killed, and told."""
    end = time.monotonic() + timeout_s
    for process in context.processes:
        process.join(max(0.0, end - time.monotonic()))
    alive = [process.pid for process in context.processes if process.is_alive()]
    for process in context.processes:
        if process.is_alive():
            process.kill()
            process.join()
    assert not alive, f"{len(alive)} of {len(context.processes)} ranks still waited after {timeout_s} s"
    return [process.exitcode for process in context.processes]


def results_in(folder: Path, world_size: int) -> list[Any]:
    """What each rank has returned or raised; None where it has ended before."""
    paths = [folder / f"rank_{rank}.result" for rank in range(world_size)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def outcomes(
    work: Callable[..., Any], folder: Path, world_size: int = 2, *args: Any, timeout_s: float = TIMEOUT_S, **kwargs: Any
) -> list[Any]:
    """What `work(*args, **kwargs)` returns on each rank; `Failed` where it raises."""
    wait(start(work, folder, world_size, *args, **kwargs), timeout_s)
    return results_in(folder, world_size)


def on_processes(work: Callable[..., Any], folder: Path, world_size: int = 2, *args: Any, **kwargs: Any) -> list[Any]:
    """What `work(*args, **kwargs)` returns on each rank.

    Raises:
        Failed: what the first rank that has failed raised.
    """
    results = outcomes(work, folder, world_size, *args, **kwargs)
    for result in results:
        if isinstance(result, Failed):
            raise result
    return results


def _run(
    rank: int, work: Any, folder: str, world_size: int, port: int, group_timeout_s: float, args: Any, kwargs: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=group_timeout_s),
    )
    result: Any
    code = 0
    try:
        result = work(*args, **kwargs)
    except SystemExit as error:
        result, code = error.code, int(error.code or 0)
    except BaseException as error:
        result = Failed(type(error).__name__, str(error), getattr(error, "__notes__", []), traceback.format_exc())
        code = 1
    path = os.path.join(folder, f"rank_{rank}.result")
    torch.save(result, path + ".tmp")
    os.replace(path + ".tmp", path)
    if code == 0:
        dist.destroy_process_group()
    os._exit(code)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The expected values are computed as the ranks compute, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
