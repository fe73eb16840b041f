"""One output of a notebook's cell that shows what changes, and nothing when all is done."""

from __future__ import annotations

import sys
from typing import Any


def kernel_shell() -> Any:
    """The IPython shell that talks to a notebook, or None; imports nothing."""
    if "ipykernel" not in sys.modules or "IPython" not in sys.modules:
        return None
    shell = sys.modules["IPython"].get_ipython()
    return shell if hasattr(shell, "kernel") else None


def updates_outputs(shell: Any) -> bool:
    """Whether what a cell has shown can be replaced: not in Spyder, whose console only adds lines."""
    return shell is not None and not type(shell).__name__.startswith("Spyder")


class Area:
    """Lines of plain text in one output, each put there by a bar and replaced at will.

    Plain text, and no widget: it needs no ipywidgets, is shown by every front end, and is what a saved notebook keeps.

    Args:
        count: the number of the cell that is running.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._lines: dict[object, str] = {}
        self._handle: Any = None

    def show(self, owner: object, line: str) -> None:
        """Put a line there, or replace the one of this owner."""
        self._lines[owner] = line
        self._update()

    def remove(self, owner: object) -> None:
        """Take an owner's line away, if there is one."""
        if self._lines.pop(owner, None) is not None:
            self._update()

    def _update(self) -> None:
        from IPython.display import display  # type: ignore[import-not-found,unused-ignore]

        shown = {"text/plain": "\n".join(self._lines.values())}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)


_area: Area | None = None


def current_area() -> Area:
    """The area of the cell that is running: bars of one run after another share it."""
    global _area
    count = int(getattr(kernel_shell(), "execution_count", 0) or 0)
    if _area is None or _area.count != count:
        _area = Area(count)
    return _area
