"""What a checkpoint holds of a run: named parts, in the order of restoring.

The trainer makes the table (`Trainer._parts`): name -> part. A part is anything with `state_dict` and `load_state_dict`; those
that are not a run's own objects are in `run/parts.py`. A part that can tell whether a saved state fits has `differences` too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from torch_frame._version import __version__
from torch_frame.checkpoint.format import FORMAT, VERSION, plain
from torch_frame.errors import CheckpointError

State = Mapping[str, Any]

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
    """Some parts as they are now, sharing no memory with the run; None if one of them cannot be saved."""
    state: dict[str, Any] = {}
    for name, part in parts.items():
        state[name] = part.state_dict()
    try:
        copied: dict[str, Any] = plain(state, copy_tensors=True)
    except CheckpointError:
        return None
    return copied


def restore(parts: Mapping[str, Part], state: State) -> None:
    """Restore all but `RESTORED_LAST`, in the order of the table.

    Raises:
        CheckpointError: if the state does not fit; that is checked before anything is changed.
    """
    _check_fits(parts, state)
    for name, part in parts.items():
        if name not in RESTORED_LAST:
            part.load_state_dict(state[name])


def restore_last(parts: Mapping[str, Part], state: State) -> None:
    """Restore the rest of a state."""
    for name in RESTORED_LAST:
        parts[name].load_state_dict(state[name])


def _check_fits(parts: Mapping[str, Part], state: State) -> None:
    unknown = state.get("unknown", ())
    differences = [
        difference
        for name, part in parts.items()
        if isinstance(part, CheckedPart) and name not in unknown
        for difference in part.differences(state[name], unknown)
    ]
    if differences:
        raise CheckpointError(
            "The checkpoint is of another run than this trainer was built for:\n  - "
            + "\n  - ".join(differences)
            + "\nBuild the trainer as it was built then, or load the weights alone: load_checkpoint(checkpoint=...)."
        )
