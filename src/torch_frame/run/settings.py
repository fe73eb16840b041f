"""Settings that a script and its checkpoint disagree on: which of them count, and what is said of it.

Compared is what the two scripts have *set*, as it was when their trainers were made: a learning rate that its schedule has moved
since, or a weight decay that a hook changes on its way, is no difference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from torch_frame.checkpoint.values import decode
from torch_frame.run.length import RunLength
from torch_frame.run.script_settings import (
    AllSettings,
    Plan,
    Settings,
    State,
    continue_schedule,
    rates_of_plateau,
    with_functions,
    write_groups,
)
from torch_frame.run.setting_differences import BY_SCHEDULE, Difference, derived, differing, shown
from torch_frame.training.replay import replayed, with_counts_of_plateau
from torch_frame.training.schedule_settings import LENGTHS, PLACES, length_of, position_in, rates_that_differ
from torch_frame.training.several import ONLY, schedule_label

CHOICE = (
    "Choose: resume_settings='script' continues with this script's settings, the schedule stepped to where the run is; "
    "resume_settings='checkpoint' continues with the saved ones"
)

_NEEDS_STATE = (
    ("amsgrad", "exp_avg_sq", "max_exp_avg_sq"),
    ("centered", "square_avg", "grad_avg"),  # of RMSprop, as the next one
    ("momentum", "square_avg", "momentum_buffer"),
)
"""(setting, a value that the optimizer keeps for each parameter, one that it keeps only with the setting)."""


class SettingsPart:
    """The settings in force, as a part of the state: compared with the script's when a run is resumed.

    Args:
        settings: of the script, for each optimizer.
        length, interval: of the run, which a schedule's length belongs to.
    """

    def __init__(self, settings: AllSettings, length: RunLength, interval: str) -> None:
        run = {"max_epochs": length.max_epochs, "max_iters": length.own_max_iters, "interval": interval}
        self._parts = {label: _SettingsOfOne(one, label, run) for label, one in settings.each.items()}

    def state_dict(self) -> dict[str, Any]:
        states = {label: part.state_dict() for label, part in self._parts.items()}
        return states[ONLY] if list(states) == [ONLY] else {"each": states}

    def compare(self, state: State) -> None:
        """Compare a whole state with the script; `differences` and `load_state_dict` go by the result."""
        saved = state.get("settings") or {}
        of_each = saved.get("each", {ONLY: saved})
        for label, part in self._parts.items():
            if label in state["optimizers"] and schedule_label(label) in state["lr_schedulers"]:
                part.compare(state, of_each.get(label))

    def differences(self, saved: Any, unknown: Collection[str]) -> list[str]:
        return [self._said(label, line) for label, part in self._parts.items() for line in part.refused()]

    def keep(self) -> Callable[[], None]:
        """The optimizers and schedules are put back by their own parts."""
        kept = [part.keep() for part in self._parts.values()]

        def put_back() -> None:
            for part in kept:
                part()

        return put_back

    def load_state_dict(self, saved: Any) -> None:
        """Bring the script's settings into force, or note that the saved ones are."""
        for part in self._parts.values():
            part.bring_into_force()

    def told(self) -> list[str]:
        """Sentences about the differences, for one warning."""
        return [self._said(label, line) for label, part in self._parts.items() for line in part.told()]

    def _said(self, label: str, line: str) -> str:
        return line if label == ONLY else f"{label}: {line}"


