"""What a checkpoint holds of a run: named parts, in the order of restoring.

The table (`run/table.py`) is name -> part. A part is anything with `state_dict` and `load_state_dict`; those that are not a run's
own objects are in `run/parts.py`. A part that can tell whether a saved state fits has `differences` too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch_frame._version import __version__
from torch_frame.checkpoint.format import FORMAT, VERSION, plain
from torch_frame.errors import CheckpointError

State = Mapping[str, Any]

Line = tuple[int, str]
"""(level of logging, text) of what is said when a run is resumed."""

RESTORED_FIRST = ("progress", "metric_storage", "hooks")
"""Restored before it is looked at whether the rest fits: a hook that unfreezes layers may add them to the optimizer meanwhile."""
WAITING = ("optimizers", "lr_schedulers", "settings")
"""Restored after `before_train` if the optimizer lacks layers that a hook may add there."""
RESTORED_LAST = ("data", "loader_generators", "rng")
"""Restored after everything else, before the first batch: the random numbers, and what draws some when it is restored."""


class Part(Protocol):
    """A part of a run's state."""

    def state_dict(self) -> Any:
        """What is saved: plain types and tensors."""
        ...

    def load_state_dict(self, state: Any, /) -> None:
        """Take on what was saved; None if the checkpoint does not say (one converted from 1.7)."""
        ...


@runtime_checkable
class CheckedPart(Part, Protocol):
    """A part that is compared with the saved one before anything is restored."""

    def differences(self, saved: Any, unknown: Collection[str]) -> list[str]:
        """Why the saved part cannot be restored here, in words; empty if it can.

        Args:
            saved: what `state_dict` returned.
            unknown: names of parts that the checkpoint could not say, because 1.7 did not save them.
        """
        ...


def capture(parts: Mapping[str, Part], replaced: State | None = None) -> dict[str, Any]:
    """The whole state of the run, as plain types and tensors.

    Args:
        parts: the table.
        replaced: parts that are saved as they were at an earlier moment.

    Raises:
        CheckpointError: naming what cannot be saved.
    """
    replaced = replaced or {}
    state: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "sealed": True,  # a digest follows in the file: one that lacks it has been cut
        "torch_frame": __version__,
    }
    for name, part in parts.items():  # a loop, for a comprehension is one more frame above an error in a state_dict
        state[name] = replaced[name] if name in replaced else part.state_dict()
    converted: dict[str, Any] = plain(state)
    return converted


def capture_copy(parts: Mapping[str, Part]) -> dict[str, Any] | None:
    """Some parts as they are now, sharing no memory with the run; None if one of them cannot be saved (yet)."""
    state: dict[str, Any] = {}
    try:
        for name, part in parts.items():
            state[name] = part.state_dict()
        copied: dict[str, Any] = plain(state, copy_tensors=True)
    except Exception:  # a hook's state may be complete only when its first after_epoch has run; a save tells what fails
        return None
    return copied


@runtime_checkable
class GroupedPart(Part, Protocol):
    """The optimizers: their groups may have another order than the saved ones, or come later."""

    def waits(self, saved: Any) -> str | None:
        """Why it can be restored only after `before_train`, in words; None if it can now."""
        ...

    def in_present_order(self, state: State) -> tuple[State, list[Line]]:
        """A whole state with today's groups and order, and what is to be said of it."""
        ...


@runtime_checkable
class ReplacedPart(Part, Protocol):
    """The optimizers: others may be set while a run is resumed."""

    def holds_the_same(self, other: Any) -> bool:
        """A part made later is of the same objects."""
        ...


@runtime_checkable
class RefusingPart(Part, Protocol):
    """A part whose object may refuse a state when it is loaded; it is asked when nothing else is in the way."""

    def refusals(self, saved: Any) -> list[str]:
        """What it says of a saved state, in words; it is left as it was."""
        ...


@runtime_checkable
class ComparedPart(Part, Protocol):
    """The settings, which are compared with what several other parts have saved."""

    def compare(self, state: State) -> None:
        """Look at the whole state, whose optimizers have today's order; before `differences`."""
        ...


@runtime_checkable
class UndoablePart(Part, Protocol):
    """A part with a way of its own to be put back as it was, if a resume fails."""

    def keep(self) -> Callable[[], None]:
        """What puts the part back as it is now."""
        ...


