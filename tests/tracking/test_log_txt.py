"""A full disk under log.txt is told once, and ends nothing."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from tests.small_runs import make_trainer
from torch_frame import CheckpointerHook
from torch_frame.tracking.log_txt import LogTxt


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has /dev/full")
def test_a_run_goes_on_without_its_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    trainer = make_trainer(tmp_path, create_new_dir=None, hooks=[CheckpointerHook()])
    trainer.train()
    assert trainer.progress.epoch == 2
    assert len([line for line in caplog.messages if "log.txt cannot be written" in line and "No space" in line]) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_record_that_fits_no_format_is_still_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handler = LogTxt(str(tmp_path / "log.txt"))
    handler.emit(logging.LogRecord("a", logging.INFO, "", 0, "%d", ("no number",), None))
    handler.close()
    assert "no number" in capfd.readouterr().err


def test_a_file_that_cannot_be_opened_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another member of the group has made it, say."""
    (tmp_path / "log.txt").mkdir()
    trainer = make_trainer(tmp_path, create_new_dir=None)
    trainer.train()
    assert trainer.progress.epoch == 2
    assert len([line for line in caplog.messages if "log.txt cannot be written" in line]) == 1
