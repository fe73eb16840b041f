"""The settings that a saved record and a script's disagree on, one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch_frame.training.schedule_settings import Unknown, settings_in, simple

Record = Mapping[str, Any]

BY_SCHEDULE = frozenset({"lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"})
"""Settings of a group that its schedule makes, and computes with."""


@dataclass(frozen=True)
class Difference:
    """A setting that the script and the checkpoint disagree on.

    Attributes:
        kind: where it is set: of a parameter group, the schedule (its class, or a value of its functions), or the warm-up.
        name: such as "lr", "T_max", "schedulers[1].gamma", "warmup_iters".
        saved, script: its values.
        group: index of the optimizer's parameter group.
    """

    kind: Literal["group", "schedule", "class", "function", "warmup"]
    name: str
    saved: Any
    script: Any
    group: int | None = None

    def __str__(self) -> str:
        return f"{self.name} (saved {shown(self.saved)}, the script's {shown(self.script)})"


def as_set(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an optimizer's group as its script has set them: the learning rate is that before the schedule."""
    left_out = {"params", "param_names", "initial_lr", *(("momentum",) if "max_momentum" in group else ())}
    settings = {str(name): simple(value) for name, value in group.items() if name not in left_out}
    settings["lr"] = simple(group.get("initial_lr", group["lr"]))
    if "max_momentum" in group and "betas" in group:  # the schedule moves the first one
        settings["betas"] = settings["betas"][1:]
    return {name: value for name, value in settings.items() if value is not Unknown}


def derived(
    groups: Sequence[Mapping[str, Any]], counts: Mapping[str, Any], classes: Mapping[str, Any]
) -> dict[str, Any]:
    """A record from a state that has none, as far as what was set can be seen in what is in force.

    Args:
        groups: of the optimizer.
        counts: `state_dict` of the `LRWarmupScheduler`.
        classes: names of classes, if they are known.
    """
    scheduler = counts["scheduler"]
    made = []
    for group, rate in zip(groups, counts["regular_lrs"], strict=False):
        settings = as_set(group if "initial_lr" in group else {**group, "lr": rate})
        made.append({"params": list(group["params"]), **settings})
    record = None if scheduler is None else settings_in(scheduler, classes.get("lr_scheduler"))
    return {"groups": made, "schedule": record, "warmup": list(counts["warmup"])}


def differing(saved: Record, script: Record) -> Iterator[Difference]:
    """All that two records disagree on; what only one of them has is left out."""
    groups = SavedGroups(saved["groups"])
    for index, group in enumerate(script["groups"]):
        other = groups.of(group, index)
        for name, value in group.items():
            if name != "params" and name in other and not _same(other[name], value):
                yield Difference("group", name, other[name], value, index)
    yield from _differing_schedules(saved["schedule"], script["schedule"])
    was, now = saved["warmup"], script["warmup"]
    names = ("warmup_method", "warmup_iters", "warmup_factor") if None not in (was[0], now[0]) else ("warmup_method",)
    for name, old, new in zip(names, was, now, strict=False):
        if not _same(old, new):
            yield Difference("warmup", name, old, new)


class SavedGroups:
    """The groups of a saved record, to be found by the names of their parameters."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._groups = groups
        self._of: dict[str, Mapping[str, Any]] = {}
        for group in groups:
            for name in group["params"]:
                self._of.setdefault(name, group)

    def of(self, group: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        """The saved group that held this one's first named parameter; without names the one at its place."""
        name = next((name for name in group["params"] if isinstance(name, str)), None)
        if name is not None and name in self._of:
            return self._of[name]
        return self._groups[index] if index < len(self._groups) else {}


def _differing_schedules(saved: Record | None, script: Record | None, place: str = "") -> Iterator[Difference]:
    if saved is None or script is None:
        if saved is not script:
            names = [None if record is None else record["class"] for record in (saved, script)]
            yield Difference("class", "lr_scheduler", *names)
        return
    if saved["class"] is not None and saved["class"] != script["class"]:
        yield Difference("class", place.rstrip(".") or "lr_scheduler", saved["class"], script["class"])
        return
    for name, value in script["settings"].items():
        if name in saved["settings"] and not _same(saved["settings"][name], value):
            yield Difference("schedule", place + name, saved["settings"][name], value)
    yield from _differing_functions(saved["functions"], script["functions"], place)
    if len(saved["schedulers"]) != len(script["schedulers"]):
        yield Difference("class", f"{place}schedulers", len(saved["schedulers"]), len(script["schedulers"]))
        return
    for index, (was, now) in enumerate(zip(saved["schedulers"], script["schedulers"], strict=True)):
        yield from _differing_schedules(was, now, f"{place}schedulers[{index}].")


def _differing_functions(saved: Sequence[Record], script: Sequence[Record], place: str) -> Iterator[Difference]:
    for was, now in zip(saved, script, strict=False):
        kind: Literal["schedule", "function"] = "schedule" if now["is_stateful"] else "function"
        for name, value in now["values"].items():
            if name in was["values"] and not _same(was["values"][name], value):
                yield Difference(kind, f"{place}{name}", was["values"][name], value)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-7) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


def shown(value: Any) -> str:
    """A setting's value in a message."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)
