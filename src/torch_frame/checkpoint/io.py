"""How a checkpoint file is written and read: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from torch_frame.errors import CheckpointError


def write(path: str | os.PathLike[str], checkpoint: Any, *, keep_as: str | os.PathLike[str] | None = None) -> None:
    """Write `checkpoint` so that at every moment `path` is the old file or the whole new one.

    A temporary file beside it is written, synced to the disk, read back, and renamed.

    Args:
        path: the file to write.
        checkpoint: plain types and tensors.
        keep_as: the file that `path` has been until now is kept under this name.

    Raises:
        CheckpointError: where the disk is full, the folder cannot be written, ...; the old file is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed process leaves is used again
    existed = path.exists()
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        _verify(temporary)
        if keep_as is not None and path.exists():
            _keep(path, Path(keep_as))
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError, pickle.PickleError) as error:
        cause: BaseException = error
        while cause.__context__ is not None and not isinstance(cause, OSError):
            cause = cause.__context__  # torch hides "no space left" behind an error of its own
        raise CheckpointError(
            f"{path} could not be written: {cause}."
            + (" The file that was there before is untouched." if existed else "")
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _verify(path: Path) -> None:
    torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _keep(path: Path, older: Path) -> None:
    """Give the file a second name, so that there is no moment without `path`."""
    try:
        temporary = older.with_name(f".{older.name}.tmp")
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        os.replace(temporary, older)
        temporary.unlink(missing_ok=True)  # POSIX leaves it where both names are one file already
    except OSError:  # a file system without hard links
        os.replace(path, older)


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
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) or "Unsupported" not in str(error):
            raise _damaged(path, error) from error
        raise CheckpointError(
            f"{path} holds more than tensors and plain types ({_first_line(error)}). torch-frame never runs code "
            "from a checkpoint, and a state of torch-frame 1.7 contains such. If you trust the file, take the weights out with "
            f"torch.load({str(path)!r}, weights_only=False)['model'] and pass them as load_checkpoint(checkpoint=...)."
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str | os.PathLike[str], error: BaseException) -> CheckpointError:
    path = Path(path)
    message = f"{path} cannot be read: it is damaged, or no checkpoint ({_first_line(error)})."
    previous = path.with_name("previous.pth")
    if path.name == "latest.pth" and previous.exists():
        message += f" {previous} is the state that was saved before it: load_checkpoint({str(previous)!r})."
    return CheckpointError(message)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
