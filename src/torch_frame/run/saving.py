"""Saves: asked for by hooks, copied while the run is as it is meant to be saved, written in the background."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from torch_frame.checkpoint import io
from torch_frame.checkpoint.background import Background
from torch_frame.checkpoint.snapshot import HostBuffers, Snapshot
from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import CheckpointError, SettingError
from torch_frame.run.state import Part, State, capture, capture_copy
from torch_frame.run.watch import Watch
from torch_frame.training.finite import check_weights

_logger = logging.getLogger("torch_frame")
ASKED_BY_RANK_0 = (
    "%s is saved at the next safe point: a whole state needs all ranks, and only rank 0 has the hook that saves it."
)


@dataclass(frozen=True)
class Contents:
    """What can be saved of a run, for one call: callables, asked when a copy is made.

    Attributes:
        folder: of the checkpoints.
        where: the moment, in words.
        before: what is to be done before the run is looked at; raises if a loss that has not been read yet is not finite.
        weights: the model's `state_dict`, or EMA's.
        as_saved: that under the names, and with the values, that a file holds.
        parts: the table of a whole state.
        finite_names: of the tensors of the model that have to be finite, or nothing is written.
        window_open: a window of gradients is open, and no state can hold it.
        own_save: a trainer's own `save_checkpoint(file_name, save_single_model)`, which saves instead; None: it has none.
    """

    folder: str
    where: str
    before: Sequence[Callable[[], object]]
    weights: Callable[[], Mapping[str, Any]]
    as_saved: Callable[[Mapping[str, Any]], dict[str, Any]]
    parts: Callable[[], Mapping[str, Part]]
    finite_names: Callable[[], set[str]]
    window_open: bool
    own_save: Callable[[str, bool], object] | None = None


class _Weights(NamedTuple):
    """A file of weights that were copied when it was asked for."""

    path: str
    snapshot: Snapshot
    finite_names: set[str]
    where: str


class FileToWrite(NamedTuple):
    """A checkpoint file and what goes into it."""

    path: str
    keep_as: str | None
    """The file that `path` has been until then is kept under this name."""
    snapshot: Snapshot
    must_be_finite: Mapping[str, Tensor]
    where: str
    """The moment of the copy, in words."""


@dataclass(frozen=True)
class SaveJob:
    """What one save writes.

    Attributes:
        files: in the order of writing: weights, then the state that speaks of them.
        then_remove: files that are not needed any more once all of these are written.
    """

    files: list[FileToWrite]
    then_remove: list[str]

    def write(self, cancelled: Callable[[], bool] | None = None) -> None:
        """Write the files, then remove what they make superfluous.

        Raises:
            NonFiniteError: if weights are NaN or infinite; nothing is written then.
            CheckpointError: if a file cannot be written.
        """
        for file in self.files:
            check_weights(file.must_be_finite, file.where)
        for file in self.files:
            io.write(file.path, file.snapshot.content, keep_as=file.keep_as, cancelled=cancelled)
        remove(self.then_remove)


class Saver:
    """Carries out saves: the run's tensors are copied at once, and written while training continues.

    Weights are copied when they are asked for, so they are those that were scored; a whole state at the next safe point, when
    all hooks have run. Both are written by one job: weights, then the state, then what they make superfluous is removed.

    Args:
        strategy: rank 0 decides which files are saved, and writes them.

    Attributes:
        pending: there is something to do at the next safe point: a request, a stop signal, a save that has failed.
        rollback: parts of the state that are saved as they were before `after_epoch`; None outside it.
        has_safe_points: a run is under way, so a safe point will come.
        holds_last_state: the run has ended inside an epoch, and `latest.pth` holds where it goes on from there: it is
            not asked for again.
        saves_own_way: a subclass's `save_checkpoint` is at work on whole states, at a safe point.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.pending = False
        self.rollback: State | None = None
        self.holds_last_state = self.has_safe_points = self.saves_own_way = False
        self._watch: Watch | None = None
        self._strategy = strategy
        self._saved_here: list[str] = []
        self._is_writer = strategy.rank == 0
        self._weights: dict[str, _Weights] = {}  # by path, copied and still to be written
        self._states: list[str] = []  # names of the whole states that are asked for
        self._outdated: list[str] = []
        self._space_is_known = False
        proxy = weakref.proxy(self)  # no circle: the buffers are freed with the trainer
        self._background = Background(on_failure=lambda: proxy.wake())
        self._buffers = HostBuffers()

    def wake(self) -> None:
        """There is something to do at the next safe point. Called in signal handlers and from the writing thread too."""
        self.pending = True

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """A run is under way inside."""
        self.has_safe_points = True
        try:
            yield
        finally:
            self.has_safe_points = False

    # ---------------------------------------------------------------- requests

    def request(self, file_name: str, save_single_model: bool, then_remove: Iterable[str], contents: Contents) -> None:
        """Ask for a file: weights are copied now, a whole state at the next safe point.

        Raises:
            NonFiniteError: if a loss or a gradient that has not been read yet is not finite.
        """
        file_name = _below(contents.folder, file_name)
        if self.holds_last_state and file_name == "latest.pth" and not save_single_model:
            return
        self._outdated += then_remove
        self._forget(os.path.join(contents.folder, file_name), file_name)
        self.wake()
        if not save_single_model:
            self._states.append(file_name)
        elif contents.own_save is not None:
            contents.own_save(file_name, True)
        else:
            _call(contents.before)
            weights = contents.weights()  # here, for a function of ours is a frame above an error in it
            self._copy(file_name, weights, contents)

    def _copy(self, file_name: str, weights: Mapping[str, Any], contents: Contents) -> None:
        if self._is_writer:  # the others have helped to make the weights
            since = [file.snapshot for file in self._weights.values()]
            snapshot = self._buffers.copy(contents.as_saved(weights), since)
            path = os.path.join(contents.folder, file_name)
            self._weights[path] = _Weights(path, snapshot, contents.finite_names(), contents.where)

    def _forget(self, path: str, file_name: str) -> None:
        """A file that is asked for again: earlier requests do not count, and it is not removed."""
        self._weights.pop(path, None)
        self._states = [name for name in self._states if name != file_name]
        self._outdated = [outdated for outdated in self._outdated if os.path.abspath(outdated) != path]

    # ---------------------------------------------------------------- carrying them out

    def carry_out(self, contents: Contents) -> None:
        """At a safe point, on all ranks: begin to write what was asked for; rank 0 decides what that is.

        Raises:
            BaseException: what an earlier save has failed with.
            NonFiniteError: if a loss or a gradient that has not been read yet is not finite.
        """
        self.pending = False
        self._background.raise_failure()
        self._tell_of_files_not_written()
        states, self._states = self._strategy.broadcast(self._states), []
        state = None
        if states and contents.own_save is not None:  # a subclass of 1.7 saves its own way
            self.saves_own_way = True  # on all ranks, so it may call the trainer's own method
            try:
                for file_name in states:
                    contents.own_save(file_name, False)
            finally:
                self.saves_own_way = False
        elif states:
            self._prepare(contents)
            state = capture(contents.parts(), self.rollback)  # here, for the same reason
        outdated, self._outdated = self._outdated, []
        self._begin(contents, states if state is not None else [], state, outdated)

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

    def save_now(self, file_name: str, save_single_model: bool, contents: Contents) -> None:
        """Save there and then; complete when this returns. Weights that were asked for before are written first.

        Raises:
            SettingError: for a whole state inside a window of gradients.
        """
        file_name = _below(contents.folder, file_name)
        self._forget(os.path.join(contents.folder, file_name), file_name)
        if save_single_model:
            _call(contents.before)
            self._copy(file_name, contents.weights(), contents)
            self.complete_weights(contents)
            return
        if contents.window_open:
            raise SettingError(
                f"{file_name} would be saved inside a window of gradient_accumulation_steps, whose gradient it cannot "
                "hold. Ask with trainer.save_at_safe_point(...), which waits for the window's end."
            )
        self._prepare(contents)
        self._begin(contents, [file_name], capture(contents.parts(), self.rollback))
        self.wait()

    def save_last(self, contents: Contents, *, with_state: bool) -> None:
        """The last save before the run ends, on all ranks: complete when this returns.

        Args:
            with_state: save the whole state, and not only what was asked for.
        """
        if self.rollback is not None:  # asked for in an after_epoch that the resumed run goes through again
            self._weights, self._states, self._outdated = {}, [], []
        if with_state:
            self.request("latest.pth", False, (), contents)
        self.carry_out(contents)
        self.wait()

    def complete_weights(self, contents: Contents) -> None:
        """Return when the save under way is complete, and the weights that were asked for are written as well.

        What they make superfluous is removed later, with the state that speaks of them.
        """
        self._begin(contents, [])
        self.wait()

    def _prepare(self, contents: Contents) -> None:
        self.wait()  # its copies are in the buffers
        _call(contents.before)

    def _begin(
        self, contents: Contents, states: Sequence[str], state: Any = None, outdated: Iterable[str] = ()
    ) -> None:
        """Begin to write the weights that were copied, and whole states, which are copied now; on rank 0."""
        weights, self._weights = list(self._weights.values()), {}
        files = [_file_of(one) for one in weights]
        if not self._is_writer or not (files or states or outdated):
            return
        _make_folder(contents.folder)
        if states:
            snapshot = self._buffers.copy(state, [one.snapshot for one in weights])
            files += [_file_of_state(file_name, snapshot, contents) for file_name in states]
            self._look_at_space(snapshot, contents.folder)
        for file in files:
            _make_folder(os.path.dirname(file.path))
            file.snapshot.forget_tensors()
        job = SaveJob(files, sorted(set(outdated) - {file.path for file in files}))
        self._background.start(lambda: job.write(self._background.is_cancelled))

    def _look_at_space(self, snapshot: Snapshot, folder: str) -> None:
        """Before the first whole state: whether the disk has room for the run's files."""
        if self._space_is_known:
            return
        self._space_is_known = True
        needed = 4 * snapshot.num_bytes
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free
            if free < needed:
                _logger.warning(
                    "%s has %.1f MB of free space, and a state takes %.1f MB: four times that is wanted for latest.pth, "
                    "previous.pth, the one that is being written, and weights.",
                    folder,
                    free / 1e6,
                    snapshot.num_bytes / 1e6,
                )

    # ---------------------------------------------------------------- a signal in after_epoch

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

    def forget(self) -> None:
        """The run is over."""
        self.drop_rollback()
        self.holds_last_state = False

    # ---------------------------------------------------------------- the job under way

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

    def finish(self, *, give_up: bool) -> None:
        """The run has ended, perhaps by an error: weights that were asked for are written, for they were scored.

        Args:
            give_up: nothing is waited for.
        """
        self.wait()
        weights, self._weights = list(self._weights.values()), {}
        lost, self._states, self._outdated = list(self._states), [], []
        if give_up:
            lost += [os.path.basename(one.path) for one in weights]
        elif weights:
            for one in weights:
                _make_folder(os.path.dirname(one.path))
            SaveJob([_file_of(one) for one in weights], []).write()
        if lost and self._is_writer:
            _logger.info("Asked for, but not written, because the run has ended before: %s.", ", ".join(lost))

    def remove_unfinished_files(self, folder: str) -> None:
        """Remove what a process that was killed inside a save has left in the folder of a run that begins."""
        if self._is_writer:
            remove(glob.glob(os.path.join(glob.escape(folder), ".*.tmp")))


