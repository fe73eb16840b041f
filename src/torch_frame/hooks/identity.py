"""Which saved state belongs to which hook: by class and by what the hook was registered with, never by its place.

A hook's identity is its plain attributes (numbers, texts, flags) as they were when it was registered. A state goes to the hook of
its class with the same identity. What is left then is paired by what agrees most, if the class has as many hooks as there were:
a setting has been changed in the script. Attributes that `HookBase.identified_by` names have to agree in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch_frame.hooks.base import HookBase

_SCALARS = (bool, int, float, str, type(None))


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
    """The hook's plain attributes as they are now."""
    return {name: value for name, value in vars(hook).items() if type(value) in _SCALARS}


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
    for state in list(saved):
        old = state.identity is None
        same = (one for one in own if (one.key == state.key if old else one.identity == state.identity))
        hook = next(same, None)
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
