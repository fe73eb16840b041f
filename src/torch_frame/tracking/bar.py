"""A progress bar that costs a training step next to nothing."""

import contextlib
import datetime
import functools
import inspect
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol, Self

from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from torch_frame.errors import TorchFrameError
from torch_frame.tracking.format import cells, showable
from torch_frame.tracking.notebook import current_area, kernel_shell, updates_outputs

_logger = logging.getLogger(__name__)

WIDTH_IN_A_NOTEBOOK = 100
"""Cells of a line of text in a notebook's page."""


def is_terminal(stream: Any) -> bool:
    """Says whether a person can watch `stream`; a missing or closed one is not a terminal.

    >>> import io
    >>> is_terminal(None), is_terminal(io.StringIO())
    (False, False)
    """
    try:
        return not getattr(stream, "closed", False) and bool(stream.isatty())
    except (AttributeError, ValueError, OSError):
        return False


def can_redraw(stream: Any, environ: Mapping[str, str] = os.environ) -> bool:
    """Says whether `stream` is a terminal that knows escape codes; `TERM=dumb` is Emacs's shell, a serial line, some CI."""
    return is_terminal(stream) and environ.get("TERM", "").lower() not in ("dumb", "unknown")


def in_notebook() -> bool:
    """Says whether this process is a notebook's kernel; imports nothing."""
    return kernel_shell() is not None


class TerminalBar(tqdm):  # type: ignore[misc,unused-ignore]
    """tqdm without its monitor thread, and with a lock of its own.

    tqdm's own lock holds a multiprocessing lock (which fixes the start method of the whole process), stays locked in a
    child forked at the wrong moment, and is never released where drawing raises. Bars that users make are still in the
    shared `_instances`, so that a line on the console clears them too.
    """

    monitor_interval = 0
    _lock = threading.RLock()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except BaseException:  # half-made, it would keep its place on the screen until it is collected
            self.abandon()
            raise

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> Any:
        """Redraws, and releases the lock whatever happens."""
        with self._lock:
            return super().refresh(nolock=True)

    def clear(self, nolock: bool = False) -> None:
        """Wipes the bar off the screen, and releases the lock whatever happens."""
        with self._lock:
            super().clear(nolock=True)

    def abandon(self) -> None:
        """Makes sure that tqdm never draws this bar again, its finaliser included."""
        self.disable = True
        self._instances.discard(self)


def _renew_lock() -> None:
    TerminalBar._lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # a thread of the parent may hold the lock in the moment of the fork
    os.register_at_fork(after_in_child=_renew_lock)


def _size_keywords(stream: Any) -> dict[str, Any]:
    """Follows the terminal's width; one that reports 0 x 0 (expect, docker exec) would make tqdm draw nothing."""
    try:
        size = os.get_terminal_size(stream.fileno())
    except (AttributeError, ValueError, OSError):
        return {}
    return {"dynamic_ncols": True} if size.columns and size.lines else {"ncols": 80, "nrows": 24}


def _encoding_of(stream: Any) -> str:
    encoding = getattr(stream, "encoding", None)
    return encoding if isinstance(encoding, str) else "utf-8"


def _is_disabled_by_environment() -> bool:
    return os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")


@functools.cache
def _known_to_tqdm() -> frozenset[str]:
    """Its keyword arguments that make sense here; looked up once, for that takes as long as two draws."""
    known = {*inspect.signature(tqdm.__init__).parameters, "display"}
    return frozenset(known - {"self", "iterable", "gui", "kwargs"})


def _check_tqdm_kwargs(tqdm_kwargs: Mapping[str, Any], interval_s: float | None) -> None:
    unknown = sorted(tqdm_kwargs.keys() - _known_to_tqdm())
    if unknown:
        raise TypeError(f"ProgressBar got {unknown}, which neither it nor tqdm knows. Remove or rename {unknown[0]!r}.")
    if interval_s is not None and "mininterval" in tqdm_kwargs:
        raise TypeError("ProgressBar got interval_s and mininterval, which mean the same. Give only interval_s.")


