"""Learning rates: torch's own sequence to the last bit, and in a warm-up a factor times that sequence."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from tests.small_hooks import On
from tests.small_runs import Net, copied, make_batches, make_trainer
from torch_frame import CheckpointerHook, EvalHook, LRWarmupScheduler, SettingError, Trainer
from torch_frame.training.schedules import warmup_factor_at

EPOCHS, BATCHES = 6, 3
Rates = list[list[float]]


# A whole run has EPOCHS steps with interval="epoch", EPOCHS * BATCHES with "iter".
SCHEDULERS: dict[str, Callable[[Optimizer, int], Any]] = {
    "step": lambda optimizer, steps: StepLR(optimizer, 2, gamma=0.3),
    "multi_step": lambda optimizer, steps: MultiStepLR(optimizer, [1, 3, 4], gamma=0.7),
    "exponential": lambda optimizer, steps: ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, 4, eta_min=1e-3),
    "warm_restarts": lambda optimizer, steps: CosineAnnealingWarmRestarts(optimizer, 2, T_mult=2),
    "polynomial": lambda optimizer, steps: PolynomialLR(optimizer, 5, power=2.0),
    "linear": lambda optimizer, steps: LinearLR(optimizer, 0.2, 1.0, total_iters=5),
    "constant": lambda optimizer, steps: ConstantLR(optimizer, 0.3, total_iters=3),
    "lambda": lambda optimizer, steps: LambdaLR(optimizer, lambda n: 1 / (n + 1)),
    "multiplicative": lambda optimizer, steps: MultiplicativeLR(optimizer, lambda n: 0.93),
    "one_cycle": lambda optimizer, steps: OneCycleLR(optimizer, [0.3, 0.03], total_steps=steps),
    "cyclic": lambda optimizer, steps: CyclicLR(optimizer, [0.01, 0.001], [0.1, 0.02], step_size_up=3),
    "sequential": lambda optimizer, steps: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=3), ExponentialLR(optimizer, 0.8)], [3]
    ),
    "chained": lambda optimizer, steps: ChainedScheduler(
        [ConstantLR(optimizer, 0.1, total_iters=2), ExponentialLR(optimizer, 0.9)]
    ),
    "plateau": lambda optimizer, steps: ReduceLROnPlateau(optimizer, factor=0.3, patience=0),
}
STEPPING = [
    (name, interval)
    for name, interval in itertools.product(SCHEDULERS, ["epoch", "iter"])
    if (name, interval) != ("plateau", "iter")
]
METHODS = ["constant", "linear", "exp"]
METRIC = [1.0, 0.9, 0.95, 0.8, 0.85, 0.9]
"""What the plateau scheduler sees, epoch by epoch."""


def two_groups(model: Net, *, as_tensor: bool = False) -> Optimizer:
    """Two groups with rates of their own; SGD with momentum, which OneCycleLR and CyclicLR cycle too."""
    first, *others = model.parameters()
    lrs: list[Any] = [torch.tensor(lr, dtype=torch.float64) if as_tensor else lr for lr in (0.1, 0.01)]
    groups = [{"params": [first], "lr": lrs[0]}, {"params": others, "lr": lrs[1]}]
    if as_tensor:
        return AdamW(groups, lr=lrs[0], foreach=False, capturable=False)
    return SGD(groups, lr=0.1, momentum=0.9)


def rates_of(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def rates_by_hand(make: Any, interval: str, **kwargs: Any) -> Rates:
    """The rates of each update in the plain loop."""
    model = Net()
    optimizer = two_groups(model, **kwargs)
    scheduler = make(optimizer, EPOCHS if interval == "epoch" else EPOCHS * BATCHES)
    rates = []
    for epoch in range(EPOCHS):
        for batch in make_batches(BATCHES):
            optimizer.zero_grad()
            model(batch).backward()
            rates.append(rates_of(optimizer))
            optimizer.step()
            if interval == "iter":
                scheduler.step()
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(METRIC[epoch])
        elif interval == "epoch":
            scheduler.step()
    return rates


def rates_of_trainer(tmp_path: Path, make: Any, interval: Any, *, as_tensor: bool = False, **kwargs: Any) -> Rates:
    """The rates of each update in a trainer's run."""
    model = Net()
    optimizer = two_groups(model, as_tensor=as_tensor)
    used: Rates = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(rates_of(optimizer)))
    scheduler = make(optimizer, EPOCHS if interval == "epoch" else EPOCHS * BATCHES)
    evaluation = On(
        after_epoch=lambda trainer: trainer.log(trainer.epoch, eval_loss=METRIC[trainer.epoch], window_size=1)
    )
    trainer = make_trainer(
        tmp_path,
        model,
        optimizer,
        scheduler,
        make_batches(BATCHES),
        EPOCHS,
        lr_scheduler_interval=interval,
        lr_scheduler_metric="eval_loss" if isinstance(scheduler, ReduceLROnPlateau) else None,
        hooks=[evaluation],
        **kwargs,
    )
    trainer.train()
    return used


