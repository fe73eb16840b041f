"""What a step may return is read as documented; all else is named."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.small_runs import Net, differences, make_trainer, weights_of
from torch_frame import StepOutputError
from torch_frame.training.losses import check_counted_once, read_losses


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


# ---------------------------------------------------------------- counted once


def parts() -> tuple[Any, Any]:
    weight = torch.ones(2, requires_grad=True)
    return (weight * 2).sum(), weight.square().sum()


ce, reg = parts()
both = torch.stack([ce * 2, reg * 2])
TWICE: dict[str, Any] = {
    "total and parts": ({"loss": ce + 0.1 * reg, "ce": ce, "reg": reg}, "'loss' is computed from .*'reg'"),
    "the same twice": ({"loss": ce, "ce": ce}, "'loss' is computed from 'ce'"),
    "a part behind the total": ({"ce": ce, "loss": ce + reg}, "'loss' is computed from 'ce'"),
    "in a pair": (({"loss": ce * 2, "ce": ce}, {"acc": 0.5}), "'loss' is computed from 'ce'"),
    "far below": ({"loss": (ce.exp().log() + reg).clamp(0, 9).sqrt(), "ce": ce}, "'loss' is computed from 'ce'"),
}


@pytest.mark.parametrize(("output", "match"), TWICE.values(), ids=TWICE)
def test_a_loss_beside_its_parts_is_refused(output: Any, match: str) -> None:
    with pytest.raises(StepOutputError, match=match):
        check_counted_once(output)


ONCE: dict[str, Any] = {
    "parts": {"ce": ce, "reg": reg},
    "a total called loss beside another one": {"loss": ce, "reg": reg},
    "one": {"loss": ce},
    "outputs of one function": dict(zip("ab", both.unbind(), strict=True)),
    "a detached part": {"loss": ce + reg, "ce": ce.detach()},
    "numbers": {"loss": ce, "n": 3},
    "metrics with graphs": (ce + reg, {"ce": ce, "reg": reg, "sum": ce + reg}),
    "a tensor": ce,
}


@pytest.mark.parametrize("output", ONCE.values(), ids=ONCE)
def test_losses_that_count_once_are_fine(output: Any) -> None:
    check_counted_once(output)


@pytest.mark.parametrize("window", [1, 2])
def test_a_loss_beside_its_parts_ends_the_run_before_the_weights_are_touched(window: int, tmp_path: Path) -> None:
    def step(model: Any, batch: Any) -> Any:
        error = (model.predict(batch[0]) - batch[1]).square().mean()
        return {"loss": error * 2, "error": error}

    model = Net()
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, step_fn=step, gradient_accumulation_steps=window)
    with pytest.raises(StepOutputError, match="'error' would count twice"):
        trainer.train()
    assert differences(before, weights_of(model)) == []


# ---------------------------------------------------------------- outputs of transformers' kind


class ModelOutput(OrderedDict[str, Any]):
    """transformers' by its class's name: a mapping whose entries are attributes as well."""

    def __init__(self, **values: Any) -> None:
        super().__init__({name: value for name, value in values.items() if value is not None})
        for name, value in values.items():
            setattr(self, name, value)


class Seq2SeqOutput(ModelOutput):
    pass


class Attributes(dict[str, Any]):
    """A dict whose entries are attributes, as addict's and others are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", [ModelOutput, Seq2SeqOutput, Attributes])
def test_the_loss_of_a_model_output_is_trained(kind: Any, rows: int) -> None:
    logits = torch.ones(rows, 1, requires_grad=True) * 2
    output = kind(loss=(logits - 1).square().mean(), logits=logits)
    for given in (output, (output, {"n": 1})):
        total, values = read_losses(given)
        assert total is output.loss
        assert next(iter(values)) == "total_loss"
        assert set(values) <= {"total_loss", "n"}
        check_counted_once(given)


def test_a_dict_of_losses_with_attributes_is_summed() -> None:
    total, values = read_losses(Attributes(loss=ce, reg=reg, off=0.0))
    assert total.item() == (ce + reg).item()
    assert list(values) == ["total_loss", "loss", "reg", "off"]


def test_a_model_output_without_a_loss_is_told() -> None:
    with pytest.raises(StepOutputError, match=r"without a loss: .* 'labels'"):
        read_losses(ModelOutput(loss=None, logits=ce))
