"""The lock of a run's folder: one living process trains in it."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import sys
import time
from typing import Self

from torch_frame.errors import WorkDirError

_logger = logging.getLogger("torch_frame")
NAME = ".torch_frame.lock"
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
"""What the system says of a lock that another process has; anything else is a file system that cannot lock."""
_BYTE = 1 << 30  # Windows locks bytes; one far behind those that others are to read

_held: dict[str, int] = {}
"""Folders that a trainer of this process holds -> pid: the system's lock is the process's, and tells its trainers nothing."""


class FolderLock:
    """Held while a run trains in a folder; the system lets it go with the process, however that ends.

    It is `lockf`'s, which forked workers do not inherit: after a SIGKILL a busy worker would keep a `flock` for seconds. The
    price: it is lost when this process closes any other handle of the file, after a copy of the whole folder, say. So `renew` is
    called at each save.

    Raises:
        WorkDirError: another run holds it; who that is.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._key = os.path.realpath(folder)
        self._path = os.path.join(folder, NAME)
        if _held.get(self._key) == os.getpid():
            raise WorkDirError(_in_use(folder, "another trainer of this process"))
        self._handle = self._open()
        _held[self._key] = os.getpid()
        self._sign()

    @classmethod
    def if_free(cls, folder: str) -> Self | None:
        """The lock, or None if another run holds it.

        Raises:
            WorkDirError: if the folder cannot be written.
        """
        try:
            return cls(folder)
        except WorkDirError as error:
            if error.__cause__ is not None:  # of the system: no process holds it
                raise
            return None

    def release(self) -> None:
        """Let it go, and remove its file."""
        if _held.get(self._key) == os.getpid():
            del _held[self._key]
        # Removed before it is free: a process that holds it knows whether the file is still the one of this name.
        with contextlib.suppress(OSError):
            os.remove(self._path)
        with contextlib.suppress(OSError):
            os.close(self._handle)

    def renew(self) -> None:
        """Take it again, if it has been lost, or if its file has been removed."""
        if not _lock(self._handle, self.folder) or not (self._is_there(self._handle) or self._taken_anew()):
            _logger.warning("Another process has taken the lock of %s: two runs write there.", self.folder)

    def _taken_anew(self) -> bool:
        try:
            os.makedirs(self.folder, exist_ok=True)
            handle = self._open()
        except OSError:
            return False
        os.close(self._handle)
        self._handle = handle
        self._sign()
        return True

    def _open(self) -> int:
        while True:
            try:
                handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
                _share(handle, self.folder)
            except OSError as error:
                raise WorkDirError(f"work_dir {self.folder!r} cannot be written: {error.strerror}.") from error
            if not _lock(handle, self.folder):
                os.close(handle)
                raise WorkDirError(_in_use(self.folder, _holder(self._path)))
            if self._is_there(handle):
                return handle
            os.close(handle)  # removed by the one that held it, just now

    def _is_there(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _sign(self) -> None:
        since = datetime.datetime.now().isoformat(" ", "seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        with contextlib.suppress(OSError):  # a full disk
            os.ftruncate(self._handle, 0)
            os.lseek(self._handle, 0, os.SEEK_SET)
            os.write(self._handle, json.dumps(holder).encode())


def _share(handle: int, folder: str) -> None:
    """Who may write to the folder may lock it: after a kill another member of its group finds this file, whatever the umask."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # the file of another member
            os.fchmod(handle, os.stat(folder).st_mode & 0o666)


def _holder(path: str) -> str:
    """Who holds a lock, by its file; it may be signing it just now."""
    for _ in range(20):
        try:
            with open(path, "rb") as file:
                holder = json.loads(file.read())
            return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.05)
    return "another process"


def _in_use(folder: str, holder: str) -> str:
    return (
        f"work_dir {folder!r} is in use: {holder} trains in it. Wait for its end, or choose another work_dir "
        "(create_new_dir='time_s' makes one)."
    )


def _lock(handle: int, folder: str) -> bool:
    """Lock an open file; False if another process has it. A file system without locks is told, and taken for free."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, _BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        _logger.warning(
            "The file system of %s has no locks, so nothing keeps another run out of it: %s.", folder, error
        )
    return True
