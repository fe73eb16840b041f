"""How a checkpoint file is written and read: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from torch_frame.checkpoint.format import is_full_state
from torch_frame.checkpoint.seal import SealingFile, holds, verify
from torch_frame.errors import CheckpointError

_OUR_OWN: dict[Path, tuple[int, int, int]] = {}
"""Files that this process has verified, as they were then (see `_identity`): they need not be read again to be kept."""


def write(
    path: str | os.PathLike[str],
    checkpoint: Any,
    *,
    keep_as: str | os.PathLike[str] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> None:
    """Write `checkpoint` so that at every moment `path` is the old file or the whole new one.

    A temporary file beside it is written, sealed with a digest, synced to the disk, read back, and renamed.

    Args:
        path: the file to write.
        checkpoint: plain types and tensors.
        keep_as: the file that `path` has been until now is kept under this name, unless it is damaged.
        cancelled: asked now and then; where it says True the file is given up.

    Raises:
        CheckpointError: where the disk is full, the folder cannot be written, ...; the old file is as it was.
    """
    path = Path(path)
    temporary = temporary_of(path)  # one name: what a killed process leaves is used again
    existed = path.exists()
    try:
        written = _write_sealed(temporary, checkpoint, cancelled)
        _check_written(temporary, written)
        if keep_as is not None and path.exists():
            _keep(path, Path(keep_as))
        os.replace(temporary, path)
        _sync_folder(path.parent)
        if keep_as is not None:
            _OUR_OWN[path.absolute()] = _identity(path)
    except (OSError, RuntimeError, pickle.PickleError) as error:
        raise CheckpointError(
            f"{path} could not be written: {_cause_of(error)}."
            + (" The file that was there before is untouched." if existed else "")
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_of(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


def _write_sealed(path: Path, checkpoint: Any, cancelled: Callable[[], bool] | None) -> list[bytes | memoryview]:
    with open(path, "wb") as file:
        sealing = SealingFile(file, cancelled, _memory_of(checkpoint))
        torch.save(checkpoint, sealing)  # type: ignore[arg-type]  # write and flush are all it calls
        sealing.seal()
        os.fsync(file.fileno())
    return sealing.written


def _memory_of(value: Any) -> dict[int, int]:
    """address -> bytes of the CPU memory that the tensors in a nesting of containers hold, for as long as it is held."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.device.type != "cpu" or type(value) not in _PLAIN_TENSORS:
            return {}
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    found: dict[int, int] = {}
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return found
    for item in value:
        found |= _memory_of(item)
    return found


_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def _check_written(path: Path, written: list[bytes | memoryview]) -> None:
    """Read the file back: its bytes are those that were written, and torch finds its way in them."""
    if not holds(path, written):
        raise OSError("read back, it is not what was written")
    torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _cause_of(error: BaseException) -> BaseException:
    """torch hides "no space left" behind an error of its own."""
    cause = error
    while cause.__context__ is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


def _keep(path: Path, older: Path) -> None:
    """Give the file a second name, so that there is no moment without `path`; a damaged one does not replace a whole one."""
    if older.exists() and _OUR_OWN.get(path.absolute()) != _identity(path) and verify(path)[0] != "valid":
        return
    try:
        temporary = temporary_of(older)
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        os.replace(temporary, older)
        temporary.unlink(missing_ok=True)  # POSIX leaves it where both names are one file already
    except OSError:  # a file system without hard links
        os.replace(path, older)


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there, and renames are durable
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: str | os.PathLike[str]) -> Any:
    """Read a checkpoint onto the CPU, without running any code that it may contain.

    Raises:
        FileNotFoundError: where there is none.
        CheckpointError: where it is damaged, or holds more than plain types and tensors.
    """
    path = Path(path)
    verdict, words = _verdict(path)
    if verdict == "damaged":
        raise _damaged(path, words)
    checkpoint = _load(path)
    if verdict == "none" and is_full_state(checkpoint) and checkpoint.get("sealed"):
        raise _damaged(path, "its digest has been cut off")
    if verdict == "valid":
        _OUR_OWN[path.absolute()] = _identity(path)
    return checkpoint


def _verdict(path: Path) -> tuple[str, str]:
    try:
        return verify(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _load(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the error below says more
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        words = str(error).lower()
        if "unsupported" not in words or "unsupported operand" in words:
            raise _damaged(path, _first_line(error)) from error
        raise CheckpointError(
            f"{path} holds more than tensors and plain types{_wanted(error)}, and torch-frame never runs code from a checkpoint. "
            f"If it is a state of torch-frame 1.7, 'torch-frame convert {path} NEW.pth' reads it without running any. If it is a "
            "whole pickled model, save the model's weights where it was made: torch.save(model.state_dict(), ...)."
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise _damaged(path, _first_line(error)) from error
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error, ArithmeticError) as error:
        # torch's reader of pickles meets any bytes so; a text that begins with "hi" is a KeyError
        raise _damaged(path, f"torch finds no sense in its bytes ({type(error).__name__})") from error


def _damaged(path: Path, what: str) -> CheckpointError:
    message = f"{path} is damaged, or no checkpoint: {what}."
    previous = path.with_name("previous.pth")
    if path.name == "latest.pth" and previous.exists():
        message += (
            f" {previous} is the state that was saved before it: load_checkpoint({str(previous)!r}), "
            "or resume='auto', which takes the newest whole one."
        )
    return CheckpointError(message)


def _wanted(error: BaseException) -> str:
    name = re.search(r"GLOBAL (\S+)", str(error))
    return "" if name is None else f" ({name[1]})"


def _first_line(error: BaseException) -> str:
    """Of torch's many lines the one that says what was found, else the first."""
    if (found := re.search(r"WeightsUnpickler error:\s*(\S.*)", str(error))) is not None:
        return found[1][:200]
    return (str(error) or type(error).__name__).splitlines()[0][:200]
