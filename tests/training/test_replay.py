"""A schedule that is built anew and stepped stands where torch's own loop would have brought it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from tests.small_runs import Net, copied, differences
from torch_frame import LRWarmupScheduler
from torch_frame.training.replay import Snapshot, replayed, set_in_group, with_counts_of_plateau

SIMPLE = [
    lambda o: StepLR(o, 2, 0.5),
    lambda o: ExponentialLR(o, 0.9),
    lambda o: CosineAnnealingLR(o, 4),
    lambda o: LinearLR(o, 0.2, total_iters=3),
    lambda o: PolynomialLR(o, 30, 2.0),
    lambda o: ConstantLR(o, 0.5, 3),
]


def make(scheduler: Any) -> LRWarmupScheduler:
    first, *others = Net().parameters()
    optimizer = SGD([{"params": [first], "lr": 0.2}, {"params": others}], lr=0.1, momentum=0.9)
    return LRWarmupScheduler(scheduler(optimizer), None, "linear", 5, 0.1)


def composed(parts: list[int], places: list[int], chained: bool) -> Any:
    def scheduler(optimizer: Optimizer) -> Any:
        made = [SIMPLE[part](optimizer) for part in parts]
        return ChainedScheduler(made) if chained else SequentialLR(optimizer, made, places[: len(made) - 1])

    return scheduler


def facts(schedule: LRWarmupScheduler) -> Any:
    assert schedule.scheduler is not None
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in schedule.optimizer.param_groups
    ]
    return copied({"groups": groups, "scheduler": schedule.scheduler.state_dict()})


@given(
    parts=st.lists(st.integers(0, len(SIMPLE) - 1), min_size=1, max_size=3),
    gaps=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    chained=st.booleans(),
    moved=st.integers(0, 9),
    steps=st.integers(0, 20),
)
@settings(max_examples=60)
def test_a_replay_is_torchs_own_steps_and_leaves_the_schedule_as_it_is(
    parts: list[int], gaps: list[int], chained: bool, moved: int, steps: int
) -> None:
    scheduler = composed(parts, list(itertools.accumulate(gaps)), chained)
    schedule = make(scheduler)
    begin = Snapshot.of(schedule, schedule.regular_lrs)
    for _ in range(moved):
        schedule.optimizer.step()
        schedule.step_scheduler()
        schedule.step()
    before = facts(schedule)
    target = replayed(schedule, begin, steps)
    assert differences(before, facts(schedule)) == []

    twin = make(scheduler)
    assert twin.scheduler is not None
    Snapshot.of(twin, twin.regular_lrs).write(twin)
    twin.optimizer.step()
    for _ in range(steps):
        twin.scheduler.step()
    assert [group["lr"] for group in target.groups] == [group["lr"] for group in twin.optimizer.param_groups]
    target.write(schedule)
    assert differences(facts(twin), facts(schedule)) == []


def test_momentum_is_cycled_too() -> None:
    schedule = make(lambda o: CyclicLR(o, 0.01, 0.1, 3))
    target = replayed(schedule, Snapshot.of(schedule, schedule.regular_lrs), 2)
    twin = make(lambda o: CyclicLR(o, 0.01, 0.1, 3))
    assert twin.scheduler is not None
    twin.optimizer.step()
    for _ in range(2):
        twin.scheduler.step()
    assert [group["momentum"] for group in target.groups] == [
        group["momentum"] for group in twin.optimizer.param_groups
    ]


def test_a_schedule_that_is_too_short_is_left_as_it_is() -> None:
    schedule = make(lambda o: OneCycleLR(o, 0.1, 5))
    before = facts(schedule)
    with pytest.raises(ValueError, match="total steps is 5"):
        replayed(schedule, Snapshot.of(schedule, schedule.regular_lrs), 6)
    assert differences(before, facts(schedule)) == []


def test_a_group_that_was_added_later_is_left_alone() -> None:
    schedule = make(lambda o: ExponentialLR(o, 0.5))
    begin = Snapshot.of(schedule, schedule.regular_lrs)
    schedule.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 7.0})
    target = replayed(schedule, begin, 1)
    assert [group["lr"] for group in target.groups] == [0.1, 0.05]
    assert [group["lr"] for group in schedule.optimizer.param_groups][2] == 7.0


@pytest.mark.parametrize(("mode", "best", "bad"), [("min", 0.5, 3), ("max", float("-inf"), 0)])
def test_a_plateau_keeps_what_it_has_seen_in_its_direction(mode: Any, best: float, bad: int) -> None:
    schedule = make(lambda o: ReduceLROnPlateau(o, mode, patience=9))
    saved = {"mode": "min", "best": 0.5, "num_bad_epochs": 3, "cooldown_counter": 1, "last_epoch": 6, "patience": 4}
    made = with_counts_of_plateau(Snapshot.of(schedule), saved, [0.3, 0.2])
    assert made.scheduler is not None
    names = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "patience", "_last_lr")
    assert [made.scheduler[name] for name in names] == [best, bad, 1, 6, 9, [0.3, 0.2]]
    assert [group["lr"] for group in made.groups] == [0.3, 0.2]


@pytest.mark.parametrize("value", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_a_tensor_stays_the_same_tensor_with_all_its_digits(value: Any) -> None:
    lr = torch.tensor(1.0, dtype=torch.float64)
    group = {"lr": lr}
    set_in_group(group, "lr", value)
    assert group["lr"] is lr
    assert lr.item() == 0.1
