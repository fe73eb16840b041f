"""Calls the hooks, and only those that have something to do."""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from torch_frame.checkpoint.slots import attributes_of
from torch_frame.checkpoint.values import decode, encode
from torch_frame.errors import CheckpointError, SettingError
from torch_frame.hooks.base import STAGES, HookBase, is_ours
from torch_frame.hooks.checkpoint import CheckpointerHook, tell_best_files
from torch_frame.hooks.identity import OwnHook, SavedHook, described, identity_of, pairs
from torch_frame.tracking.step_times import TimeSplit

_logger = logging.getLogger("torch_frame")
_UNTIMED = ("on_exception", "close")


IDENTITIES = "#identities"
"""The key in the saved states under which the hooks' identities are; no class is called so."""


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
        self._identities: dict[int, dict[str, Any]] = {}  # by id() of the hook, which `hooks` keeps alive
        self._saved: list[SavedHook] = []
        self._taken: set[str] = set()  # keys of saved states that a hook has taken
        self._restored: set[int] = set()  # id() of the hooks that have taken one
        self._told: list[tuple[int, str]] = []
        # Marks the hooks that have been through a run's before_train; a text, for hooks of 1.7 save all their attributes.
        self._run = uuid.uuid4().hex

    @property
    def registered(self) -> tuple[HookBase, ...]:
        """For others: what is put into a list of them would never run."""
        return tuple(self.hooks)

    def add(self, hooks: Iterable[HookBase], *, under_way: bool = False, has_begun: bool = False) -> None:
        """Register hooks; a state that was restored before they came is handed to them now.

        Args:
            under_way: a `train()` has begun, so they join it.
            has_begun: its `before_train` is over, which they miss.
        """
        hooks = list(hooks)
        for hook in hooks:
            if under_way and _turn(hook) < 0:
                raise SettingError(
                    f"{hook.class_name} runs before all other hooks, so it cannot join a run that has begun. Register it before "
                    "train()."
                )
            if any(hook is other for other in self.hooks):
                raise SettingError(
                    f"The same {hook.class_name} object is registered twice; each hook needs its own object."
                )
            self._identities[id(hook)] = identity_of(hook)
            if isinstance(hook, CheckpointerHook):
                hook._note_attributes()
            self.hooks.append(hook)
        self.hooks.sort(key=_turn)  # stable: the order is otherwise kept
        self.load_state_dict(None)
        if under_way:
            self._join(hooks, has_begun=has_begun)
        self._look_for_methods()

    def _look_for_methods(self) -> None:
        """Which methods of the hooks, and of the objects themselves, each stage calls."""
        self.time_split = split = _the_one_split(self.hooks)
        for stage, methods in self.stages.items():
            calls = [(hook.class_name, getattr(hook, stage)) for hook in self.hooks if _overrides(hook, stage)]
            if split is None or stage in _UNTIMED:
                methods[:] = [call for _, call in calls]
            else:
                methods[:] = split.around(calls)

    def _join(self, hooks: Iterable[HookBase], *, has_begun: bool) -> None:
        """Hooks come to a run that has begun: what is done for all when it begins is done for them now."""
        for hook in hooks:
            hook._begun_run = self._run
        self._tell_notes(hooks)
        for hook in hooks:
            hook.check()
            if has_begun and _overrides(hook, "before_train"):
                _logger.warning(
                    "%s is registered when the run has begun: its before_train is not called. Register it in before_train of "
                    "another hook, or before train().",
                    hook.class_name,
                )

    def names_with(self, *stages: str) -> list[str]:
        """Names of the hooks that do something at one of these stages."""
        return [hook.class_name for hook in self.hooks if any(_overrides(hook, stage) for stage in stages)]

    def check_new(self, hooks: Iterable[HookBase]) -> None:
        """Hooks that have been through `before_train` of another run are refused.

        Raises:
            SettingError: naming the hook.
        """
        for hook in hooks:
            if vars(hook).get("_begun_run", self._run) is not self._run:
                raise SettingError(
                    f"This {hook.class_name} object belongs to a run that has begun: it holds that run's best values, files and "
                    "counts. Make a new one for each Trainer."
                )

    @property
    def names(self) -> list[str]:
        """The hooks' classes, in the order they run."""
        return [hook.class_name for hook in self.hooks]

    def takes_media(self) -> bool:
        """A hook is registered that gives pictures, texts and histograms to writers."""
        return any(getattr(hook, "takes_media", False) for hook in self.hooks)

    def state_dict(self) -> dict[str, Any]:
        states: dict[str, Any] = {}
        identities: dict[str, Any] = {}
        for key, hook in self._keyed().items():
            states[key] = encode(hook.state_dict(), f"the state of {key}")
            identities[key] = encode(self._identities[id(hook)])
        return {**states, IDENTITIES: identities} if states else {}

    def load_state_dict(self, states: dict[str, Any] | None) -> None:
        """Hand each hook its state; what no hook takes is kept for hooks registered later, which come with None."""
        if states is not None:
            self._saved, self._taken, self._restored, self._told = _saved_hooks(states), set(), set(), []
        own = [OwnHook(key, self._identities[id(hook)], hook) for key, hook in self._keyed().items()]
        has_state = {one.key for one in own if id(one.hook) in self._restored}
        for saved, one, certain in pairs(self._saved, own, self._taken, has_state):
            self._taken.add(saved.key)
            self._restored.add(id(one.hook))
            if not certain:
                text = f"{described(one)} continues with the state of {described(saved)}, the one that agrees most."
                self._told.append((logging.WARNING, text))
            one.hook.load_state_dict(_state_of(saved))

    def begin(self) -> None:
        """The run begins: its hooks belong to it, and what was found when it was resumed is told."""
        for hook in self.hooks:
            hook._begun_run = self._run
        self._look_for_methods()  # checks and scripts may have changed some since the hooks were registered
        self._tell_of_one_side()
        self._tell_notes(self.hooks)

    def _tell_notes(self, hooks: Iterable[HookBase]) -> None:
        """What was found when their states were loaded."""
        for level, text in self._told:
            _logger.log(level, text)
        self._told = []
        for hook in hooks:
            if isinstance(hook, CheckpointerHook):
                hook._tell()

    def _tell_of_one_side(self) -> None:
        lost = [described(one) for one in self._saved if one.key not in self._taken]
        if lost:  # they are not carried into the next checkpoint
            _logger.warning("The checkpoint holds the state of hooks that are not registered: %s.", ", ".join(lost))
        own = [(OwnHook(key, self._identities[id(hook)], hook)) for key, hook in self._keyed().items()]
        new = [described(one) for one in own if id(one.hook) not in self._restored]
        if new and self._saved:
            _logger.info("The checkpoint holds no state of these hooks, which begin anew: %s.", ", ".join(new))

    def check_states(self) -> None:
        """Before the first step: the states of users' hooks can be saved; which hook writes which best file.

        Raises:
            CheckpointError: with the place of what cannot.
        """
        for key, hook in self._keyed().items():
            if not is_ours(type(hook)):
                try:
                    encode(hook.state_dict(), f"the state of {key}")
                except CheckpointError:
                    raise
                except Exception:  # it needs a step to be complete; the first save asks again
                    continue
        tell_best_files(self.hooks)

    def keep(self) -> Callable[[], None]:
        """What puts the hooks' attributes back as they are now: a resume may fail after hooks were given their states."""
        kept = [(hook, _attributes(hook)) for hook in self.hooks]
        own = {name: value for name, value in _attributes(self).items() if name.startswith("_")}

        def put_back() -> None:
            vars(self).update(own)
            for hook, attributes in kept:
                for name in attributes_of(hook).keys() - attributes.keys():
                    delattr(hook, name)
                for name, value in attributes.items():
                    object.__setattr__(hook, name, value)

        return put_back

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


def _saved_hooks(states: dict[str, Any]) -> list[SavedHook]:
    identities = states.get(IDENTITIES, {})
    saved = [
        SavedHook(key, decode(identities[key]) if key in identities else None, state) for key, state in states.items()
    ]
    return [one for one in saved if one.key != IDENTITIES]


def _state_of(saved: SavedHook) -> Any:
    try:
        return decode(saved.state)
    except CheckpointError as error:
        raise CheckpointError(f"The state of {saved.key}: {error}") from None


def _attributes(of: Any) -> dict[str, Any]:
    """An object's attributes; lists, dicts and sets as copies, for they may be changed in place."""
    found = attributes_of(of)
    return {name: copy.copy(value) if type(value) in (list, dict, set) else value for name, value in found.items()}


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
