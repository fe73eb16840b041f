"""What is probably not meant is told before the first step, and only then."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)

from tests.small_hooks import On
from tests.small_runs import Net, Unsized, make_batches, make_trainer
from torch_frame import HookBase, Trainer


def told(caplog: pytest.LogCaptureFixture, trainer: Trainer) -> list[str]:
    """The warnings before the first step."""
    lines: list[str] = []

    class Note(HookBase):
        def before_iter(self) -> None:
            if not lines:
                lines.extend(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)

    trainer.register_hooks([Note()])
    trainer.train()
    assert lines == [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return lines


# ---------------------------------------------------------------- parameters that no optimizer has


def test_a_head_that_was_replaced_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    model.layers[0].weight.requires_grad_(False)  # frozen: not named
    optimizer = SGD(model.parameters(), lr=0.1)
    model.layers[2] = nn.Linear(8, 1)
    (line,) = told(caplog, make_trainer(tmp_path, model, optimizer))
    assert line.startswith(
        "No optimizer has these trainable parameters, so they stay as they are: layers.2.weight, layers.2.bias."
    )


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}])
def test_nothing_is_said_if_all_are_trained(compile: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert told(caplog, make_trainer(tmp_path, compile=compile)) == []


def test_what_a_hook_gives_to_the_optimizer_is_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    add = On(before_train=lambda t: t.optimizer.add_param_group({"params": list(model.layers[2].parameters())}))
    trainer = make_trainer(tmp_path, model, SGD(model.layers[0].parameters(), lr=0.1), hooks=[add])
    assert told(caplog, trainer) == []


class WithTwo(Trainer):
    """Its second optimizer is an attribute."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.second = SGD(self.model.layers[2].parameters(), lr=0.1)


def test_what_an_optimizer_among_the_attributes_has_is_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net()
    trainer = WithTwo(model, SGD(model.layers[0].parameters(), lr=0.1), None, make_batches(), 1, tmp_path, hooks=[])
    assert told(caplog, trainer) == []


def test_of_many_the_first_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    model.more = nn.ModuleList(nn.Linear(1, 1) for _ in range(10))
    (line,) = told(caplog, make_trainer(tmp_path, model, SGD(model.layers.parameters(), lr=0.1)))
    assert "more.4.bias and 10 more." in line


# ---------------------------------------------------------------- a schedule in the wrong unit


def ramp(steps: int) -> Any:
    return lambda optimizer: LambdaLR(optimizer, lambda step: min(step / steps, 1.0))


def warm_and_cosine(total: int, warm: int) -> Any:
    return lambda o: SequentialLR(o, [LinearLR(o, total_iters=warm), CosineAnnealingLR(o, total - warm)], [warm])


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "begins at 0": (
        ramp(5),
        {},
        r"\(LambdaLR\) begins with a learning rate of 0, .* pass lr_scheduler_interval='iter'",
    ),
    "updates": (lambda o: CosineAnnealingLR(o, 10), {}, "T_max=10, the number of updates in the run, .* counts epochs"),
    "epochs": (
        lambda o: CosineAnnealingLR(o, 2),
        {"lr_scheduler_interval": "iter"},
        "T_max=2, the number of epochs in the run, .* counts updates, of which there are 10. Pass lr_scheduler_interval='epoch'",
    ),
    "iterations": (
        lambda o: CosineAnnealingLR(o, 7),
        {"max_epochs": 3, "max_iters": 7},
        "T_max=7, the number of updates in the run",
    ),
    "in a sequence, updates": (
        warm_and_cosine(10, 3),
        {},
        r"SequentialLR\) has milestones\[-1\] \+ T_max=10, the number of updates",
    ),
    "in a sequence, epochs": (
        warm_and_cosine(4, 1),
        {"lr_scheduler_interval": "iter", "max_epochs": 4},
        r"T_max=4, the number of epochs in the run, .* counts updates",
    ),
    "in a chain": (lambda o: ChainedScheduler([StepLR(o, 2), CosineAnnealingLR(o, 10)], o), {}, "T_max=10, .* updates"),
    "a polynomial": (lambda o: PolynomialLR(o, 10), {}, "total_iters=10, the number of updates in the run"),
    "a line down": (
        lambda o: LinearLR(o, 1.0, 0.0, total_iters=2),
        {"lr_scheduler_interval": "iter"},
        "total_iters=2, the number of epochs in the run",
    ),
    "batches": (
        lambda o: CosineAnnealingLR(o, 10),
        {"lr_scheduler_interval": "iter", "gradient_accumulation_steps": 2},
        "T_max=10, the number of batches in the run, .* counts updates, of which there are 6. Make it for 6 steps.",
    ),
}


