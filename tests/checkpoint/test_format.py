"""What `plain` lets through is what torch.load reads without running code, and it is the same afterwards."""

from __future__ import annotations

import enum
import io
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import AdamW

from tests.small_runs import Net, differences, make_batches, train_by_hand
from torch_frame import CheckpointError
from torch_frame.checkpoint.format import FORMAT, is_full_state, plain

Point = namedtuple("Point", "x y")


class Color(enum.IntEnum):
    RED = 1


class Name(str):
    """A subclass of a plain type."""


@dataclass
class Record:
    x: int = 1


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
nested = st.recursive(
    scalars,
    lambda children: st.lists(children) | st.tuples(children) | st.dictionaries(st.text() | st.integers(), children),
)


@given(nested)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    assert plain(value) == value
    assert through_a_file(plain(value)) == value


CONVERTED = {
    "numpy_float": (np.float64(0.5), 0.5),
    "numpy_int": (np.int32(3), 3),
    "numpy_bool": (np.bool_(True), True),
    "defaultdict": (defaultdict(list, a=[1]), {"a": [1]}),
    "counter": (Counter("aab"), {"a": 2, "b": 1}),
    "deque": (deque([1, 2], maxlen=2), [1, 2]),
    "namedtuple": (Point(1, np.float32(2)), (1, 2.0)),
    "path": (Path("a") / "b", str(Path("a") / "b")),
    "int_enum": (Color.RED, 1),
    "text": (Name("x"), "x"),
    "set": ({1, 2}, {1, 2}),
    "frozenset": (frozenset({1}), {1}),
    "dict_keys": ({"a": 1}.keys(), {"a"}),
    "numpy_key": ({np.int64(3): 1}, {3: 1}),
    "deep": ({"a": [(np.float64(1.0), deque([np.int8(1)]))]}, {"a": [(1.0, [1])]}),
    "ordered": (OrderedDict(b=1, a=2), OrderedDict(b=1, a=2)),
}


@pytest.mark.parametrize(("value", "expected"), CONVERTED.values(), ids=CONVERTED)
def test_what_loading_would_refuse_becomes_plain(value: Any, expected: Any) -> None:
    made = plain(value)
    assert made == expected
    assert type(made) is type(expected)
    assert through_a_file(made) == expected


def test_arrays_become_tensors_of_their_own() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    made = plain(array)
    assert torch.equal(made, torch.arange(6.0).reshape(2, 3))
    array[:] = 0
    assert made.sum() == 15


REFUSED = {
    "object": object(),
    "function": len,
    "dataclass": Record(),
    "datetime": datetime(2024, 1, 1),
    "enum": enum.Enum("Kind", "A").A,
    "object_array": np.array([object()]),
    "module": Net(),
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_held_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"hooks.*mine.*\[1\]"):
        plain({"hooks": {"mine": [0, value]}})


def test_an_optimizers_state_comes_back_bitwise() -> None:
    model = Net(norm=True)
    optimizer = AdamW(model.parameters(), lr=np.float64(0.01))
    train_by_hand(model, optimizer, make_batches(), 1)
    state = optimizer.state_dict()
    loaded = through_a_file(plain(state))
    assert differences(state, loaded) == []


@pytest.mark.parametrize(
    ("checkpoint", "is_state"),
    [
        ({"format": FORMAT, "model": {}}, True),
        ({"model": {}}, False),
        ({"format": "other"}, False),
        ({}, False),
        ([FORMAT], False),
        (None, False),
        (torch.ones(2), False),
    ],
)
def test_a_full_state_is_told_from_weights(checkpoint: Any, is_state: bool) -> None:
    assert is_full_state(checkpoint) is is_state
