"""Few frames of ours stand above an error in the user's code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.optim import SGD

from tests.small_hooks import On
from tests.small_runs import Net, Unsized, UserError, fail, library_frames, make_batches, make_trainer, raised_by
from torch_frame import EvalHook, EvalTotalHook
from torch_frame.metrics import ModelMetric

STAGES = ("before_train", "before_epoch", "before_iter", "before_update", "after_update", "after_iter", "after_epoch",
          "after_train", "close")  # fmt: skip


class FailingNet(Net):
    def forward(self, batch: Any) -> Any:
        raise UserError


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_few_library_frames_stand_above_an_error_in_a_hook(stage: str, accumulate: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, hooks=[On(**{stage: fail})], gradient_accumulation_steps=accumulate)
    frames = library_frames(raised_by(trainer.train, UserError))
    assert len(frames) <= 3, frames


def test_few_library_frames_stand_above_an_error_in_the_last_partial_window(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, data=Unsized(), hooks=[On(before_update=fail)], gradient_accumulation_steps=9)
    assert len(library_frames(raised_by(trainer.train, UserError))) <= 3


FAILING = {
    "model": lambda: {"model": FailingNet()},
    "step_fn": lambda: {"step_fn": fail},
    "loss": lambda: {"step_fn": lambda model, batch: fail(model(batch))},
    "loss_weight": lambda: {"loss_weight": fail, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("make", FAILING.values(), ids=FAILING)
def test_few_library_frames_stand_above_an_error_in_the_step(make: Any, tmp_path: Path) -> None:
    frames = library_frames(raised_by(make_trainer(tmp_path, **make()).train, UserError))
    assert len(frames) <= 3, frames


def failing_backward() -> dict[str, Any]:
    model = Net()
    model.layers[0].weight.register_hook(fail)
    return {"model": model}


def failing_optimizer() -> dict[str, Any]:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(fail)
    return {"model": model, "optimizer": optimizer}


class FailingData:
    def __iter__(self) -> Iterator[Any]:
        yield make_batches()[0]
        raise UserError


class Recall(ModelMetric):
    """A metric of 1.7."""

    def __init__(self, update: Any = lambda model, batch: None) -> None:
        self.update = update

    def evaluate(self) -> dict[str, float]:
        return {"recall": 1.0}

    def reset(self) -> None:
        pass


ELSEWHERE = {
    "backward": failing_backward,
    "optimizer": failing_optimizer,
    "data": lambda: {"data": FailingData()},
    "eval_func": lambda: {"hooks": [EvalHook(make_batches(1), fail)]},
    "eval_inputs": lambda: {"hooks": [EvalTotalHook(make_batches(1), Recall(), inputs=fail)]},
    "eval_metric": lambda: {"hooks": [EvalTotalHook(make_batches(1), Recall(update=fail))]},
    "eval_figure": lambda: {"hooks": [EvalTotalHook(make_batches(1), Recall(), figures={"curves": fail})]},
    "eval_data": lambda: {"hooks": [EvalHook(FailingData(), lambda model, batch: {"a": [1.0]})]},
}


@pytest.mark.parametrize("make", ELSEWHERE.values(), ids=ELSEWHERE)
def test_at_most_six_library_frames_stand_above_any_other_error(make: Any, tmp_path: Path) -> None:
    frames = library_frames(raised_by(make_trainer(tmp_path, **make()).train, UserError))
    assert len(frames) <= 6, frames
