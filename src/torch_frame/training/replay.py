"""A schedule as it would stand now if its run had been made with it: built anew, and stepped."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from torch_frame.training.schedule_state import load_state, state_of
from torch_frame.training.schedules import LRWarmupScheduler

_KEPT_BY_PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


@dataclass(frozen=True)
class Snapshot:
    """A schedule and the settings of its optimizer's groups at one moment, without the warm-up.

    Attributes:
        scheduler: `state_dict` of torch's scheduler; None if there is none.
        groups: the settings of each parameter group, all but its parameters.
    """

    scheduler: dict[str, Any] | None
    groups: list[dict[str, Any]]

    @classmethod
    def of(cls, schedule: LRWarmupScheduler, rates: Sequence[float] | None = None) -> Self:
        """As they are now; with `rates`, the groups' learning rates are those."""
        groups = [
            {name: _copied(value) for name, value in group.items() if name != "params"}
            for group in schedule.optimizer.param_groups
        ]
        for group, rate in zip(groups, rates or (), strict=False):
            group["lr"] = rate
        return cls(None if schedule.scheduler is None else _copied(state_of(schedule.scheduler)), groups)

    def write(self, schedule: LRWarmupScheduler) -> None:
        """Put them back into the same objects."""
        self.write_scheduler(schedule)
        for group, settings in zip(schedule.optimizer.param_groups, self.groups, strict=False):
            for name, value in settings.items():
                set_in_group(group, name, value)

    def write_scheduler(self, schedule: LRWarmupScheduler) -> None:
        """Put the scheduler back only."""
        if schedule.scheduler is not None and self.scheduler is not None:
            load_state(schedule.scheduler, self.scheduler)


def set_in_group(group: dict[str, Any], name: str, value: Any) -> None:
    """Set a group's setting; a tensor stays the same tensor."""
    own = group.get(name)
    if isinstance(own, Tensor) and isinstance(value, Tensor):
        own.copy_(value)
    elif isinstance(own, Tensor):
        own.fill_(value)
    else:
        group[name] = _copied(value)


def replayed(schedule: LRWarmupScheduler, begin: Snapshot, steps: int) -> Snapshot:
    """The schedule and its groups after a number of steps from `begin`; what there is now is left as it is.

    By torch's own steps, so that the rates are those of a run with this schedule to the last bit.

    Raises:
        ValueError: if the schedule is shorter than that (OneCycleLR).
    """
    groups = schedule.optimizer.param_groups
    before = Snapshot.of(schedule)
    added = groups[len(begin.groups) :]  # by a hook, during the run
    del groups[len(begin.groups) :]
    try:
        begin.write(schedule)
        with warnings.catch_warnings():
            # torch misses the optimizer's steps between these
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step|Seems like `optimizer\.step")
            for _ in range(steps if schedule.scheduler is not None else 0):
                schedule.scheduler.step()  # type: ignore[union-attr]
        return Snapshot.of(schedule)
    finally:
        groups += added
        before.write(schedule)


def with_counts_of_plateau(begin: Snapshot, saved: Mapping[str, Any], rates: Sequence[float]) -> Snapshot:
    """A ReduceLROnPlateau with the script's settings that has seen what the saved one has seen.

    Args:
        begin: the script's.
        saved: `state_dict` of the saved one. Its best value belongs to its direction.
        rates: the rates of the groups now.
    """
    assert begin.scheduler is not None
    kept = {name: saved[name] for name in _KEPT_BY_PLATEAU if name in saved}
    if saved.get("mode") != begin.scheduler["mode"]:
        kept |= {name: begin.scheduler[name] for name in ("best", "num_bad_epochs")}
    groups = [{**group, "lr": rate} for group, rate in zip(begin.groups, rates, strict=False)]
    return Snapshot({**begin.scheduler, **kept, "_last_lr": list(rates)}, groups)


def _copied(value: Any) -> Any:
    """A copy of containers and tensors; anything else is shared."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        made = copy.copy(value)
        for key, item in value.items():
            made[key] = _copied(item)
        return made
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return tuple(_copied(item) for item in value) if type(value) is tuple else value
