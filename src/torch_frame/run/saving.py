"""Saves: asked for by hooks, copied when the run's state is whole, written in the background."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from torch_frame.checkpoint import io
from torch_frame.checkpoint.background import Background
from torch_frame.checkpoint.snapshot import HostBuffers
from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import CheckpointError
from torch_frame.run.state import Part, State, capture_copy
from torch_frame.run.watch import Watch
from torch_frame.training.finite import check_weights

_logger = logging.getLogger("torch_frame")


class SaveRequest(NamedTuple):
    """A file that is to be written at the next safe point."""

    file_name: str
    save_single_model: bool
    then_remove: list[str]
    """Files that are not needed any more once this one is written."""


class SaveRequests:
    """The saves that hooks have asked for since the last safe point; a file asked for twice is written once."""

    def __init__(self) -> None:
        self._requests: dict[str, SaveRequest] = {}

    def add(self, file_name: str, save_single_model: bool, then_remove: Iterable[str] = ()) -> None:
        before = self._requests.get(file_name)
        outdated = [] if before is None else before.then_remove
        self._requests[file_name] = SaveRequest(file_name, save_single_model, [*outdated, *then_remove])

    def take(self) -> list[SaveRequest]:
        """All requests, which are forgotten then; full states last, so that they speak of files that exist."""
        requests, self._requests = self._requests, {}
        return sorted(requests.values(), key=lambda request: not request.save_single_model)


class FileToWrite(NamedTuple):
    """A checkpoint file and what goes into it."""

    path: str
    keep_as: str | None
    """The file that `path` has been until then is kept under this name."""
    content: Any
    then_remove: list[str]


@dataclass(frozen=True)
class SaveJob:
    """What one save writes: the run as it stood at one moment.

    Attributes:
        files: in the order of writing.
        must_be_finite: nothing is written if one of these tensors is not.
        where: the moment, in words.
    """

    files: list[FileToWrite]
    must_be_finite: Mapping[str, Tensor]
    where: str

    def copied_into(self, buffers: HostBuffers) -> SaveJob:
        """The same job, of copies: training may change the run's own tensors."""
        contents, tensors = buffers.copy(([file.content for file in self.files], dict(self.must_be_finite)))
        files = [file._replace(content=content) for file, content in zip(self.files, contents, strict=True)]
        return replace(self, files=files, must_be_finite=tensors)

    def write(self, cancelled: Callable[[], bool] | None = None) -> None:
        """Write the files; what a file makes superfluous is removed once that file is verified.

        Raises:
            NonFiniteError: if weights are NaN or infinite; nothing is written then.
            CheckpointError: if a file cannot be written.
        """
        check_weights(self.must_be_finite, self.where)
        for file in self.files:
            io.write(file.path, file.content, keep_as=file.keep_as, cancelled=cancelled)
            remove(file.then_remove)


def job_of(
    requests: Sequence[SaveRequest],
    folder: str,
    contents: Mapping[bool, Any],
    tensors: Mapping[str, Tensor],
    where: str,
) -> SaveJob:
    """The job that carries out some requests.

    Args:
        requests: in the order of writing.
        folder: of the checkpoints.
        contents: {True: the weights, False: the whole state}, of those that are asked for.
        tensors, where: `must_be_finite` and `where` of the job.
    """
    previous = os.path.join(folder, "previous.pth")
    files = [
        FileToWrite(
            os.path.join(folder, request.file_name),
            previous if request.file_name == "latest.pth" else None,
            contents[request.save_single_model],
            list(request.then_remove),
        )
        for request in requests
    ]
    return SaveJob(files, tensors, where)


