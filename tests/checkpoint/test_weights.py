"""Weights load into a model as far as they fit, and the report says how far."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.small_runs import Net, copied, differences, weights_of
from torch_frame import CheckpointError
from torch_frame.checkpoint.names import bare_names
from torch_frame.checkpoint.weights import WeightsReport, load_weights


def changed(before: dict[str, Any], model: nn.Module) -> set[str]:
    return {line.split(":")[0].lstrip(".") for line in differences(before, weights_of(model))}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_all_is_loaded_whatever_wrapped_the_model_when_it_was_saved(prefix: str) -> None:
    source, model = Net(norm=True), Net(norm=True, seed=1)
    report = load_weights(model, {prefix + name: value for name, value in source.state_dict().items()})
    assert differences(weights_of(source), weights_of(model)) == []
    assert report.complete
    assert sorted(report.loaded) == sorted(model.state_dict())
    assert str(report) == f"{len(report.loaded)} tensors loaded"


def test_a_models_own_submodule_called_module_keeps_its_name() -> None:
    source, model = (nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 1)}) for _ in range(2))
    assert load_weights(model, source.state_dict()).complete
    assert differences(weights_of(source), weights_of(model)) == []


def test_weights_load_into_a_compiled_model() -> None:
    source, model = Net(), Net(seed=1)
    compiled = torch.compile(model, backend="eager")
    assert load_weights(compiled, source.state_dict()).complete
    assert differences(weights_of(source), weights_of(model)) == []
    assert list(bare_names(compiled.state_dict())) == list(source.state_dict())


def test_missing_and_unexpected_names_are_reported_and_the_rest_is_loaded() -> None:
    source, model = Net(), Net(seed=1)
    before = weights_of(model)
    weights = copied(source.state_dict())
    weights["new.weight"] = weights.pop("layers.0.weight")
    report = load_weights(model, weights)
    assert (report.missing_keys, report.unexpected_keys) == (["layers.0.weight"], ["new.weight"])
    assert report.mismatched_shapes == {}
    assert changed(before, model) == {"layers.0.bias", "layers.2.weight", "layers.2.bias"}
    assert not report.complete


@pytest.mark.parametrize("shape", [(5, 8), (1, 9), (8,), ()])
def test_another_shape_is_reported_with_both_shapes(shape: tuple[int, ...]) -> None:
    model = Net(seed=1)
    before = weights_of(model)
    weights = {**Net().state_dict(), "layers.2.weight": torch.zeros(shape)}
    report = load_weights(model, weights)
    assert report.mismatched_shapes == {"layers.2.weight": (shape, (1, 8))}
    assert report.missing_keys == report.unexpected_keys == []
    assert "layers.2.weight" not in changed(before, model)
    assert f"{list(shape)} -> [1, 8]" in str(report)


def test_weights_of_another_kind_of_number_are_converted() -> None:
    source, model = Net().double(), Net(seed=1)
    assert load_weights(model, source.state_dict()).complete
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_the_loaded_weights_are_copies() -> None:
    weights, model = copied(Net().state_dict()), Net(seed=1)
    load_weights(model, weights)
    weights["layers.0.weight"].zero_()
    assert model.layers[0].weight.abs().sum() > 0


@pytest.mark.parametrize(
    "weights",
    [{}, {"other.weight": torch.ones(1)}, {"layers.0.weight": torch.ones(1)}, [], None, "best.pth", {3: torch.ones(1)}],
    ids=repr,
)
def test_where_nothing_fits_it_is_an_error(weights: Any) -> None:
    model = Net()
    before = weights_of(model)
    with pytest.raises(CheckpointError):
        load_weights(model, weights)
    assert changed(before, model) == set()


def test_the_document_form_of_a_1_7_checkpoint_is_named() -> None:
    with pytest.raises(CheckpointError):
        load_weights(Net(), {"epoch": 3, "model": Net().state_dict()})


def test_long_lists_are_cut_in_the_text_alone() -> None:
    report = WeightsReport(missing_keys=[f"layer{i}" for i in range(30)])
    assert "30 missing" in str(report)
    assert "20 more" in str(report)
    assert len(report.missing_keys) == 30
