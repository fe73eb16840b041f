"""Which logging handlers show their records on the screen, so that no line is there twice."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

_WRITING_TO_A_SCREEN = frozenset({"print", "stdout", "stderr", "__stdout__", "__stderr__", "tqdm", "echo", "secho"})


def is_console(handler: logging.Handler) -> bool:
    """Whether a handler shows its records on the screen, as far as can be seen.

    A stream handler does by its stream, rich's by its console, one that hands records on (to a target, a listener) by where they
    go. Of a class of a user's own the code of `emit` tells: it prints, names stdout or stderr, uses tqdm or click, or hands
    records to loguru. A handler that cannot be told is none: then a line may be on the screen twice, but is not lost.
    """
    return _is_console(handler, depth=0)


def _is_console(handler: Any, depth: int) -> bool:
    stream = getattr(getattr(handler, "console", handler), "file" if hasattr(handler, "console") else "stream", None)
    if stream is not None:
        return any(stream is screen for screen in _screens())
    if depth < 3 and any(_is_console(other, depth + 1) for other in _behind(handler)):
        return True
    if not isinstance(handler, logging.Handler):
        return False
    return any(_shows(method.__code__, method.__globals__) for method in _emitting(type(handler)))


def _screens() -> list[Any]:
    return [stream for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__) if stream is not None]


def _behind(handler: Any) -> Iterator[Any]:
    """The handlers that a handler hands its records to: logging's and absl's."""
    yield from (
        other for other in (getattr(handler, "target", None), getattr(handler, "_current_handler", None)) if other
    )
    yield from getattr(getattr(handler, "listener", None), "handlers", ())


def _emitting(kind: type[logging.Handler]) -> list[FunctionType]:
    """A user's own `emit`, and the methods of the class that it names."""
    emit = kind.emit
    if not isinstance(emit, FunctionType) or emit.__module__.partition(".")[0] == "logging":
        return []
    named = [getattr(kind, name, None) for name in emit.__code__.co_names]
    own = [method for method in named if isinstance(method, FunctionType)]
    return [emit, *(method for method in own if method.__module__.partition(".")[0] != "logging")]


def _shows(code: CodeType, names: dict[str, Any]) -> bool:
    used = {*code.co_names, *code.co_freevars}
    of_loguru = any(type(names.get(name)).__module__.partition(".")[0] == "loguru" for name in used)
    inner = any(_shows(constant, names) for constant in code.co_consts if isinstance(constant, CodeType))
    return of_loguru or inner or not _WRITING_TO_A_SCREEN.isdisjoint(used)
