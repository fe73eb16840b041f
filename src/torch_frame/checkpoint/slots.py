"""The attributes of an object, whether its class keeps them in a dict or in slots."""

from __future__ import annotations

from typing import Any


def attributes_of(thing: Any) -> dict[str, Any]:
    """Name -> value of all that are set.

    >>> class Point:
    ...     __slots__ = ("x", "y")
    >>> point = Point()
    >>> point.x = 1
    >>> attributes_of(point)
    {'x': 1}
    """
    found = {name: getattr(thing, name) for name in slots_of(thing) if hasattr(thing, name)}
    return {**getattr(thing, "__dict__", {}), **found}


def slots_of(thing: Any) -> list[str]:
    """The names of its slots, as `getattr` takes them."""
    names = []
    for kind in type(thing).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            is_private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{kind.__name__.lstrip('_')}{name}" if is_private else name)
    return [name for name in names if name not in ("__dict__", "__weakref__")]
