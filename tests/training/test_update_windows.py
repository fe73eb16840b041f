"""A window's gradient is that of all its batches together, however many it really holds."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR

from tests.small_hooks import On, at_iter
from tests.small_runs import Net, differences, make_batches, make_trainer, weights_of
from tests.training.small_updates import LOADERS, SGD_MOMENTUM, assert_close, doubled, joined, step_by_hand
from torch_frame import Trainer


@pytest.mark.parametrize("num_batches", [1, 4, 5, 7, 8])
@pytest.mark.parametrize("loader", LOADERS)
def test_each_update_is_the_mean_over_the_batches_its_window_really_holds(
    loader: str, num_batches: int, tmp_path: Path
) -> None:
    if loader == "claims_fewer" and num_batches < 3:
        pytest.skip("a length of 0 is an empty loader")
    batches = doubled(make_batches(num_batches))
    model, expected = Net().double(), Net().double()
    ends: list[int] = []
    trainer = make_trainer(
        tmp_path,
        model,
        SGD_MOMENTUM(model.parameters()),
        data=LOADERS[loader](batches),
        gradient_accumulation_steps=4,
        hooks=[On(after_update=lambda trainer: ends.append(trainer.cur_iter + 1))],
    )
    trainer.train()

    optimizer = SGD_MOMENTUM(expected.parameters())
    for begin, end in itertools.pairwise([0, *ends]):
        step_by_hand(expected, optimizer, joined([batches[i % num_batches] for i in range(begin, end)]))
    assert_close(expected, model)
    assert trainer.progress.num_updates == len(ends)
    assert num_batches in ends, "a window ends with its epoch"
    if loader != "claims_fewer":
        of_an_epoch = [*range(4, num_batches, 4), num_batches]
        assert ends == of_an_epoch + [num_batches + end for end in of_an_epoch]


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_full_windows_have_the_bits_of_a_loop_that_divides_the_loss(steps: int, clip: float, tmp_path: Path) -> None:
    batches = make_batches(8)
    model, expected = Net(norm=True), Net(norm=True)
    optimizer = SGD_MOMENTUM(expected.parameters())
    for _ in range(2):
        for i, batch in enumerate(batches):
            (expected(batch) / steps).backward()
            if (i + 1) % steps == 0:
                if clip:
                    nn.utils.clip_grad_norm_(expected.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    make_trainer(
        tmp_path,
        model,
        SGD_MOMENTUM(model.parameters()),
        data=batches,
        gradient_accumulation_steps=steps,
        clip_grad_norm=clip,
    ).train()
    assert differences(weights_of(expected), weights_of(model)) == []


@pytest.mark.parametrize("settings", [{}, {"loss_weight": lambda batch: len(batch[0])}], ids=["plain", "loss_weight"])
def test_a_window_of_one_batch_has_the_bits_of_the_plain_loop(settings: dict[str, Any], tmp_path: Path) -> None:
    batches = make_batches(5, last=1)
    model, expected = Net(), Net()
    optimizer = AdamW(expected.parameters(), lr=0.01)
    for batch in batches * 2:
        step_by_hand(expected, optimizer, batch)
    make_trainer(tmp_path, model, AdamW(model.parameters(), lr=0.01), data=batches, **settings).train()
    assert differences(weights_of(expected), weights_of(model)) == []


def test_scheduler_and_num_updates_count_windows(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=1e-3)
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    trainer = make_trainer(
        tmp_path,
        model,
        optimizer,
        ExponentialLR(optimizer, 0.5),
        make_batches(5),
        lr_scheduler_interval="iter",
        gradient_accumulation_steps=4,
    )
    trainer.train()
    assert used == [1e-3 * 0.5**n for n in range(4)]
    assert trainer.progress.num_updates == 4


def test_each_batch_of_a_window_is_recorded_with_the_rate_that_its_update_used(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=1e-3)
    recorded: list[float] = []
    make_trainer(
        tmp_path,
        model,
        optimizer,
        ExponentialLR(optimizer, 0.5),
        make_batches(4),
        gradient_accumulation_steps=2,
        hooks=[On(after_iter=lambda trainer: recorded.append(trainer.metric_storage["lr"].latest))],
    ).train()
    assert recorded == [1e-3] * 4 + [0.5e-3] * 4


def test_a_window_that_an_error_has_interrupted_is_told_and_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A notebook: train() again. From a checkpoint its batches are trained on again, and nothing is said."""
    errors = [ZeroDivisionError, ZeroDivisionError]

    def fail(trainer: Trainer) -> None:
        if errors:
            raise errors.pop()

    hooks = [
        On(before_iter=at_iter(6, fail), after_iter=at_iter(3, lambda trainer: trainer.save_checkpoint("a.pth", False)))
    ]
    trainer = make_trainer(tmp_path, data=make_batches(8), max_epochs=1, gradient_accumulation_steps=4, hooks=hooks)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.load_checkpoint(f"{trainer.ckpt_dir}/a.pth")
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "are dropped" not in caplog.text
    trainer.train()
    assert "gradient_accumulation_steps=4: the gradients of its 2 batches are dropped" in caplog.text
    assert trainer.progress.num_updates == 2


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_window_without_a_gradient_for_the_optimizer_changes_nothing(clip: float, tmp_path: Path) -> None:
    """The epoch's last window, which is shorter, holds a batch whose loss depends on what is not optimized."""
    model = Net()
    model.other = nn.Parameter(torch.ones(()))
    optimizer = SGD(model.layers.parameters(), lr=0.05)
    seen: list[Any] = []

    def step(model: Any, batch: Any) -> Any:
        seen.append(weights_of(model))
        return model(batch) if len(seen) < 5 else model.other * 2

    settings: dict[str, Any] = {"max_epochs": 1, "step_fn": step, "clip_grad_norm": clip}
    make_trainer(tmp_path, model, optimizer, data=make_batches(5), gradient_accumulation_steps=2, **settings).train()
    assert differences(seen[4], weights_of(model)) == []
    assert differences(seen[0], seen[4])
