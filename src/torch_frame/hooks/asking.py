"""Which hooks may want something of the run in the middle of an epoch: what they ask for there counts at that very batch."""

from __future__ import annotations

from collections.abc import Iterable

from torch_frame.hooks.base import HookBase

_STAGES = ("before_iter", "before_update", "after_update", "after_iter")


def may_ask_in_steps(hooks: Iterable[HookBase]) -> bool:
    """One of the hooks does something in a step, and does not say that it asks for nothing there.

    >>> class Stops(HookBase):
    ...     def after_iter(self): ...
    >>> may_ask_in_steps([HookBase()]), may_ask_in_steps([Stops()])
    (False, True)
    """
    return any(_asks(hook, stage) for hook in hooks for stage in _STAGES if stage not in hook.idle_stages)


def _asks(hook: HookBase, stage: str) -> bool:
    if stage in vars(hook):
        return True
    kinds = type(hook).__mro__
    author = next(kind for kind in kinds if stage in vars(kind))
    if author is HookBase:
        return False
    said_by = next(kind for kind in kinds if "asks_in_steps" in vars(kind))
    return hook.asks_in_steps or not issubclass(said_by, author)  # said of another method than the one that is called
