"""A snapshot holds what the state held, whatever happens to the state next."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from tests.small_runs import copied, differences
from torch_frame.checkpoint.snapshot import HostBuffers, Snapshot


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
    snapshot = HostBuffers().copy(state).content
    with torch.no_grad():
        for tensor in (*state["model"].values(), state["list"][0], state["list"][1][1]):
            tensor.zero_()
    state["sparse"].values().zero_()
    assert differences(dense(snapshot), before) == []
    assert type(snapshot["model"]) is OrderedDict


def test_tied_tensors_stay_one_and_are_copied_once() -> None:
    snapshot = HostBuffers().copy(a_state()).content["model"]
    assert snapshot["weight"] is snapshot["tied"]
    assert torch.equal(snapshot["view"], snapshot["weight"].t())


def test_buffers_are_used_again_when_their_snapshot_is_gone() -> None:
    buffers, weight = HostBuffers(), torch.randn(5)
    first = buffers.copy({"a": weight, "b": torch.ones(5)})
    places = {tensor.data_ptr() for tensor in first.content.values()}
    weight.add_(1)
    second = buffers.copy({"a": weight, "b": torch.ones(5)})
    assert not places & {tensor.data_ptr() for tensor in second.content.values()}, "the first one is still used"
    assert torch.equal(first.content["a"] + 1, second.content["a"])
    del first
    third = buffers.copy({"a": weight, "b": torch.ones(5)})
    assert {tensor.data_ptr() for tensor in third.content.values()} == places
    assert torch.equal(third.content["a"], weight)


def test_tensors_of_one_form_get_buffers_of_their_own() -> None:
    state = {str(i): torch.full((3,), float(i)) for i in range(5)}
    assert differences(HostBuffers().copy(state).content, state) == []


# ---------------------------------------------------------------- what is not copied twice

LARGE = 10_000


def shares(first: Snapshot, second: Snapshot) -> bool:
    return first.content["a"].data_ptr() == second.content["a"].data_ptr()


def test_what_has_not_changed_is_not_copied_again() -> None:
    buffers = HostBuffers()
    model = {"a": torch.randn(LARGE), "small": torch.randn(3)}
    weights = buffers.copy(model)
    state = buffers.copy({"a": model["a"].detach(), "moment": torch.randn(LARGE)}, [weights])
    assert shares(weights, state)
    del weights
    again = buffers.copy({"a": torch.randn(LARGE), "b": torch.randn(LARGE)})
    assert state.content["a"].data_ptr() not in {tensor.data_ptr() for tensor in again.content.values()}


def write(tensor: torch.Tensor) -> None:
    tensor.add_(1)


def write_past_torch(tensor: torch.Tensor) -> None:
    tensor.data.mul_(-1)  # an average that is swapped in: torch does not count this


def replace(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data + 1


@pytest.mark.parametrize("change", [write, write_past_torch, replace])
def test_what_has_changed_is_copied_again(change: Any) -> None:
    buffers, model = HostBuffers(), {"a": torch.randn(LARGE)}
    first = buffers.copy(model)
    before = model["a"].clone()
    change(model["a"])
    second = buffers.copy(model, [first])
    assert torch.equal(first.content["a"], before)
    assert torch.equal(second.content["a"], model["a"])


def test_another_tensor_in_the_memory_of_one_that_is_gone_is_not_taken_for_it() -> None:
    buffers = HostBuffers()
    snapshots, equal = [], []
    for value in range(20):
        tensor = torch.full((LARGE,), float(value))
        snapshots.append(buffers.copy({"a": tensor}, snapshots))
        equal.append(torch.equal(snapshots[-1].content["a"], tensor))
        del tensor
    assert all(equal)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 64, 64, 8).permute(0, 3, 1, 2),
        torch.randn(LARGE, dtype=torch.complex64).conj(),
        torch.randn(LARGE, 2)[:, 0],
        torch.randn(1, LARGE).expand(3, LARGE),
    ],
    ids=["channels_last", "conjugate", "strided", "expanded"],
)
def test_tensors_of_any_layout_are_copied_right_twice(tensor: torch.Tensor) -> None:
    buffers = HostBuffers()
    first = buffers.copy({"a": tensor})
    second = buffers.copy({"a": tensor}, [first])
    assert torch.equal(first.content["a"], tensor)
    assert torch.equal(second.content["a"], tensor)


def test_views_that_read_the_same_memory_as_other_values_stay_apart() -> None:
    numbers = torch.tensor([1 + 2j, 3 - 1j])
    state = {"z": numbers, "conj": numbers.conj(), "imag": numbers.imag, "neg": numbers.conj().imag}
    found = HostBuffers().copy(state).content
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "z": [1 + 2j, 3 - 1j],
        "conj": [1 - 2j, 3 + 1j],
        "imag": [2.0, -1.0],
        "neg": [-2.0, 1.0],
    }
