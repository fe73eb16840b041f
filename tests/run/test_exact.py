"""Values of an optimizer's state come back as they were."""

from __future__ import annotations

import enum
from collections import defaultdict, deque
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from torch_frame.checkpoint.format import plain
from torch_frame.distributed.strategy import SingleProcess
from torch_frame.run.exact import castable, exact
from torch_frame.run.optimizers import OptimizerPart


class Phase(enum.Enum):
    WARM = 1
    LATE = 2


class Moments(NamedTuple):
    first: torch.Tensor
    count: int


def test_values_come_back_as_they_were() -> None:
    half = torch.ones(2, dtype=torch.float16)
    value = {"t": torch.full((2,), 1 / 3, dtype=torch.float64), "s": "text", "l": [half, "x", None], "n": 1, "b": b"x"}
    cast = castable(value)
    assert cast["s"] is cast["l"][1] is cast["b"] is None
    loaded = {"t": value["t"].float(), "s": None, "l": [half.float(), None, None], "n": torch.tensor(1.0), "b": None}  # type: ignore[attr-defined]
    made = exact(value, {**loaded, "new": 3})
    assert torch.equal(made["t"], value["t"])
    assert made["l"][0].dtype == torch.float16
    assert (made["s"], made["l"][1:], made["n"], made["b"], made["new"]) == ("text", ["x", None], loaded["n"], b"x", 3)


@pytest.mark.parametrize(
    "value",
    [
        Phase.LATE,
        b"bytes",
        {1, 2},
        np.float32(1.5),
        np.arange(3.0),
        deque([torch.ones(2, dtype=torch.float64)], maxlen=1),
        defaultdict(list, {"a": [1]}),
        Moments(torch.ones(2, dtype=torch.float64), 3),
        (torch.ones(1, dtype=torch.float64), "text"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_of_any_kind_keeps_its_kind(value: Any) -> None:
    saved, resumed = made(), made()
    parameter = saved.param_groups[0]["params"][0]
    saved.state[parameter]["value"] = saved.param_groups[0]["value"] = value
    part_of(resumed).load_state_dict(plain(part_of(saved).state_dict()))
    for found in (resumed.state[resumed.param_groups[0]["params"][0]]["value"], resumed.param_groups[0]["value"]):
        assert type(found) is type(value)
        assert repr(found) == repr(value)


def made() -> SGD:
    return SGD(nn.Linear(1, 1, bias=False).parameters(), lr=0.1)


def part_of(optimizer: SGD) -> OptimizerPart:
    model = nn.Module()
    model.weight = optimizer.param_groups[0]["params"][0]
    return OptimizerPart(optimizer, model, SingleProcess())