def _format(value: Any) -> str:
    if isinstance(value, Integral | str):
        return str(value).strip()
    return f"{value:.4g}" if isinstance(value, Real) else str(value)


def _parts(bar: "ProgressBar", encoding: str) -> list[str]:
    """What stands behind a drawn bar."""
    parts = [*(f"{key}={value}" for key, value in bar.shown().items()), *bar.notes()]
    return [showable(part, encoding) for part in parts]


def _is_utf(encoding: str) -> bool:
    """GBK and others have the blocks that bars are drawn with too, but terminals show them twice as wide there."""
    return encoding.lower().startswith(("utf", "u8", "cp65001"))


def _those_that_fit(parts: list[str], room: float) -> list[str]:
    """The first of the parts, as many as fit whole, each with a comma before it.

    >>> _those_that_fit(["total_loss=0.5", "acc=0.9"], room=20)
    ['total_loss=0.5']
    """
    fitting = []
    for part in parts:
        room -= cells(part) + 2
        if room < 0:
            break
        fitting.append(part)
    return fitting


class _Display(Protocol):
    """Where a `ProgressBar` shows itself: a drawn bar or lines in the log."""

    interval_s: float

    def draw(self, bar: "ProgressBar") -> None: ...
    def close(self, bar: "ProgressBar") -> None: ...
    def abandon(self) -> None: ...


class _DrawnBar:
    """A bar that tqdm draws and redraws in place, on a terminal or in a notebook."""

    def __init__(self, bar_class: type[TerminalBar], **tqdm_kwargs: Any) -> None:
        self._encoding = _encoding_of(tqdm_kwargs.get("file") or sys.stderr)
        own = {"desc": showable(tqdm_kwargs.pop("desc", None) or "", self._encoding)}
        self._tqdm = bar_class(**{"ascii": None if _is_utf(self._encoding) else True, **tqdm_kwargs, **own})
        # tqdm has settled its arguments and environment variables; from here on the gate is ours.
        self.interval_s = float(self._tqdm.mininterval)
        self._tqdm.mininterval = 0

    def _take(self, bar: "ProgressBar") -> None:
        if getattr(self._tqdm.fp, "closed", False):
            raise ValueError("the stream it draws on is closed")
        self._tqdm.total = bar.total
        self._tqdm.desc = showable(bar.desc, self._encoding)
        self._tqdm.postfix = ", ".join(_those_that_fit(_parts(bar, self._encoding), self._room(bar)))

    def _room(self, bar: "ProgressBar") -> float:
        """Cells behind the counts and times, beside a bar of ten cells; infinite if the line has no width."""
        given = self._tqdm.format_dict
        if not given.get("ncols"):
            return math.inf
        line = self._tqdm.format_meter(**{**given, "n": bar.n, "ncols": None, "postfix": None})
        return float(given["ncols"] - cells(line))

    def draw(self, bar: "ProgressBar") -> None:
        self._take(bar)
        self._tqdm.update(bar.n - self._tqdm.n)

    def close(self, bar: "ProgressBar") -> None:
        try:
            self._tqdm.n = bar.n
            self._take(bar)
        finally:
            self._tqdm.close()

    def abandon(self) -> None:
        self._tqdm.abandon()


