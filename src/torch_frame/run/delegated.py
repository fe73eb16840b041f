"""Attributes of the trainer that another object holds, and those that a subclass has of its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any


def delegated(place: str, text: str, *, settable: bool = False) -> Any:
    """A property that reads, and sets, the attribute at `place`: "progress.current_epoch". `text` is its docstring."""
    owner, _, name = place.rpartition(".")

    def set_it(trainer: Any, value: Any) -> None:
        setattr(attrgetter(owner)(trainer), name, value)

    return property(attrgetter(place), set_it if settable else None, doc=text)


def is_overridden(thing: Any, base: type, *names: str) -> bool:
    """The object's class has another method or property than `base` under one of the names."""
    return any(getattr(type(thing), name) is not getattr(base, name) for name in names)


def overridden(thing: Any, base: type, *names: str) -> Mapping[str, Callable[[], Any]]:
    """name -> what gives its value, of the properties that the object's class has of its own; they do not keep it alive."""
    proxy = weakref.proxy(thing)
    return {name: partial(getattr, proxy, name) for name in names if is_overridden(thing, base, name)}
