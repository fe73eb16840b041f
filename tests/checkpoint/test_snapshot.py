"""A snapshot holds what the state held, whatever happens to the state next."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from tests.small_runs import copied, differences
from torch_frame.checkpoint.snapshot import HostBuffers


def a_state() -> dict[str, Any]:
    weight = torch.randn(4, 3)
    return {
        "model": OrderedDict(weight=weight, tied=weight, view=weight.t(), channels_last=torch.randn(2, 3, 4, 4).to(
            memory_format=torch.channels_last)),
        "list": [torch.tensor(3), (torch.zeros(0), nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))],
        "sparse": torch.eye(3).to_sparse(),
        "plain": {"n": 1, "name": "x", "none": None},
    }  # fmt: skip


def dense(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "sparse": state["sparse"].to_dense()}


def test_a_snapshot_is_equal_and_shares_nothing() -> None:
    state = a_state()
    before = copied(dense(state))
    snapshot = HostBuffers().copy(state)
    with torch.no_grad():
        for tensor in (*state["model"].values(), state["list"][0], state["list"][1][1]):
            tensor.zero_()
    state["sparse"].values().zero_()
    assert differences(dense(snapshot), before) == []
    assert type(snapshot["model"]) is OrderedDict


def test_tied_tensors_stay_one_and_are_copied_once() -> None:
    snapshot = HostBuffers().copy(a_state())["model"]
    assert snapshot["weight"] is snapshot["tied"]
    assert torch.equal(snapshot["view"], snapshot["weight"].t())


def test_buffers_are_used_again() -> None:
    buffers, weight = HostBuffers(), torch.randn(5)
    first = buffers.copy({"a": weight, "b": torch.ones(5)})
    places = first["a"].data_ptr(), first["b"].data_ptr()
    weight.add_(1)
    second = buffers.copy({"a": weight, "b": torch.ones(5)})
    assert (second["a"].data_ptr(), second["b"].data_ptr()) == places
    assert torch.equal(second["a"], weight)


def test_tensors_of_one_form_get_buffers_of_their_own() -> None:
    state = {str(i): torch.full((3,), float(i)) for i in range(5)}
    assert differences(HostBuffers().copy(state), state) == []
