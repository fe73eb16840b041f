"""Figures of an evaluation: made from its metrics, handed to the writers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch_frame.errors import SettingError


def check_figures(figures: Mapping[str, Callable[[Any], Any]] | None, owner: str) -> dict[str, Callable[[Any], Any]]:
    """The functions by name.

    Raises:
        TypeError: they are something else.
    """
    if figures is None:
        return {}
    if not isinstance(figures, Mapping) or not all(callable(function) for function in figures.values()):
        raise TypeError(
            f"figures of {owner} is {figures!r}; it has to be {{name: function of the metric that returns a figure}}."
        )
    return dict(figures)


def check_can_draw(names: Iterable[str], owner: str) -> None:
    """matplotlib is there, if any figure is asked for.

    Raises:
        SettingError: it is not installed.
    """
    if not list(names):
        return
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise SettingError(
            f"figures of {owner} need matplotlib, which is not installed. Run: pip install 'torch-frame[report]'"
        ) from error


def checked_figure(name: str, figure: Any) -> Any:
    """What a function of `figures` returned: a figure, or None: nothing to show.

    Raises:
        TypeError: it is something else.
    """
    if figure is not None and not hasattr(figure, "savefig"):
        raise TypeError(
            f"The function of the figure {name!r} returned {type(figure).__name__}; it has to return a matplotlib figure."
        )
    return figure