class _NotebookLine:
    """A line of text in a notebook's output, replaced in place."""

    def __init__(self, total: float | None, initial: float, unit: str, tqdm_kwargs: Mapping[str, Any]) -> None:
        self.interval_s = max(float(tqdm_kwargs.get("mininterval", 0.5)), 0.5)
        self._width = tqdm_kwargs.get("ncols") or WIDTH_IN_A_NOTEBOOK
        self._leave = tqdm_kwargs.get("leave", True)
        self._initial, self._unit = initial, unit
        self._started_s = perf_counter()
        self._area = current_area()

    def draw(self, bar: "ProgressBar") -> None:
        self._area.show(self, self._line(bar))

    def _line(self, bar: "ProgressBar") -> str:
        meter: dict[str, Any] = {
            "n": bar.n,
            "total": bar.total,
            "elapsed": perf_counter() - self._started_s,
            "prefix": showable(bar.desc.removesuffix(": ")),
            "unit": self._unit,
            "initial": self._initial,
        }
        fitting = _those_that_fit(_parts(bar, "utf-8"), self._width - cells(tqdm.format_meter(**meter)))
        return str(tqdm.format_meter(**meter, ncols=self._width, postfix=", ".join(fitting)))

    def close(self, bar: "ProgressBar") -> None:
        if self._leave:
            self.draw(bar)
        else:
            self.abandon()

    def abandon(self) -> None:
        with contextlib.suppress(Exception):
            self._area.remove(self)


class _LogLines:
    """A line in the log every `interval_s` seconds, for everything that is no screen."""

    def __init__(self, initial: float, unit: str, interval_s: float) -> None:
        self.interval_s = interval_s
        self._unit = unit
        self._last_n, self._last_s = initial, perf_counter()

    def _speed(self, bar: "ProgressBar") -> list[str]:
        """Rate since the last line, and the time left at that rate."""
        now_s = perf_counter()
        rate = (bar.n - self._last_n) / max(now_s - self._last_s, 1e-9)
        self._last_n, self._last_s = bar.n, now_s
        if rate <= 0:
            return []
        speed = f"{rate:.1f} {self._unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{self._unit}"
        if bar.total is None:
            return [speed]
        return [speed, f"ETA {datetime.timedelta(seconds=int(max(bar.total - bar.n, 0) / rate))}"]

    def draw(self, bar: "ProgressBar") -> None:
        place = f"{bar.n:g}" if isinstance(bar.n, float) else str(bar.n)
        if bar.total is not None:
            place += f"/{bar.total}"
        values = [f"{key} {value}" for key, value in bar.shown().items()]
        parts = [bar.desc.removesuffix(": "), place, *self._speed(bar), *values, *bar.notes()]
        _logger.info("%s", showable("  ".join(part for part in parts if part)))

    def close(self, bar: "ProgressBar") -> None:
        pass

    def abandon(self) -> None:
        pass


def _open_display(
    total: float | None, desc: str, initial: float, unit: str, plain_interval_s: float, tqdm_kwargs: dict[str, Any]
) -> _Display:
    stream = tqdm_kwargs.get("file") or sys.stderr
    if updates_outputs(kernel_shell()):
        return _NotebookLine(total, initial, unit, tqdm_kwargs)
    if not can_redraw(stream):
        return _LogLines(initial, unit, plain_interval_s)
    defaults = {"miniters": 0, **_size_keywords(stream)}
    # disable=False: whatever TQDM_DISABLE held when tqdm was imported, it is we who read it.
    counts = {"total": total, "desc": desc, "initial": initial, "unit": unit, "disable": False}
    return _DrawnBar(TerminalBar, **{**defaults, **tqdm_kwargs, **counts})


