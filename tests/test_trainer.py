"""The loop: its weights are those of a hand-written one, whatever it is given; what it cannot train on it names."""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import torch_frame
from tests.small_hooks import On, Recorder
from tests.small_runs import (
    DictNet,
    Net,
    copied,
    differences,
    library_frames,
    make_batches,
    make_trainer,
    raised_by,
    train_by_hand,
    weights_of,
)
from torch_frame import (
    CheckpointerHook,
    CheckpointError,
    EvalHook,
    LoggerHook,
    NonFiniteError,
    SettingError,
    StepOutputError,
    Trainer,
)

FORBIDDEN_ON_WINDOWS = set('<>:"|?* ')


class UserError(Exception):
    """Raised by the code that a user brings."""


def fail(*args: Any) -> Any:
    raise UserError


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


# ---------------------------------------------------------------- what a step may return

GOOD_OUTPUTS = {
    "scalar": lambda loss: loss,
    "one_element": lambda loss: loss.reshape(1),
    "one_element_matrix": lambda loss: loss.reshape(1, 1),
    "dict": lambda loss: {"a": loss, "b": loss},
    "dict_with_numbers": lambda loss: {"l1": 0.0, "a": loss, "n": 1},
    "dict_of_mixed_shapes": lambda loss: {"a": loss, "b": loss.reshape(1)},
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
    "two_names_alike": lambda loss: ({"a": loss}, {"a": 1.0}),
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


# ---------------------------------------------------------------- learning rates

PER_EPOCH = {
    "step": lambda optimizer: StepLR(optimizer, 2, gamma=0.5),
    "multi_step": lambda optimizer: MultiStepLR(optimizer, [1, 3]),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 4),
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.7),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [LambdaLR(optimizer, lambda n: 0.1 * n), ExponentialLR(optimizer, 0.5)], [2]
    ),
}


def optimizer_of(model: nn.Module) -> SGD:
    """Two groups with rates of their own."""
    first, *others = model.parameters()
    return SGD([{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.01}], lr=0.1)


@pytest.mark.parametrize("interval", ["epoch", "iter"])
@pytest.mark.parametrize("make", PER_EPOCH.values(), ids=PER_EPOCH)
def test_schedulers_step_per_epoch_or_iteration(make: Any, interval: Any, tmp_path: Path) -> None:
    twin = optimizer_of(Net())
    twin_scheduler = make(twin)
    expected = []
    for _ in range(4):
        for _ in range(3):
            expected.append([group["lr"] for group in twin.param_groups])
            twin.step()
            if interval == "iter":
                twin_scheduler.step()
        if interval == "epoch":
            twin_scheduler.step()

    used: list[list[float]] = []
    model = Net()
    optimizer = optimizer_of(model)
    optimizer.register_step_pre_hook(lambda opt, *_: used.append([group["lr"] for group in opt.param_groups]))
    trainer = make_trainer(
        tmp_path, model, optimizer, make(optimizer), make_batches(3), 4, lr_scheduler_interval=interval
    )
    trainer.train()
    assert used == expected


def test_one_cycle_runs_to_its_last_step(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = OneCycleLR(optimizer, 0.5, epochs=2, steps_per_epoch=3)
    make_trainer(tmp_path, model, optimizer, scheduler, make_batches(3), 2, lr_scheduler_interval="iter").train()


def test_without_a_scheduler_the_rate_is_constant(tmp_path: Path) -> None:
    rates = Recorder(lambda trainer: trainer.lr)
    make_trainer(tmp_path, hooks=[rates]).train()
    assert rates.values == [0.05] * 10


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("constant", [0.01, 0.01, 0.01, 0.01, 0.1]),
        ("linear", [0.01, 0.0325, 0.055, 0.0775, 0.1]),
        ("exp", [0.01, 0.1 * 0.1**0.75, 0.1 * 0.1**0.5, 0.1 * 0.1**0.25, 0.1]),
    ],
)
def test_warm_up_counts_updates(method: Any, expected: list[float], tmp_path: Path) -> None:
    used: list[float] = []
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda opt, *_: used.append(opt.param_groups[0]["lr"]))
    make_trainer(
        tmp_path, model, optimizer, None, make_batches(5), 1, warmup_method=method, warmup_iters=4, warmup_factor=0.1
    ).train()
    assert used == pytest.approx(expected)