def factor(method: str, update: int, iters: int, first: float) -> float:
    """The warm-up's closed form."""
    if update >= iters:
        return 1.0
    a = update / iters
    return {"constant": first, "linear": first * (1 - a) + a, "exp": first ** (1 - a)}[method]


# ---------------------------------------------------------------- torch's own sequence


@pytest.mark.parametrize(("name", "interval"), STEPPING)
def test_rates_are_torchs_own_to_the_last_bit(name: str, interval: str, tmp_path: Path) -> None:
    make = SCHEDULERS[name]
    assert rates_of_trainer(tmp_path, make, interval) == rates_by_hand(make, interval)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("iters", [4, 2 * BATCHES, 100])
@pytest.mark.parametrize(("name", "interval"), STEPPING)
def test_a_warm_up_is_a_factor_on_torchs_own_sequence(
    name: str, interval: str, iters: int, method: Any, tmp_path: Path
) -> None:
    """Bitwise: ended before, at and after an epoch's end, and longer than the run."""
    make = SCHEDULERS[name]
    used = rates_of_trainer(tmp_path, make, interval, warmup_method=method, warmup_iters=iters, warmup_factor=0.1)
    regular = rates_by_hand(make, interval)
    assert used == [[lr * factor(method, n, iters, 0.1) for lr in lrs] for n, lrs in enumerate(regular)]


@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize(("name", "interval"), STEPPING)
def test_a_rate_may_be_a_tensor(name: str, interval: str, method: Any, tmp_path: Path) -> None:
    make = SCHEDULERS[name]
    if name in ("one_cycle", "cyclic"):
        original = make
        make = lambda optimizer, steps: without_momentum(original, optimizer, steps)  # noqa: E731
    used = rates_of_trainer(
        tmp_path, make, interval, as_tensor=True, warmup_method=method, warmup_iters=5, warmup_factor=0.1
    )
    regular = rates_by_hand(make, interval, as_tensor=True)
    expected = [[lr * factor(method, n, 5, 0.1) if method else lr for lr in lrs] for n, lrs in enumerate(regular)]
    assert used == expected


def without_momentum(make: Any, optimizer: Optimizer, steps: int) -> Any:
    if make is SCHEDULERS["one_cycle"]:
        return OneCycleLR(optimizer, [0.3, 0.03], total_steps=steps, cycle_momentum=False)
    return CyclicLR(optimizer, [0.01, 0.001], [0.1, 0.02], step_size_up=3, cycle_momentum=False)


def test_a_tensor_rate_stays_the_same_tensor(tmp_path: Path) -> None:
    """Captured graphs and compiled steps read it where it is."""
    model = Net()
    optimizer = two_groups(model, as_tensor=True)
    before = [group["lr"] for group in optimizer.param_groups]
    make_trainer(
        tmp_path, model, optimizer, ExponentialLR(optimizer, 0.5), warmup_method="linear", warmup_iters=3
    ).train()
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, before, strict=True))


