"""Tests of a run's folder: its name, its making, and finding its checkpoints."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import make_trainer, raised_by
from tests.tracking.pseudo_terminal import script_environment
from torch_frame.distributed.strategy import SingleProcess
from torch_frame.errors import TorchFrameError, WorkDirError
from torch_frame.run.work_dir import WorkDir, claim_work_dir, find_checkpoint, get_workspace

MODES = {
    "time_s": r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d",
    "time_m": r"_\d{4}-\d\d-\d\d_\d\d-\d\d",
    "time_h": r"_\d{4}-\d\d-\d\d_\d\d",
    "time_d": r"_\d{4}-\d\d-\d\d",
    "count": "_0",
}


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_folder_that_does_not_exist_is_proposed_as_it_is(mode: str | None, tmp_path: Path) -> None:
    assert get_workspace("runs/a", mode) == "runs/a"
    assert get_workspace(tmp_path / "runs" / "a", mode) == str(tmp_path / "runs" / "a")
    assert not os.listdir(".")


@pytest.mark.parametrize("work_dir", ["runs/a", "runs/a/", "runs/a//"])
@pytest.mark.parametrize(("mode", "suffix"), MODES.items())
def test_a_folder_that_exists_gets_a_sibling(work_dir: str, mode: str, suffix: str) -> None:
    os.makedirs("runs/a")
    assert re.fullmatch(f"runs/a{suffix}", get_workspace(work_dir, mode))
    assert os.listdir("runs") == ["a"]


def test_none_uses_the_folder_again() -> None:
    os.makedirs("runs/a")
    assert get_workspace("runs/a/", None) == "runs/a"
    assert claim_work_dir("runs/a/", None) == "runs/a"


@pytest.mark.parametrize("mode", MODES)
def test_claimed_folders_are_always_distinct(mode: str) -> None:
    claimed = [claim_work_dir("runs/a", mode) for _ in range(5)]
    assert claimed[0] == "runs/a"
    assert len(set(claimed)) == 5
    assert all(os.path.isdir(path) for path in claimed)
    assert not any(character in "".join(claimed) for character in ": ")


def test_numbers_follow_the_time_and_the_count() -> None:
    assert [claim_work_dir("a", "count") for _ in range(4)] == ["a", "a_0", "a_1", "a_2"]
    first, second, third = [claim_work_dir("a", "time_d") for _ in range(3)]
    assert (second, third) == (f"{first}_1", f"{first}_2")


def test_processes_that_start_together_get_a_folder_each() -> None:
    code = "from torch_frame.run.work_dir import claim_work_dir\nprint(claim_work_dir('runs/a', 'time_s'))"
    commands = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(commands, stdout=subprocess.PIPE, text=True, env=script_environment()) for _ in range(4)
    ]
    claimed = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert len(claimed) == 4
    assert {os.path.basename(path) for path in claimed} == set(os.listdir("runs"))


@pytest.mark.parametrize("function", [get_workspace, claim_work_dir])
def test_an_unknown_mode_gets_the_list(function) -> None:
    with pytest.raises(ValueError, match=r"is 'time', but must be one of None, 'time_s', .*'time_d', 'count'"):
        function("a", "time")
    with pytest.raises(ValueError, match="empty"):
        function("", None)


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert claim_work_dir("~/a", "time_s") == os.path.join(str(tmp_path), "a")


def test_the_current_folder_gets_a_sibling_and_not_a_hidden_child(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    os.chdir(tmp_path / "here")
    assert claim_work_dir(".", "count") == str(tmp_path / "here_0")
    assert claim_work_dir("./", None) == str(tmp_path / "here")


def test_a_file_in_the_way_gets_a_sentence() -> None:
    Path("a").write_text("")
    with pytest.raises(WorkDirError, match=r"work_dir 'a' is a file.*choose another") as caught:
        claim_work_dir("a", None)
    assert isinstance(caught.value, OSError | TorchFrameError)
    with pytest.raises(WorkDirError, match=r"work_dir '.*run' can't be made"):
        claim_work_dir(os.path.join("a", "run"), "time_s")
    assert claim_work_dir("a", "count") == "a_0"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a place that nobody can write to")
def test_a_place_that_cannot_be_written_to_gets_a_sentence() -> None:
    with pytest.raises(WorkDirError, match=r"work_dir '/proc/run' can't be made: .*Choose a work_dir"):
        claim_work_dir("/proc/run", "time_s")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_gets_a_sentence() -> None:
    os.mkdir("a", mode=0o500)
    with pytest.raises(WorkDirError, match="may not write to"):
        claim_work_dir("a", None)


def _checkpoint(path: str, at_s: int) -> str:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    Path(path).write_text("")
    os.utime(path, (at_s, at_s))
    return path


def test_a_path_as_given_comes_first(caplog: pytest.LogCaptureFixture) -> None:
    _checkpoint("run/checkpoints/best.pth", 100)
    given = _checkpoint("best.pth", 200)
    assert find_checkpoint("best.pth", "run") == given
    assert find_checkpoint(Path("run/checkpoints/best.pth"), "other") == "run/checkpoints/best.pth"
    assert find_checkpoint(os.path.abspath(given), "run") == os.path.abspath(given)
    assert not caplog.records


def test_then_the_work_dir_then_the_newest_sibling(caplog: pytest.LogCaptureFixture) -> None:
    _checkpoint("run_0/checkpoints/latest.pth", 300)
    newest = _checkpoint("run_1/checkpoints/latest.pth", 400)
    _checkpoint("run_2/checkpoints/latest.pth", 200)
    _checkpoint("running/checkpoints/latest.pth", 900)
    os.makedirs("run_3/checkpoints")
    assert find_checkpoint("latest.pth", "run/") == newest
    assert not caplog.records
    inside = _checkpoint("run/checkpoints/latest.pth", 500)
    assert find_checkpoint("latest.pth", "run") == inside
    assert not caplog.records


def test_a_newer_file_in_a_sibling_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    inside = _checkpoint("run/checkpoints/latest.pth", 100)
    newer = _checkpoint("run_0/checkpoints/latest.pth", 200)
    assert find_checkpoint("latest.pth", "run") == inside
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert newer in record.getMessage()


def test_special_characters_of_the_name_are_meant_as_they_stand() -> None:
    found = _checkpoint("run[1]_0/checkpoints/latest.pth", 100)
    assert find_checkpoint("latest.pth", "run[1]") == found


def test_a_checkpoint_that_is_nowhere_gets_the_list_of_places() -> None:
    os.makedirs("run_0")
    with pytest.raises(FileNotFoundError) as caught:
        find_checkpoint("latest.pth", "run")
    places = ["latest.pth", "run/checkpoints/latest.pth", "run_0/checkpoints/latest.pth"]
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == places
    with pytest.raises(FileNotFoundError, match=r"/nowhere/latest\.pth"):
        find_checkpoint("/nowhere/latest.pth", "run")


def test_only_what_create_new_dir_makes_is_a_sibling(tmp_path: Path) -> None:
    own = [
        "_0",
        "_12",
        "_2026-01-31",
        "_2026-01-31_12",
        "_2026-01-31_12-00_1",
        "_2026-01-31_12-00-59",
        "_2023-01-31 12_00_00",
    ]
    for suffix in [*own, "_3d", "_18-layers", "_0.1", "_2026", "_2026-01-31-b", "s_1", "_large"]:
        (tmp_path / f"exp{suffix}").mkdir()
    found = {os.path.basename(folder) for folder in WorkDir(tmp_path / "exp", None, SingleProcess()).candidates()}
    assert found == {"exp", "exp_2026", *(f"exp{suffix}" for suffix in own)}


@pytest.mark.skipif(os.name == "nt", reason="symbolic links")
def test_links_to_nothing_and_files_in_the_way_are_told_with_their_names(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    error = raised_by(make_trainer(tmp_path / "run", create_new_dir=None).train, WorkDirError)
    assert f"is a link to {str(tmp_path / 'gone')!r}, which is not there" in str(error)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").touch()
    error = raised_by(make_trainer(tmp_path / "other", create_new_dir=None).train, WorkDirError)
    assert f"{str(tmp_path / 'other' / 'checkpoints')!r} is a file, not a folder" in str(error)
    (tmp_path / "other" / "checkpoints").unlink()
    (tmp_path / "other" / "checkpoints").symlink_to(tmp_path / "gone")  # on a disk that is not mounted, say
    error = raised_by(make_trainer(tmp_path / "other", create_new_dir=None).train, WorkDirError)
    assert f"checkpoints' is a link to {str(tmp_path / 'gone')!r}, which is not there" in str(error)
