"""The settings that a script has set, and how they come into force when its run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_frame.run.setting_differences import BY_SCHEDULE, Difference, SavedGroups, as_set
from torch_frame.training.replay import Snapshot, set_in_group
from torch_frame.training.schedule_settings import settings_of
from torch_frame.training.schedules import LRWarmupScheduler

State = Mapping[str, Any]
Choice = Literal["checkpoint", "script"]


@dataclass
class Plan:
    """What becomes of the differences.

    Attributes:
        saved: the record of the checkpoint.
        counts: `state_dict` of the saved `LRWarmupScheduler`.
        differing: the settings.
        refused: why the run cannot continue, in words.
        target: the script's schedule and groups, where the run stands; None: the saved schedule continues.
        notes: sentences to be told.
        is_done: it has been carried out.
    """

    saved: Mapping[str, Any]
    counts: State
    differing: list[Difference]
    refused: list[str] = field(default_factory=list)
    target: Snapshot | None = None
    notes: list[str] = field(default_factory=list)
    is_done: bool = False


class Settings:
    """What the script has set of the optimizer's groups and of the schedule, kept from when the trainer was made.

    Args:
        choice: `resume_settings`: None and "checkpoint": the saved ones count; "script": the script's.
        schedule: with the optimizer and scheduler of the script.
        model: bare; gives the parameters their names.
    """

    def __init__(self, choice: Choice | None, schedule: LRWarmupScheduler, model: nn.Module) -> None:
        self.choice = choice
        self.schedule = schedule
        self.begin = Snapshot.of(schedule, schedule.regular_lrs)
        names = {id(parameter): name.replace("_orig_mod.", "") for name, parameter in model.named_parameters()}
        groups = [
            {"params": [names.get(id(parameter)) for parameter in group["params"]], **as_set(settings)}
            for group, settings in zip(schedule.optimizer.param_groups, self.begin.groups, strict=True)
        ]
        self.script: Mapping[str, Any] = {
            "groups": groups,
            "schedule": settings_of(schedule.scheduler),
            "warmup": [schedule.warmup_method, schedule.warmup_iters, schedule.warmup_factor],
        }
        self.in_force: Mapping[str, Any] = self.script
        self.plan: Plan | None = None

    @property
    def saved_count(self) -> bool:
        """The settings in force are a checkpoint's."""
        return self.plan is not None and self.choice != "script"

    @property
    def builds_anew(self) -> bool:
        """The saved schedule is not restored, for the script's is built anew and stepped."""
        return self.plan is not None and self.plan.target is not None


class AllSettings:
    """The settings of each optimizer and its schedule.

    Args:
        choice, model: see `Settings`.
        schedules: label of the optimizer -> schedule.

    Attributes:
        each: label of the optimizer -> its settings.
    """

    def __init__(self, choice: Choice | None, model: nn.Module, schedules: Mapping[str, LRWarmupScheduler]) -> None:
        self._choice = choice
        self._model = model
        self.each: dict[str, Settings] = {}
        self.renew(schedules)

    def renew(self, schedules: Mapping[str, LRWarmupScheduler]) -> None:
        """A script or a hook has set these schedules: those that are new are settings of the script from now on."""
        before = self.each
        self.each = {
            label: before[label]
            if label in before and before[label].schedule is schedule
            else Settings(self._choice, schedule, self._model)
            for label, schedule in schedules.items()
        }

    @property
    def saved_count(self) -> bool:
        """The settings in force are a checkpoint's."""
        return any(settings.saved_count for settings in self.each.values())


def rates_of_plateau(plan: Plan, settings: Settings, same_class: bool) -> list[float]:
    """The script's rates, reduced as often as the saved ones were."""
    rates = []
    saved = SavedGroups(plan.saved["groups"])
    for index, (group, rate) in enumerate(zip(settings.script["groups"], plan.counts["regular_lrs"], strict=False)):
        was = saved.of(group, index).get("lr")
        if not same_class or not was:
            rates.append(group["lr"])
        else:
            rates.append(rate if was == group["lr"] else group["lr"] * (rate / was))
    return rates


def write_groups(plan: Plan, settings: Settings) -> None:
    """Give the groups the settings that differ, and those that their schedule makes and moves."""
    source = settings.begin if plan.target is None else plan.target
    differing: dict[int, set[str]] = {}
    for one in plan.differing:
        if one.kind == "group" and one.group is not None:
            differing.setdefault(one.group, set()).add(one.name)
    for index, (group, begin, values) in enumerate(
        zip(settings.schedule.optimizer.param_groups, settings.begin.groups, source.groups, strict=False)
    ):
        names = differing.get(index, set())
        if plan.target is not None:
            names |= {name for name in values if name in BY_SCHEDULE or values[name] != begin.get(name)}
            names |= _left_by_saved_schedule(group, values)
        for name in names - {"lr"}:
            set_in_group(group, name, values[name])
        if names & {"fused", "capturable"}:
            _move_step_counts(group, settings.schedule.optimizer)


def _left_by_saved_schedule(group: dict[str, Any], values: Mapping[str, Any]) -> set[str]:
    """Settings that the saved schedule has moved and the script's may not; entries that only the saved one makes are removed."""
    cycled = {"momentum", "betas"} & values.keys() if "max_momentum" in group else set()
    for name in BY_SCHEDULE - values.keys():
        group.pop(name, None)
    return cycled


def _move_step_counts(group: Mapping[str, Any], optimizer: Optimizer) -> None:
    """A fused or capturable optimizer counts its steps where the parameter is, another one on the CPU."""
    on_device = group.get("fused") or group.get("capturable")
    for parameter in group["params"]:
        step = optimizer.state[parameter].get("step") if parameter in optimizer.state else None
        if isinstance(step, Tensor):
            optimizer.state[parameter]["step"] = step.to(parameter.device if on_device else "cpu")


def continue_schedule(plan: Plan, settings: Settings) -> None:
    schedule = settings.schedule
    rates = list(plan.counts["regular_lrs"])
    if plan.target is not None:
        changed = {one.group for one in plan.differing if one.kind == "group" and one.name == "lr"}
        by_schedule = schedule.scheduler is not None or any(one.kind == "class" for one in plan.differing)
        for index, group in enumerate(plan.target.groups):
            if by_schedule or index in changed:
                rates[index] = float(group["lr"])
        plan.target.write_scheduler(schedule)
    schedule.warmup_method, schedule.warmup_iters, schedule.warmup_factor = settings.script["warmup"]
    schedule.continue_at(plan.counts, rates)


def with_functions(saved: Any, script: Any) -> Any:
    """The saved schedule with the values of the script's functions, which are in force whatever was chosen."""
    if saved is None or script is None:
        return saved
    functions = [
        next((was for was in saved["functions"][index : index + 1] if now["is_stateful"]), now)
        for index, now in enumerate(script["functions"])
    ]
    pairs = zip(saved["schedulers"], script["schedulers"], strict=False)
    return {**saved, "functions": functions, "schedulers": [with_functions(was, now) for was, now in pairs]}
