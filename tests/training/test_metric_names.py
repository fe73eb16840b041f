"""Names that clash: each value is recorded under a name of its own, and that is told once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.small_hooks import On
from tests.small_runs import make_trainer
from torch_frame import LoggerHook
from torch_frame.training.metric_names import MetricNames


def returning(output: Any) -> Any:
    """A step that returns `output(loss)`."""
    return lambda model, batch: output(model(batch))


CLASHES = {
    "loss_tensor": (lambda loss: (loss, {"total_loss": 5.0}), {"total_loss_metric": 5.0}),
    "loss_in_a_dict": (lambda loss: ({"a": loss, "b": 0.5}, {"b": 5.0}), {"b": 0.5, "b_metric": 5.0}),
    "twice": (
        lambda loss: ({"a": loss, "b": 0.5}, {"b": 5.0, "b_metric": 6.0}),
        {"b": 0.5, "b_metric": 5.0, "b_metric_metric": 6.0},
    ),
    "counters": (
        lambda loss: (loss, {"iter": 3.0, "epoch": 7.0, "time": 0.25}),
        {"iter_metric": 3.0, "epoch_metric": 7.0, "time_metric": 0.25},
    ),
    "rates": (
        lambda loss: (loss, {"lr": 9.0, "iter_time": 8.0}),
        {"lr": 0.05, "lr_metric": 9.0, "iter_time_metric": 8.0},
    ),
    "no_texts": (lambda loss: {0: loss, 1: 0.5}, {"1": 0.5}),
    "a_number_and_its_text": (lambda loss: {"a": loss, 1: 0.5, "1": 0.25}, {"1": 0.25, "1_metric": 0.5}),
}


@pytest.mark.parametrize(("output", "expected"), CLASHES.values(), ids=CLASHES)
def test_both_values_are_recorded_and_the_name_is_told_once(
    output: Any, expected: dict[str, float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path / "run", hooks=[LoggerHook(1)], step_fn=returning(output))
    with caplog.at_level(logging.WARNING, "torch_frame"):
        trainer.train()
    assert {name: trainer.metric_storage[name].latest for name in expected} == pytest.approx(expected)
    for name in expected:
        told = [line for line in caplog.messages if f"recorded as {name!r}" in line]
        assert len(told) == name.endswith("_metric"), name
    rows = [json.loads(line) for line in Path(trainer.work_dir, "metrics.jsonl").read_text().splitlines()]
    assert [row["iter"] for row in rows] == list(range(10))


def test_training_is_on_the_loss_not_on_the_metric_of_its_name(tmp_path: Path) -> None:
    weights = []
    for output in (lambda loss: loss, lambda loss: (loss, {"total_loss": 5.0})):
        trainer = make_trainer(tmp_path / str(len(weights)), step_fn=returning(output))
        trainer.train()
        weights.append(nn.utils.parameters_to_vector(trainer.model.parameters()))
    assert torch.equal(*weights)


def test_grad_norm_is_the_runs_own_only_while_clipping_records_it(tmp_path: Path) -> None:
    step = returning(lambda loss: (loss, {"grad_norm": 123.0}))
    clipped = make_trainer(tmp_path / "a", step_fn=step, clip_grad_norm=1.0)
    clipped.train()
    assert clipped.metric_storage["grad_norm_metric"].latest == 123.0 != clipped.metric_storage["grad_norm"].latest
    free = make_trainer(tmp_path / "b", step_fn=step)
    free.train()
    assert free.metric_storage["grad_norm"].latest == 123.0
    assert "grad_norm_metric" not in free.metric_storage


def test_a_hooks_value_of_a_reserved_name_makes_room(tmp_path: Path) -> None:
    hook = On(after_iter=lambda trainer: trainer.log(trainer.cur_iter, lr=7.0, smooth=False))
    direct = On(after_iter=lambda trainer: trainer.metric_storage.update(trainer.cur_iter, epoch=3))
    trainer = make_trainer(tmp_path, hooks=[hook, direct])
    trainer.train()
    assert (trainer.value("lr"), trainer.value("lr_metric"), trainer.value("epoch_metric")) == (0.05, 7.0, 3.0)


def test_own_values_may_be_logged_by_an_override_of_1_7() -> None:
    names = MetricNames(norms=["grad_norm"])
    with names.own_values():
        assert [names.logged(name) for name in ("lr", "data_time", "grad_norm")] == [
            "lr",
            "data_time",
            "grad_norm_metric",
        ]
    assert names.logged("lr") == "lr_metric"


NUMBERS = [np.array(0.5), np.array(2), np.bool_(True), np.float32(0.5), np.int64(3), np.array([0.25]), True, 3]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_numpys_numbers_are_numbers(number: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, step_fn=returning(lambda loss: ({"a": loss, "b": number}, {"m": number})))
    trainer.train()
    assert trainer.value("m") == trainer.value("b") == float(np.asarray(number).item())


class OffCpu(nn.Parameter):
    """Says that it is on a device, so that it is kept unread."""

    is_cpu = property(lambda self: False)  # type: ignore[assignment]


@pytest.mark.parametrize(
    "metric", [lambda p: p, lambda p: p.view(1), lambda p: p[None][0]], ids=["itself", "view", "part"]
)
def test_a_parameter_as_metric_has_the_value_of_its_step(metric: Any, tmp_path: Path) -> None:
    class Scale(nn.Module):
        def __init__(self, kind: Any) -> None:
            super().__init__()
            self.scale = kind(torch.tensor(0.0))

        def forward(self, batch: Any) -> Any:
            return -(self.scale * 1.0), {"scale": metric(self.scale)}

    means = []
    for kind in (nn.Parameter, OffCpu):
        model = Scale(kind)
        trainer = make_trainer(
            tmp_path / kind.__name__, model, torch.optim.SGD(model.parameters(), lr=1.0), max_epochs=1
        )
        trainer.train()
        means.append(trainer.value("scale"))
    assert means == [3.0, 3.0]  # 1, 2, 3, 4, 5: as it is behind the update
