"""What is logged is a number as it is at that moment, or an error that names it there."""

from __future__ import annotations

import gc
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.small_hooks import On, at_iter
from tests.small_runs import make_trainer, raised_by
from torch_frame import HistoryBuffer, HookBase, LoggerHook, MetricStorage
from torch_frame.scalars import number_or_copy

GOOD = [
    1,
    2.5,
    True,
    np.float16(2.5),
    np.array([[3]]),
    torch.tensor([4]),
    torch.tensor(True),
    Fraction(1, 2),
    np.bool_(1),
]
BAD = [None, "abc", [1.0], {}, 1j, torch.ones(3), torch.tensor(1j), np.ones(2), np.array("a"), np.array(None), object()]


@pytest.mark.parametrize("value", GOOD, ids=repr)
def test_a_number_is_taken(value: Any) -> None:
    storage = MetricStorage()
    storage.update(x=value)
    assert storage.value("x") == float(getattr(value, "item", lambda: value)())


@pytest.mark.parametrize("value", BAD, ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_an_error_where_it_is_logged(value: Any, tmp_path: Path) -> None:
    caught = []

    def log(trainer: Any) -> None:
        try:
            trainer.log(3, fine=1.0, confusion=value)
        except TypeError as error:
            caught.append((error, trainer.cur_iter))
            raise

    trainer = make_trainer(tmp_path, hooks=[On(after_iter=at_iter(3, log)), LoggerHook()])
    error = raised_by(trainer.train, TypeError)
    assert caught == [(error, 3)]
    assert "'confusion'" in str(error)
    assert "fine" not in trainer.metric_storage


def test_a_buffer_is_its_mean() -> None:
    buffer = HistoryBuffer(2)
    buffer.update(1.0)
    buffer.update(2.0)
    assert number_or_copy(buffer, "x") == 1.5


def test_a_tensor_that_is_changed_later_was_what_it_was(tmp_path: Path) -> None:
    class Running(HookBase):
        def __init__(self) -> None:
            self.seen = torch.zeros(())

        def after_iter(self) -> None:
            self.seen += 1.0
            self.log(self.trainer.cur_iter, seen=self.seen, smooth=True)

    trainer = make_trainer(tmp_path, hooks=[Running()], max_epochs=1)
    trainer.train()
    assert trainer.value("seen") == 3.0  # 1 to 5


def test_no_graph_is_kept(tmp_path: Path) -> None:
    alive = []

    class Log(HookBase):
        def __init__(self) -> None:
            self.references: list[Any] = []

        def after_iter(self) -> None:
            saved = torch.ones(10)  # by the multiplication, for its backward
            self.references.append(weakref.ref(saved))
            weight = next(self.trainer.model.parameters())
            self.log(self.trainer.cur_iter, norm=(weight.sum() * saved).square().mean())
            del saved
            gc.collect()
            alive.append(sum(reference() is not None for reference in self.references))

    make_trainer(tmp_path, hooks=[Log()], max_epochs=1).train()
    assert max(alive) == 0
