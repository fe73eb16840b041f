"""Which saved state belongs to which hook: by class and by what the hook was registered with, never by its place.

A hook's identity is its attributes as they were when it was registered: numbers, texts and flags themselves, of containers a
digest of what is in them, of functions and classes the name, of other objects the name of their class. A state goes to the hook
of its class with the same identity, else to one with the same numbers, texts and flags. What is left then is paired by what
agrees most, if the class has as many hooks as there were: a setting has been changed in the script. Attributes that
`HookBase.identified_by` names have to agree in any case.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import math
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch_frame.checkpoint.slots import attributes_of
from torch_frame.hooks.base import HookBase

_SCALARS = (bool, int, float, str, type(None))
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, type)
_OF_THE_RUN = frozenset({"trainer", "_begun_run", "_as_registered", "_resume_notes", "_written", "time_split"})
_LONGEST = (1000, 64, 64)
"""Elements of a container that is looked into, by its depth in others; of a longer or deeper one only the length counts."""


class SavedHook(NamedTuple):
    """A hook's state in a checkpoint; `identity` is None if the checkpoint is older than identities."""

    key: str
    identity: Mapping[str, Any] | None
    state: Any

    @property
    def class_name(self) -> str:
        return self.key.partition("#")[0]


class OwnHook(NamedTuple):
    """A registered hook that has a state."""

    key: str
    identity: Mapping[str, Any]
    hook: HookBase


class Pair(NamedTuple):
    """A state and the hook that takes it; `certain` if there was no other choice."""

    saved: SavedHook
    own: OwnHook
    certain: bool


def identity_of(hook: HookBase) -> dict[str, Any]:
    """Name -> scalar, or the digest of another value, of the hook's attributes as they are now."""
    kind = type(hook)
    identity: dict[str, Any] = {
        "#class": _digest(f"{kind.__module__}.{kind.__qualname__}")
    }  # two may have the bare name
    for name, value in attributes_of(hook).items():
        if name not in _OF_THE_RUN:
            identity[name] = value if _is_scalar(value) else _digest(value)
    return identity


def _is_scalar(value: Any) -> bool:
    return type(value) in _SCALARS and not (isinstance(value, float) and math.isnan(value))  # which equals nothing


def _digest(value: Any) -> tuple[str]:
    return (hashlib.blake2b(repr(_outline(value)).encode(errors="replace"), digest_size=8).hexdigest(),)


def _outline(value: Any, depth: int = 0) -> Any:
    """Texts that tell a value from others, the same in each process; of an object no more than its class."""
    kind = type(value)
    if kind in _SCALARS:
        return repr(value)
    if isinstance(value, enum.Enum | pathlib.PurePath):
        return str(value)
    if kind in _FUNCTIONS:
        return value.__qualname__
    if depth < len(_LONGEST) and kind is functools.partial:
        return [_outline(part, depth + 1) for part in (value.func, value.args, value.keywords)]
    if kind in (list, tuple, dict, set, frozenset):
        if depth == len(_LONGEST) or len(value) > _LONGEST[depth]:
            return [kind.__name__, len(value)]
        items = [_outline(item, depth + 1) for item in (value.items() if kind is dict else value)]
        return [kind.__name__, sorted(items, key=repr) if kind in (set, frozenset) else items]
    return kind.__qualname__


def pairs(saved: Sequence[SavedHook], own: Sequence[OwnHook], taken: set[str], has_state: set[str]) -> list[Pair]:
    """Who takes which state.

    Args:
        saved: all states of the checkpoint, in their order.
        own: all registered hooks, in their order.
        taken, has_state: keys of the states and hooks that have been paired before.
    """
    found: list[Pair] = []
    for name in dict.fromkeys(one.class_name for one in saved):
        of_class = [one for one in saved if one.class_name == name], [one for one in own if one.hook.class_name == name]
        free_saved = [one for one in of_class[0] if one.key not in taken]
        free_own = [one for one in of_class[1] if one.key not in has_state]
        found += _of_one_class(free_saved, free_own, as_many=len(of_class[0]) == len(of_class[1]))
    return found


def described(one: SavedHook | OwnHook) -> str:
    """The hook in words: its class and the public texts that it was registered with."""
    public = {name: value for name, value in (one.identity or {}).items() if not name.startswith("_")}
    texts = [f"{name}={value!r}" for name, value in public.items() if isinstance(value, str)]
    name = one.key.partition("#")[0]
    return f"{name}({', '.join(texts)})" if texts else one.key


def _of_one_class(saved: list[SavedHook], own: list[OwnHook], *, as_many: bool) -> list[Pair]:
    found: list[Pair] = []
    for is_same in (_agree_in_all, _agree_in_scalars):
        for state in list(saved):
            same = [one for one in own if is_same(state, one)]
            hook = max(same, key=lambda one: _num_equal(state, one), default=None)  # the first of several
            if hook is not None:
                found.append(Pair(state, hook, certain=True))
                saved.remove(state)
                own.remove(hook)
    certain = len(saved) == len(own) == 1
    possible = [(state, hook) for state in saved for hook in own if _may_take(state, hook, as_many, saved, own)]
    possible.sort(key=lambda pair: -_num_equal(*pair))  # stable: else in their order
    for state, hook in possible:
        if state in saved and hook in own:
            found.append(Pair(state, hook, certain or bool(hook.hook.identified_by)))
            saved.remove(state)
            own.remove(hook)
    return found


def _agree_in_all(state: SavedHook, hook: OwnHook) -> bool:
    return hook.key == state.key if state.identity is None else hook.identity == state.identity


def _agree_in_scalars(state: SavedHook, hook: OwnHook) -> bool:
    """Containers may hold what the hook has done; older checkpoints have scalars only."""
    return state.identity is not None and _scalars(hook.identity) == _scalars(state.identity)


def _scalars(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if type(value) in _SCALARS}


def _may_take(
    state: SavedHook, hook: OwnHook, as_many: bool, saved: Sequence[SavedHook], own: Sequence[OwnHook]
) -> bool:
    names = hook.hook.identified_by
    if not _agree(state, hook.identity, names):
        return False
    if as_many:
        return True
    rivals = [one for one in saved if _agree(one, hook.identity, names)]
    others = [one for one in own if _agree(state, one.identity, names)]
    return bool(names) and len(rivals) == len(others) == 1


def _agree(state: SavedHook, identity: Mapping[str, Any], names: Sequence[str]) -> bool:
    was = state.identity
    return was is not None and all(was.get(name) == identity.get(name) for name in names)


def _num_equal(state: SavedHook, hook: OwnHook) -> int:
    was = state.identity or {}
    return sum(name in was and was[name] == value for name, value in hook.identity.items())
