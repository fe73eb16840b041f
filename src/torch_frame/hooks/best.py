"""Which of several hooks writes best.pth, and what the others write."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

BEST = "best.pth"
_logger = logging.getLogger("torch_frame")


class Follower(Protocol):
    """A hook that may follow a metric.

    Attributes:
        save_metric: the metric; None: it follows none.
        evaluates: the metric is a score of its own evaluation.
        best_file: what it writes; None: not decided yet.
    """

    save_metric: str | None
    evaluates: bool
    best_file: str | None

    @property
    def class_name(self) -> str: ...


def assign_best_files(hooks: Sequence[Follower], saving_method: Any) -> None:
    """Decide for each hook that follows a metric which file it writes, and say so if there are several.

    `best.pth` belongs to the first hook that evaluates and follows a score, else to the first that follows a value. Each of the
    others has a `best_<metric>.pth`. A hook with a `save_model` of its own, which does not call the inherited one, claims
    nothing. What is decided stays, over a resume too.

    Args:
        hooks: in the order they run.
        saving_method: `CheckpointerHook.save_model`.
    """
    following = [hook for hook in hooks if hook.save_metric is not None]
    undecided = [hook for hook in following if hook.best_file is None]
    if not undecided:
        return
    claiming = [hook for hook in following if writes_by_itself(hook, saving_method)]
    plain = [hook for hook in hooks if hook.save_metric is None and writes_by_itself(hook, saving_method)]
    taken = {hook.best_file for hook in following}
    first = [hook for hook in claiming if hook in undecided and hook.evaluates]
    first += [hook for hook in claiming if hook in undecided]
    if not claiming and not plain:
        first = undecided
    if first and BEST not in taken:
        first[0].best_file = BEST
        taken.add(BEST)
    for hook in undecided:
        if hook.best_file is None:
            hook.best_file = _free_name(str(hook.save_metric), taken)
            taken.add(hook.best_file)
    if len(claiming) > 1:
        files = [f"{hook.best_file} is the best by {hook.save_metric!r} ({hook.class_name})" for hook in claiming]
        _logger.info("Several hooks follow a metric: %s.", "; ".join(sorted(files)))


def writes_by_itself(hook: Follower, saving_method: Any) -> bool:
    """Whether the hook has no `save_model` of its own that does not call the inherited one."""
    return calls_inherited(hook, saving_method)


def calls_inherited(hook: Any, method: Callable[..., Any]) -> bool:
    """Whether all overrides of a method that the hook has, under a decorator too (1.7's `@torch.no_grad()`), call the next one.

    Args:
        method: the inherited function, which is called at the end.
    """
    name = method.__name__
    methods = [vars(kind)[name] for kind in type(hook).__mro__ if name in vars(kind)]
    own = [vars(hook)[name]] if name in vars(hook) else []
    own += methods[: methods.index(method)]
    codes = [getattr(inspect.unwrap(override), "__code__", None) for override in own]
    return all(name in getattr(code, "co_names", ()) for code in codes)


def _free_name(metric: str, taken: set[str | None]) -> str:
    stem = "best_" + re.sub(r"[^\w.+-]", "_", metric)
    names = [f"{stem}.pth"] + [f"{stem}_{number}.pth" for number in range(2, len(taken) + 3)]
    return next(name for name in names if name not in taken)
