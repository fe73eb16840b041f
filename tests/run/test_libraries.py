"""The versions of the libraries that make samples, in a state and at a resume."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.small_runs import make_batches, make_trainer
from torch_frame import CheckpointerHook
from torch_frame.checkpoint import io
from torch_frame.run.libraries import LIBRARIES, loaded_versions

SAID = "last bits may differ"


def saved_with(folder: Path, **versions: str) -> Path:
    """A run's state whose libraries had these versions; names with the version "" are not in it."""
    make_trainer(folder, data=make_batches(3), max_epochs=1, hooks=[CheckpointerHook()], create_new_dir=None).train()
    path = folder / "checkpoints" / "latest.pth"
    state = io.read(path)
    environment: dict[str, Any] = {**state["environment"], **versions}
    io.write(path, {**state, "environment": {name: value for name, value in environment.items() if value != ""}})
    return path


def told_at_resume(folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "torch_frame"):
        make_trainer(folder, data=make_batches(3), max_epochs=2, hooks=[CheckpointerHook()], resume="auto").train()
    return [record.getMessage() for record in caplog.records]


def test_another_version_of_a_library_is_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved_with(tmp_path, numpy="1.26.4")
    (line,) = told_at_resume(tmp_path, caplog)
    assert SAID in line
    assert f"numpy was 1.26.4, now it is {np.__version__}" in line


def test_the_same_versions_are_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved_with(tmp_path)
    assert io.read(path)["environment"]["numpy"] == np.__version__
    assert told_at_resume(tmp_path, caplog) == []


def test_a_state_without_versions_is_resumed_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved_with(tmp_path, **dict.fromkeys(LIBRARIES, ""))
    assert told_at_resume(tmp_path, caplog) == []


def test_a_library_that_is_not_loaded_any_more_is_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "SimpleITK" not in sys.modules
    saved_with(tmp_path, SimpleITK="2.3.1")
    assert told_at_resume(tmp_path, caplog) == []


def test_nothing_is_imported_for_it_and_what_the_script_imports_is_seen() -> None:
    script = (
        "import sys, torch_frame\n"
        "from torch_frame.run.libraries import loaded_versions\n"
        "before = set(sys.modules); loaded_versions(); assert set(sys.modules) == before\n"
        "assert 'PIL' not in loaded_versions()\n"
        "import PIL.Image\n"
        "assert loaded_versions()['PIL'] == PIL.__version__\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_modules_without_a_version_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imgaug", None)  # as python marks an import that is blocked
    monkeypatch.setitem(sys.modules, "decord", sys)
    assert not {"imgaug", "decord"} & loaded_versions().keys()
