"""Calls the hooks, and only those that have something to do."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch_frame.errors import SettingError
from torch_frame.hooks.base import STAGES, HookBase
from torch_frame.tracking.step_times import TimeSplit

_logger = logging.getLogger("torch_frame")
_UNTIMED = ("on_exception", "close")


class HookCaller:
    """The registered hooks, in order, and for each stage the methods that are not HookBase's own empty ones.

    Attributes:
        hooks: in the order they run; those with `runs_first` before all others, those with `runs_last` after them.
        stages: stage -> bound methods; if a hook splits the run's time, with calls between them that tell whose time it is.
        time_split: of the hook that splits it, or None.
    """

    def __init__(self) -> None:
        self.hooks: list[HookBase] = []
        self.stages: dict[str, list[Callable[..., None]]] = {stage: [] for stage in STAGES}
        self.time_split: TimeSplit | None = None
        self._unclaimed: dict[str, Any] = {}

    def add(self, hooks: Iterable[HookBase]) -> None:
        """Register hooks; a state that was restored before they came is handed to them now."""
        for hook in hooks:
            if any(hook is other for other in self.hooks):
                raise SettingError(
                    f"The same {hook.class_name} object is registered twice; each hook needs its own object."
                )
            self.hooks.append(hook)
        self.hooks.sort(key=_turn)  # stable: the order is otherwise kept
        self.time_split = split = _the_one_split(self.hooks)
        for stage, methods in self.stages.items():
            calls = [(hook.class_name, getattr(hook, stage)) for hook in self.hooks if _overrides(hook, stage)]
            if split is None or stage in _UNTIMED:
                methods[:] = [call for _, call in calls]
            else:
                methods[:] = split.around(calls)
        if self._unclaimed:
            self.load_state_dict(self._unclaimed)

    def state_dict(self) -> dict[str, Any]:
        return {key: hook.state_dict() for key, hook in self._keyed().items()}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Hand each hook its state; what no hook claims is kept for hooks registered later."""
        keyed = self._keyed()
        for key in keyed.keys() & states.keys():
            keyed[key].load_state_dict(states[key])
        self._unclaimed = {key: state for key, state in states.items() if key not in keyed}

    def keep(self) -> Callable[[], None]:
        """What puts the hooks' attributes back as they are now: a resume may fail after hooks were given their states."""
        kept = [(hook, _attributes(hook)) for hook in self.hooks]
        own = {name: value for name, value in _attributes(self).items() if name.startswith("_")}

        def put_back() -> None:
            vars(self).update(own)
            for hook, attributes in kept:
                vars(hook).clear()
                vars(hook).update(attributes)

        return put_back

    def warn_of_unclaimed(self) -> None:
        """Say which restored states no hook has taken; they are not carried into the next checkpoint."""
        if self._unclaimed:
            _logger.warning(
                "The checkpoint holds the state of hooks that are not registered: %s.", ", ".join(self._unclaimed)
            )

    def _keyed(self) -> dict[str, HookBase]:
        """Hooks that have a state, by class name; further ones of a class by `Name#1`, `Name#2`, ..."""
        keyed: dict[str, HookBase] = {}
        counts: dict[str, int] = {}
        for hook in self.hooks:
            if hook.checkpointable:
                index = counts[hook.class_name] = counts.get(hook.class_name, -1) + 1
                keyed[hook.class_name if index == 0 else f"{hook.class_name}#{index}"] = hook
        return keyed


def _turn(hook: HookBase) -> int:
    """-1 for hooks that run first, 1 for those that run last."""
    return getattr(hook, "runs_last", False) - getattr(hook, "runs_first", False)


def _the_one_split(hooks: Iterable[HookBase]) -> TimeSplit | None:
    splitting = [hook for hook in hooks if hook.time_split is not None]
    if len(splitting) > 1:
        names = " and ".join(hook.class_name for hook in splitting)
        raise SettingError(f"{names} both split the run's time; only one hook can. Leave one of them out.")
    return splitting[0].time_split if splitting else None


def _attributes(of: Any) -> dict[str, Any]:
    """An object's attributes; lists, dicts and sets as copies, for they may be changed in place."""
    return {name: copy.copy(value) if type(value) in (list, dict, set) else value for name, value in vars(of).items()}


def _overrides(hook: HookBase, stage: str) -> bool:
    if stage in hook.idle_stages:
        return False
    # An instance may carry its own method, too: hook.after_iter = function.
    return stage in vars(hook) or getattr(type(hook), stage) is not getattr(HookBase, stage)


def checked_hooks(hooks: Iterable[HookBase | None]) -> list[HookBase]:
    """The hooks of a list that may hold None for "not this time".

    Raises:
        TypeError: for a class instead of an object, or anything that is no hook.
    """
    if isinstance(hooks, type) and issubclass(hooks, HookBase):
        raise TypeError(
            f"hooks is the class {hooks.__name__}; it has to be a list of objects: hooks=[{hooks.__name__}(...)]."
        )
    if isinstance(hooks, HookBase):
        raise TypeError(f"hooks is a single {hooks.class_name}; it has to be a list: hooks=[{hooks.class_name}(...)].")
    if not isinstance(hooks, Iterable):
        raise TypeError(f"hooks is {hooks!r}; it has to be a list of hooks, or None.")
    checked = []
    for hook in hooks:
        if isinstance(hook, type) and issubclass(hook, HookBase):
            raise TypeError(f"hooks contains the class {hook.__name__}; make an object of it: {hook.__name__}(...).")
        if hook is not None and not isinstance(hook, HookBase):
            raise TypeError(f"hooks contains {hook!r}, which is no hook; derive it from torch_frame.HookBase.")
        if hook is not None:
            checked.append(hook)
    return checked
