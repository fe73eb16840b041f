"""Runs that several modules compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kit import Config, Training


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Uninterrupted runs: number of workers -> folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    runs = {c.workers: Training(folder / str(c), *c.options) for c in (Config("plain", 0), Config("infinite", 2))}
    for run in runs.values():
        with run:
            assert run.wait() == 0, run.tail()
    return {workers: run.folder for workers, run in runs.items()}