@pytest.mark.parametrize("method", [None, *METHODS])
def test_without_a_scheduler_only_the_warm_up_acts(method: Any, tmp_path: Path) -> None:
    model = Net()
    optimizer = two_groups(model)
    used: Rates = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(rates_of(optimizer)))
    make_trainer(tmp_path, model, optimizer, warmup_method=method, warmup_iters=6, warmup_factor=0.01).train()
    factors = [factor(method, n, 6, 0.01) if method else 1.0 for n in range(10)]
    assert used == [[0.1 * f, 0.01 * f] for f in factors]


def test_momentum_is_cycled_through_a_warm_up_as_torch_does(tmp_path: Path) -> None:
    def momenta(**kwargs: Any) -> list[float]:
        model = Net()
        optimizer = two_groups(model)
        used: list[float] = []
        optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["momentum"]))
        scheduler = OneCycleLR(optimizer, 0.3, total_steps=10)
        make_trainer(tmp_path, model, optimizer, scheduler, lr_scheduler_interval="iter", **kwargs).train()
        return used

    assert momenta() == momenta(warmup_method="linear", warmup_iters=4)


def test_no_warning_comes_from_torchs_schedulers(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rates_of_trainer(tmp_path, SCHEDULERS["sequential"], "iter", warmup_method="linear", warmup_iters=4)
    by_torch = [str(warning.message) for warning in caught if "order" in str(warning.message)]
    assert by_torch == []


# ---------------------------------------------------------------- the plain object, as in 1.7


@given(
    method=st.sampled_from(METHODS),
    iters=st.integers(1, 12),
    first=st.floats(1e-4, 1.0),
    epoch_len=st.integers(1, 5),
    name=st.sampled_from([name for name in SCHEDULERS if name not in ("plateau", "one_cycle")]),
)
@settings(max_examples=60, deadline=None)
def test_one_step_after_each_update_is_all_that_1_7_called(
    method: Any, iters: int, first: float, epoch_len: int, name: str
) -> None:
    def make() -> tuple[Optimizer, Any]:
        optimizer = two_groups(Net())
        return optimizer, SCHEDULERS[name](optimizer, 100)

    torch_optimizer, torch_scheduler = make()
    optimizer, scheduler = make()
    warm = LRWarmupScheduler(scheduler, epoch_len, method, iters, first)
    for update in range(16):
        expected = [lr * factor(method, update, iters, first) for lr in rates_of(torch_optimizer)]
        assert rates_of(optimizer) == expected
        assert warm.get_last_lr() == expected
        torch_optimizer.step()
        optimizer.step()
        warm.step()
        if (update + 1) % epoch_len == 0:
            torch_scheduler.step()


@pytest.mark.parametrize("method", METHODS)
def test_the_warm_up_needs_no_scheduler(method: Any) -> None:
    optimizer = SGD(Net().parameters(), lr=0.1)
    warm = LRWarmupScheduler(None, 2, method, 5, 0.1, optimizer=optimizer)
    for update in range(8):
        assert rates_of(optimizer) == [0.1 * factor(method, update, 5, 0.1)]
        optimizer.step()
        warm.step()


@given(method=st.sampled_from(METHODS), iters=st.integers(1, 1000), first=st.floats(1e-6, 1.0))
@settings(max_examples=100, deadline=None)
def test_the_factor_begins_at_the_first_and_never_falls(method: Any, iters: int, first: float) -> None:
    factors = [warmup_factor_at(method, n, iters, first) for n in range(iters + 2)]
    assert factors[0] == pytest.approx(first, rel=1e-12)
    assert factors[iters:] == [1.0, 1.0]
    assert all(b >= a * (1 - 1e-15) for a, b in itertools.pairwise(factors))
    assert all(math.isclose(f, factor(method, n, iters, first), rel_tol=1e-12) for n, f in enumerate(factors))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"warmup_method": "cosine"}, "cosine"),
        ({"warmup_method": "linear", "warmup_iters": 0}, "0"),
        ({"warmup_method": "linear", "warmup_iters": -3}, "-3"),
        ({"warmup_method": "linear", "warmup_factor": 0.0}, "0.0"),
        ({"warmup_method": "linear", "warmup_factor": 1.5}, "1.5"),
        ({"warmup_method": "linear", "warmup_factor": float("nan")}, "nan"),
    ],
)
def test_a_bad_warm_up_is_told_when_it_is_made(arguments: dict[str, Any], names: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=names):
        make_trainer(tmp_path, **arguments)


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("stop", [0, 2, 4, 7])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["exponential", "cosine", "sequential", "cyclic", "one_cycle", "chained", "plateau"])
def test_a_state_round_trip_goes_on_as_if_nothing_had_happened(name: str, as_tensor: bool, stop: int) -> None:
    """In the warm-up, at its end and after it; into objects made anew."""

    def make() -> tuple[Optimizer, LRWarmupScheduler]:
        optimizer = two_groups(Net(), as_tensor=as_tensor)
        plain = SCHEDULERS[name]
        scheduler = without_momentum(plain, optimizer, 12) if "cyc" in name else plain(optimizer, 12)
        return optimizer, LRWarmupScheduler(scheduler, None, "exp", 4, 0.01)

    def advance(optimizer: Optimizer, warm: LRWarmupScheduler, begin: int, end: int) -> Rates:
        rates = []
        for update in range(begin, end):
            rates.append(rates_of(optimizer))
            optimizer.step()
            warm.step()
            if name == "plateau":
                warm.step_by_metric(METRIC[update % 6], update)
            else:
                warm.step_scheduler()
        return [*rates, rates_of(optimizer)]

    whole = advance(*make(), 0, 12)
    first_optimizer, first = make()
    advance(first_optimizer, first, 0, stop)
    state = copied({"optimizer": first_optimizer.state_dict(), "schedule": first.state_dict()})
    optimizer, warm = make()
    optimizer.load_state_dict(state["optimizer"])
    warm.load_state_dict(state["schedule"])
    assert rates_of(optimizer) == whole[stop]
    assert advance(optimizer, warm, stop, 12) == whole[stop:]


