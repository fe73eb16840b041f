"""What a step may return, and the sentence that says so when it returns something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD

from tests.small_runs import (
    DictNet,
    Net,
    differences,
    library_frames,
    make_batches,
    make_trainer,
    raised_by,
    train_by_hand,
    weights_of,
)
from torch_frame import StepOutputError, Trainer

GOOD_OUTPUTS = {
    "scalar": lambda loss: loss,
    "one_element": lambda loss: loss.reshape(1),
    "one_element_matrix": lambda loss: loss.reshape(1, 1),
    "dict": lambda loss: {"a": 0.5 * loss, "b": 1.5 * loss},
    "dict_with_numbers": lambda loss: {"l1": 0.0, "a": loss, "n": 1},
    "dict_of_mixed_shapes": lambda loss: {"a": 0.5 * loss, "b": (1.5 * loss).reshape(1)},
    "tensor_and_metrics": lambda loss: (loss, {"acc": 0.5, "n": 3, "t": torch.tensor([2.0])}),
    "dict_and_metrics": lambda loss: ({"a": loss}, {"acc": torch.tensor(1)}),
    "no_metrics": lambda loss: (loss, {}),
}
BAD_OUTPUTS = {
    "nothing": lambda loss: None,
    "number": lambda loss: loss.item(),
    "vector": lambda loss: loss.repeat(3),
    "empty_tensor": lambda loss: loss.reshape(1)[:0],
    "detached": lambda loss: loss.detach(),
    "detached_dict": lambda loss: {"a": loss.detach()},
    "numbers_alone": lambda loss: {"a": 0.5},
    "empty_dict": lambda loss: {},
    "total_loss_inside": lambda loss: {"a": loss, "total_loss": loss},
    "vector_in_dict": lambda loss: {"a": loss, "b": loss.repeat(2)},
    "text_in_dict": lambda loss: {"a": loss, "b": "0.5"},
    "tuple_of_three": lambda loss: (loss, {}, {}),
    "tuple_of_one": lambda loss: (loss,),
    "metrics_not_a_dict": lambda loss: (loss, 0.5),
    "vector_metric": lambda loss: (loss, {"acc": torch.ones(4)}),
    "list": lambda loss: [loss],
}


@pytest.mark.parametrize("form", GOOD_OUTPUTS.values(), ids=GOOD_OUTPUTS)
def test_a_step_may_return(form: Any, tmp_path: Path) -> None:
    model = Net()
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, step_fn=lambda model, batch: form(model(batch)))
    trainer.train()
    assert differences(before, weights_of(model))
    assert trainer.metric_storage["total_loss"].latest > 0


@pytest.mark.parametrize("form", BAD_OUTPUTS.values(), ids=BAD_OUTPUTS)
def test_a_step_may_not_return(form: Any, tmp_path: Path) -> None:
    model = Net()
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, step_fn=lambda model, batch: form(model(batch)))
    error = raised_by(trainer.train, StepOutputError)
    assert len(str(error)) > 40
    assert len(library_frames(error)) <= 6
    assert differences(before, weights_of(model)) == []


def test_a_dicts_losses_are_summed_and_each_is_recorded(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, DictNet(), max_epochs=1)
    trainer.train()
    latest = {name: trainer.metric_storage[name].latest for name in ("total_loss", "mse", "l1", "off")}
    assert latest["total_loss"] == pytest.approx(latest["mse"] + latest["l1"], rel=1e-6)
    assert latest["off"] == 0.0


def test_metrics_are_recorded_and_take_no_part_in_the_gradient(tmp_path: Path) -> None:
    plain, with_metrics = Net(), Net()
    make_trainer(tmp_path / "a", plain).train()
    trainer = make_trainer(
        tmp_path / "b",
        with_metrics,
        step_fn=lambda model, batch: (model(batch), {"norm": model.layers[0].weight.norm()}),
    )
    trainer.train()
    assert differences(weights_of(plain), weights_of(with_metrics)) == []
    assert trainer.metric_storage["norm"].latest > 0


def test_step_fn_trains_a_model_that_does_not_hold_its_loss(tmp_path: Path) -> None:
    model, expected = Net(), Net()
    train_by_hand(expected, SGD(expected.parameters(), lr=0.05), make_batches(), 2)
    step = lambda layers, batch: F.mse_loss(layers(batch[0]), batch[1])  # noqa: E731
    make_trainer(tmp_path, model.layers, step_fn=step).train()
    assert differences(weights_of(expected), weights_of(model)) == []


def test_train_one_iter_can_be_overridden(tmp_path: Path) -> None:
    class OwnTrainer(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            loss = self.model(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            return {"total_loss": loss}

    model, expected = Net(), Net()
    train_by_hand(expected, SGD(expected.parameters(), lr=0.05), make_batches(), 2)
    OwnTrainer(model, SGD(model.parameters(), lr=0.05), None, make_batches(), 2, tmp_path / "run", hooks=[]).train()
    assert differences(weights_of(expected), weights_of(model)) == []
