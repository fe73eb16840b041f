"""An attribute of the trainer that another object holds."""

from __future__ import annotations

from operator import attrgetter
from typing import Any


def delegated(place: str, text: str, *, settable: bool = False) -> Any:
    """A property that reads, and sets, the attribute at `place`: "progress.current_epoch". `text` is its docstring."""
    owner, _, name = place.rpartition(".")

    def set_it(trainer: Any, value: Any) -> None:
        setattr(attrgetter(owner)(trainer), name, value)

    return property(attrgetter(place), set_it if settable else None, doc=text)