def test_reduce_on_plateau_follows_the_evaluation(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    evaluation = EvalHook([0], lambda model, batch: {"loss": [1.0]}, save_last=False)
    rates = Recorder(lambda trainer: trainer.lr)
    make_trainer(
        tmp_path,
        model,
        optimizer,
        scheduler,
        make_batches(1),
        4,
        lr_scheduler_metric="eval_loss",
        hooks=[evaluation, rates],
    ).train()
    assert rates.values == [0.1, 0.1, 0.05, 0.025]


# ---------------------------------------------------------------- batches and loaders

Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: Tensor
    y: Tensor
    name: str = "record"


class Movable:
    """Knows how to move itself."""

    moved_to: torch.device | None = None

    def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
        self.pair = pair

    def to(self, device: torch.device) -> Movable:
        self.moved_to = device
        return self


NESTINGS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tuple": (lambda pair: pair, lambda batch: batch),
    "list": (list, lambda batch: batch),
    "dict": (lambda pair: {"x": pair[0], "y": pair[1], "id": "a"}, lambda batch: (batch["x"], batch["y"])),
    "nested": (
        lambda pair: {"in": [pair[0], {"y": (pair[1], None)}]},
        lambda batch: (batch["in"][0], batch["in"][1]["y"][0]),
    ),
    "dataclass": (lambda pair: Record(*pair), lambda batch: (batch.x, batch.y)),
    "namedtuple": (lambda pair: Pair(*pair), lambda batch: (batch.x, batch.y)),
    "has_to": (Movable, lambda batch: batch.pair),
    "tensor": (lambda pair: torch.cat(pair, 1), lambda batch: (batch[:, :3], batch[:, 3:])),
}


@pytest.mark.parametrize(("pack", "unpack"), NESTINGS.values(), ids=NESTINGS)
def test_batches_of_any_nesting_train(pack: Any, unpack: Any, tmp_path: Path) -> None:
    plain, nested = Net(), Net()
    make_trainer(tmp_path / "a", plain).train()
    seen: list[Any] = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return model(unpack(batch))

    data = [pack(batch) for batch in make_batches()]
    make_trainer(tmp_path / "b", nested, data=data, step_fn=step).train()
    assert differences(weights_of(plain), weights_of(nested)) == []
    assert {type(batch) for batch in seen} == {type(data[0])}
    if isinstance(data[0], Movable):
        assert seen[0].moved_to == torch.device("cpu")


