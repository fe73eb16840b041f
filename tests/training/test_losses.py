"""What a step may return is read as documented; all else is named."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_frame import StepOutputError
from torch_frame.training.losses import read_losses


def loss(value: float = 2.0, shape: tuple[int, ...] = ()) -> Tensor:
    return torch.full(shape, value, requires_grad=True) * 1


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_one_element_tensor_is_the_total(shape: tuple[int, ...]) -> None:
    output = loss(2.0, shape)
    total, values = read_losses(output)
    assert total is output
    assert list(values) == ["total_loss"]
    assert values["total_loss"] is output


@pytest.mark.parametrize(
    ("named", "total"),
    [
        ({"a": loss(1.5)}, 1.5),
        ({"a": loss(1.5), "b": loss(2.0)}, 3.5),
        ({"a": loss(1.5), "l1": 0.0, "n": 2}, 3.5),
        ({"l1": 0.5, "a": loss(1.5)}, 2.0),
        ({"a": loss(1.5), "np": np.float32(0.25)}, 1.75),
        ({"a": loss(1.5), "b": loss(1.0, (1,))}, 2.5),
        ({"a": loss(1.5), "constant": torch.tensor(1.0)}, 2.5),
        (OrderedDict(a=loss(1.0)), 1.0),
    ],
)
def test_a_dict_is_summed(named: Any, total: float) -> None:
    summed, values = read_losses(named)
    assert summed.item() == total
    assert summed.numel() == 1
    assert list(values) == ["total_loss", *named]


def test_the_gradient_is_that_of_the_sum() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    read_losses({"a": weight * 2, "off": 0.0, "b": weight.square(), "fixed": torch.tensor(5.0)})[0].backward()
    assert weight.grad == 2 + 2 * 3.0


def test_the_given_dict_is_not_changed() -> None:
    named = {"a": loss(), "b": 0.0}
    read_losses((named, {"acc": 0.5}))
    assert list(named) == ["a", "b"]


@pytest.mark.parametrize("losses", [loss(), {"a": loss(), "b": 0.0}], ids=["tensor", "dict"])
def test_metrics_stand_beside_the_losses(losses: Any) -> None:
    metrics = {"acc": 0.5, "n": 3, "t": torch.tensor([1]), "np": np.float64(0.1), "flag": True}
    total, values = read_losses((losses, metrics))
    assert total.item() == 2.0
    assert next(iter(values)) == "total_loss"
    assert list(values)[-5:] == list(metrics)


BAD: dict[str, tuple[Any, str]] = {
    "none": (None, "return statement"),
    "number": (0.5, "item()"),
    "text": ("loss", "str"),
    "list": ([loss()], "list of 1"),
    "array": (np.ones(1), "ndarray"),
    "huggingface": (SimpleNamespace(loss=loss()), "step_fn"),
    "vector": (loss(1.0, (3,)), "(3,)"),
    "empty": (loss(1.0, (0,)), "(0,)"),
    "detached": (loss().detach(), "requires_grad"),
    "whole_number": (torch.tensor(1), "requires_grad"),
    "empty_dict": ({}, "empty dict"),
    "total_loss_inside": ({"total_loss": loss()}, "total_loss"),
    "numbers_alone": ({"a": 0.5, "b": 1}, "'a', 'b'"),
    "detached_dict": ({"a": loss().detach()}, "'a'"),
    "vector_in_dict": ({"fine": loss(), "wide": loss(1.0, (2,))}, "'wide'"),
    "text_in_dict": ({"a": loss(), "name": "x"}, "'name'"),
    "none_in_dict": ({"a": loss(), "gone": None}, "'gone'"),
    "tuple_of_three": ((loss(), {}, {}), "3 elements"),
    "tuple_of_one": ((loss(),), "1 elements"),
    "empty_tuple": ((), "0 elements"),
    "number_in_pair": ((0.5, {}), "first element"),
    "metrics_no_dict": ((loss(), [0.5]), "second element"),
    "pair_of_tensors": ((loss(), loss()), "second element"),
    "metric_vector": ((loss(), {"wide": torch.ones(2)}), "'wide'"),
    "metric_text": ((loss(), {"name": "x"}), "'name'"),
    "metric_array": ((loss(), {"name": np.ones(2)}), "'name'"),
    "metric_complex": ((loss(), {"name": 1j}), "'name'"),
    "pair_in_pair": (((loss(), {}), {}), "first element"),
    "complex": (torch.tensor(1j, requires_grad=True) * 1, "complex64"),
}


@pytest.mark.parametrize(("output", "names"), BAD.values(), ids=BAD)
def test_all_else_is_an_error_that_names_it_and_what_is_expected(output: Any, names: str) -> None:
    with pytest.raises(StepOutputError) as raised:
        read_losses(output)
    assert names in str(raised.value)
    assert isinstance(raised.value, TypeError)


def test_a_names_type_does_not_break_the_message() -> None:
    with pytest.raises(StepOutputError, match="3"):
        read_losses({3: torch.ones(2, requires_grad=True)})