class ProgressBar:
    """Shows how far a loop has come: a bar on a terminal or in a notebook, now and then a log line elsewhere.

    `update()` adds to `n` and looks at the clock; all else, reading the values included, happens when it is time to
    draw. A bar that can't be drawn (an odd terminal, an encoding, a closed stream) turns itself off; the run goes on.
    Only torch-frame's own errors that `values` raises are raised.

    Args:
        total: the count at the end, if known.
        desc: what stands before the bar.
        initial: the count at the start, for a resumed run.
        unit: what is counted.
        values: gives what is shown behind the bar; called only when it is drawn, so it may read from the device.
        interval_s: seconds between two draws; default 0.1, or `TQDM_MININTERVAL`.
        plain_interval_s: seconds between two log lines where there is no screen.
        disable: shows nothing. So does the environment variable `TQDM_DISABLE=1`.
        tqdm_kwargs: further arguments of tqdm: `leave`, `position`, `ncols`, `file`, ...

    Raises:
        TypeError: an argument that tqdm doesn't know.

    >>> with ProgressBar(total=3, desc="epoch 1/1", disable=True) as bar:
    ...     for loss in (0.3, 0.2, 0.1):
    ...         bar.set_postfix(loss=loss)
    ...         bar.update()
    >>> bar.n
    3
    """

    def __init__(
        self,
        total: float | None = None,
        desc: str = "",
        *,
        initial: float = 0,
        unit: str = "it",
        values: Callable[[], Mapping[str, float]] | None = None,
        interval_s: float | None = None,
        plain_interval_s: float = 30.0,
        disable: bool = False,
        **tqdm_kwargs: Any,
    ) -> None:
        _check_tqdm_kwargs(tqdm_kwargs, interval_s)
        self.n = initial
        self.total = total
        self.desc = desc
        self._values = values
        self._postfix: dict[str, Any] = {}
        self._note = ""
        self._display: _Display | None = None
        self._next_draw_s = math.inf
        if disable or _is_disabled_by_environment():
            return
        if interval_s is not None:
            tqdm_kwargs["mininterval"] = interval_s
        try:
            self._display = _open_display(total, desc, initial, unit, plain_interval_s, tqdm_kwargs)
            self._next_draw_s = perf_counter() + self._display.interval_s
        except Exception as error:
            self._turn_off(error)

    def update(self, n: float = 1) -> None:
        """Counts `n` more, and draws if it is time to."""
        self.n += n
        if perf_counter() >= self._next_draw_s:
            self._draw()

    def set_postfix(self, values: Mapping[str, Any] | None = None, refresh: bool = False, **more: Any) -> None:
        """Sets what stands behind the bar; drawn when it is time to, or at once with `refresh=True`."""
        self._postfix = {**(values or {}), **more}
        self._note = ""
        self._show(refresh)

    def set_postfix_str(self, s: str = "", refresh: bool = False) -> None:
        """Sets a text behind the bar, in place of what `set_postfix` set."""
        self._postfix = {}
        self._note = str(s)
        self._show(refresh)

    def set_description(self, desc: str | None = None, refresh: bool = False) -> None:
        """Sets what stands before the bar; a colon is added."""
        self.set_description_str(f"{desc}: " if desc else "", refresh)

    def set_description_str(self, desc: str | None = None, refresh: bool = False) -> None:
        """Sets what stands before the bar."""
        self.desc = desc or ""
        self._show(refresh)

    def shown(self) -> dict[str, str]:
        """The named values behind the bar as text: those set by hand, then `values()`."""
        read = self._values() if self._values is not None else {}
        return {key: _format(value) for key, value in {**self._postfix, **read}.items()}

    def notes(self) -> list[str]:
        """The text of `set_postfix_str`, if there is one."""
        return [self._note] if self._note else []

    def close(self) -> None:
        """Draws the bar for the last time. Closing twice is fine."""
        display, self._display = self._display, None
        self._next_draw_s = math.inf
        if display is None:
            return
        try:
            display.close(self)
        except Exception as error:
            self._display = display
            self._turn_off(error)

    def _show(self, at_once: bool) -> None:
        if self._display is not None and (at_once or perf_counter() >= self._next_draw_s):
            self._draw()

    def _draw(self) -> None:
        assert self._display is not None
        try:
            self._display.draw(self)
            # Counted from the end of the drawing: a slow terminal must not eat the run's time.
            self._next_draw_s = perf_counter() + self._display.interval_s
        except TorchFrameError:  # a value that was read here ends the run: it is not finite
            raise
        except Exception as error:
            self._turn_off(error)

    def _turn_off(self, error: Exception) -> None:
        if self._display is not None:
            self._display.abandon()
        self._display = None
        self._next_draw_s = math.inf
        _logger.debug("The progress bar is off: %s: %s", type(error).__name__, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