class Saver:
    """Carries out saves: the run's tensors are copied at once, and written while training continues.

    Args:
        strategy: rank 0 decides which files are saved, and writes them.

    Attributes:
        pending: there is something to do at the next safe point: a request, a stop signal, a save that has failed.
        rollback: parts of the state that are saved as they were before `after_epoch`; None outside it.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.pending = False
        self.rollback: State | None = None
        self._watch: Watch | None = None
        self._strategy = strategy
        self._requests = SaveRequests()
        self._saved_here: list[str] = []
        proxy = weakref.proxy(self)  # no circle: the buffers are freed with the trainer
        self._background = Background(on_failure=lambda: proxy.wake())
        self._buffers = HostBuffers()

    def wake(self) -> None:
        """There is something to do at the next safe point. Called in signal handlers and from the writing thread too."""
        self.pending = True

    def request(self, file_name: str, save_single_model: bool, then_remove: Iterable[str] = ()) -> None:
        """Ask for a file, written at the next safe point."""
        self._requests.add(file_name, save_single_model, then_remove)
        self.wake()

    def take_requests(self) -> list[SaveRequest]:
        """What is to be written now, on all ranks; rank 0 decides.

        Raises:
            BaseException: what an earlier save has failed with.
        """
        self.pending = False
        self._background.raise_failure()
        self._tell_of_files_not_written()
        plain: list[Any] = [tuple(request) for request in self._requests.take()]
        return [SaveRequest(*fields) for fields in self._strategy.broadcast(plain)]

    def note_weights(self, file_name: str) -> None:
        """Weights are saved there and then: by rank 0, if it does so too, which is looked at when all ranks meet."""
        if self._strategy.world_size > 1:
            self._saved_here.append(file_name)
            self.wake()

    def _tell_of_files_not_written(self) -> None:
        if self._strategy.world_size == 1:
            return
        names, self._saved_here = self._saved_here, []
        of_main, *of_others = self._strategy.gather(names)
        for rank, saved in enumerate(of_others, 1):
            missing = sorted(set(saved) - set(of_main))
            if missing:
                _logger.warning(
                    "Rank %d has saved weights (%s) that rank 0 has not, so no file was written: rank 0 writes. Call "
                    "save_checkpoint on rank 0 too.",
                    rank,
                    ", ".join(missing),
                )

    def prepare(self, folder: str) -> None:
        """Before the run is looked at for a save: the save before is complete, and the checkpoints' folder exists.

        Raises:
            BaseException: what the save before has failed with.
            CheckpointError: if the folder cannot be made.
        """
        self.wait()  # its copies are in the buffers
        if self._strategy.rank == 0:
            _make_folder(folder)

    def start(self, job: SaveJob) -> None:
        """Copy what a job writes, and begin to write it; on rank 0, the others have helped to make the job."""
        if self._strategy.rank == 0:
            copied = job.copied_into(self._buffers)
            self._background.start(lambda: copied.write(self._background.is_cancelled))

    def rolled_back_if_stopped(
        self, parts: Mapping[str, Part], others: Callable[[], Iterable[Any]]
    ) -> AbstractContextManager[None]:
        """If a signal ends `after_epoch`, which is inside, the run is saved with these parts as they were before.

        A hook whose state cannot be saved has no way back: a signal then waits for the end of `after_epoch`. So it does if a hook
        has changed something that is not copied.

        Args:
            others: gives all else that is saved, today's at each call.
        """
        self.rollback = capture_copy(parts)
        self._watch = Watch(others)
        return self._rollback_dropped()

    def can_roll_back(self) -> bool:
        """`after_epoch` can be ended here, and gone through again when the run is resumed."""
        if self.rollback is None or self._watch is None:
            return False
        if self._watch.sees_change():
            self.rollback = None
            _logger.info(
                "The run ends when all hooks of this after_epoch have run, because one has changed what cannot be undone."
            )
        return self.rollback is not None

    @contextlib.contextmanager
    def _rollback_dropped(self) -> Iterator[None]:
        yield
        self.drop_rollback()

    def drop_rollback(self) -> None:
        """`after_epoch` is over."""
        self.rollback = self._watch = None

    def request_last_state(self) -> None:
        """Ask for the whole state before the run ends by a signal."""
        if self.rollback is not None:
            self._requests.take()  # asked for in an after_epoch that the resumed run goes through again
        self.request("latest.pth", save_single_model=False)

    @property
    def busy(self) -> bool:
        """A save is being written."""
        return self._background.busy

    def wait(self) -> None:
        """Return when the save that is being written is complete; raises what it failed with, once."""
        self._background.wait()

    def cancel(self) -> None:
        """Give up the save that is being written; the files that it would have replaced stay."""
        self._background.cancel()

    def remove_unfinished_files(self, folder: str) -> None:
        """Remove what a process that was killed inside a save has left in the folder of a run that begins."""
        if self._strategy.rank == 0:
            remove(glob.glob(os.path.join(glob.escape(folder), ".*.tmp")))


def save_one_by_one(requests: Iterable[SaveRequest], save: Callable[[str, bool], None]) -> None:
    """Carry out requests by a trainer's own `save_checkpoint(file_name, save_single_model)`."""
    for file_name, save_single_model, outdated in requests:
        save(file_name, save_single_model)
        remove(outdated)


def remove(paths: Iterable[str]) -> None:
    """Remove files that may be gone already."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be made, so nothing is saved: {error}.") from error
