"""The files and the log of a run: which there are, where, and under which names."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

import torch_frame
from tests.small_hooks import On
from tests.small_runs import UserError, fail, make_trainer, raised_by
from torch_frame import CheckpointerHook, LoggerHook, Trainer

FORBIDDEN_ON_WINDOWS = set('<>:"|?* ')


def test_nothing_is_made_before_train(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", hooks=None)
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_the_documented_files(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", hooks=None)
    trainer.train()
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("tb_logs/")}
    assert files - events == {
        "checkpoints/latest.pth",
        "checkpoints/previous.pth",
        "checkpoints/best.pth",
        "log.txt",
        "metrics.jsonl",
        "run.json",
        "table.jsonl",
    }
    assert trainer.work_dir == str(tmp_path / "run")
    assert trainer.ckpt_dir == os.path.join(trainer.work_dir, "checkpoints")
    assert trainer.tb_log_dir == os.path.join(trainer.work_dir, "tb_logs")


@pytest.mark.parametrize("mode", ["time_s", "time_m", "time_h", "time_d", "count"])
def test_runs_at_the_same_moment_get_folders_of_their_own(mode: Any, tmp_path: Path) -> None:
    trainers = [make_trainer(tmp_path / "run", create_new_dir=mode, hooks=None, max_epochs=1) for _ in range(3)]
    for trainer in trainers:
        trainer.train()
    folders = {trainer.work_dir for trainer in trainers}
    assert len(folders) == 3
    assert trainers[0].work_dir == str(tmp_path / "run")
    for folder in folders:
        assert not FORBIDDEN_ON_WINDOWS & set(Path(folder).name)
        assert (Path(folder) / "checkpoints" / "latest.pth").is_file()


def test_create_new_dir_none_goes_on_in_the_folder(tmp_path: Path) -> None:
    for _ in range(2):
        trainer = make_trainer(tmp_path / "run", create_new_dir=None)
        trainer.train()
        assert trainer.work_dir == str(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_no_file_of_a_run_has_a_name_that_windows_forbids(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    make_trainer(tmp_path / "run", hooks=[CheckpointerHook(max_to_keep=2), LoggerHook()]).train()
    for path in tmp_path.rglob("*"):
        assert not FORBIDDEN_ON_WINDOWS & set(path.name), path


@pytest.mark.parametrize(
    ("levels", "texts"), [((), {"info", "warning"}), ((1, 1), {"debug", "info", "warning"}), ((2, 3), {"warning"})]
)
def test_log_levels_count_from_debug(levels: tuple[int, ...], texts: set[str], tmp_path: Path) -> None:
    def write(trainer: Trainer) -> None:
        for text in ("debug", "info", "warning"):
            getattr(torch_frame.logger, text)("user's %s line", text)

    trainer = make_trainer(tmp_path / "run", hooks=[On(before_train=write)])
    trainer.train(*levels)
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert {text for text in ("debug", "info", "warning") if f"user's {text} line" in log} == texts


def test_training_leaves_the_logger_as_it_was(tmp_path: Path) -> None:
    logger = logging.getLogger("torch_frame")
    before = (logger.level, logger.propagate, list(logger.handlers))
    make_trainer(tmp_path / "a").train(1, 1)
    raised_by(make_trainer(tmp_path / "b", step_fn=fail).train, UserError)
    assert before == (logger.level, logger.propagate, list(logger.handlers))


def test_an_error_in_training_is_in_the_log(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", step_fn=fail)
    raised_by(trainer.train, UserError)
    assert "UserError" in Path(trainer.log_file).read_text(encoding="utf-8")