@pytest.mark.parametrize("interval", ["epoch", "iter"])
def test_a_run_resumed_in_its_warm_up_uses_the_rates_of_the_whole_run(interval: Any, tmp_path: Path) -> None:
    used: list[float] = []

    def trainer(name: str, epochs: int) -> Trainer:
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
        return make_trainer(
            tmp_path / name,
            model,
            optimizer,
            ExponentialLR(optimizer, 0.8),
            make_batches(3),
            epochs,
            warmup_method="exp",
            warmup_iters=8,
            lr_scheduler_interval=interval,
            hooks=[CheckpointerHook()],
            create_new_dir=None,
        )

    trainer("whole", 4).train()
    whole, used[:] = list(used), []
    trainer("parts", 2).train()
    resumed = trainer("parts", 4)
    resumed.load_checkpoint("latest.pth")
    resumed.train()
    assert used == whole


def test_a_rate_that_a_hook_sets_in_the_warm_up_is_in_force_in_the_resumed_run(tmp_path: Path) -> None:
    """Until the next update, as in the run that was not interrupted."""

    def run(folder: str, max_iters: int) -> list[float]:
        model, rates = Net(), []
        optimizer = SGD(model.parameters(), lr=0.1)

        def lower(trainer: Trainer) -> None:
            if trainer.cur_iter == 1:
                optimizer.param_groups[0]["lr"] *= 0.25

        hooks = [On(after_iter=lower), CheckpointerHook(), On(before_iter=lambda trainer: rates.append(trainer.lr))]
        settings: Any = {"warmup_method": "linear", "warmup_iters": 4, "resume": "auto", "max_iters": max_iters}
        make_trainer(tmp_path / folder, model, optimizer, StepLR(optimizer, 1, 0.5), hooks=hooks, **settings).train()
        return rates

    whole = run("whole", 5)
    assert run("parts", 2) + run("parts", 5) == whole
    assert whole[2] == pytest.approx(0.25 * 0.1 * (0.001 * 0.5 + 0.5))