def _call(functions: Iterable[Callable[[], object]]) -> None:
    for function in functions:
        function()


def _below(folder: str, file_name: str | os.PathLike[str]) -> str:
    """A file's name below the folder of the checkpoints, as it is compared with others; of one elsewhere its path."""
    path = os.path.normpath(os.path.join(folder, file_name))
    return path[len(folder) + 1 :] if path.startswith(folder + os.sep) else path


def _file_of(weights: _Weights) -> FileToWrite:
    """A file of weights."""
    names, content = weights.finite_names, weights.snapshot.content
    checked = {name: content[name] for name in sorted(names & content.keys())}
    return FileToWrite(weights.path, None, weights.snapshot, checked, weights.where)


def _file_of_state(file_name: str, snapshot: Snapshot, contents: Contents) -> FileToWrite:
    """A file of a whole state."""
    names, content = contents.finite_names(), snapshot.content
    checked = {name: content["model"][name] for name in sorted(names & content["model"].keys())}
    if content["ema"] is not None:
        average = content["ema"]["model"]
        checked |= {f"EMA's {name}": average[name] for name in sorted(names & average.keys())}
    keep_as = os.path.join(contents.folder, "previous.pth") if file_name == "latest.pth" else None
    return FileToWrite(os.path.join(contents.folder, file_name), keep_as, snapshot, checked, contents.where)


def remove(paths: Iterable[str]) -> None:
    """Remove files, and folders, whose paths end with a separator; one that cannot be removed is told, and stays."""
    for path in paths:
        try:
            if path.endswith(os.sep):
                shutil.rmtree(path)
            else:
                os.remove(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            _logger.warning("%s is not needed any more, but cannot be removed: %s.", path, error)


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be made, so nothing is saved: {error}.") from error
