"""Sparse, unused, mixed, frozen and late parameters train as in the plain loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, SparseAdam

from tests.small_hooks import On
from tests.small_runs import Net, differences, make_batches, make_trainer, weights_of
from tests.training.small_updates import (
    OPTIMIZERS,
    SGD_MOMENTUM,
    Batch,
    assert_close,
    doubled,
    poisoned,
    poisoned_step,
    step_by_hand,
)
from torch_frame import NonFiniteError, Trainer

# ---------------------------------------------------------------- parameters of all kinds


class Words(nn.Module):
    """A sparse embedding: model((N, 2) words) -> loss."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.Embedding(10, 4, sparse=True)

    def forward(self, words: Tensor) -> Tensor:
        loss = self.table(words).square().mean()
        return loss * float("nan") if (words == 9).any() else loss


SPARSE: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.5),
    "sparse_adam": lambda parameters: SparseAdam(parameters, lr=0.1),
}
SENTENCES = [torch.tensor(words) for words in ([[1, 2], [2, 2]], [[3, 1], [2, 4]], [[5, 5], [0, 1]])]


@pytest.mark.parametrize("settings", [{}, {"on_nonfinite": "skip"}], ids=["raise", "skip"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("optimizer", SPARSE)
def test_sparse_gradients_train(optimizer: str, steps: int, settings: dict[str, Any], tmp_path: Path) -> None:
    model, expected = Words().double(), Words().double()
    by_hand = SPARSE[optimizer](list(expected.parameters()))
    for window in [SENTENCES[i : i + steps] for i in range(0, 3, steps)] * 2:
        step_by_hand(expected, by_hand, torch.cat(window))
    make_trainer(
        tmp_path,
        model,
        SPARSE[optimizer](list(model.parameters())),
        data=SENTENCES,
        gradient_accumulation_steps=steps,
        **settings,
    ).train()
    assert_close(expected, model)


@pytest.mark.parametrize("steps", [1, 2])
def test_sparse_gradients_that_are_not_finite_are_found(steps: int, tmp_path: Path) -> None:
    model = Words()
    before = weights_of(model)
    nan_gradient = lambda model, words: model(words) + (model.table(words).sum() * 0).sqrt()  # noqa: E731
    trainer = make_trainer(tmp_path, model, data=SENTENCES, gradient_accumulation_steps=steps, step_fn=nan_gradient)
    with pytest.raises(NonFiniteError, match="gradient"):
        trainer.train()
    assert differences(before, weights_of(model)) == []


def test_sparse_gradients_are_skipped_too(tmp_path: Path) -> None:
    model, expected = Words(), Words()
    by_hand = SparseAdam(list(expected.parameters()), lr=0.1)
    for words in SENTENCES:
        step_by_hand(expected, by_hand, words)
    data = [SENTENCES[0], torch.tensor([[9, 1]]), *SENTENCES[1:]]
    optimizer = SparseAdam(list(model.parameters()), lr=0.1)
    trainer = make_trainer(tmp_path, model, optimizer, data=data, max_epochs=1, on_nonfinite="skip")
    trainer.train()
    assert differences(weights_of(expected), weights_of(model)) == []
    assert trainer.updater.num_skipped == 1


class Odd(nn.Module):
    """A branch that is used every other time, a part that is never used, and two number formats."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(3, 4).double()
            self.branch = nn.Linear(4, 4)
            self.last = nn.Linear(4, 1)
            self.unused = nn.Linear(2, 2)

    def forward(self, batch: Batch) -> Tensor:
        x, y = batch
        hidden = self.first(x.double()).float()
        if x[0, 0] > 0:
            hidden = hidden + self.branch(hidden)
        return F.mse_loss(self.last(hidden), y)


@pytest.mark.parametrize("settings", [{}, {"on_nonfinite": "skip"}], ids=["raise", "skip"])
@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adamw"])
def test_unused_parameters_and_mixed_formats_have_the_bits_of_the_plain_loop(
    optimizer: str, clip: float, settings: dict[str, Any], tmp_path: Path
) -> None:
    batches = make_batches(6)
    model, expected = Odd(), Odd()
    by_hand = OPTIMIZERS[optimizer](expected.parameters())
    for batch in batches * 2:
        by_hand.zero_grad()
        expected(batch).backward()
        if clip:
            nn.utils.clip_grad_norm_(expected.parameters(), clip)
        by_hand.step()
    own = OPTIMIZERS[optimizer](model.parameters())
    make_trainer(tmp_path, model, own, data=batches, clip_grad_norm=clip, **settings).train()
    assert differences(weights_of(expected), weights_of(model)) == []
    assert torch.equal(model.unused.weight, Odd().unused.weight)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("part", ["first", "last"])
def test_a_bad_gradient_is_found_in_each_number_format(part: str, clip: float, tmp_path: Path) -> None:
    model = Odd()
    before = weights_of(model)
    step = lambda model, batch: model(batch) + (getattr(model, part).weight.sum() * 0).sqrt()  # noqa: E731
    with pytest.raises(NonFiniteError):
        make_trainer(tmp_path, model, clip_grad_norm=clip, step_fn=step).train()
    assert differences(before, weights_of(model)) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_of_another_number_format_trains(dtype: torch.dtype, tmp_path: Path) -> None:
    batches = [tuple(part.to(dtype) for part in batch) for batch in make_batches(3)]
    model, expected = Net().to(dtype), Net().to(dtype)
    optimizer = SGD(expected.parameters(), lr=0.05)
    for batch in batches * 2:
        step_by_hand(expected, optimizer, batch)
    make_trainer(tmp_path, model, data=batches).train()
    assert differences(weights_of(expected), weights_of(model)) == []
    step = lambda model, batch: model(batch) + (model.layers[0].weight.sum() * 0).sqrt()  # noqa: E731
    trainer = make_trainer(tmp_path, model, data=batches, step_fn=step)
    with pytest.raises(NonFiniteError):
        trainer.train()


# ---------------------------------------------------------------- parameters that come later


MOMENTS = {"first_batch": 0, "mid_epoch": 2, "second_epoch": 7}


def unfreeze(model: Any, optimizer: Any) -> None:
    model.layers[0].requires_grad_(True)


def freeze(model: Any, optimizer: Any) -> None:
    model.layers[2].requires_grad_(False)


def add_group(model: Any, optimizer: Any) -> None:
    model.layers[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model.layers[0].parameters())})


CHANGES: dict[str, Callable[[Any, Any], None]] = {"unfrozen": unfreeze, "frozen": freeze, "group_added": add_group}


def changing(change: str, model: Any) -> Any:
    """The optimizer of a model that `change` fits."""
    if change != "frozen":
        model.layers[0].requires_grad_(False)
    if change == "group_added":
        return SGD(model.layers[2].parameters(), lr=0.05, momentum=0.9)
    return SGD_MOMENTUM(model.parameters())


@pytest.mark.parametrize("stage", ["before_iter", "before_update"])
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize(("steps", "clip"), [(1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1)])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_hook_changes_in_mid_run_counts_from_then_on(
    change: str, steps: int, clip: float, moment: int, stage: str, tmp_path: Path
) -> None:
    """As in the plain loop with the same change at the same place; 5 batches, so windows of 2 are ragged."""
    if stage == "before_update":
        moment = {0: 1, 2: 3, 7: 8}[moment]  # batches that end a window, with 1 and with 2
    batches = doubled(make_batches(5))
    model, expected = Net().double(), Net().double()
    optimizer, by_hand = changing(change, model), changing(change, expected)

    def apply(at: str, i: int) -> None:
        if at == stage and i == moment:
            CHANGES[change](expected, by_hand)

    for epoch in range(2):
        for first in range(0, 5, steps):
            window = batches[first : first + steps]
            for k, batch in enumerate(window):
                i = epoch * 5 + first + k
                apply("before_iter", i)
                if k == 0:
                    by_hand.zero_grad()
                (expected(batch) / len(window)).backward()
                if k + 1 == len(window):
                    apply("before_update", i)
                    if clip:
                        nn.utils.clip_grad_norm_(expected.parameters(), clip)
                    by_hand.step()
                apply("after_iter", i)

    def hook(trainer: Trainer) -> None:
        if trainer.cur_iter == moment:
            CHANGES[change](model, optimizer)

    make_trainer(
        tmp_path,
        model,
        optimizer,
        data=batches,
        gradient_accumulation_steps=steps,
        clip_grad_norm=clip,
        hooks=[On(**{stage: hook})],
    ).train()
    assert_close(expected, model)
    if change != "frozen":
        assert not torch.equal(model.layers[0].weight, Net().double().layers[0].weight)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("change", ["unfrozen", "group_added"])
def test_a_bad_gradient_of_a_parameter_that_came_later_is_found(change: str, clip: float, tmp_path: Path) -> None:
    model = Net()
    optimizer = changing(change, model)
    before = model.layers[0].weight.detach().clone()
    batches = poisoned(5, {3}, "nan_gradient")

    def hook(trainer: Trainer) -> None:
        if trainer.cur_iter == 2:
            CHANGES[change](model, optimizer)
            before.copy_(model.layers[0].weight.detach())
        elif trainer.cur_iter == 3:
            before.copy_(model.layers[0].weight.detach())

    trainer = make_trainer(
        tmp_path,
        model,
        optimizer,
        data=batches,
        clip_grad_norm=clip,
        step_fn=poisoned_step,
        hooks=[On(before_iter=hook)],
    )
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert torch.equal(model.layers[0].weight, before)


def test_a_group_may_be_added_during_the_warm_up(tmp_path: Path) -> None:
    model = Net()
    optimizer = changing("group_added", model)
    used: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: used.append([g["lr"] for g in optimizer.param_groups]))

    def hook(trainer: Trainer) -> None:
        if trainer.cur_iter == 1:
            model.layers[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model.layers[0].parameters()), "lr": 0.5})

    make_trainer(
        tmp_path,
        model,
        optimizer,
        max_epochs=1,
        warmup_method="constant",
        warmup_iters=4,
        warmup_factor=0.5,
        hooks=[On(after_iter=hook)],
    ).train()
    assert [lrs[0] for lrs in used] == [0.025] * 4 + [0.05]
    assert used[-1] == [0.05, 0.5]


def test_a_zero_grad_that_an_object_carries_is_called(tmp_path: Path) -> None:
    """apex puts methods of its own into the optimizer object."""
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.05)
    calls: list[int] = []
    optimizer.zero_grad = lambda *args: calls.append(1)  # type: ignore[method-assign,misc]
    make_trainer(tmp_path, model, optimizer, data=make_batches(5), max_epochs=1).train()
    assert len(calls) == 5
