"""The digest tells every flipped bit and every cut, and torch reads a sealed file as any other."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_runs import differences
from torch_frame.checkpoint import io
from torch_frame.checkpoint.seal import MARK, SealingFile, verify
from torch_frame.errors import CheckpointError

CONTENT: dict[str, Any] = {
    "a": torch.arange(6.0),
    "b": [1, "x", None],
    "c": {"d": torch.ones(2, 2, dtype=torch.bfloat16)},
}


def sealed(path: Path, content: Any = None) -> Path:
    io.write(path, CONTENT if content is None else content)
    return path


@pytest.mark.parametrize("mmap", [False, True])
def test_plain_torch_load_reads_a_sealed_file(mmap: bool, tmp_path: Path) -> None:
    loaded = torch.load(sealed(tmp_path / "a.pth"), weights_only=True, mmap=mmap)
    assert differences(loaded, CONTENT) == []


def test_the_digest_is_the_sha256_of_everything_before_it(tmp_path: Path) -> None:
    content = sealed(tmp_path / "a.pth").read_bytes()
    assert content[-64:].decode() == hashlib.sha256(content[:-64]).hexdigest()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.comment == content[-64 - len(MARK) :]
        assert archive.testzip() is None
    assert verify(tmp_path / "a.pth") == ("valid", f"sha256 {content[-64:].decode()}")


def test_every_flipped_bit_of_the_end_and_some_of_the_rest_are_refused(tmp_path: Path) -> None:
    """tests/faults flips them all."""
    path = sealed(tmp_path / "a.pth")
    content = path.read_bytes()
    places = [*range(0, len(content) - 200, 37), *range(len(content) - 200, len(content))]
    for place in places:
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            assert verify(path)[0] == "damaged", (place, bit)


def test_every_cut_and_anything_behind_is_refused(tmp_path: Path) -> None:
    path = sealed(tmp_path / "a.pth")
    content = path.read_bytes()
    for length in [0, 1, 2, 21, *range(3, len(content), 29), *range(len(content) - 120, len(content))]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            io.read(path)
    path.write_bytes(content + b"\0")
    assert verify(path)[0] == "damaged"


def test_a_state_whose_digest_has_been_cut_off_cleanly_is_refused(tmp_path: Path) -> None:
    path = sealed(tmp_path / "a.pth", {"format": "torch_frame.state", "sealed": True, "x": torch.ones(3)})
    content = path.read_bytes()
    unsealed = content[: -64 - len(MARK)]
    path.write_bytes(unsealed[:-2] + b"\0\0")
    assert verify(path)[0] == "none"
    with pytest.raises(CheckpointError, match="digest has been cut off"):
        io.read(path)


def test_files_of_others_have_no_digest_and_are_read(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "zip.pth")
    torch.save(CONTENT, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("zip.pth", "legacy.pth"):
        assert verify(tmp_path / name)[0] == "none"
        assert differences(io.read(tmp_path / name), CONTENT) == []


@pytest.mark.parametrize("sizes", [[1] * 200, [50, 3, 3, 90], [200], [21, 22, 23], [1000, 1, 22, 10]])
def test_whatever_the_pieces_what_is_written_is_what_came(sizes: list[int], tmp_path: Path) -> None:
    pieces = [os.urandom(size) for size in sizes]
    end = b"PK\x05\x06" + bytes(18)
    with open(tmp_path / "a", "wb") as file:
        sealing = SealingFile(file)
        for piece in [*pieces, end[:5], end[5:]]:
            assert sealing.write(piece) == len(piece)
        sealing.seal()
    written = (tmp_path / "a").read_bytes()
    whole = b"".join(pieces) + end
    assert written[: len(whole) - 2] == whole[:-2]
    assert verify(tmp_path / "a")[0] == "valid"


def test_writing_can_be_given_up(tmp_path: Path) -> None:
    sealed(tmp_path / "a.pth", {"old": 1})
    with pytest.raises(CheckpointError, match=r"interrupted.*untouched"):
        io.write(tmp_path / "a.pth", CONTENT, cancelled=lambda: True)
    assert io.read(tmp_path / "a.pth") == {"old": 1}
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_damaged_latest_does_not_take_the_place_of_a_whole_previous(tmp_path: Path) -> None:
    latest, previous = tmp_path / "latest.pth", tmp_path / "previous.pth"
    for number in (1, 2):
        io.write(latest, {"number": number}, keep_as=previous)
    assert io.read(previous) == {"number": 1}
    content = bytearray(latest.read_bytes())
    content[60] ^= 4
    latest.write_bytes(content)
    io.write(latest, {"number": 3}, keep_as=previous)
    assert io.read(latest) == {"number": 3}
    assert io.read(previous) == {"number": 1}, "the damaged one is gone, the whole one stays"
