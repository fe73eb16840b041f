"""One living process trains in a folder; a run that begins anew there puts another one's files aside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_hooks import On
from tests.small_runs import environment, make_batches, make_trainer, raised_by
from torch_frame import CheckpointerHook, HookBase, LoggerHook, Trainer
from torch_frame.errors import WorkDirError
from torch_frame.run.lock import NAME, FolderLock

HOLD = """
import sys, time
from torch_frame.run.lock import FolderLock

lock = FolderLock(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


class Other:
    """Another process, which holds a folder."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", HOLD, str(folder)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment(), text=True, **pipes)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- the lock


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_folder_in_which_another_process_trains_is_refused_with_its_name(resume: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with Other(tmp_path / "run") as other:
        trainer = make_trainer(tmp_path / "run", create_new_dir=None, resume=resume)
        error = raised_by(trainer.train, WorkDirError)
        assert f"process {other.process.pid} on " in str(error)
        assert "since 20" in str(error)
        assert files_in(tmp_path / "run") == {NAME}
    trainer.train()
    assert trainer.progress.epoch == 2
    assert files_in(tmp_path / "run") == {"log.txt"}


def test_a_holder_that_signs_its_lock_just_now_is_named(tmp_path: Path) -> None:
    with Other(tmp_path) as other:
        signed = (tmp_path / NAME).read_bytes()
        (tmp_path / NAME).write_bytes(b"")
        threading.Timer(0.3, (tmp_path / NAME).write_bytes, (signed,)).start()
        with pytest.raises(WorkDirError, match=f"process {other.process.pid} on "):
            FolderLock(str(tmp_path))


def test_a_trainer_of_this_process_is_refused_too(tmp_path: Path) -> None:
    errors: list[Any] = []

    def start_another(trainer: Trainer) -> None:
        errors.append(raised_by(make_trainer(tmp_path, create_new_dir=None).train, WorkDirError))

    make_trainer(tmp_path, create_new_dir=None, hooks=[On(before_train=start_another)]).train()
    assert "another trainer of this process" in str(errors[0])


def test_the_folder_is_free_after_an_error_and_after_one_before_the_run(tmp_path: Path) -> None:
    def fail(*arguments: Any) -> Any:
        raise KeyError

    class Refuses(HookBase):
        def check(self) -> None:
            raise KeyError

    raised_by(make_trainer(tmp_path, create_new_dir=None, step_fn=fail).train, KeyError)
    raised_by(make_trainer(tmp_path, create_new_dir=None, hooks=[Refuses()]).train, KeyError)
    make_trainer(tmp_path, create_new_dir=None, resume="auto").train()
    assert not (tmp_path / NAME).exists()


def test_a_new_folder_is_made_beside_one_that_another_process_holds(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", create_new_dir="count")
    (tmp_path / "run").mkdir()  # the other one has made it meanwhile
    with Other(tmp_path / "run"):
        trainer.train()
    assert trainer.work_dir == str(tmp_path / "run_0")


@pytest.mark.parametrize("mode", [None, "count", "time_s"])
def test_a_folder_that_cannot_be_written_is_an_error_and_not_a_reason_for_another_one(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def full(path: Any, *arguments: Any, **settings: Any) -> int:
        if os.fspath(path).endswith(NAME):
            raise OSError(28, "No space left on device")
        return opened(path, *arguments, **settings)

    monkeypatch.setattr(os, "open", full)
    error = raised_by(make_trainer(tmp_path / "run", create_new_dir=mode).train, WorkDirError)
    assert "cannot be written: No space left on device" in str(error)
    assert os.listdir(tmp_path) == ["run"]


def test_a_lock_that_a_copy_of_the_folder_has_lost_is_taken_again_at_a_save(tmp_path: Path) -> None:
    """POSIX lets a lock go when any handle of the file is closed in the process."""
    refused: list[bool] = []

    def copy_all(trainer: Trainer) -> None:
        shutil.copytree(trainer.work_dir, tmp_path / f"copy_{trainer.epoch}")
        trainer.save_checkpoint("mine.pth")
        code = f"from torch_frame.run.lock import FolderLock\nFolderLock({trainer.work_dir!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
        )
        refused.append("is in use" in done.stderr)

    make_trainer(tmp_path / "run", max_epochs=1, hooks=[On(after_epoch=copy_all)]).train()
    assert refused == [True]


@pytest.mark.skipif(sys.platform == "win32", reason="fcntl")
@pytest.mark.parametrize("name", ["ENOLCK", "EIO", "EPERM", "ENOTTY"])
def test_a_file_system_without_locks_is_told_and_the_run_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno
    import fcntl

    def refuse(*arguments: Any) -> None:
        raise OSError(getattr(errno, name), "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    make_trainer(tmp_path / "run").train()
    assert len([line for line in caplog.messages if "has no locks" in line]) == 1


def test_a_lock_can_be_taken_again_and_again(tmp_path: Path) -> None:
    for _ in range(3):
        lock = FolderLock(str(tmp_path))
        assert FolderLock.if_free(str(tmp_path)) is None
        lock.release()
    assert not os.listdir(tmp_path)


def test_a_lock_whose_file_was_removed_is_taken_again_at_a_save(tmp_path: Path) -> None:
    refused: list[bool] = []

    def tidy_up(trainer: Trainer) -> None:
        shutil.rmtree(trainer.work_dir)
        trainer.save_checkpoint("mine.pth")
        code = f"from torch_frame.run.lock import FolderLock\nFolderLock({trainer.work_dir!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
        )
        refused.append(f"is in use: process {os.getpid()} on " in done.stderr)

    make_trainer(tmp_path / "run", max_epochs=1, hooks=[On(after_epoch=tidy_up)]).train()
    assert refused == [True]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
@pytest.mark.parametrize(("folder", "lock"), [(0o2775, 0o664), (0o755, 0o644), (0o700, 0o600)])
def test_who_may_write_to_the_folder_may_lock_it(folder: int, lock: int, tmp_path: Path) -> None:
    """What a killed run leaves does not keep another member of its group out, whatever its umask was."""
    tmp_path.chmod(folder)
    before = os.umask(0o022)
    try:
        held = FolderLock(str(tmp_path))
    finally:
        os.umask(before)
    assert (tmp_path / NAME).stat().st_mode & 0o777 == lock
    held.release()


# ---------------------------------------------------------------- the folder


def test_paths_are_absolute_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    move = On(before_train=lambda trainer: os.chdir(tmp_path / "elsewhere"))
    hooks = [move, CheckpointerHook(max_to_keep=1), LoggerHook(tb_log_dir="more_logs")]
    trainer = make_trainer(Path("run"), hooks=hooks)
    assert trainer.work_dir == str(tmp_path / "run")
    trainer.train()
    assert not os.listdir(tmp_path / "elsewhere")
    os.chdir(tmp_path)
    again = make_trainer(Path("other"), max_epochs=3, resume="run/checkpoints/latest.pth")
    os.chdir(tmp_path / "elsewhere")
    again.train()
    assert again.work_dir == str(tmp_path / "run")
    assert not os.listdir(tmp_path / "elsewhere")


def test_the_checkpoints_folder_is_there_from_before_train_on(tmp_path: Path) -> None:
    found: list[bool] = []
    look = On(before_train=lambda trainer: found.append(os.path.isdir(trainer.ckpt_dir)))
    make_trainer(tmp_path, hooks=[look]).train()
    assert found == [True]


@pytest.mark.parametrize("mode", ["time_s", "count"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_the_script_makes_is_used(mode: Any, exists: bool, tmp_path: Path) -> None:
    if exists:
        (tmp_path / "run").mkdir()
    trainer = make_trainer(tmp_path / "run", create_new_dir=mode, hooks=[CheckpointerHook()])
    proposed = Path(trainer.work_dir)
    (proposed / "checkpoints").mkdir(parents=True)
    (proposed / "config.yaml").touch()
    (proposed / "checkpoints" / "tokenizer.json").touch()
    trainer.train()
    assert trainer.work_dir == str(proposed)
    assert {"config.yaml", "log.txt", "checkpoints/latest.pth", "checkpoints/tokenizer.json"} <= files_in(proposed)


def test_a_folder_that_another_run_has_used_meanwhile_is_not(tmp_path: Path) -> None:
    first, second = (make_trainer(tmp_path / "run", create_new_dir="count") for _ in range(2))
    first.train()
    second.train()
    assert (first.work_dir, second.work_dir) == (str(tmp_path / "run"), str(tmp_path / "run_0"))


# ---------------------------------------------------------------- what another run has left


def run_in(folder: Path, epochs: int = 1, **settings: Any) -> Trainer:
    settings = {"create_new_dir": None, "hooks": [CheckpointerHook(), LoggerHook(period=5)], **settings}
    trainer = make_trainer(folder, max_epochs=epochs, data=make_batches(5), **settings)
    trainer.train()
    return trainer


def iters(path: Path) -> list[int]:
    return [json.loads(line)["iter"] for line in path.read_text().splitlines()]


def test_files_of_another_run_are_put_aside_and_this_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for epochs in (3, 2, 1):
        caplog.clear()
        run_in(tmp_path, epochs)
    told = [line for line in caplog.messages if "put aside" in line]
    assert len(told) == 1
    assert "metrics.2.jsonl, tb_logs.2, checkpoints.2" in told[0]
    names = ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")
    assert [iters(tmp_path / name) for name in names] == [[4, 9, 14], [4, 9], [4]]
    states = [torch.load(tmp_path / f"checkpoints{n}" / "latest.pth") for n in (".1", ".2", "")]
    assert [state["progress"]["epoch"] for state in states] == [3, 2, 1]
    assert all(len(list((tmp_path / f"tb_logs{n}").iterdir())) == 1 for n in (".1", ".2", ""))


@pytest.mark.parametrize("how", ["auto", "load", "again"])
def test_a_run_that_continues_puts_nothing_aside(how: str, tmp_path: Path) -> None:
    first = run_in(tmp_path)
    if how == "again":
        first.max_epochs = 2
        first.train()
    elif how == "auto":
        run_in(tmp_path, 2, resume="auto")
    else:
        trainer = make_trainer(tmp_path, max_epochs=2, create_new_dir=None, data=make_batches(5), hooks=[LoggerHook(5)])
        trainer.load_checkpoint("latest.pth")
        trainer.train()
    assert iters(tmp_path / "metrics.jsonl") == [4, 9]
    assert not [name for name in os.listdir(tmp_path) if ".1" in name]


def test_what_the_script_has_written_after_the_trainer_was_made_stays(tmp_path: Path) -> None:
    run_in(tmp_path)
    trainer = make_trainer(tmp_path, create_new_dir=None)
    trainer.save_checkpoint("init.pth")
    (tmp_path / "tb_logs" / "scripts_own").touch()
    trainer.train()
    assert os.listdir(tmp_path / "checkpoints") == ["init.pth"]
    assert os.listdir(tmp_path / "tb_logs") == ["scripts_own"]
    assert {"best.pth", "latest.pth"} <= set(os.listdir(tmp_path / "checkpoints.1"))


def test_a_run_that_came_and_went_since_the_trainer_was_made_is_another_one_too(tmp_path: Path) -> None:
    late = make_trainer(tmp_path, create_new_dir=None, data=make_batches(5), max_epochs=1, hooks=[LoggerHook(5)])
    run_in(tmp_path, 3)
    late.train()
    assert iters(tmp_path / "metrics.jsonl") == [4]
    assert iters(tmp_path / "metrics.1.jsonl") == [4, 9, 14]


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
def test_links_to_another_disk_stay_links(tmp_path: Path) -> None:
    work, disk = tmp_path / "work", tmp_path / "disk"
    work.mkdir()
    (disk / "checkpoints").mkdir(parents=True)
    (work / "checkpoints").symlink_to(disk / "checkpoints")
    for _ in range(2):
        run_in(work)
    assert (work / "checkpoints").is_symlink()
    assert (disk / "checkpoints" / "latest.pth").exists()
    assert (disk / "checkpoints.1" / "latest.pth").exists()
