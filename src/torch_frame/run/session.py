"""What surrounds the loop of one `train()`: log, signals, the first lines, reports and the end.

Context managers, because they add no frame to a traceback.
"""

from __future__ import annotations

import logging
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch_frame._version import __version__
from torch_frame.progress import Progress
from torch_frame.run.saving import Saver
from torch_frame.signals.interruption import INTERRUPTION, StopRequested
from torch_frame.signals.stop import StopSignals
from torch_frame.tracking.console import console_width
from torch_frame.tracking.format import aligned
from torch_frame.tracking.line import Line

_logger = logging.getLogger("torch_frame")

Stages = Mapping[str, Sequence[Callable[..., None]]]


class Session:
    """One `train()`: inside, the log is open and signals are listened to. At its end hooks and saves are closed.

    Written out as a class, because a user's code runs at its end: a generator would turn a StopIteration of a hook into another
    error.

    Args:
        around: open inside: the folder is held, the log is written.
        signals: listened to inside; if one came, the process is ended as by that signal afterwards.
        saver: its last save is complete at the end; a Ctrl-C gives it up.
        stages: of the hooks; "on_exception" is called with an error, "close" in every case.
        on_error: says where the run was; called before the hooks are told.
        on_end: called in every case, before the hooks are closed.
    """

    def __init__(
        self,
        around: Sequence[AbstractContextManager[Any]],
        signals: StopSignals,
        saver: Saver,
        stages: Stages,
        on_error: Callable[[BaseException], str],
        on_end: Callable[[], None],
    ) -> None:
        self._around = around
        self._signals = signals
        self._saver = saver
        self._stages = stages
        self._on_error = on_error
        self._on_end = on_end
        self._open = ExitStack()

    def __enter__(self) -> None:
        self._open.enter_context(self._saver.under_way())
        for context in self._around:
            self._open.enter_context(context)
        self._open.enter_context(self._signals.listening())

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with self._open:
            own_error: BaseException | None = None
            if error is None:
                try:
                    self._saver.wait()
                except BaseException as failure:
                    own_error = error = failure
            try:
                if error is not None:
                    if isinstance(error, KeyboardInterrupt):
                        self._saver.cancel()  # the user waits for nothing
                    _report(error, self._on_error(error), self._stages["on_exception"])
            finally:
                self._on_end()
                error_at_close = _close(self._saver, self._stages["close"], isinstance(error, KeyboardInterrupt))
            if error is None:
                own_error = error_at_close
            if own_error is not None:
                raise own_error  # here and not in _close: one frame less above an error in a hook's close
        if error is None and self._signals.received is not None:
            self._signals.end()


@contextmanager
def ended_by_signals(save: Callable[[], None]) -> Iterator[None]:
    """A signal that asks the run to end ends what is inside; `save` is called then."""
    try:
        yield
    except StopRequested:
        save()


_LIBRARIES = (
    str(Path(__file__).parents[1]) + os.sep,
    *(path + os.sep for name, path in sysconfig.get_paths().items() if name in ("stdlib", "purelib", "platlib")),
    "<frozen",
)


def phase_of(progress: Progress, frame: FrameType | None) -> str:
    """Where the run is, in words, and the user's code. Called in the handler of a signal, so it only looks."""
    epoch, iteration = progress.current_epoch + 1, progress.current_iter
    place = f"epoch {epoch}, iteration {iteration} of the run"
    if INTERRUPTION.allowed:
        phase = f"while a batch was waited for in {place}"
    elif progress.epoch_trained:
        phase = f"behind the last batch of epoch {epoch}"
    else:
        phase = f"in {place}"
    return phase + _users_place(frame)


def _users_place(frame: FrameType | None) -> str:
    """The line of the user's code that the main thread was in: of the innermost file that is in no library."""
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(_LIBRARIES):
            return f" ({os.path.basename(path)}, line {frame.f_lineno}, in {frame.f_code.co_name})"
        frame = frame.f_back
    return ""


def _report(error: BaseException, where: str, tell: Sequence[Callable[[BaseException], None]]) -> None:
    """Tell the hooks of an error; one that fails at it does not hide the error itself."""
    _logger.error("Training ended in %s: %s", where, type(error).__name__)
    for on_exception in tell:
        try:
            on_exception(error)
        except Exception:
            _logger.exception("A hook's on_exception failed as well")


def _close(saver: Saver, closes: Sequence[Callable[[], None]], give_up: bool) -> Exception | None:
    """Close saves and all hooks, and write what these ask for; returns the first error."""
    errors = [_finish(saver, give_up)]
    for close in closes:
        try:
            close()
        except Exception as error:
            _logger.exception("A hook's close failed")
            errors.append(error)
    errors.append(_finish(saver, give_up))
    return next((error for error in errors if error is not None), None)


def _finish(saver: Saver, give_up: bool) -> Exception | None:
    try:
        saver.finish(give_up=give_up)
    except Exception as error:
        _logger.error("A save in the background failed: %s", error)
        return error
    return None


# ---------------------------------------------------------------- the first lines


def log_first_lines(rows: Mapping[str, str | None], told: list[tuple[int, str]], parameters: Sequence[str]) -> None:
    """Log the run at a glance, and what has happened before there was a log.

    Args:
        rows: name -> text, such as "Model" -> "Net, 41 parameters"; None: left out.
        told: (level, line); emptied, for each is told once.
        parameters: lines that the script wants in the log.
    """
    Line.title(f"torch-frame {__version__}").log(_logger)
    for line in aligned({name: row for name, row in rows.items() if row}, console_width()):
        _logger.info("%s", line)
    for level, line in told:
        _logger.log(level, line)
    told.clear()
    log_parameters(parameters)


def log_parameters(parameters: Sequence[str]) -> None:
    """Log lines that the script, or a hook, wants in the log."""
    for text in parameters:
        for line in text.splitlines():
            _logger.info("  %s", line)


def log_end_inside(signal: str | None, iterations: int, folder: str) -> None:
    """Log that a run has ended inside an epoch.

    Args:
        signal: that ended it, in words; None: `should_stop`.
        iterations: batches that are trained.
        folder: of the checkpoints.
    """
    if signal is None:
        _logger.info("should_stop is set: the run ends after iteration %d.", iterations)
    else:
        _logger.warning("%s: saved after iteration %d as %s/latest.pth.", signal, iterations, folder)


def log_late_signal(signals: StopSignals) -> None:
    """Log a signal that came in `after_train`: the whole state was saved before it, and is not saved again."""
    if not signals.is_told:
        _logger.warning("%s: the run had ended.", signals.told())
