"""resume="auto": the newest whole state of a work dir and of those beside it, in which nobody else trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.run.test_lock import Other
from tests.small_runs import make_trainer, raised_by
from torch_frame import CheckpointerHook, CheckpointError, Trainer


def run_until(work_dir: Path, epochs: int, time_s: float | None = None, **settings: Any) -> Trainer:
    """A run whose files are of a time."""
    trainer = make_trainer(work_dir, max_epochs=epochs, hooks=[CheckpointerHook()], **settings)
    trainer.train()
    for age, name in enumerate(("latest.pth", "previous.pth")):
        if time_s is not None and os.path.exists(os.path.join(trainer.ckpt_dir, name)):
            os.utime(os.path.join(trainer.ckpt_dir, name), (time_s - age, time_s - age))
    return trainer


def resumed(work_dir: Path) -> Trainer:
    trainer = make_trainer(work_dir, max_epochs=9, hooks=[CheckpointerHook()], resume="auto")
    trainer.train()
    return trainer


def cut(trainer: Trainer, name: str) -> None:
    path = os.path.join(trainer.ckpt_dir, name)
    os.truncate(path, os.path.getsize(path) // 2)


def test_the_newest_run_is_continued_in_its_folder_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for epochs, time_s in ((4, 2000), (2, 3000), (3, 1000)):
        run_until(tmp_path / "run", epochs, time_s, create_new_dir="count")
    run_until(tmp_path / "run_large", 5, 9000, create_new_dir="count")  # another experiment
    trainer = resumed(tmp_path / "run")
    assert (trainer.start_epoch, trainer.work_dir) == (2, str(tmp_path / "run_0"))
    assert any(str(tmp_path / "run_0") in line and "Resumed from" in line for line in caplog.messages)


def test_a_damaged_state_is_passed_over_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_until(tmp_path / "run", 4, 2000)
    newer = run_until(tmp_path / "run", 2, 3000, create_new_dir="count")
    cut(newer, "latest.pth")
    trainer = resumed(tmp_path / "run")
    assert (trainer.start_epoch, trainer.work_dir) == (1, newer.work_dir)
    assert any("Not resumed from" in line and "latest.pth is damaged" in line for line in caplog.messages)


def test_an_older_run_is_continued_where_the_newer_one_has_no_whole_state(tmp_path: Path) -> None:
    older = run_until(tmp_path / "run", 4, 2000)
    newer = run_until(tmp_path / "run", 2, 3000, create_new_dir="count")
    for name in ("latest.pth", "previous.pth"):
        cut(newer, name)
    trainer = resumed(tmp_path / "run")
    assert (trainer.start_epoch, trainer.work_dir) == (4, older.work_dir)


def test_where_all_are_damaged_nothing_is_begun_anew(tmp_path: Path) -> None:
    for settings in ({}, {"create_new_dir": "count"}):
        cut(run_until(tmp_path / "run", 1, **settings), "latest.pth")
    error = raised_by(make_trainer(tmp_path / "run", resume="auto").train, CheckpointError)
    assert str(error).count("is damaged") == 2


def test_a_run_in_which_another_process_trains_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older = run_until(tmp_path / "run", 3, 2000)
    newer = run_until(tmp_path / "run", 2, 3000, create_new_dir="count")
    with Other(Path(newer.work_dir)):
        trainer = resumed(tmp_path / "run")
    assert (trainer.start_epoch, trainer.work_dir) == (3, older.work_dir)
    assert any(f"{newer.work_dir} is left alone" in line for line in caplog.messages)


def test_in_a_copied_folder_the_latest_state_is_taken_whatever_the_times_of_its_files(tmp_path: Path) -> None:
    run = run_until(tmp_path / "run", 3)
    os.utime(os.path.join(run.ckpt_dir, "latest.pth"), (1000, 1000))
    os.utime(os.path.join(run.ckpt_dir, "previous.pth"), (2000, 2000))
    assert resumed(tmp_path / "run").start_epoch == 3


def test_a_link_that_leads_nowhere_is_passed_over_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A disk that is not mounted: the run is not begun anew without a word."""
    trainer = run_until(tmp_path / "run", 3)
    latest = Path(trainer.ckpt_dir, "latest.pth")
    latest.unlink()
    latest.symlink_to(tmp_path / "unmounted" / "latest.pth")
    assert resumed(tmp_path / "run").start_epoch == 2
    told = [line for line in caplog.messages if "Not resumed from" in line]
    assert len(told) == 1
    assert "latest.pth is a link to" in told[0]
    for name in ("latest.pth", "previous.pth"):
        Path(trainer.ckpt_dir, name).unlink()
    latest.symlink_to(tmp_path / "unmounted" / "latest.pth")
    assert "is not there" in str(raised_by(lambda: resumed(tmp_path / "run"), CheckpointError))
    assert latest.is_symlink()