class _SettingsOfOne:
    """Those of one optimizer and its schedule.

    Args:
        settings: of the script.
        label: of the optimizer.
        run: `max_epochs`, `max_iters` and `interval`.
    """

    def __init__(self, settings: Settings, label: str, run: dict[str, Any]) -> None:
        self._settings = settings
        self._label = label
        self._run = run

    def state_dict(self) -> dict[str, Any]:
        return {**self._settings.in_force, **self._run}

    def compare(self, state: State, saved: Mapping[str, Any] | None) -> None:
        settings = self._settings
        counts = _schedule_in(state, self._label)
        if not saved:
            classes: Mapping[str, Any] = state.get("classes") or {}
            saved = derived(
                _groups_in(state, self._label), counts, {"lr_scheduler": classes.get(schedule_label(self._label))}
            )
        plan = settings.plan = Plan(saved, counts, list(differing(saved, settings.script)))
        rates = _rates_that_differ(plan, settings)
        if settings.choice == "script":
            _refuse_missing_state(plan, state, self._label)
            self._build_anew(plan, state, functions_differ=bool(rates))
        else:
            _refuse_another_class(plan)
            if settings.choice is None:
                _refuse_another_length(plan, self._run)
        _judge_functions(plan, settings, rates)
        self._note_end_of_schedule(plan, state)

    def refused(self) -> list[str]:
        plan = self._settings.plan
        return [] if plan is None else plan.refused

    def keep(self) -> Callable[[], None]:
        return functools.partial(setattr, self._settings, "in_force", self._settings.in_force)

    def bring_into_force(self) -> None:
        settings, plan = self._settings, self._settings.plan
        if plan is None:
            return
        plan.is_done = True
        if settings.choice == "script":
            write_groups(plan, settings)
            continue_schedule(plan, settings)
        else:
            schedule = with_functions(plan.saved["schedule"], settings.script["schedule"])
            settings.in_force = {**plan.saved, "schedule": schedule}

    def told(self) -> list[str]:
        plan, choice = self._settings.plan, self._settings.choice
        if plan is None:
            return []
        told = []
        functions = [one for one in plan.differing if one.kind == "function" and choice != "script"]
        others = [one for one in plan.differing if one not in functions]
        if others:
            who = "The script's count" if choice == "script" else "The saved ones count"
            other = "; resume_settings='script' takes the script's" if choice is None else ""
            told.append(f"The script has other settings than the checkpoint: {_listed(others)}. {who}{other}.")
        if functions:
            told.append(
                f"The schedule's functions use other values, and functions are always the script's: {_listed(functions)}."
            )
        if choice == "script" and plan.is_done and (plan.differing or plan.target is not None):
            rates = dict.fromkeys(shown(rate) for rate in self._settings.schedule.get_last_lr())
            told.append(f"The learning rate is now {', '.join(rates)}.")
        return told + plan.notes

    # ---------------------------------------------------------------- the script's schedule, stepped

    def _build_anew(self, plan: Plan, state: State, *, functions_differ: bool) -> None:
        """The schedule as it would stand now in a run with the script's settings, if anything of it differs."""
        settings, scheduler = self._settings, self._settings.schedule.scheduler
        saved_scheduler = plan.counts["scheduler"]
        same_class = not any(one.kind == "class" for one in plan.differing)
        cycled = {"betas"} if any("max_momentum" in group for group in settings.begin.groups) else set()
        differs = functions_differ or any(_concerns_schedule(one, cycled) for one in plan.differing)
        if not differs and (scheduler is None or self._same_interval(plan)):
            return
        if isinstance(scheduler, ReduceLROnPlateau):
            seen = saved_scheduler if same_class and saved_scheduler is not None else {}
            plan.target = with_counts_of_plateau(settings.begin, seen, rates_of_plateau(plan, settings, same_class))
            return
        steps = self._steps_done(plan, state, same_class)
        try:
            plan.target = replayed(settings.schedule, settings.begin, steps)
        except Exception as error:  # of a schedule that is too short (OneCycleLR), or of the user's function
            plan.refused.append(
                f"the script's lr_scheduler cannot be stepped to where the run is, {steps} steps: "
                f"{type(error).__name__}: {error}"
            )

    def _same_interval(self, plan: Plan) -> bool:
        return plan.saved.get("interval") in (None, self._run["interval"])

    def _steps_done(self, plan: Plan, state: State, same_class: bool) -> int:
        """Steps that the script's schedule has to make to stand where the run does."""
        saved_steps = position_in(plan.counts["scheduler"])
        if same_class and saved_steps is not None and self._same_interval(plan):
            return saved_steps - (position_in(self._settings.begin.scheduler) or 0)
        progress = state["progress"]
        if self._run["interval"] == "iter":
            return int(progress["num_updates"])
        return int(progress["epoch"]) + int(progress["epoch_trained"])

    def _note_end_of_schedule(self, plan: Plan, state: State) -> None:
        """A run that became longer than its schedule, whose learning rate would go anywhere from there on."""
        record = (self._settings.script if self._settings.choice == "script" else plan.saved)["schedule"]
        if record is None or plan.refused:
            return
        updates, epochs, iters = (state["progress"][name] for name in ("num_updates", "epoch", "iter"))
        by_iter = self._run["interval"] == "iter"
        steps_each = {"max_epochs": updates // max(epochs, 1) if by_iter else 1}
        steps_each |= {"max_iters": updates / max(iters, 1)} if by_iter else {}
        for name, steps in steps_each.items():
            was, now = plan.saved.get(name), self._run[name]
            if was is not None and was != now and length_of(record) == round(was * steps):
                plan.notes.append(
                    f"{name} was {was}, now it is {now}, but the schedule is made for {round(was * steps)} steps."
                )


# ---------------------------------------------------------------- what is refused


def _refuse_another_class(plan: Plan) -> None:
    for one in plan.differing:
        if one.kind == "class":
            plan.refused.append(
                f"the {one.name} was {one.saved}, now it is {one.script}. "
                "resume_settings='script' continues with this script's, stepped to where the run is"
            )


def _refuse_another_length(plan: Plan, run: Mapping[str, Any]) -> None:
    """A schedule made for another length: T_max and the like; milestones and periods if the run's length differs too."""
    same = all(plan.saved.get(name) in (None, run[name]) for name in ("max_epochs", "max_iters"))
    of_length = LENGTHS if same else LENGTHS | PLACES
    lengths = [one for one in plan.differing if one.kind == "schedule" and one.name.split(".")[-1] in of_length]
    if lengths:
        texts = ", ".join(f"{one.name} was {shown(one.saved)}, now it is {shown(one.script)}" for one in lengths)
        plan.refused.append(f"the lr_scheduler was made for another length: {texts}. {CHOICE}")


def _refuse_missing_state(plan: Plan, state: State, label: str) -> None:
    """Some settings need state that the optimizer keeps only with them, and that torch does not make later."""
    kept = [values for values in state["optimizers"][label]["state"].values() if isinstance(values, Mapping)]
    switched_on = {one.name: one for one in plan.differing if one.kind == "group" and one.script and not one.saved}
    for setting, always, only_with_it in _NEEDS_STATE:
        if setting in switched_on and any(always in one and only_with_it not in one for one in kept):
            was, now = switched_on[setting].saved, switched_on[setting].script
            plan.refused.append(
                f"{setting} was {shown(was)}, now it is {shown(now)}, but the saved optimizer has no "
                f"{only_with_it} to continue with"
            )


def _rates_that_differ(plan: Plan, settings: Settings) -> list[tuple[float, float, int]]:
    """Where the script's functions do not give the saved rates: (saved, the script's, steps)."""
    saved = plan.counts["scheduler"]
    if saved is None or any(one.kind == "class" for one in plan.differing):
        return []
    try:
        return list(rates_that_differ(settings.schedule.scheduler, saved))
    except Exception as error:
        plan.refused.append(
            f"the lr_scheduler's function fails after {position_in(saved)} steps: {type(error).__name__}: {error}"
        )
        return []


def _judge_functions(plan: Plan, settings: Settings, rates: Sequence[tuple[float, float, int]]) -> None:
    """A function cannot be saved, so the script's counts; it has to give the saved rate."""
    for saved, now, steps in rates[:1]:
        text = f"the lr_scheduler's function gives {shown(now)} after {steps} steps, where the saved rate is {shown(saved)}"
        if settings.choice is None:
            plan.refused.append(f"{text}. {CHOICE} until the schedule's next step, from which on the function counts")
        else:
            who = "the script's counts" if settings.choice == "script" else "the saved rate counts until the next step"
            plan.notes.append(f"{text[0].upper()}{text[1:]}: {who}.")


# ---------------------------------------------------------------- the script's settings


def _concerns_schedule(one: Difference, cycled: Set[str]) -> bool:
    return one.kind in ("schedule", "class", "function") or (one.kind == "group" and one.name in BY_SCHEDULE | cycled)


# ---------------------------------------------------------------- where a state has it


def _schedule_in(state: State, label: str) -> State:
    schedule: State = decode(state["lr_schedulers"][schedule_label(label)])
    return schedule


def _groups_in(state: State, label: str) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = decode(state["optimizers"][label]["param_groups"])
    return groups


def _listed(differences: Iterable[Difference]) -> str:
    return ", ".join(dict.fromkeys(map(str, differences)))
