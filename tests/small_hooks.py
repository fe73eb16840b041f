"""Small hooks that many tests need: they call a function at a stage, or write down what they see; and what they evaluate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch_frame import HookBase, Trainer
from torch_frame.hooks.base import STAGES
from torch_frame.metrics.metric import Metric


class On(HookBase):
    """Calls `function(trainer)` at a stage: On(after_iter=function)."""

    def __init__(self, **stages: Callable[[Trainer], Any]) -> None:
        for stage, function in stages.items():
            setattr(self, stage, lambda *_, function=function: function(self.trainer))


def at_iter(iter: int, function: Callable[[Trainer], Any]) -> Callable[[Trainer], Any]:
    """The function, called in one iteration only: On(after_iter=at_iter(3, function))."""
    return lambda trainer: function(trainer) if trainer.cur_iter == iter else None


class Recorder(HookBase):
    """Keeps what `function(trainer)` returns after each batch, in `values`."""

    def __init__(self, function: Callable[[Trainer], Any]) -> None:
        self.function = function
        self.values: list[Any] = []

    def after_iter(self) -> None:
        self.values.append(self.function(self.trainer))


class Stages(HookBase):
    """Writes down the stages at which it is called.

    Args:
        stages: which ones; all of them if none is named.
        note: (stage, trainer) -> what is written down; the stage's name.
        into: a list to write to, which several hooks may share.

    Attributes:
        calls: what was written down.
        errors: those that `on_exception` was told of.
    """

    def __init__(
        self,
        *stages: str,
        note: Callable[[str, Trainer], Any] = lambda stage, trainer: stage,
        into: list[Any] | None = None,
    ) -> None:
        self.note = note
        self.calls: list[Any] = [] if into is None else into
        self.errors: list[BaseException] = []
        for stage in stages or STAGES:
            setattr(self, stage, functools.partial(self._write, stage))

    def _write(self, stage: str, *error: BaseException) -> None:
        self.calls.append(self.note(stage, self.trainer))
        self.errors += error


class CountBatches(Metric):
    """For EvalTotalHook: the number of batches, as "batches", over all ranks."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self) -> None:
        self.count = 0

    def update(self, model: Any, batch: Any) -> None:
        self.count += 1

    def compute(self) -> dict[str, float]:
        return {"batches": self.count}

    def merge(self, other: Any) -> None:
        self.count += other.count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
