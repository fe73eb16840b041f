"""Runs that several modules compare with."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.kit import Config, Training


@pytest.fixture(scope="session", autouse=True)
def _signals_are_not_ignored() -> Iterator[None]:
    """Processes of a shell's background job begin with SIGINT ignored, and so would those that are started here."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Uninterrupted runs: number of workers -> folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    runs = {c.workers: Training(folder / str(c), *c.options) for c in (Config("plain", 0), Config("infinite", 2))}
    for run in runs.values():
        with run:
            assert run.wait() == 0, run.tail()
    return {workers: run.folder for workers, run in runs.items()}
