"""Runs that several modules compare with."""

from __future__ import annotations

import pytest

from tests.faults.kit import Uninterrupted


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """Uninterrupted runs."""
    return Uninterrupted(tmp_path_factory.mktemp("uninterrupted"))
