"""What a step of one's own gives to `update()` is looked at when the device is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.small_runs import make_trainer
from torch_frame.errors import NonFiniteError
from torch_frame.training.own_step import OwnStep


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_on_a_device_are_looked_at_when_values_are_read(bad: float, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    step = OwnStep(trainer.optimization, trainer.precision, trainer.strategy, torch.device("cuda"), list)
    for loss in (1.0, bad, 2.0):
        step._note(torch.tensor(loss))
    with pytest.raises(NonFiniteError, match=r"a loss given to update\(\) is not finite"):
        step.check_losses()
    step.check_losses()  # told once
    step._note(torch.tensor(1.0))
    step.check_losses()


def test_on_the_cpu_nothing_is_kept_for_later(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    step = OwnStep(trainer.optimization, trainer.precision, trainer.strategy, trainer.device, list)
    step._note(torch.tensor(float("nan")))
    step.check_losses()
