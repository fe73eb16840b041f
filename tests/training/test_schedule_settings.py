"""What is recorded of a schedule are its settings and never its place, of functions the values around them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from tests.small_runs import Net
from torch_frame.training.schedule_settings import (
    Unknown,
    length_of,
    position_in,
    rates_that_differ,
    settings_of,
    simple,
)


def made(scheduler: Any) -> Any:
    return scheduler(SGD(Net().parameters(), lr=0.1, momentum=0.9))


SETTINGS = {
    "milestones": (lambda o: MultiStepLR(o, [3, 1, 3]), {"milestones": [1, 3, 3], "gamma": 0.1}),
    "one_cycle": (
        lambda o: OneCycleLR(o, 0.1, 10, pct_start=0.4, three_phase=True),
        {
            "total_steps": 10,
            "pct_start": 0.4,
            "three_phase": True,
            "anneal_func_type": "cos",
            "cycle_momentum": True,
            "use_beta1": False,
        },
    ),
    "restarts": (
        lambda o: CosineAnnealingWarmRestarts(o, 2, 2),
        {"T_0": 2, "T_mult": 2, "eta_min": 0.0},
    ),
    "plateau": (
        lambda o: ReduceLROnPlateau(o, "max", 0.5),
        {
            "factor": 0.5,
            "default_min_lr": 0,
            "min_lrs": [0],
            "patience": 10,
            "cooldown": 0,
            "eps": 1e-8,
            "mode": "max",
            "threshold": 1e-4,
            "threshold_mode": "rel",
        },
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_schedulers_settings(name: str) -> None:
    scheduler, expected = SETTINGS[name]
    own = made(scheduler)
    before = settings_of(own)
    assert before is not None
    assert before["settings"] == expected
    own.optimizer.step()
    for _ in range(3):
        own.step(1.0) if name == "plateau" else own.step()
    assert settings_of(own) == before, "where it stands makes no difference"


def test_schedulers_inside_others_are_recorded() -> None:
    def scheduler(o: Optimizer) -> Any:
        return ChainedScheduler([SequentialLR(o, [ExponentialLR(o, 0.5), ExponentialLR(o, 0.9)], [3])])

    record = settings_of(made(scheduler))
    assert record is not None
    (sequence,) = record["schedulers"]
    assert (sequence["class"], sequence["settings"]) == ("SequentialLR", {"milestones": [3]})
    assert [one["settings"] for one in sequence["schedulers"]] == [{"gamma": 0.5}, {"gamma": 0.9}]
    assert settings_of(None) is None


class Decay:
    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def __call__(self, step: int) -> float:
        return self.gamma**step


def power(step: int, *, gamma: float) -> float:
    return gamma**step


def around(gamma: float) -> Any:
    return lambda step: gamma**step


FUNCTIONS = {
    "closure": (around(0.5), around(0.7), False),
    "partial": (functools.partial(power, gamma=0.5), functools.partial(power, gamma=0.7), False),
    "object": (Decay(0.5), Decay(0.7), True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_values_around_a_function_are_recorded(name: str) -> None:
    function, _, is_stateful = FUNCTIONS[name]
    record = settings_of(made(lambda o: LambdaLR(o, function)))
    assert record is not None
    assert record["functions"] == [{"is_stateful": is_stateful, "values": {"gamma": 0.5}}]


def test_a_variable_that_is_assigned_later_and_one_that_is_no_value_are_left_out() -> None:
    config = {"epochs": 5}
    total = 10

    def function(step: int) -> float:
        return 1.0 if step == 0 else len(config) * total * later

    record = settings_of(made(lambda o: LambdaLR(o, function)))
    later = 1
    assert record is not None
    assert record["functions"] == [{"is_stateful": False, "values": {"total": 10}}]


@pytest.mark.parametrize("kind", [LambdaLR, MultiplicativeLR])
@pytest.mark.parametrize("name", ["closure", "partial"])
def test_another_function_gives_another_rate_at_the_saved_step(name: str, kind: Any) -> None:
    function, other, _ = FUNCTIONS[name]
    saved = made(lambda o: kind(o, function))
    saved.optimizer.step()
    for _ in range(3):
        saved.step()
    assert list(rates_that_differ(made(lambda o: kind(o, function)), saved.state_dict())) == []
    ((rate, now, steps),) = rates_that_differ(made(lambda o: kind(o, other)), saved.state_dict())
    n = 3 if kind is LambdaLR else 6
    assert (rate, now, steps) == (pytest.approx(0.1 * 0.5**n), pytest.approx(0.1 * 0.7**n), 3)


def test_a_callable_object_is_asked_with_its_saved_attributes() -> None:
    saved, script = (made(lambda o, gamma=gamma: LambdaLR(o, Decay(gamma))) for gamma in (0.5, 0.7))
    saved.optimizer.step()
    saved.step()
    assert list(rates_that_differ(script, saved.state_dict())) == []
    assert script.lr_lambdas[0].gamma == 0.7, "a copy was asked"


def test_asking_a_scale_function_moves_no_momentum() -> None:
    scheduler = lambda scale: lambda o: CyclicLR(o, 0.01, 0.1, 4, scale_fn=lambda cycle: scale)  # noqa: E731
    saved, script = made(scheduler(0.5)), made(scheduler(0.7))
    saved.optimizer.step()
    saved.step()
    before = dict(script.optimizer.param_groups[0])
    ((rate, now, steps),) = rates_that_differ(script, saved.state_dict())
    assert (rate, now, steps) == (pytest.approx(0.01 + 0.09 * 0.5 / 4), pytest.approx(0.01 + 0.09 * 0.7 / 4), 1)
    assert script.optimizer.param_groups[0] == before


def test_the_position_of_a_chain_is_that_of_its_first() -> None:
    chain = made(lambda o: ChainedScheduler([ExponentialLR(o, 0.5)]))
    chain.optimizer.step()
    chain.step()
    assert [position_in(chain.state_dict()), position_in(None), position_in({"t": 3})] == [1, None, None]


def test_only_plain_values_are_recorded() -> None:
    values = {"a": np.float64(0.5), "b": (1, "x"), "c": torch.tensor([1.0, 2.0]), "d": {"e": None}}
    assert simple(values) == {"a": 0.5, "b": [1, "x"], "c": [1.0, 2.0], "d": {"e": None}}
    for value in (object(), [object()], {"a": object()}, torch.zeros(65), Net()):
        assert simple(value) is Unknown


@pytest.mark.parametrize(
    ("scheduler", "length"),
    [
        (lambda o: CosineAnnealingLR(o, 30), 30),
        (lambda o: OneCycleLR(o, 0.1, 10), 10),
        (lambda o: SequentialLR(o, [LinearLR(o, total_iters=5), CosineAnnealingLR(o, 25)], [5]), 30),
        (lambda o: LambdaLR(o, functools.partial(to_zero, num_training_steps=40)), 40),
        (lambda o: ExponentialLR(o, 0.9), None),
        (lambda o: SequentialLR(o, [LinearLR(o, total_iters=5), ExponentialLR(o, 0.9)], [5]), None),
    ],
)
def test_the_length_that_a_schedule_is_made_for(scheduler: Any, length: int | None) -> None:
    record = settings_of(made(scheduler))
    assert record is not None
    assert length_of(record) == length


def to_zero(step: int, *, num_training_steps: int) -> float:
    return max(0.0, 1 - step / num_training_steps)
