"""A checkpoint file is the old one or the whole new one, whatever happens; reading one runs no code."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_runs import Net, differences, run_python
from torch_frame import CheckpointError
from torch_frame.checkpoint import io


def state(number: int = 0) -> dict[str, Any]:
    return {"number": number, "weights": torch.arange(1000.0) + number, "nested": [{"a": (1, "x")}]}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    io.write(tmp_path / "a.pth", state())
    assert differences(state(), io.read(tmp_path / "a.pth")) == []
    assert differences(state(), torch.load(tmp_path / "a.pth", weights_only=True)) == []
    assert os.listdir(tmp_path) == ["a.pth"]


def test_the_file_before_is_kept_under_another_name(tmp_path: Path) -> None:
    path, older = tmp_path / "latest.pth", tmp_path / "previous.pth"
    for number in range(4):
        io.write(path, state(number), keep_as=older)
        assert io.read(path)["number"] == number
        assert older.exists() is (number > 0)
        if number:
            assert io.read(older)["number"] == number - 1
    assert sorted(os.listdir(tmp_path)) == ["latest.pth", "previous.pth"]


def test_names_may_be_strings_of_any_alphabet(tmp_path: Path) -> None:
    path = os.path.join(tmp_path, "保存 路径.pth")
    io.write(path, state(1), keep_as=path + ".old")
    io.write(path, state(2), keep_as=path + ".old")
    assert (io.read(path)["number"], io.read(path + ".old")["number"]) == (2, 1)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full: the kernel refuses to let a file grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_full_disk_leaves_the_old_file_and_no_other(size: int, tmp_path: Path) -> None:
    path, older = tmp_path / "latest.pth", tmp_path / "previous.pth"
    for number in range(2):
        io.write(path, state(number), keep_as=older)
    large = {"weights": torch.randn(100_000)}
    with files_of_at_most(size), pytest.raises(CheckpointError, match=r"latest\.pth could not be written: .*large"):
        io.write(path, large, keep_as=older)
    assert sorted(os.listdir(tmp_path)) == ["latest.pth", "previous.pth"]
    assert (io.read(path)["number"], io.read(older)["number"]) == (1, 0)


def test_a_value_that_cannot_be_pickled_leaves_the_old_file(tmp_path: Path) -> None:
    io.write(tmp_path / "a.pth", state(1))
    with pytest.raises((CheckpointError, pickle.PicklingError, AttributeError, TypeError)):
        io.write(tmp_path / "a.pth", {"function": lambda: None})
    assert os.listdir(tmp_path) == ["a.pth"]
    assert io.read(tmp_path / "a.pth")["number"] == 1


def test_a_folder_that_is_not_there_is_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        io.write(tmp_path / "nowhere" / "a.pth", state())


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        io.read(tmp_path / "a.pth")


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.5, 0.9, 0.99])
def test_a_file_cut_short_is_refused_as_damaged(part: float, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    io.write(path, state())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        io.read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"not a checkpoint",
        b"\x80\x02",
        b"PK\x03\x04" + bytes(100),
        bytes(1000),
        b"hi\n",  # torch: KeyError
        b"X\x01\x00\x00\x00\xff.",  # UnicodeDecodeError
        b".",  # IndexError
        b"J.",  # struct.error
    ],
    ids=repr,
)
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        io.read(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.filterwarnings("error")
def test_a_bare_pickle_is_refused_with_a_cause_and_no_warning(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps({"a": [1, 2]}, protocol))
    with pytest.raises(CheckpointError, match=r"a\.pth is damaged, or no checkpoint: \S.+\.$"):
        io.read(path)


def all_kinds_of_tensors() -> dict[str, Any]:
    base = torch.arange(100_000.0)
    return {
        "parts of one": [base[:10], base[50:], base.view(100, 1000).T],
        "parameter": torch.nn.Parameter(torch.ones(300)),
        "types": [torch.arange(5000).to(dtype) for dtype in (torch.bfloat16, torch.int8, torch.bool, torch.complex64)],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "sparse": torch.eye(50).to_sparse(),
        "view": torch.arange(9.0).expand(4, 9),
    }


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11 says so of each; 2.13 says nothing
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")  # torch 2.14
def test_tensors_of_all_kinds_are_written_and_read(tmp_path: Path) -> None:
    io.write(tmp_path / "a.pth", all_kinds_of_tensors())
    came, expected = io.read(tmp_path / "a.pth"), all_kinds_of_tensors()
    assert torch.equal(came.pop("sparse").to_dense(), expected.pop("sparse").to_dense())
    assert differences(expected, came) == []


@pytest.mark.parametrize("place", [0, 100, 0.3, 0.6, 0.9, -1, "cut", "longer"])
def test_a_disk_that_stores_something_else_is_noticed_before_the_file_has_its_name(
    place: int | float | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io.write(tmp_path / "a.pth", state(1))
    sync = os.fsync

    def damage(handle: int) -> None:
        sync(handle)
        monkeypatch.undo()
        path = tmp_path / ".a.pth.tmp"
        content = bytearray(path.read_bytes())
        if place == "cut":
            del content[-1:]
        elif place == "longer":
            content += b"x"
        else:
            content[int(place * len(content)) if isinstance(place, float) else int(place)] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(os, "fsync", damage)
    with pytest.raises(CheckpointError, match=r"read back, it is not what was written.*untouched"):
        io.write(tmp_path / "a.pth", all_kinds_of_tensors())
    assert io.read(tmp_path / "a.pth")["number"] == 1
    assert os.listdir(tmp_path) == ["a.pth"]


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_reading_runs_no_code(tmp_path: Path) -> None:
    torch.save({"model": Net().state_dict(), "more": Harmful(tmp_path / "harm")}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="never runs code"):
        io.read(tmp_path / "a.pth")
    assert not (tmp_path / "harm").exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(Net(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="weights"):
        io.read(tmp_path / "a.pth")


KILLED = """
import os, random, signal, time
import torch
from torch_frame.checkpoint import io

torch.set_num_threads(1)
WEIGHTS = torch.arange(300_000.0)
delays = random.Random(0)
newest = 0
for attempt in range(25):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        for number in range(newest + 1, newest + 10_000):
            io.write("latest.pth", {"number": number, "weights": WEIGHTS + number}, keep_as="previous.pth")
            os.write(writer, b"%d\\n" % number)
        os._exit(0)
    os.close(writer)
    written = os.read(reader, 16) if attempt % 2 else b""
    time.sleep(delays.random() * 0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as rest:
        written += rest.read()
    confirmed = [int(line) for line in written.split()] or [newest]
    states = [io.read(name) for name in ("latest.pth", "previous.pth") if os.path.exists(name)]
    for state in states:
        assert torch.equal(state["weights"], WEIGHTS + state["number"])
    if confirmed[-1]:
        assert states[0]["number"] >= confirmed[-1], (states[0]["number"], confirmed)
        newest = states[0]["number"]
print("newest", newest)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch")
def test_a_kill_at_any_moment_leaves_whole_files_and_loses_no_finished_one(tmp_path: Path) -> None:
    result = run_python(KILLED, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[1]) > 10
