"""The lines of a run: on the console, and in the run's log file."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from torch_frame.distributed.comm import is_main
from torch_frame.tracking.bar import WIDTH_IN_A_NOTEBOOK, TerminalBar, can_redraw, in_notebook
from torch_frame.tracking.consoles import is_console
from torch_frame.tracking.line import Line, line_of
from torch_frame.tracking.log_txt import LogTxt

logger = logging.getLogger("torch_frame")

_FORMAT = "[%(asctime)s %(name)s %(levelname)s]: %(message)s"
_DATE_FORMAT = "%m/%d %H:%M:%S"

_RESET, _GREEN = "\x1b[0m", "\x1b[32m"
_LEVEL_COLORS = {logging.DEBUG: "\x1b[35m", logging.WARNING: "\x1b[33m"}
_ERROR_COLOR = "\x1b[1;31m"
_STYLES = {"head": "\x1b[1m", "best": "\x1b[1;32m"}

WIDTH_OF_A_PIPE = 120
"""Cells of a line that goes to no screen."""


def supports_color(stream: Any, environ: Mapping[str, str] = os.environ, os_name: str = os.name) -> bool:
    """Says whether ANSI colours are wanted and understood: a terminal, no `NO_COLOR`, not `TERM=dumb`; or `FORCE_COLOR` is set.

    On Windows only the terminals known to understand them count: Windows Terminal, VS Code, ConEmu, ansicon.
    """
    if environ.get("NO_COLOR"):
        return False
    if environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    if not can_redraw(stream, environ):
        return False
    if os_name != "nt":
        return True
    return (
        any(name in environ for name in ("WT_SESSION", "ANSICON"))
        or environ.get("ConEmuANSI") == "ON"
        or environ.get("TERM_PROGRAM") == "vscode"
    )


def console_width() -> int:
    """Cells of a line on the console: `COLUMNS` if it is set, else of the terminal that one of stdout, stderr, stdin is.

    In a notebook 100, and 120 if there is no terminal.
    """
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    if in_notebook():
        return WIDTH_IN_A_NOTEBOOK
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        with contextlib.suppress(AttributeError, ValueError, OSError, TypeError):
            columns = os.get_terminal_size(stream.fileno()).columns
            if columns > 0:
                return columns
    return WIDTH_OF_A_PIPE


def console_encoding() -> str:
    """What text on stdout is encoded in."""
    return getattr(sys.stdout, "encoding", None) or "utf-8"


class _ShortFormatter(logging.Formatter):
    """For people: torch-frame's lines without time and name, and with their level if it is not INFO; others as in the file."""

    def __init__(self, *, color: bool) -> None:
        super().__init__(_FORMAT, _DATE_FORMAT)
        self._color = color
        self._long = _ColorFormatter(_FORMAT, _DATE_FORMAT) if color else logging.Formatter(_FORMAT, _DATE_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        is_ours = record.name.partition(".")[0] == logger.name
        return super().format(record) if is_ours else self._long.format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = line_of(record)
        if record.levelno == logging.INFO:
            return record.message if line is None else line.on_screen(_STYLES if self._color else None, _RESET)
        level = f"{record.levelname.lower()}:"
        if self._color:
            color = _ERROR_COLOR if record.levelno >= logging.ERROR else _LEVEL_COLORS.get(record.levelno, "")
            level = f"{color}{level}{_RESET}"
        return f"{level} {record.message}"


class _FileFormatter(logging.Formatter):
    """A dated line, whatever the width of the screen."""

    def __init__(self) -> None:
        super().__init__(_FORMAT, _DATE_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = line_of(record)
        if line is not None and line.whole is not None:
            record.message = line.whole
        return super().formatMessage(record)


class _ColorFormatter(logging.Formatter):
    """The plain line with its head in green and its level in a colour of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        color = _ERROR_COLOR if record.levelno >= logging.ERROR else _LEVEL_COLORS.get(record.levelno, "")
        head = f"[{record.asctime} {record.name} {color}{record.levelname}{_RESET}{_GREEN}]:"
        return f"{_GREEN}{head}{_RESET} {record.message}"


class ConsoleHandler(logging.Handler):
    """Writes to whatever `sys.stdout` is at the moment, above the progress bars.

    A console is a courtesy: missing, closed, gone or unable to show a character, it never stops or litters a run.

    Args:
        color: colours the lines if `supports_color` says so.
    """

    def __init__(self, level: int = logging.NOTSET, *, color: bool = False) -> None:
        super().__init__(level)
        self._color = color
        self._plain_formatter = _ShortFormatter(color=False)
        self._color_formatter = _ShortFormatter(color=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        stream = sys.stdout
        if stream is None or getattr(stream, "closed", False):
            return
        try:
            line = self._formatter_for(stream).format(record) + "\n"
        except Exception:  # arguments that don't fit the message: the caller's mistake
            self.handleError(record)
            return
        try:
            with TerminalBar.external_write_mode(file=stream):
                _write(stream, line)
        except BrokenPipeError:
            _detach(stream)
        except Exception:  # whatever a user's own stream does
            pass

    def _formatter_for(self, stream: Any) -> logging.Formatter:
        if self.formatter is not None:
            return self.formatter
        return self._color_formatter if self._color and supports_color(stream) else self._plain_formatter


def _write(stream: Any, line: str) -> None:
    try:
        stream.write(line)
    except UnicodeEncodeError:
        encoding = getattr(stream, "encoding", None) or "ascii"
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding))
    if hasattr(stream, "flush"):
        stream.flush()


def show_lines(lines: Iterable[Line]) -> None:
    """Print lines to stdout, with colours if it wants them; a pipe that is not read any more (`| head`) ends it quietly."""
    stream = sys.stdout
    if stream is None:
        return
    is_colored = supports_color(stream)
    try:
        for line in lines:
            _write(stream, line.on_screen(_STYLES if is_colored else None, _RESET) + "\n")
    except BrokenPipeError:
        _detach(stream)


def _detach(stream: Any) -> None:
    """Points a pipe that is not read any more at the null device.

    The line is still in Python's buffer. Its last flush would fail too, print an error and make the exit status 120.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _open_file(path: str, level: int, *, may_fail: bool = False) -> logging.FileHandler:
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handler = LogTxt(path, may_fail=may_fail)
    handler.setLevel(level)
    handler.setFormatter(_FileFormatter())
    return handler


def _lower_level(target: logging.Logger, *levels: int) -> None:
    """Lets `levels` through, and what came through before; NOTSET would hand the question to the root logger."""
    wanted = [max(level, 1) for level in levels]
    target.setLevel(min(wanted + ([target.level] if target.level else [])))


def setup_logger(
    name: str | None = None,
    output: str | os.PathLike[str] | None = None,
    console_log_level: int = logging.INFO,
    file_log_level: int = logging.INFO,
    color: bool = False,
) -> logging.Logger:
    """Gives a logger a console handler, and a file if `output` names one; on rank 0 only.

    A second call for the same name changes nothing, but a new `output` is added as one more file.

    Args:
        name: of the logger; None is the root logger.
        output: a file that ends in `.txt` or `.log`, else a folder, for its `log.txt`. Missing folders are made.
        console_log_level: of the console, a level of `logging`.
        file_log_level: of the file, a level of `logging`.
        color: colours the console's lines if it is a terminal that knows colours (see `supports_color`).

    Returns:
        The logger. It doesn't hand its records to its parents.

    >>> setup_logger("doctest.project") is logging.getLogger("doctest.project")
    True
    """
    target = logging.getLogger(name)
    target.propagate = False
    if target is logger and _open_runs:
        _undo.pop_all()  # set up in the middle of a run: stays after it
    if not is_main():  # scripts of 1.7 call this on every rank
        _lower_level(target, console_log_level)
        return target
    if not any(isinstance(handler, ConsoleHandler) for handler in target.handlers):
        target.setLevel(max(console_log_level, 1))
        target.addHandler(ConsoleHandler(console_log_level, color=color))
    if output is not None:
        _add_file(target, os.fspath(output), file_log_level)
    return target


def _add_file(target: logging.Logger, output: str, level: int) -> None:
    path = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
    open_files = {handler.baseFilename for handler in target.handlers if isinstance(handler, logging.FileHandler)}
    if os.path.abspath(path) not in open_files:
        target.addHandler(_open_file(path, level))
        _lower_level(target, level)


class RunLog:
    """What `open_run_log` attached to the "torch_frame" logger; `close()` takes it off again."""

    def __init__(self, path: str | None, file_handler: logging.FileHandler | None) -> None:
        self.path = path
        self._file_handler = file_handler

    def close(self) -> None:
        """Closes the file; the last open run puts the logger back as it was. Closing twice is fine."""
        if self not in _open_runs:
            return
        _open_runs.remove(self)
        if self._file_handler is not None:
            logger.removeHandler(self._file_handler)
            self._file_handler.close()
        if not _open_runs:
            _undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


_open_runs: list[RunLog] = []
_undo = contextlib.ExitStack()  # what the first open run changed on the logger; the last one to close undoes it


def open_run_log(path: str | os.PathLike[str] | None, console_log_level: int, file_log_level: int) -> RunLog:
    """Shows the "torch_frame" logger's records on the console and appends them to a file, until it is closed.

    A console that is there already is used as it is: one of `setup_logger` or of a run still open, or one that the
    user's own handler writes to. Other handlers of the root logger (pytest's, a file) still receive the records.

    Args:
        path: of the run's log file; None is no file.
        console_log_level: 0..5 for all, DEBUG, INFO, WARNING, ERROR, CRITICAL.
        file_log_level: the same for the file.

    Raises:
        ValueError: a level that is not 0..5.

    >>> with open_run_log(None, 2, 2):
    ...     logger.debug("not shown")
    """
    logger.disabled = False  # by logging.config, which switches off all loggers that a configuration does not name
    console_level = _check_level("console_log_level", console_log_level)
    file_level = _check_level("file_log_level", file_log_level)
    path = None if path is None else os.fspath(path)
    file_handler = None if path is None else _open_file(path, file_level, may_fail=True)
    if not _open_runs:
        _attach(console_level)
    run = RunLog(path, file_handler)
    _open_runs.append(run)
    _lower_level(logger, console_level)
    if file_handler is not None:
        logger.addHandler(file_handler)
        _lower_level(logger, file_level)
    return run


def keep_shown() -> None:
    """Switch the logger on again, if something has switched it off in the middle of a run, and say so."""
    if logger.disabled and _open_runs:
        logger.disabled = False
        logger.warning(
            "logging.config had switched off the logger 'torch_frame' during the run; it is on again, and lines of this time are "
            "missing. Pass disable_existing_loggers=False."
        )


def _check_level(name: str, level: int) -> int:
    if not isinstance(level, int) or not 0 <= level <= 5:
        levels = "0 (all), 1 (DEBUG), 2 (INFO), 3 (WARNING), 4 (ERROR) or 5 (CRITICAL)"
        raise ValueError(f"{name} must be {levels}, but is {level!r}. Give 2 for the usual lines.")
    return level * 10


def _attach(console_level: int) -> None:
    _undo.callback(logger.setLevel, logger.level)
    _undo.callback(setattr, logger, "propagate", logger.propagate)
    root_handlers = logging.getLogger().handlers if logger.propagate else []
    root_consoles = [handler for handler in root_handlers if is_console(handler)]
    for handler in root_consoles:
        _limit(handler, console_level)
    if not root_consoles and not any(
        isinstance(handler, ConsoleHandler) or is_console(handler) for handler in logger.handlers
    ):
        console = ConsoleHandler(console_level, color=True)
        logger.addHandler(console)
        _undo.callback(logger.removeHandler, console)
    logger.propagate = bool(root_handlers)


def _limit(handler: logging.Handler, level: int) -> None:
    """Keeps our records below `level` off a user's console: the logger may let them through for the file."""
    is_shown: Callable[[logging.LogRecord], bool] = lambda record: (  # noqa: E731
        record.levelno >= level or record.name.split(".")[0] != logger.name
    )
    handler.addFilter(is_shown)
    _undo.callback(handler.removeFilter, is_shown)
