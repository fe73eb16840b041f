"""The loop's weights are those of a hand-written one; its counters and values are those of their step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from tests.small_hooks import Recorder
from tests.small_runs import DictNet, Net, differences, make_batches, make_trainer, train_by_hand, weights_of
from torch_frame import CheckpointerHook, EvalHook, HookBase, LoggerHook, NonFiniteError

# ---------------------------------------------------------------- a hand-written loop


@dataclass
class Case:
    """A way to train; by hand and by the trainer."""

    model: Callable[[], nn.Module] = Net
    optimizer: Callable[[Any], Any] = lambda parameters: SGD(parameters, lr=0.05, momentum=0.9)
    each_epoch: Callable[[Any], Any] | None = None
    each_iter: Callable[[Any], Any] | None = None
    clip: float = 0.0


CASES = {
    "sgd": Case(),
    "clip": Case(clip=0.2),
    "step_lr": Case(each_epoch=lambda optimizer: StepLR(optimizer, 1, gamma=0.5)),
    "one_cycle_per_iter": Case(
        each_iter=lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=18)
    ),  # of the list 15
    "adamw": Case(optimizer=lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1)),
    "dict_of_losses": Case(model=DictNet),
    "dropout": Case(model=lambda: Net(dropout=True)),
    "batch_norm": Case(model=lambda: Net(norm=True)),
    "all_together": Case(
        model=lambda: DictNet(dropout=True, norm=True),
        optimizer=lambda parameters: AdamW(parameters, lr=0.01),
        each_epoch=lambda optimizer: StepLR(optimizer, 2, gamma=0.1),
        clip=0.2,
    ),
}


def loader_of(kind: str) -> Any:
    batches = make_batches(5)
    if kind == "list":
        return batches
    dataset = TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True)))
    return DataLoader(dataset, batch_size=4, shuffle=kind == "shuffled_loader")


@pytest.mark.parametrize("kind", ["list", "shuffled_loader"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weights_are_those_of_a_hand_written_loop(case: Case, kind: str, tmp_path: Path) -> None:
    by_hand = case.model()
    optimizer = case.optimizer(by_hand.parameters())
    each_epoch = case.each_epoch and case.each_epoch(optimizer)
    each_iter = case.each_iter and case.each_iter(optimizer)
    torch.manual_seed(5)
    train_by_hand(by_hand, optimizer, loader_of(kind), 3, clip=case.clip, each_epoch=each_epoch, each_iter=each_iter)
    rng_by_hand = torch.get_rng_state()

    model = case.model()
    optimizer = case.optimizer(model.parameters())
    make_scheduler = case.each_epoch or case.each_iter
    evaluation = EvalHook(
        make_batches(2), lambda model, batch: {"loss": [model(batch).item()] if case.model is Net else [0.0]}
    )
    trainer = make_trainer(
        tmp_path / "run",
        model,
        optimizer,
        make_scheduler and make_scheduler(optimizer),
        loader_of(kind),
        max_epochs=3,
        clip_grad_norm=case.clip,
        lr_scheduler_interval="iter" if case.each_iter else "epoch",
        hooks=[evaluation, LoggerHook()],
        take_over=False,  # the loop by hand gets torch's own order
    )
    torch.manual_seed(5)
    trainer.train()

    assert differences(weights_of(by_hand), weights_of(model)) == []
    assert torch.equal(rng_by_hand, torch.get_rng_state())


@pytest.mark.parametrize("steps", [2, 3, 5, 8])
def test_accumulated_gradients_are_those_of_the_large_batch(steps: int, tmp_path: Path) -> None:
    batches = make_batches(5, 4)  # windows of 3: 3 + 2; of 8: all five in one
    windows = [batches[i : i + steps] for i in range(0, 5, steps)]
    large = [tuple(torch.cat(part) for part in zip(*window, strict=True)) for window in windows]
    by_hand, model = Net().double(), Net().double()
    to_double = lambda pairs: [(x.double(), y.double()) for x, y in pairs]  # noqa: E731
    train_by_hand(by_hand, SGD(by_hand.parameters(), lr=0.05), to_double(large), 2)
    make_trainer(tmp_path, model, data=to_double(batches), gradient_accumulation_steps=steps).train()
    for name, weight in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-13, atol=1e-14)


def test_ema_follows_its_formula(tmp_path: Path) -> None:
    model = Net(norm=True)
    expected = weights_of(model)
    seen = Recorder(lambda trainer: weights_of(trainer.model))
    trainer = make_trainer(tmp_path, model, use_ema=True, ema_decay=0.9, hooks=[seen])
    trainer.train()
    for n, weights in enumerate(seen.values, start=1):
        d = 0.9 * (1 - torch.exp(torch.tensor(-n / 2000, dtype=torch.float64)).item())
        for name, value in weights.items():
            is_buffer = "running" in name or "num_batches" in name
            expected[name] = value if is_buffer else d * expected[name] + (1 - d) * value
    for name, value in weights_of(trainer.model_evaluate).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- values that are not finite


def with_nan(at: int) -> list[Any]:
    batches = make_batches(5)
    batches[at][0][0, 0] = float("nan")
    return batches


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_nan_loss_ends_the_run_before_the_weights_are_touched(clip: float, tmp_path: Path) -> None:
    good, model = Net(), Net()
    train_by_hand(good, SGD(good.parameters(), lr=0.05), make_batches(5)[:3], 1, clip=clip)
    trainer = make_trainer(tmp_path, model, data=with_nan(3), clip_grad_norm=clip)
    with pytest.raises(NonFiniteError, match=r"(?s)iteration 3\b.*nan"):
        trainer.train()
    assert differences(weights_of(good), weights_of(model)) == []


def test_a_skipped_update_leaves_no_trace(tmp_path: Path) -> None:
    batches = with_nan(2)
    good, model = Net(norm=True), Net(norm=True)
    train_by_hand(good, AdamW(good.parameters(), lr=0.01), batches[:2] + batches[3:], 2)
    make_trainer(tmp_path, model, AdamW(model.parameters(), lr=0.01), data=batches, on_nonfinite="skip").train()
    assert differences(weights_of(good), weights_of(model)) == []


# ---------------------------------------------------------------- values and counters


def test_counters_are_indices_that_start_at_0(tmp_path: Path) -> None:
    seen = Recorder(lambda trainer: (trainer.epoch, trainer.inner_iter, trainer.cur_iter))
    trainer = make_trainer(tmp_path, data=make_batches(3), hooks=[seen])
    trainer.train()
    assert seen.values == [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 0, 3), (1, 1, 4), (1, 2, 5)]
    assert (trainer.epoch_len, trainer.max_iters, trainer.max_epochs, trainer.start_epoch) == (3, 6, 2, 0)


def test_recorded_values_are_those_of_their_step(tmp_path: Path) -> None:
    model, losses = Net(), []
    seen = Recorder(lambda trainer: trainer.metric_storage["total_loss"].latest)

    def step(model: nn.Module, batch: Any) -> Tensor:
        loss = model(batch)
        losses.append(loss.item())
        return loss

    make_trainer(tmp_path, model, step_fn=step, hooks=[seen]).train()
    assert seen.values == losses


def test_a_hooks_trainer_is_freed_with_the_last_reference(tmp_path: Path) -> None:
    hook = Recorder(lambda trainer: None)
    make_trainer(tmp_path, hooks=[hook]).train()
    gc.collect()
    with pytest.raises(ReferenceError):
        hook.trainer.max_epochs  # noqa: B018


def test_log_param_is_in_the_log(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.log_param("a note", batch_size=32)
    trainer.train()
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert "a note" in log
    assert "batch_size: 32" in log


@pytest.mark.parametrize("stage", ["before_train", "before_epoch"])
def test_what_a_hook_gives_to_log_param_is_in_the_log(stage: str, tmp_path: Path) -> None:
    class Tells(HookBase):
        def before_train(self) -> None:
            self._tell("before_train")

        def before_epoch(self) -> None:
            self._tell("before_epoch")

        def _tell(self, now: str) -> None:
            if now == stage and self.trainer.epoch == 0:
                self.trainer.log_param("a note", depth=3)

    trainer = make_trainer(tmp_path / "run", hooks=[Tells()])
    trainer.train()
    lines = Path(trainer.log_file).read_text(encoding="utf-8").splitlines()
    assert [line.rpartition("]: ")[2] for line in lines if "a note" in line or "depth" in line] == [
        "  a note",
        "  depth: 3",
    ]


def test_a_trainer_and_its_model_are_freed_with_their_last_reference(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        trainer = make_trainer(tmp_path / "run", hooks=[CheckpointerHook()])
        trainer.train()
        model = weakref.ref(trainer.model)
        del trainer
        assert model() is None
    finally:
        gc.enable()