class Stream(IterableDataset[Any]):
    """Has no length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in make_batches():
            yield from zip(x, y, strict=True)


class Restartable:
    def __iter__(self) -> Iterator[Any]:
        return iter(make_batches())


LOADERS = {
    "list": make_batches,
    "tuple": lambda: tuple(make_batches()),
    "iterable_dataset": lambda: DataLoader(Stream(), batch_size=4),
    "iterable_object": Restartable,
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_any_iterable_of_batches_trains(make: Any, tmp_path: Path) -> None:
    expected, model = Net(), Net()
    train_by_hand(expected, SGD(expected.parameters(), lr=0.05), make_batches(), 2)
    trainer = make_trainer(tmp_path / "run", model, data=make(), hooks=None)
    trainer.train()
    assert differences(weights_of(expected), weights_of(model)) == []
    assert (trainer.progress.epoch, trainer.progress.iter) == (2, 10)


def test_a_generator_trains_one_epoch(tmp_path: Path) -> None:
    expected, model = Net(), Net()
    train_by_hand(expected, SGD(expected.parameters(), lr=0.05), make_batches(), 1)
    make_trainer(tmp_path, model, data=(batch for batch in make_batches()), max_epochs=1).train()
    assert differences(weights_of(expected), weights_of(model)) == []


def test_a_generator_for_more_epochs_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", data=(batch for batch in make_batches()))
    with pytest.raises(SettingError, match="iterator"):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


class EmptyLater:
    """Batches in the first epoch alone."""

    count = 0

    def __iter__(self) -> Iterator[Any]:
        self.count += 1
        return iter(make_batches() if self.count == 1 else [])


EMPTY = {
    "list": list,
    "dataset": lambda: DataLoader([], batch_size=2),  # type: ignore[arg-type]
    "drop_last": lambda: DataLoader(range(3), batch_size=4, drop_last=True),  # type: ignore[arg-type]
    "no_length": lambda: (batch for batch in ()),
    "second_epoch": EmptyLater,
}


@pytest.mark.parametrize("make", EMPTY.values(), ids=EMPTY)
def test_an_empty_loader_is_an_error_that_says_so(make: Any, tmp_path: Path) -> None:
    loader = make()
    trainer = make_trainer(tmp_path, data=loader, max_epochs=1 if isinstance(loader, Iterator) else 2)
    with pytest.raises(SettingError, match="no batch"):
        trainer.train()


@pytest.mark.parametrize("data", [[], make_batches()], ids=["empty_loader", "loader"])
def test_no_epochs_train_nothing_and_say_so(data: Any, tmp_path: Path) -> None:
    model = Net()
    before = weights_of(model)
    trainer = make_trainer(tmp_path / "run", model, data=data, max_epochs=0, hooks=None)
    trainer.train()
    assert differences(before, weights_of(model)) == []
    assert "othing to train" in Path(trainer.log_file).read_text(encoding="utf-8")
    assert trainer.progress.iter == 0


def test_a_finished_run_trains_no_further_and_keeps_its_weights(tmp_path: Path) -> None:
    model = Net()
    trainer = make_trainer(tmp_path / "run", model)
    trainer.train()
    before = weights_of(model)
    trainer.train()
    assert differences(before, weights_of(model)) == []


# ---------------------------------------------------------------- settings


def model_and_optimizer() -> dict[str, Any]:
    model = Net()
    return {"model": model, "optimizer": SGD(model.parameters(), lr=0.1)}


BAD_SETTINGS = {
    "model_of_another_type": {"model": 3},
    "optimizer_of_another_model": {"optimizer": SGD(Net().parameters(), lr=0.1)},
    "scheduler_of_another_optimizer": {"lr_scheduler": StepLR(SGD(Net().parameters(), lr=0.1), 1)},
    "dataset_without_loader": {"data_loader": TensorDataset(torch.ones(3))},
    "loader_not_iterable": {"data_loader": 5},
    "negative_epochs": {"max_epochs": -1},
    "epochs_not_whole": {"max_epochs": 1.5},
    "interval": {"lr_scheduler_interval": "step"},
    "precision": {"precision": "fp8"},
    "accumulation": {"gradient_accumulation_steps": 0},
    "warmup_method": {"warmup_method": "quadratic"},
    "ema_decay": {"use_ema": True, "ema_decay": 1.5},
    "create_new_dir": {"create_new_dir": "year"},
    "on_nonfinite": {"on_nonfinite": "ignore"},
    "hook_class": {"hooks": [LoggerHook]},
    "hook_not_in_list": {"hooks": LoggerHook()},
    "no_hook": {"hooks": ["logger"]},
    "plateau_metric_alone": {"lr_scheduler_metric": "total_loss"},
}


@pytest.mark.parametrize("bad", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_bad_setting_is_an_error_with_a_sentence(bad: dict[str, Any], tmp_path: Path) -> None:
    good = {"lr_scheduler": None, "data_loader": make_batches(), "max_epochs": 1, "work_dir": tmp_path / "run"}
    error = raised_by(lambda: Trainer(**{**model_and_optimizer(), **good, **bad}), Exception)
    assert isinstance(error, ValueError | TypeError)
    assert len(str(error)) > 30
    assert list(tmp_path.iterdir()) == []


def test_hooks_none_is_a_checkpointer_and_a_logger(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, hooks=None)
    assert [type(hook) for hook in trainer.hooks] == [CheckpointerHook, LoggerHook]


def test_a_model_with_frozen_parameters_trains_the_others(tmp_path: Path) -> None:
    model = Net()
    model.layers[0].requires_grad_(False)
    before = weights_of(model)
    make_trainer(tmp_path, model, SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)).train()
    changed = {line.split(":")[0] for line in differences(before, weights_of(model))}
    assert changed == {".layers.2.weight", ".layers.2.bias"}


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


# ---------------------------------------------------------------- the work dir


def test_nothing_is_made_before_train(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", hooks=None)
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_the_documented_files(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", hooks=None)
    trainer.train()
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("tb_logs/")}
    assert files - events == {
        "checkpoints/latest.pth",
        "checkpoints/previous.pth",
        "checkpoints/best.pth",
        "log.txt",
        "metrics.jsonl",
    }
    assert trainer.work_dir == str(tmp_path / "run")
    assert trainer.ckpt_dir == os.path.join(trainer.work_dir, "checkpoints")
    assert trainer.tb_log_dir == os.path.join(trainer.work_dir, "tb_logs")


@pytest.mark.parametrize("mode", ["time_s", "time_m", "time_h", "time_d", "count"])
def test_runs_at_the_same_moment_get_folders_of_their_own(mode: Any, tmp_path: Path) -> None:
    trainers = [make_trainer(tmp_path / "run", create_new_dir=mode, hooks=None, max_epochs=1) for _ in range(3)]
    for trainer in trainers:
        trainer.train()
    folders = {trainer.work_dir for trainer in trainers}
    assert len(folders) == 3
    assert trainers[0].work_dir == str(tmp_path / "run")
    for folder in folders:
        assert not FORBIDDEN_ON_WINDOWS & set(Path(folder).name)
        assert (Path(folder) / "checkpoints" / "latest.pth").is_file()


def test_create_new_dir_none_goes_on_in_the_folder(tmp_path: Path) -> None:
    for _ in range(2):
        trainer = make_trainer(tmp_path / "run", create_new_dir=None)
        trainer.train()
        assert trainer.work_dir == str(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_no_file_of_a_run_has_a_name_that_windows_forbids(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    make_trainer(tmp_path / "run", hooks=[CheckpointerHook(max_to_keep=2), LoggerHook()]).train()
    for path in tmp_path.rglob("*"):
        assert not FORBIDDEN_ON_WINDOWS & set(path.name), path


@pytest.mark.parametrize(
    ("levels", "texts"), [((), {"info", "warning"}), ((1, 1), {"debug", "info", "warning"}), ((2, 3), {"warning"})]
)
def test_log_levels_count_from_debug(levels: tuple[int, ...], texts: set[str], tmp_path: Path) -> None:
    def write(trainer: Trainer) -> None:
        for text in ("debug", "info", "warning"):
            getattr(torch_frame.logger, text)("user's %s line", text)

    trainer = make_trainer(tmp_path / "run", hooks=[On(before_train=write)])
    trainer.train(*levels)
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert {text for text in ("debug", "info", "warning") if f"user's {text} line" in log} == texts


def test_training_leaves_the_logger_as_it_was(tmp_path: Path) -> None:
    logger = logging.getLogger("torch_frame")
    before = (logger.level, logger.propagate, list(logger.handlers))
    make_trainer(tmp_path / "a").train(1, 1)
    raised_by(make_trainer(tmp_path / "b", step_fn=fail).train, UserError)
    assert before == (logger.level, logger.propagate, list(logger.handlers))


def test_an_error_in_training_is_in_the_log(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", step_fn=fail)
    raised_by(trainer.train, UserError)
    assert "UserError" in Path(trainer.log_file).read_text(encoding="utf-8")


# ---------------------------------------------------------------- load_checkpoint


def finished_run(work_dir: Path, **kwargs: Any) -> Trainer:
    trainer = make_trainer(work_dir, hooks=[CheckpointerHook()], **kwargs)
    trainer.train()
    return trainer


def test_a_checkpoint_is_found_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_run(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "other/checkpoints/latest.pth", "other/checkpoints/latest.pth"):
        trainer = make_trainer(tmp_path / "run")
        trainer.load_checkpoint(path)
        assert trainer.progress.epoch == 2
        assert Path(trainer.work_dir).resolve() == tmp_path / "other"


def test_a_checkpoint_is_found_in_the_work_dir(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    trainer = make_trainer(tmp_path / "run", max_epochs=3)
    trainer.load_checkpoint("latest.pth")
    trainer.train()
    assert trainer.work_dir == str(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_is_found_in_the_newest_sibling(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for epochs, mtime in ((1, 2000), (2, 3000), (3, 1000)):
        trainer = finished_run(tmp_path / "run", create_new_dir="count", max_epochs=epochs)
        os.utime(Path(trainer.ckpt_dir, "latest.pth"), (mtime, mtime))
    trainer = make_trainer(tmp_path / "run", create_new_dir="count", max_epochs=4)
    trainer.load_checkpoint("latest.pth")
    assert trainer.progress.epoch == 2
    trainer.train()
    assert Path(trainer.work_dir).name == "run_1"
    assert len(list(tmp_path.iterdir())) == 4


def test_the_work_dir_itself_comes_before_its_siblings(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", max_epochs=1)
    finished_run(tmp_path / "run", max_epochs=2)
    trainer = make_trainer(tmp_path / "run")
    trainer.load_checkpoint("latest.pth")
    assert trainer.progress.epoch == 1


def test_a_checkpoint_that_is_not_there_is_named_with_the_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"(?s)nowhere\.pth.*checkpoints"):
        make_trainer(tmp_path / "run").load_checkpoint("nowhere.pth")


@pytest.mark.parametrize("arguments", [{}, {"path": "latest.pth", "checkpoint": {}}])
def test_load_checkpoint_takes_one_of_the_two(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="one of the two"):
        make_trainer(tmp_path).load_checkpoint(**arguments)


def test_weights_are_no_state_to_resume_from(tmp_path: Path) -> None:
    trainer = finished_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="checkpoint="):
        make_trainer(tmp_path / "run").load_checkpoint(Path(trainer.ckpt_dir, "best.pth"))


UNFIT = {
    "another_model": {"model": Net(norm=True)},
    "ema_added": {"use_ema": True},
    "precision": {"precision": "bf16"},
}


@pytest.mark.parametrize("other", UNFIT.values(), ids=UNFIT)
def test_a_state_of_another_run_is_refused_and_changes_nothing(other: dict[str, Any], tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    trainer = make_trainer(tmp_path / "run", **{"model": Net(seed=1), **other})
    before = weights_of(trainer.model)
    with pytest.raises(CheckpointError):
        trainer.load_checkpoint("latest.pth")
    assert differences(before, weights_of(trainer.model)) == []
    assert trainer.progress.epoch == 0


def test_a_state_with_another_optimizer_or_scheduler_is_refused(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    model = Net(seed=1)
    before = weights_of(model)
    adam = make_trainer(tmp_path / "run", model, AdamW(model.parameters(), lr=0.1))
    sgd = SGD(model.parameters(), lr=0.1)
    for trainer in (adam, make_trainer(tmp_path / "run", model, sgd, StepLR(sgd, 1))):
        with pytest.raises(CheckpointError):
            trainer.load_checkpoint("latest.pth")
    assert differences(before, weights_of(model)) == []


def test_a_shape_that_differs_is_named_with_both_shapes(tmp_path: Path) -> None:
    model = Net()
    finished_run(tmp_path / "run", model=model)
    wider = Net()
    wider.layers[2] = nn.Linear(8, 2)
    with pytest.raises(CheckpointError, match=r"layers\.2\.weight.*\[1, 8\].*\[2, 8\]"):
        make_trainer(tmp_path / "run", wider).load_checkpoint("latest.pth")


def test_weights_only_begins_a_new_run_with_them(tmp_path: Path) -> None:
    first = finished_run(tmp_path / "run")
    weights = torch.load(os.path.join(first.ckpt_dir, "best.pth"), weights_only=True)
    model = Net(seed=1)
    trainer = make_trainer(tmp_path / "run", model, use_ema=True)
    report = trainer.load_checkpoint(checkpoint=weights)
    assert report.complete
    assert differences(weights_of(first.model), weights_of(model)) == []
    assert differences(weights_of(first.model), weights_of(trainer.model_evaluate)) == []
    assert trainer.progress.epoch == 0
    trainer.train(1, 1)
    assert trainer.work_dir != first.work_dir


def test_weights_are_reported_where_they_do_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = copied(Net().state_dict())
    weights["extra"] = torch.ones(1)
    weights["layers.2.weight"] = torch.ones(5, 8)
    del weights["layers.0.bias"]
    model = Net(seed=1)
    before = weights_of(model)
    report = make_trainer(tmp_path, model).load_checkpoint(checkpoint=weights)
    assert report.missing_keys == ["layers.0.bias"]
    assert report.unexpected_keys == ["extra"]
    assert report.mismatched_shapes == {"layers.2.weight": ((5, 8), (1, 8))}
    assert not report.complete
    for text in ("layers.0.bias", "extra", "layers.2.weight", "5, 8", "1, 8"):
        assert text in caplog.text
    changed = {line.split(":")[0] for line in differences(before, weights_of(model))}
    assert changed == {".layers.0.weight", ".layers.2.bias"}


def test_what_was_loaded_is_in_the_runs_log(tmp_path: Path) -> None:
    first = finished_run(tmp_path / "run")
    resumed = make_trainer(tmp_path / "run", max_epochs=3)
    resumed.load_checkpoint("latest.pth")
    resumed.train()
    log = Path(resumed.log_file).read_text(encoding="utf-8")
    assert os.path.join(first.ckpt_dir, "latest.pth") in log
    other = make_trainer(tmp_path / "other", Net(norm=True))
    other.load_checkpoint(checkpoint=first.model.state_dict())
    other.train()
    assert "layers.1.running_mean" in Path(other.log_file).read_text(encoding="utf-8")


def test_a_whole_state_given_as_weights_gives_its_weights(tmp_path: Path) -> None:
    first = finished_run(tmp_path / "run")
    state = torch.load(os.path.join(first.ckpt_dir, "latest.pth"), weights_only=True)
    model = Net(seed=1)
    trainer = make_trainer(tmp_path / "run", model)
    trainer.load_checkpoint(checkpoint=state)
    assert differences(weights_of(first.model), weights_of(model)) == []
    assert trainer.progress.epoch == 0


# ---------------------------------------------------------------- save_checkpoint


def test_a_saved_checkpoint_is_there_when_the_call_returns(tmp_path: Path) -> None:
    model = Net()
    found: list[Any] = []

    def save(trainer: Trainer) -> None:
        trainer.save_checkpoint("mine.pth")
        found.append(torch.load(os.path.join(trainer.ckpt_dir, "mine.pth"), weights_only=True))
        found.append(weights_of(model))

    trainer = make_trainer(tmp_path / "run", model, max_epochs=1, hooks=[On(after_epoch=save)])
    trainer.train()
    assert differences(*found) == []


def test_nan_weights_are_not_saved_over_good_ones(tmp_path: Path) -> None:
    trainer = finished_run(tmp_path / "run")
    path = Path(trainer.ckpt_dir, "latest.pth")
    before = path.read_bytes()
    with torch.no_grad():
        trainer.model.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.0\.weight"):
        trainer.save_checkpoint("latest.pth", save_single_model=False)
    assert path.read_bytes() == before


# ---------------------------------------------------------------- tracebacks

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
    trainer = make_trainer(tmp_path, data=Restartable(), hooks=[On(before_update=fail)], gradient_accumulation_steps=9)
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


ELSEWHERE = {
    "backward": failing_backward,
    "optimizer": failing_optimizer,
    "data": lambda: {"data": FailingData()},
    "eval_func": lambda: {"hooks": [EvalHook(make_batches(1), fail)]},
    "eval_data": lambda: {"hooks": [EvalHook(FailingData(), lambda model, batch: {"a": [1.0]})]},
}


@pytest.mark.parametrize("make", ELSEWHERE.values(), ids=ELSEWHERE)
def test_at_most_six_library_frames_stand_above_any_other_error(make: Any, tmp_path: Path) -> None:
    frames = library_frames(raised_by(make_trainer(tmp_path, **make()).train, UserError))
    assert len(frames) <= 6, frames


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


def test_a_trainer_and_its_model_are_freed_with_their_last_reference(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        trainer = finished_run(tmp_path / "run")
        model = weakref.ref(trainer.model)
        del trainer
        assert model() is None
    finally:
        gc.enable()
