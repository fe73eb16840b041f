"""Metric files: one JSON object a line, and TensorBoard's event files."""

import contextlib
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import torch

_EVENTS = "events.out.tfevents."
"""How the names of TensorBoard's files begin."""


def _plain(value: Any, where: str) -> Any:
    """Turns `value` into what JSON knows: NaN and infinity into None, numpy's and one-element tensors into numbers."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = _only_element(value, where)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON doesn't know. Give a number, a string or a list.")


def _only_element(value: "torch.Tensor | np.ndarray[Any, Any] | np.generic", where: str) -> Any:
    num_elements = value.numel() if isinstance(value, torch.Tensor) else value.size
    if num_elements != 1:
        raise TypeError(f"{where} has {num_elements} elements, but must be one number. Reduce it, or use tolist().")
    return value.item()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _is_later(line: bytes, last_iter: int) -> bool:
    try:
        at = json.loads(line)["iter"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(at, int | float) and at > last_iter


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, without a last one that a killed process left half-written."""
    for line in file:
        if line.endswith(b"\n"):
            yield line
        elif _is_object(line):
            yield line + b"\n"


def _cut_rows_after(path: str, last_iter: int) -> None:
    """Rewrites a file without its later rows; the old file stays whole until the new one is on disk."""
    temporary = _temporary_of(path)
    try:
        with open(path, "rb") as old, open(temporary, "wb") as new:
            new.writelines(line for line in _whole_lines(old) if not _is_later(line, last_iter))
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def _temporary_of(path: str) -> str:
    """One name: what a killed process has left is found and removed by the next."""
    return f"{path}.tmp"


def _mark_at(path: str, size: int) -> dict[str, Any]:
    """A place in a file, and by what to recognise it: the rows before it carry their times."""
    with open(path, "rb") as file:
        file.seek(max(size - 512, 0))
        return {"size": size, "sha256_before": hashlib.sha256(file.read(min(size, 512))).hexdigest()}


def _is_marked(path: str, mark: Mapping[str, Any]) -> bool:
    return os.path.getsize(path) >= mark["size"] and _mark_at(path, mark["size"]) == mark


def _cut_half_line(path: str, block_size: int = 1 << 16) -> None:
    """Ends a file with a whole line, reading no more than its last one."""
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start, tail = end, b""
        while start > 0 and b"\n" not in tail:
            start = max(start - block_size, 0)
            file.seek(start)
            tail = file.read(end - start)
        half = tail[tail.rfind(b"\n") + 1 :]
        if half and _is_object(half):
            file.seek(end)
            file.write(b"\n")
        elif half:
            file.truncate(end - len(half))


class JsonlFile:
    """Appends rows to a file, one JSON object a line; each row is flushed, so that others can follow the file.

    NaN and infinity are written as null, numpy scalars and one-element tensors as numbers.

    Args:
        path: of the file. An existing one is continued; a half-written last line is cut off.
        keep_until_iter: rows of an existing file whose `"iter"` is greater are cut off too: a resumed run writes
            them again.
        keep_until: what `mark` returned when the state was saved that the run goes on from. A file that has this place ends
            there, whatever was written since; for another one `keep_until_iter` counts.

    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "metrics.jsonl")
    >>> writer = JsonlFile(path)
    >>> writer.write({"iter": 49, "total_loss": torch.tensor(0.5), "grad_norm": float("nan")})
    >>> writer.close()
    >>> from pathlib import Path
    >>> print(Path(path).read_text(), end="")
    {"iter": 49, "total_loss": 0.5, "grad_norm": null}
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        keep_until_iter: int | None = None,
        *,
        keep_until: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = os.path.realpath(path)  # a link stays a link when the file is replaced
        with contextlib.suppress(FileNotFoundError):
            os.remove(_temporary_of(self.path))
        if os.path.exists(self.path):
            if keep_until is not None and _is_marked(self.path, keep_until):
                os.truncate(self.path, keep_until["size"])
            elif keep_until_iter is None:
                _cut_half_line(self.path)
            else:
                _cut_rows_after(self.path, keep_until_iter)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  # until close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row.

        Raises:
            TypeError: a value that JSON doesn't know, or a tensor of more than one element. Nothing is written then.
            OSError: the disk is full, or the like. The file ends with the row before, and the next one may be written.
        """
        plain = {str(key): _plain(value, f"row[{key!r}]") for key, value in row.items()}
        line = json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"
        self._append(line.encode(errors="backslashreplace"))  # which turns a lone surrogate into a JSON escape

    def _append(self, line: bytes) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            with contextlib.suppress(OSError):  # a row is in the file as a whole, or not at all
                os.truncate(self._file.fileno(), end)
            raise

    def mark(self) -> dict[str, Any] | None:
        """Returns where the file ends now, for a state that a run goes on from; None where it is gone."""
        try:
            return _mark_at(self.path, os.path.getsize(self.path))
        except OSError:
            return None

    def close(self) -> None:
        """Closes the file. Closing twice is fine."""
        self._file.close()


