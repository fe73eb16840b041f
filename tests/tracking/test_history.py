"""HistoryBuffer: 1.7's window and running sums."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_frame import HistoryBuffer, MetricStorage

FLOATS = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@given(values=st.lists(FLOATS, min_size=1, max_size=60), window=st.integers(1, 25))
@settings(max_examples=100, deadline=None)
def test_a_buffer_is_a_window_and_a_running_sum(values: list[float], window: int) -> None:
    buffer = HistoryBuffer(window)
    for value in values:
        buffer.update(value)
    assert buffer.latest == values[-1]
    assert buffer.avg == pytest.approx(np.mean(values[-window:]), rel=1e-9, abs=1e-9)
    assert buffer.global_sum == sum(values)
    assert buffer.global_avg == sum(values) / len(values)
    assert float(buffer) == buffer.avg
    assert str(buffer) == str(round(buffer.avg, 4))


def test_the_default_window_is_1_7s() -> None:
    buffer = HistoryBuffer()
    for value in range(30):
        buffer.update(value)
    assert buffer.avg == np.mean(range(10, 30))
    assert buffer.global_avg == np.mean(range(30))


@pytest.mark.parametrize("other", [2, 2.0, torch.tensor(2.0)], ids=["int", "float", "tensor"])
def test_comparisons_are_of_the_windows_mean(other: Any) -> None:
    low, same, high = HistoryBuffer(2), HistoryBuffer(2), HistoryBuffer(2)
    for buffer, values in ((low, (9, 1, 2)), (same, (9, 1, 3)), (high, (-9, 2, 3))):
        for value in values:
            buffer.update(value)
    assert low < other <= same < high
    assert high > other >= same > low
    assert not low >= other
    assert not high <= other
    assert other > low
    assert other < high
    assert max(low, high, same, key=float) is high
    assert sorted([high, low, same]) == [low, same, high]


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        np.float32(0.5),
        np.float64(0.5),
        torch.tensor(0.5),
        torch.tensor([0.5]),
        torch.tensor(0.5, requires_grad=True),
    ],
    ids=["float", "np32", "np64", "tensor", "tensor_of_one", "tensor_with_graph"],
)
def test_a_value_of_any_kind_becomes_a_plain_float(value: Any) -> None:
    buffer = HistoryBuffer()
    buffer.update(value)
    storage = MetricStorage()
    storage.update(iter=0, a=value)
    storage.record(1, {"b": value})
    for latest in (buffer.latest, storage["a"].latest, storage["b"].latest):
        assert type(latest) is float
        assert latest == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_kept_as_they_are(value: float) -> None:
    buffer = HistoryBuffer(2)
    buffer.update(value)
    assert repr(buffer.latest) == repr(value)
    assert repr(buffer.avg) == repr(value)
    buffer.update(1.0)
    buffer.update(2.0)
    assert buffer.avg == 1.5