def test_a_run_that_stopped_behind_its_first_epochs_last_batch_steps_without_torchs_warning(tmp_path: Path) -> None:
    def stop(trainer: Trainer) -> None:
        trainer.should_stop = trainer.cur_iter == 4

    for hook in (On(after_iter=stop), On()):
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.1)
        hooks = [hook, CheckpointerHook()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer = make_trainer(tmp_path, model, optimizer, StepLR(optimizer, 1, 0.5), hooks=hooks, resume="auto")
            trainer.train()
    assert (trainer.progress.epoch, trainer.lr) == (2, 0.025)


# ---------------------------------------------------------------- what is told


@pytest.mark.parametrize(
    ("interval", "total_steps"),
    [("epoch", 10), ("iter", 2), ("iter", 9), ("epoch", 1), ("iter", 100), ("epoch", 20)],
)
def test_one_cycle_for_another_number_of_steps_is_told_before_the_first_step(
    interval: Any, total_steps: int, tmp_path: Path
) -> None:
    """Two epochs of five batches: 2 steps with "epoch", 10 with "iter"."""
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    steps: list[None] = []
    optimizer.register_step_pre_hook(lambda *_: steps.append(None))
    scheduler = OneCycleLR(optimizer, 0.3, total_steps=total_steps)
    trainer = make_trainer(tmp_path / "run", model, optimizer, scheduler, lr_scheduler_interval=interval)
    with pytest.raises(SettingError, match=r"OneCycleLR.*\b(2|10)\b"):
        trainer.train()
    assert steps == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("accumulate", "total_steps"), [(1, 10), (2, 6), (4, 4), (8, 2)])
def test_one_cycle_for_the_runs_updates_trains(accumulate: int, total_steps: int, tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = OneCycleLR(optimizer, 0.3, total_steps=total_steps)
    trainer = make_trainer(
        tmp_path,
        model,
        optimizer,
        scheduler,
        lr_scheduler_interval="iter",
        gradient_accumulation_steps=accumulate,
    )
    trainer.train()
    assert trainer.progress.num_updates == total_steps


def plateau(model: nn.Module, **kwargs: Any) -> tuple[Optimizer, ReduceLROnPlateau]:
    optimizer = SGD(model.parameters(), lr=0.1)
    return optimizer, ReduceLROnPlateau(optimizer, factor=0.5, patience=0, **kwargs)


@pytest.mark.parametrize("settings", [{}, {"lr_scheduler_metric": "total_loss", "lr_scheduler_interval": "iter"}])
def test_a_plateau_scheduler_that_cannot_work_is_told_when_the_trainer_is_made(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model = Net()
    with pytest.raises(SettingError, match="ReduceLROnPlateau"):
        make_trainer(tmp_path, model, *plateau(model), **settings)


def test_a_plateau_scheduler_steps_only_after_an_evaluation(tmp_path: Path) -> None:
    """An epoch without one is neither good nor bad."""
    model = Net()
    values = iter([1.0, 0.5, 0.25, 0.125])
    evaluation = EvalHook([0], lambda model, batch: {"loss": [next(values)]}, period=2, save_last=False)
    trainer = make_trainer(
        tmp_path, model, *plateau(model), make_batches(2), 6, lr_scheduler_metric="eval_loss", hooks=[evaluation]
    )
    trainer.train()
    assert trainer.lr == 0.1, "each evaluation was better than the one before"


def test_a_plateau_scheduler_sees_the_epochs_evaluation_not_the_last_ones(tmp_path: Path) -> None:
    model = Net()
    optimizer, scheduler = plateau(model)
    values = iter([1.0, 2.0, 3.0])
    seen: list[float] = []
    evaluation = EvalHook([0], lambda model, batch: {"loss": [next(values)]}, save_last=False)
    after = On(before_epoch=lambda trainer: seen.append(trainer.lr))
    make_trainer(
        tmp_path,
        model,
        optimizer,
        scheduler,
        make_batches(2),
        3,
        lr_scheduler_metric="eval_loss",
        hooks=[evaluation, after],
    ).train()
    assert seen == [0.1, 0.1, 0.05]
    assert optimizer.param_groups[0]["lr"] == 0.025


def test_an_optimizer_without_a_rate_is_refused_in_words(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None  # as transformers' Adafactor has it
    with pytest.raises(SettingError, match="SGD has a parameter group without a learning rate"):
        make_trainer(tmp_path, model, optimizer)