def _summary_writer_class() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensorboard's own, on import
            from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "tensorboard":
            raise ModuleNotFoundError(
                "TensorBoard's files need tensorboard, which is not installed. Run: pip install 'torch-frame[tensorboard]'",
                name=error.name,
            ) from error
        raise ImportError(_cannot_import(error)) from error
    except Exception as error:  # protobuf and numpy of other versions raise TypeError, AttributeError, ...
        raise ImportError(_cannot_import(error)) from error
    return SummaryWriter


def _cannot_import(error: Exception) -> str:
    return f"tensorboard is installed, but cannot be imported ({type(error).__name__}: {str(error).splitlines()[:1]})."


class EventFiles:
    """Writes scalars to a TensorBoard event file. tensorboard is imported here, not with this module.

    Args:
        log_dir: the folder of the event files; made if missing.
        purge_step: TensorBoard hides what was logged at this step or later: the first step of a resumed run.
        run_id: the event files' names end with it.
        keep: what `sizes` returned when the state was saved that the run goes on from. The files of this `run_id` end where
            they ended then, and those that it does not name are removed: the run writes all that again. `purge_step` alone
            does not reach scalars whose step is not an iteration, as an epoch's scores. None: all stay as they are.
        kwargs: further arguments of `torch.utils.tensorboard.SummaryWriter`.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        *,
        purge_step: int | None = None,
        run_id: str = "",
        keep: Mapping[str, int] | None = None,
        filename_suffix: str = "",
        **kwargs: Any,
    ) -> None:
        summary_writer = _summary_writer_class()
        self._log_dir = os.fspath(log_dir)
        self._suffix = f"{filename_suffix}.{run_id}" if run_id else filename_suffix
        if keep is not None:
            self._cut(keep)
        make = partial(summary_writer, self._log_dir, purge_step=purge_step, filename_suffix=self._suffix, **kwargs)
        before = set(self._names())
        self._writer = make()
        for name in set(self._names()) - before:
            if name < max(before, default=""):
                self._writer = self._made_again(name, make)

    def _names(self) -> list[str]:
        try:
            return [name for name in os.listdir(self._log_dir) if name.startswith(_EVENTS)]
        except OSError:
            return []

    def _made_again(self, name: str, make: Callable[[], Any]) -> Any:
        """TensorBoard reads a folder's files by their names: second, host, process, number; 10 of a process is before its 9."""
        self._writer.close()
        os.remove(os.path.join(self._log_dir, name))
        time.sleep(1.0 - time.time() % 1.0)
        return make()

    def _cut(self, keep: Mapping[str, int]) -> None:
        for name, size in (self.sizes() or {}).items():
            path = os.path.join(self._log_dir, name)
            if name not in keep:
                os.remove(path)
            elif size > keep[name]:
                os.truncate(path, keep[name])

    def sizes(self) -> dict[str, int] | None:
        """Returns the bytes of each event file of this `run_id`, by its name; None where the folder is not to be seen here."""
        try:
            with os.scandir(self._log_dir) as entries:
                return {
                    entry.name: entry.stat().st_size
                    for entry in entries
                    if entry.name.startswith(_EVENTS) and entry.name.endswith(self._suffix)
                }
        except OSError:
            return None

    @property
    def writer(self) -> Any:
        """torch's SummaryWriter."""
        return self._writer

    def write_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Writes the run's settings (numbers, texts, booleans), which TensorBoard shows under HPARAMS."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(dict(parameters), {}):
            self._writer.file_writer.add_summary(summary)

    def write(self, tag: str, value: Any, step: int) -> None:
        """Writes one scalar: a number or a one-element tensor."""
        self._writer.add_scalar(tag, value, step)

    def write_all(self, values: Mapping[str, float], step: int) -> None:
        """Writes scalars of one step as one event, which costs a fifth of one event each."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.file_writer.add_summary(Summary(value=scalars), step)

    def flush(self) -> None:
        """Returns when everything is in the file, where it outlives this process."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what is pending and closes the file. Closing twice is fine."""
        self._writer.close()