@runtime_checkable
class TalkingPart(Part, Protocol):
    """A part that has something to say when it is restored."""

    def lines(self, saved: Any) -> list[Line]:
        """What to say, before it is restored."""
        ...


@dataclass(frozen=True)
class Restored:
    """A state that has been restored in part.

    Attributes:
        state: the saved one, whose optimizers have today's groups and order.
        left: names of the parts that are restored after `before_train`, in order.
        lines: what is to be said.
        optimizers: the part that took their state.
    """

    state: State
    left: tuple[str, ...]
    lines: list[Line]
    optimizers: Any = None


def restore(parts: Mapping[str, Part], state: State) -> Restored:
    """Restore all but `RESTORED_LAST`, in the order of the table.

    Raises:
        CheckpointError: if the state does not fit. Nothing is changed then; what hooks have changed on optimizers and on
            `requires_grad` is put back.
    """
    lines: list[Line] = []
    with ExitStack() as undo:
        for name, part in reversed(list(parts.items())):  # so that they are put back in the order of the table
            if name in (*RESTORED_FIRST, *WAITING) or isinstance(part, UndoablePart):
                undo.callback(_keep(part))
        for name in RESTORED_FIRST:
            parts[name].load_state_dict(state[name])
        waits = _waits(parts, state)
        left = WAITING if waits else ()
        lines += [(logging.INFO, waits)] if waits else []
        state, said = _in_present_order(parts, state)
        lines += said
        _compare(parts, state)
        now = {name: part for name, part in parts.items() if name not in (*RESTORED_FIRST, *left, *RESTORED_LAST)}
        _check_fits({name: part for name, part in parts.items() if name in now or name == "settings"}, state)
        for name, part in now.items():
            lines += part.lines(state[name]) if isinstance(part, TalkingPart) else []
            part.load_state_dict(state[name])
        undo.pop_all()
    return Restored(state, (*left, *RESTORED_LAST), lines, parts.get("optimizers"))


def restore_last(parts: Mapping[str, Part], restored: Restored) -> list[Line]:
    """Restore the rest of a state, in the order of the table; returns what is to be said.

    Optimizers that a hook has set since `restore` take their state now.

    Raises:
        CheckpointError: if an optimizer that was waited for does not fit.
    """
    state = restored.state
    lines: list[Line] = []
    optimizers = parts.get("optimizers")
    if isinstance(optimizers, ReplacedPart) and not optimizers.holds_the_same(restored.optimizers):
        restored = replace(restored, left=tuple(dict.fromkeys((*WAITING, *restored.left))))
    if set(WAITING) & set(restored.left):
        state, lines = _in_present_order(parts, state)
        _compare(parts, state)
        _check_fits({name: parts[name] for name in WAITING}, state)
    for name in restored.left:
        parts[name].load_state_dict(state[name])
    return lines


def _keep(part: Part) -> Callable[[], None]:
    if isinstance(part, UndoablePart):
        return part.keep()
    return functools.partial(part.load_state_dict, part.state_dict())


def _waits(parts: Mapping[str, Part], state: State) -> str | None:
    optimizers = parts.get("optimizers")
    return optimizers.waits(state["optimizers"]) if isinstance(optimizers, GroupedPart) else None


def _in_present_order(parts: Mapping[str, Part], state: State) -> tuple[State, list[Line]]:
    optimizers = parts.get("optimizers")
    return optimizers.in_present_order(state) if isinstance(optimizers, GroupedPart) else (state, [])


def _compare(parts: Mapping[str, Part], state: State) -> None:
    for part in parts.values():
        if isinstance(part, ComparedPart):
            part.compare(state)


def _check_fits(parts: Mapping[str, Part], state: State) -> None:
    unknown = state.get("unknown", ())
    differences = [
        difference
        for name, part in parts.items()
        if isinstance(part, CheckedPart) and name not in unknown
        for difference in part.differences(state[name], unknown)
    ]
    differences = differences or [
        line for name, part in parts.items() if isinstance(part, RefusingPart) for line in part.refusals(state[name])
    ]
    if differences:
        raise CheckpointError(
            "The checkpoint is of another run than this trainer was built for:\n  - "
            + "\n  - ".join(differences)
            + "\nBuild the trainer as it was built then, or load the weights alone: load_checkpoint(checkpoint=...)."
        )
