from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torch_frame.errors import SettingError
from torch_frame.training.named_schedules import NAMES, POLYNOMIAL_END, schedule_by_name

# What 1.7's AccelerateTrainer gave: 8 steps, 2 of them a warm-up, learning rate 0.1 (observed, rounded to four places).
DOWN = [0.0, 0.05, 0.1, 0.0833, 0.0667, 0.05, 0.0333, 0.0167]
COSINE = [0.0, 0.05, 0.1, 0.0933, 0.075, 0.05, 0.025, 0.0067]
OBSERVED = {
    "linear": DOWN,
    "polynomial": DOWN,
    "cosine": COSINE,
    "cosine_with_restarts": COSINE,
    "constant": [0.1] * 8,
    "constant_with_warmup": [0.0, 0.05] + [0.1] * 6,
}


def rates(name: str, *, num_warmup: int = 2, num_steps: int = 8, steps: int = 8, lr: float = 0.1) -> list[float]:
    """The learning rate of each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    schedule = schedule_by_name(name, optimizer, num_warmup, lambda: num_steps)
    made: list[float] = []
    for _ in range(steps):
        made.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return made


@pytest.mark.parametrize("name", NAMES)
def test_the_rates_are_those_of_1_7(name: str) -> None:
    assert rates(name) == pytest.approx(OBSERVED[name], abs=6e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_warmup", [0, 1, 3])
def test_the_rates_are_those_of_transformers(name: str, num_warmup: int) -> None:
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule: Any = transformers.get_scheduler(name, optimizer, num_warmup, 20)
    theirs: list[float] = []
    for _ in range(21):  # behind its end theirs rises again with "cosine"
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(name, num_warmup=num_warmup, num_steps=20, steps=21) == pytest.approx(theirs, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
@pytest.mark.parametrize("num_warmup", [0, 2, 8, 20])
def test_each_ends_at_its_end_and_stays_there(name: str, num_warmup: int) -> None:
    behind = rates(name, num_warmup=num_warmup, steps=40)[max(8, num_warmup + 1) :]
    assert behind == pytest.approx([POLYNOMIAL_END if name == "polynomial" else 0.0] * len(behind), abs=1e-12)


def test_without_a_warm_up_it_begins_with_the_whole_rate() -> None:
    assert rates("cosine", num_warmup=0, num_steps=4, steps=4) == pytest.approx(
        [0.1 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    )


def test_the_number_of_steps_is_not_asked_for_before_the_first_step() -> None:
    def unknown() -> int:
        raise AssertionError("asked for")

    for name in NAMES:
        schedule_by_name(name, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), 2, unknown)


def test_a_name_that_does_not_exist_is_a_sentence() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(SettingError, match=r"'cosin'.*has to be one of 'linear'"):
        schedule_by_name("cosin", optimizer, 0, lambda: 8)
    with pytest.raises(SettingError, match=r"piecewise_constant.*MultiStepLR"):
        schedule_by_name("piecewise_constant", optimizer, 0, lambda: 8)


def test_polynomial_needs_a_rate_that_it_can_lower() -> None:
    with pytest.raises(SettingError, match=r"polynomial.*1e-07.*is 1e-08"):
        rates("polynomial", lr=1e-8)
