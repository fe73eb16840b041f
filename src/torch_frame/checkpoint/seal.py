"""The digest in a checkpoint file: whether every bit of it is as it was written.

A file of `torch.save` is a zip archive, and a zip archive may end with a comment. Ours is `torch_frame:sha256:` and 64
hexadecimal digits: the sha256 of everything before the digits. `torch.load` reads such a file as any other, mapped into
memory too. No format that PyTorch has tells a flipped bit: of 400 single flips in a file, `torch.load` loads 377 as if
nothing were wrong.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO, Literal

import numpy as np

MARK = b"torch_frame:sha256:"
_COMMENT_LEN = len(MARK) + 64
_END_RECORD = b"PK\x05\x06"
"""A zip archive's last record: 22 bytes, the last two of them the length of the comment that follows."""
_END_LEN = 22

Verdict = Literal["valid", "none", "damaged"]
"""valid: the digest is there and right. none: a file without one, by another program. damaged: anything else."""


class SealingFile:
    """What `torch.save` writes to: passes everything on, and puts the digest behind it.

    Args:
        file: open for writing in binary mode.
        cancelled: asked at each write; where it says True, writing ends with `InterruptedError`.
        lasting: address -> bytes of memory that stays as it is until the file has been compared with `written`. What is
            written from there is not copied.

    Attributes:
        written: all that has been written, in pieces.
    """

    def __init__(
        self,
        file: BinaryIO,
        cancelled: Callable[[], bool] | None = None,
        lasting: Mapping[int, int] | None = None,
    ) -> None:
        self._file = file
        self._cancelled = cancelled
        self._lasting = lasting or {}
        self.written: list[bytes | memoryview] = []
        self._digest = hashlib.sha256()
        self._held = b""  # what may be the last record, whose comment's length is still to be set

    def write(self, data: bytes | memoryview) -> int:
        if self._cancelled is not None and self._cancelled():
            raise InterruptedError("saving was interrupted")
        size = len(data)
        if size < _END_LEN:
            self._held += data
            data = b""
        else:
            self._pass_on(self._held)
            data, self._held = data[:-_END_LEN], bytes(data[-_END_LEN:])
        self._pass_on(data)
        if len(self._held) > 4 * _END_LEN:
            self._pass_on(self._held[:-_END_LEN])
            self._held = self._held[-_END_LEN:]
        return size

    def _pass_on(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)
        self.written.append(data if self._lasts(data) else bytes(data))

    def _lasts(self, data: bytes | memoryview) -> bool:
        if isinstance(data, bytes):
            return True
        if len(data) == 0:
            return False
        return len(data) <= self._lasting.get(np.frombuffer(data, np.uint8).ctypes.data, 0)

    def flush(self) -> None:
        """Nothing: the file is flushed where it is sealed."""

    def seal(self) -> str:
        """Write the end of the archive and the digest; returns the digest."""
        self._pass_on(self._held[:-_END_LEN])
        end = self._held[-_END_LEN:]
        if end[:4] != _END_RECORD or end[-2:] != b"\0\0":
            raise RuntimeError("torch.save has written an archive that does not end as one, so it cannot be sealed")
        self._pass_on(end[:-2] + _COMMENT_LEN.to_bytes(2, "little") + MARK)
        digest = self._digest.hexdigest()
        self._file.write(digest.encode())
        self._file.flush()
        self.written.append(digest.encode())
        return digest


def holds(path: str | os.PathLike[str], written: Iterable[bytes | memoryview], block: int = 1 << 18) -> bool:
    """Whether a file is these pieces, byte for byte; a fifth of the CPU time of a digest."""
    buffer = memoryview(bytearray(block))
    with open(path, "rb", buffering=0) as file:
        for piece in written:
            for start in range(0, len(piece), block):
                expected = piece[start : start + block]
                found = buffer[: len(expected)]
                if not _filled(file, found) or not _same_bytes(found, expected):
                    return False
        return not file.read(1)


def _same_bytes(a: bytes | memoryview, b: bytes | memoryview) -> bool:
    """Of two pieces of one length; eight bytes at a time take half as long."""
    kind = np.int64 if len(a) % 8 == 0 else np.uint8
    return np.array_equal(np.frombuffer(a, kind), np.frombuffer(b, kind))


def _filled(file: io.RawIOBase, buffer: memoryview) -> bool:
    """Read until `buffer` is full; False where the file ends before."""
    got = 0
    while got < len(buffer):
        more = file.readinto(buffer[got:])
        if not more:
            return False
        got += more
    return True


def verify(path: str | os.PathLike[str]) -> tuple[Verdict, str]:
    """Whether a file is as it was written, and in words what was found; reads all of it (0.2 s for 300 MB).

    Raises:
        OSError: where it cannot be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        ends = _tail(file, size, _END_LEN + _COMMENT_LEN)
        if ends[:4] != _END_RECORD and ends[_END_LEN : _END_LEN + len(MARK)] != MARK:
            return _without_digest(file, size)
        comment_len = int.from_bytes(ends[_END_LEN - 2 : _END_LEN], "little")
        if ends[:4] != _END_RECORD or not ends[_END_LEN:].startswith(MARK) or comment_len != _COMMENT_LEN:
            return "damaged", "the record that holds its digest is damaged"
        found = _digest_of(file, size - 64)
    if found.encode() != ends[-64:]:
        return "damaged", "its content is not what its digest was made of"
    return "valid", f"sha256 {found}"


def _without_digest(file: BinaryIO, size: int) -> tuple[Verdict, str]:
    file.seek(0)
    is_archive = file.read(2) == b"PK"
    end = _tail(file, size, _END_LEN)
    if size == 0:
        return "damaged", "it is empty"
    if is_archive and (end[:4] != _END_RECORD or end[-2:] != b"\0\0"):
        return "damaged", "its end is missing"
    return "none", "it has no digest: another program wrote it"


def _tail(file: BinaryIO, size: int, length: int) -> bytes:
    file.seek(max(size - length, 0))
    return file.read(length)


def _digest_of(file: BinaryIO, length: int, block: int = 1 << 20) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    buffer = memoryview(bytearray(block))
    while length > 0:
        got = file.readinto(buffer[: min(block, length)])  # type: ignore[attr-defined]  # a buffered file has it
        if not got:
            break
        digest.update(buffer[:got])
        length -= got
    return digest.hexdigest()
