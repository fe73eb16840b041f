"""Which hooks make several ranks ask each other after each batch: those that may want something there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.small_hooks import On
from tests.small_runs import make_batches
from torch_frame import CheckpointerHook, EarlyStoppingHook, EvalHook, HookBase, LoggerHook, ThroughputHook
from torch_frame.hooks.asking import may_ask_in_steps
from torch_frame.hooks.defaults import default_hooks


class AfterIter(HookBase):
    def after_iter(self) -> None:
        self.trainer.should_stop = True


class BeforeUpdate(HookBase):
    def before_update(self) -> None: ...


class AfterEpoch(HookBase):
    def after_epoch(self) -> None: ...


class Quiet(AfterIter):
    asks_in_steps = False


class QuietLogger(LoggerHook):
    """Renamed, and no more."""


class StoppingLogger(LoggerHook):
    """What LoggerHook says of itself is not said of this method."""

    def after_iter(self) -> None:
        super().after_iter()
        self.trainer.should_stop = True


class StoppingCheckpointer(CheckpointerHook):
    def after_iter(self) -> None:
        self.trainer.should_stop = True


def evaluation(**settings: Any) -> EvalHook:
    return EvalHook(make_batches(1), lambda model, batch: {}, **settings)


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        (HookBase(), False),
        (AfterEpoch(), False),
        (AfterIter(), True),
        (BeforeUpdate(), True),
        (Quiet(), False),
        (On(after_iter=print), True),
        (On(after_epoch=print), False),
        (LoggerHook(), False),
        (QuietLogger(), False),
        (StoppingLogger(), True),
        (ThroughputHook(), False),
        (CheckpointerHook(), False),
        (CheckpointerHook(every_n_minutes=1), False),
        (CheckpointerHook(every_n_iters=5), True),
        (StoppingCheckpointer(), True),
        (StoppingCheckpointer(every_n_minutes=1), True),
        (evaluation(), False),
        (evaluation(period=3, period_unit="iter"), True),
        (EarlyStoppingHook("total_loss"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_hook_asks_if_it_may_want_something_in_a_step(hook: HookBase, expected: bool) -> None:
    assert may_ask_in_steps([HookBase(), hook]) == expected


def test_the_default_hooks_ask_for_nothing_at_a_particular_batch() -> None:
    assert not may_ask_in_steps(default_hooks())