class WarmUpAndCosine(LRScheduler):
    """A schedule of one's own."""

    def __init__(self, optimizer: Any, max_steps: int) -> None:
        self.max_steps = max_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return list(self.base_lrs)


WRONG["one's own"] = (
    lambda o: WarmUpAndCosine(o, 10),
    {},
    r"\(WarmUpAndCosine\) has max_steps=10, the number of updates",
)


@pytest.mark.parametrize(("make", "settings", "match"), WRONG.values(), ids=WRONG)
def test_a_schedule_in_the_wrong_unit_is_told(
    make: Any, settings: dict[str, Any], match: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    (line,) = told(caplog, make_trainer(tmp_path, model, optimizer, make(optimizer), **settings))
    assert "lr_scheduler_interval" in line
    assert re.search(match, line)


def by_epochs_times_batches(num_epochs: int, loader: list[Any]) -> Any:
    return lambda optimizer: LambdaLR(optimizer, lambda step: 1 - step / (num_epochs * len(loader)))


class OfBoth(WarmUpAndCosine):
    """A schedule of one's own that counts updates, and is told both lengths."""

    def __init__(self, optimizer: Any, max_epochs: int, iters_per_epoch: int) -> None:
        self.max_epochs, self.iters_per_epoch = max_epochs, iters_per_epoch
        super().__init__(optimizer, max_epochs * iters_per_epoch)
        del self.max_steps


RIGHT: dict[str, tuple[Any, dict[str, Any]]] = {
    "by updates": (ramp(5), {"lr_scheduler_interval": "iter"}),
    "by epochs": (lambda o: CosineAnnealingLR(o, 2), {}),
    "for the updates": (lambda o: CosineAnnealingLR(o, 10), {"lr_scheduler_interval": "iter"}),
    "a short warm-up": (lambda o: LinearLR(o, 0.5, total_iters=2), {"lr_scheduler_interval": "iter"}),
    "a step as long as the run": (lambda o: StepLR(o, 10), {}),
    "an own warm-up": (lambda o: StepLR(o, 1), {"warmup_method": "linear", "warmup_iters": 3}),
    "one update an epoch": (lambda o: CosineAnnealingLR(o, 2), {"gradient_accumulation_steps": 5}),
    "no length": (lambda o: CosineAnnealingLR(o, 7), {"data": Unsized()}),
    "one cycle": (lambda o: OneCycleLR(o, 0.1, total_steps=10), {"lr_scheduler_interval": "iter"}),
    "none": (lambda o: None, {}),
    "a sequence of updates": (warm_and_cosine(10, 3), {"lr_scheduler_interval": "iter"}),
    "a sequence of epochs": (warm_and_cosine(3, 1), {"max_epochs": 3}),
    "a sequence with the whole length": (
        lambda o: SequentialLR(o, [LinearLR(o, total_iters=3), CosineAnnealingLR(o, 10)], [3]),
        {"lr_scheduler_interval": "iter"},
    ),
    "a function of epochs times batches": (
        by_epochs_times_batches(2, make_batches()),
        {"lr_scheduler_interval": "iter"},
    ),
    "one's own of epochs times batches": (lambda o: OfBoth(o, 2, 5), {"lr_scheduler_interval": "iter"}),
}


@pytest.mark.parametrize(("make", "settings"), RIGHT.values(), ids=RIGHT)
def test_of_a_schedule_in_the_right_unit_nothing_is_said(
    make: Any, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    assert told(caplog, make_trainer(tmp_path, model, optimizer, make(optimizer), **settings)) == []


def test_a_schedule_that_has_come_down_to_0_is_not_told_on_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(tmp_path, model, optimizer, LambdaLR(optimizer, lambda epoch: float(epoch < 2)))
    trainer.train()
    assert trainer.lr == 0
    trainer.max_epochs = 3
    assert "begins with" not in " ".join(told(caplog, trainer))
