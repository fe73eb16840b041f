"""Settings that script and checkpoint disagree on: of every scheduler and of the optimizer's groups, by each choice.

All runs are stopped in the middle of an epoch, after STOP of their EPOCHS * BATCHES iterations.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
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
from torch.optim.swa_utils import SWALR

from tests.small_hooks import On
from tests.small_runs import differences, make_trainer, raised_by, weights_of
from tests.small_scripts import (
    BATCHES,
    EPOCHS,
    STOP,
    MakeOptimizer,
    MakeScheduler,
    Script,
    around,
    by_hand,
    rates_by_hand,
    rates_of,
    sgd,
    two_groups,
    warned,
)
from torch_frame import CheckpointerHook, CheckpointError, SettingError, Trainer
from torch_frame.checkpoint import io

# ---------------------------------------------------------------- every scheduler


def linear_to_zero(step: int, *, num_warmup_steps: int, num_training_steps: int) -> float:
    """As transformers' get_linear_schedule_with_warmup, which is a LambdaLR over a functools.partial."""
    if step < num_warmup_steps:
        return step / max(1, num_warmup_steps)
    return max(0.0, (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps))


def with_warmup(optimizer: Optimizer, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, functools.partial(linear_to_zero, num_warmup_steps=1, num_training_steps=steps))


class Decay:
    """A callable object, whose attributes torch saves."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def __call__(self, step: int) -> float:
        return self.gamma**step


def scaled(scale: float) -> MakeScheduler:
    return lambda optimizer: CyclicLR(optimizer, 0.01, 0.1, 3, scale_fn=lambda cycle: scale)


def product(gamma: float) -> MakeScheduler:
    return lambda optimizer: MultiplicativeLR(optimizer, lambda step: gamma)


def sequence(gamma: float, at: int) -> MakeScheduler:
    return lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=1), ExponentialLR(optimizer, gamma)], [at]
    )


def chain(gamma: float) -> MakeScheduler:
    return lambda optimizer: ChainedScheduler([ConstantLR(optimizer, 0.5, 3), ExponentialLR(optimizer, gamma)])


# name -> (the saved script's, the changed one, what the changed setting is called, whether it is refused by default)
SCHEDULERS: dict[str, tuple[MakeScheduler, MakeScheduler, str, bool]] = {
    "step": (lambda o: StepLR(o, 1, 0.5), lambda o: StepLR(o, 1, 0.7), "gamma", False),
    "step_size": (lambda o: StepLR(o, 1, 0.5), lambda o: StepLR(o, 2, 0.5), "step_size", False),
    "multi_step": (lambda o: MultiStepLR(o, [1, 3]), lambda o: MultiStepLR(o, [2]), "milestones", False),
    "exponential": (lambda o: ExponentialLR(o, 0.9), lambda o: ExponentialLR(o, 0.8), "gamma", False),
    "cosine": (lambda o: CosineAnnealingLR(o, 16), lambda o: CosineAnnealingLR(o, 30), "T_max", True),
    "eta_min": (lambda o: CosineAnnealingLR(o, 16), lambda o: CosineAnnealingLR(o, 16, 0.01), "eta_min", False),
    "restarts": (
        lambda o: CosineAnnealingWarmRestarts(o, 3),
        lambda o: CosineAnnealingWarmRestarts(o, 2, 2),
        "T_mult",
        False,
    ),
    "polynomial": (lambda o: PolynomialLR(o, 20), lambda o: PolynomialLR(o, 40), "total_iters", True),
    "power": (lambda o: PolynomialLR(o, 20), lambda o: PolynomialLR(o, 20, 2.0), "power", False),
    "linear": (lambda o: LinearLR(o, 0.1), lambda o: LinearLR(o, 0.3), "start_factor", False),
    "constant": (lambda o: ConstantLR(o, 0.1, 20), lambda o: ConstantLR(o, 0.2, 20), "factor", False),
    "one_cycle": (lambda o: OneCycleLR(o, 0.2, 16), lambda o: OneCycleLR(o, 0.3, 16), "max_lr", False),
    "pct_start": (
        lambda o: OneCycleLR(o, 0.2, 16),
        lambda o: OneCycleLR(o, 0.2, 16, pct_start=0.8),
        "pct_start",
        False,
    ),
    "cyclic": (lambda o: CyclicLR(o, 0.01, 0.1, 3), lambda o: CyclicLR(o, 0.01, 0.2, 3), "max_lrs", False),
    "base_lr": (lambda o: CyclicLR(o, 0.01, 0.1, 3), lambda o: CyclicLR(o, 0.02, 0.1, 3), "lr", False),
    "sequential": (sequence(0.9, 1), sequence(0.8, 1), "schedulers[1].gamma", False),
    "chained": (chain(0.9), chain(0.8), "schedulers[1].gamma", False),
    "lambda": (around(0.9), around(0.8), "gamma", True),
    "multiplicative": (product(0.9), product(0.8), "gamma", True),
    "transformers": (lambda o: with_warmup(o, 20), lambda o: with_warmup(o, 40), "num_training_steps", True),
    "object": (lambda o: LambdaLR(o, Decay(0.9)), lambda o: LambdaLR(o, Decay(0.8)), "gamma", False),
    "scale_fn": (scaled(0.5), scaled(0.7), "scale", True),
    "average": (lambda o: SWALR(o, 0.05, 3), lambda o: SWALR(o, 0.02, 3), "swa_lr", False),
}
STEPPING = [(name, interval) for name in SCHEDULERS for interval in ("epoch", "iter")]
STEPPING = [pair for pair in STEPPING if pair[0] not in ("one_cycle", "pct_start") or pair[1] == "iter"]
FUNCTIONS = ("lambda", "multiplicative", "transformers", "scale_fn")


@pytest.mark.parametrize(("name", "interval"), STEPPING)
def test_the_scripts_schedule_goes_on_as_if_the_run_had_been_made_with_it(
    name: str, interval: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved, changed, setting, _ = SCHEDULERS[name]
    script = Script(two_groups(), saved, {"lr_scheduler_interval": interval})
    script.stopped(tmp_path)
    with warnings.catch_warnings(record=True) as by_torch:
        warnings.simplefilter("always")
        resumed = replace(script, scheduler=changed).resumed(tmp_path, resume_settings="script")
    assert resumed.rates == rates_by_hand(changed, interval, two_groups())[STOP:]
    (told,) = warned(caplog)
    assert f"{setting} (saved " in told
    assert "The script's count" in told
    assert [str(one.message) for one in by_torch if "order" in str(one.message)] == []


@pytest.mark.parametrize(("name", "interval"), STEPPING)
def test_the_saved_schedule_counts_if_it_is_chosen(
    name: str, interval: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved, changed, setting, _ = SCHEDULERS[name]
    script = Script(two_groups(), saved, {"lr_scheduler_interval": interval})
    script.stopped(tmp_path)
    resumed = replace(script, scheduler=changed).resumed(tmp_path, resume_settings="checkpoint")
    (told,) = warned(caplog)
    assert f"{setting} (saved " in told
    if name not in FUNCTIONS:
        assert resumed.rates == rates_by_hand(saved, interval, two_groups())[STOP:]
        assert "The saved ones count" in told
    else:
        assert resumed.rates[0] == rates_by_hand(saved, interval, two_groups())[STOP], "until the next step"
        assert "functions are always the script's" in told


@pytest.mark.parametrize(("name", "interval"), STEPPING)
def test_by_default_a_difference_is_told_and_another_length_or_function_refused(
    name: str, interval: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved, changed, setting, is_refused = SCHEDULERS[name]
    script = Script(two_groups(), saved, {"lr_scheduler_interval": interval})
    script.stopped(tmp_path)
    other = replace(script, scheduler=changed)
    if is_refused:
        trainer = other.trainer(tmp_path, resume="auto")
        before = weights_of(trainer.model), rates_of(trainer.optimizer)
        error = str(raised_by(trainer.train, CheckpointError))
        assert "resume_settings='script'" in error
        assert "resume_settings='checkpoint'" in error
        assert setting in error or "function gives" in error
        assert differences(before, (weights_of(trainer.model), rates_of(trainer.optimizer))) == []
    else:
        assert other.resumed(tmp_path).rates == rates_by_hand(saved, interval, two_groups())[STOP:]
        (told,) = warned(caplog)
        assert f"{setting} (saved " in told
        assert "The saved ones count; resume_settings='script'" in told


@pytest.mark.parametrize("choice", [None, "checkpoint", "script"])
@pytest.mark.parametrize(("name", "interval"), [*STEPPING, ("none", "epoch"), ("plateau", "epoch")])
def test_an_unchanged_script_is_told_nothing_and_resumes_bitwise(
    name: str, interval: Any, choice: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    makers = {"none": lambda optimizer: None, "plateau": lambda o: ReduceLROnPlateau(o, patience=0)}
    make = makers[name] if name in makers else SCHEDULERS[name][0]
    more = {"lr_scheduler_metric": "total_loss"} if name == "plateau" else {}
    script = Script(two_groups(), make, {"lr_scheduler_interval": interval, "warmup_method": "linear", **more})
    script = script.but(warmup_iters=12)
    whole = script.whole(tmp_path / "whole")
    script.stopped(tmp_path / "parts")
    resumed = script.resumed(tmp_path / "parts", resume_settings=choice)
    assert resumed.rates == whole.rates[STOP:]
    assert differences(whole.weights, resumed.weights) == []
    assert warned(caplog) == []


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: AdamW(model.parameters(), lr=torch.tensor(0.01)),
        lambda model: RMSprop(model.parameters(), lr=0.01, momentum=0.5),
        lambda model: Adagrad(model.parameters(), lr=0.1, lr_decay=0.1),
        lambda model: Adam(model.parameters(), betas=(0.8, 0.9), weight_decay=0.1, fused=True),
    ],
)
def test_no_optimizer_gives_a_false_alarm(optimizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = Script(optimizer, lambda o: CosineAnnealingLR(o, 4))
    script.stopped(tmp_path)
    script.resumed(tmp_path)
    assert warned(caplog) == []


def test_what_a_hook_changes_on_its_way_is_no_difference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A weight decay that grows, a rate that is set by hand: the resumed run continues with them, whatever is chosen."""

    def grow(trainer: Trainer) -> None:
        for group in trainer.optimizer.param_groups:
            group["weight_decay"] += 0.01
            group["lr"] *= 0.9

    script = Script(settings={"hooks": [On(after_iter=grow)]})
    whole = script.whole(tmp_path / "whole")
    for choice in (None, "script"):
        folder = tmp_path / str(choice)
        script.but(hooks=[On(after_iter=grow)]).stopped(folder)
        resumed = script.but(hooks=[On(after_iter=grow)]).resumed(folder, resume_settings=choice)
        # saved in after_iter, behind the hook
        assert differences(whole.weights, resumed.weights) == []
    assert warned(caplog) == []


# ---------------------------------------------------------------- every setting of the optimizer


# name -> (the changed optimizer, what is told of it)
SETTINGS: dict[str, tuple[MakeOptimizer, str]] = {
    "lr": (sgd(lr=0.02), "lr (saved 0.1, the script's 0.02)"),
    "weight_decay": (sgd(weight_decay=0.3), "weight_decay (saved 0, the script's 0.3)"),
    "momentum": (sgd(momentum=0.5), "momentum (saved 0.9, the script's 0.5)"),
    "nesterov": (sgd(nesterov=True), "nesterov (saved False, the script's True)"),
    "dampening": (sgd(dampening=0.1), "dampening (saved 0, the script's 0.1)"),
    "maximize": (sgd(maximize=True), "maximize (saved False, the script's True)"),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("choice", [None, "checkpoint", "script"])
def test_a_setting_of_the_optimizer(name: str, choice: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changed, words = SETTINGS[name]
    first, second = Script(), Script(changed)
    first.stopped(tmp_path)
    resumed = second.resumed(tmp_path, resume_settings=choice)
    expected = by_hand(first, second if choice == "script" else first)
    assert differences(expected, resumed.weights) == []
    (told,) = warned(caplog)
    assert words in told
    assert ("The script's count" if choice == "script" else "The saved ones count") in told


@pytest.mark.parametrize("choice", [None, "script"])
def test_betas_and_eps_of_adam(choice: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Script(lambda model: Adam(model.parameters(), lr=0.01))
    second = Script(lambda model: Adam(model.parameters(), lr=0.01, betas=(0.7, 0.99), eps=1e-4))
    first.stopped(tmp_path)
    resumed = second.resumed(tmp_path, resume_settings=choice)
    assert differences(by_hand(first, second if choice else first), resumed.weights) == []
    assert "betas (saved [0.9, 0.999], the script's [0.7, 0.99]), eps (saved 1e-08, the script's 0.0001)" in caplog.text


@pytest.mark.parametrize(
    ("saved", "changed", "words"),
    [
        (Adam, {"amsgrad": True}, "amsgrad was False, now it is True, but the saved optimizer has no max_exp_avg_sq"),
        (RMSprop, {"centered": True}, "centered was False, now it is True, but the saved optimizer has no grad_avg"),
        (RMSprop, {"momentum": 0.9}, "momentum was 0, now it is 0.9, but the saved optimizer has no momentum_buffer"),
    ],
)
def test_a_setting_that_needs_state_which_was_not_kept_is_refused(
    saved: Any, changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """torch would fail with a KeyError in the first step."""
    Script(lambda model: saved(model.parameters(), lr=0.01)).stopped(tmp_path)
    other = Script(lambda model: saved(model.parameters(), lr=0.01, **changed))
    trainer = other.trainer(tmp_path, resume="auto", resume_settings="script")
    assert words in str(raised_by(trainer.train, CheckpointError))
    other.resumed(tmp_path, resume_settings="checkpoint")


@pytest.mark.parametrize("choice", [None, "script"])
def test_a_rate_that_is_a_tensor(choice: Any, tmp_path: Path) -> None:
    def script(lr: float, length: int = 30) -> Script:
        return Script(
            lambda model: AdamW(model.parameters(), lr=torch.tensor(lr, dtype=torch.float64)),
            lambda o: CosineAnnealingLR(o, length),
            {"lr_scheduler_interval": "iter", "warmup_method": "linear", "warmup_iters": 12},
        )

    script(0.1).stopped(tmp_path / "parts")
    resumed = script(0.05).resumed(tmp_path / "parts", resume_settings=choice)
    assert resumed.rates == script(0.05 if choice else 0.1).whole(tmp_path / "whole").rates[STOP:]
    assert isinstance(resumed.trainer.optimizer.param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize("choice", ["checkpoint", "script"])
def test_a_cycled_momentum_and_the_beta_beside_it(choice: Any, tmp_path: Path) -> None:
    def script(beta: float, momentum: float) -> Script:
        return Script(
            lambda model: AdamW(model.parameters(), betas=(0.9, beta)),
            lambda o: OneCycleLR(o, 0.1, 16, max_momentum=momentum),
            {"lr_scheduler_interval": "iter"},
        )

    saved, changed = script(0.999, 0.95), script(0.9, 0.8)
    betas: list[Any] = []

    def note() -> On:
        return On(before_iter=lambda trainer: betas.append(trainer.optimizer.param_groups[0]["betas"]))

    (changed if choice == "script" else saved).but(hooks=[note()]).whole(tmp_path / "whole")
    whole, betas[:] = list(betas), []
    saved.stopped(tmp_path / "parts")
    changed.resumed(tmp_path / "parts", note(), resume_settings=choice)
    assert betas == whole[STOP:]


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
@pytest.mark.parametrize(
    "changed",
    [
        lambda o: OneCycleLR(o, 0.1, 16, cycle_momentum=False),
        lambda o: OneCycleLR(o, 0.1, 16, three_phase=True),  # has moved the momentum back to where it began
        lambda o: ExponentialLR(o, 0.9),
        lambda o: None,
    ],
    ids=["uncycled", "three_phase", "another class", "none"],
)
def test_what_the_saved_schedule_has_moved_is_the_scripts_too(optimizer: Any, changed: Any, tmp_path: Path) -> None:
    def script(make: MakeScheduler) -> Script:
        settings: dict[str, Any] = {"momentum": 0.9} if optimizer is SGD else {}
        return Script(
            lambda model: optimizer(model.parameters(), lr=0.1, **settings), make, {"lr_scheduler_interval": "iter"}
        )

    groups: list[dict[str, Any]] = []

    def note() -> On:
        return On(before_iter=lambda trainer: groups.append(without_params(trainer.optimizer.param_groups[0])))

    script(changed).but(hooks=[note()]).whole(tmp_path / "whole")
    whole, groups[:] = list(groups), []
    script(lambda o: OneCycleLR(o, 0.1, 16)).stopped(tmp_path / "parts")
    script(changed).resumed(tmp_path / "parts", note(), resume_settings="script")
    assert groups == whole[STOP:]


def without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


@pytest.mark.parametrize("choice", [None, "checkpoint", "script"])
def test_groups_that_a_hook_adds_keep_what_they_have(
    choice: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last layer is unfrozen in epoch 1, with a rate of its own, which is no difference between the scripts."""

    def unfreeze(trainer: Trainer) -> None:
        begun = trainer.epoch >= 1 or trainer.progress.epoch > 0
        if begun and len(trainer.optimizer.param_groups) == 1:
            trainer.optimizer.add_param_group({"params": list(trainer.model.layers[2].parameters()), "lr": 0.01})

    def script(lr: float) -> Script:
        hook = On(before_train=unfreeze, before_epoch=unfreeze)
        return Script(lambda model: SGD(model.layers[0].parameters(), lr=lr), settings={"hooks": [hook]})

    script(0.1).stopped(tmp_path)
    resumed = script(0.05).resumed(tmp_path, resume_settings=choice)
    assert resumed.rates == [[0.05 if choice == "script" else 0.1, 0.01]] * (EPOCHS * BATCHES - STOP)
    assert any("lr (saved 0.1, the script's 0.05)" in told for told in warned(caplog))
    assert not any("0.01," in told for told in warned(caplog))


def test_a_group_of_its_own_is_compared_by_the_names_of_its_parameters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The two groups change places; only the bias's weight decay is another."""

    def make(order: int, decay: float) -> MakeOptimizer:
        def optimizer(model: nn.Module) -> Optimizer:
            weights = [p for p in model.parameters() if p.ndim > 1]
            biases = [p for p in model.parameters() if p.ndim == 1]
            groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": decay}]
            return SGD(groups[::order], lr=0.1)

        return optimizer

    Script(make(1, 0.0)).stopped(tmp_path)
    resumed = Script(make(-1, 0.2)).resumed(tmp_path, resume_settings="script")
    (told,) = warned(caplog)
    assert "weight_decay (saved 0, the script's 0.2)" in told
    assert "0.1" not in told.split("The learning rate")[0]
    assert [group["weight_decay"] for group in resumed.trainer.optimizer.param_groups] == [0.2, 0.1]


# ---------------------------------------------------------------- schedules in particular


@pytest.mark.parametrize("choice", [None, "script"])
def test_a_lower_rate_of_a_scheduled_run(choice: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The rate that was set is compared, not that which the schedule has moved it to."""
    cosine = lambda optimizer: CosineAnnealingLR(optimizer, 4)  # noqa: E731
    Script(two_groups(0.1), cosine).stopped(tmp_path)
    resumed = Script(two_groups(0.05), cosine).resumed(tmp_path, resume_settings=choice)
    expected = rates_by_hand(cosine, "epoch", two_groups(0.05 if choice else 0.1))[STOP:]
    assert resumed.rates == expected
    assert "lr (saved 0.1, the script's 0.05), lr (saved 0.01, the script's 0.005)" in caplog.text


@pytest.mark.parametrize("choice", [None, "checkpoint", "script"])
@pytest.mark.parametrize(
    "changes",
    [{"warmup_iters": 20}, {"warmup_factor": 0.5}, {"warmup_method": "exp"}, {"warmup_method": None}],
    ids=str,
)
def test_another_warm_up(changes: Any, choice: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = {"warmup_method": "linear", "warmup_iters": 14, "warmup_factor": 0.1}
    script = Script(scheduler=lambda optimizer: StepLR(optimizer, 1, 0.5), settings=saved)
    script.stopped(tmp_path / "parts")
    resumed = script.but(**changes).resumed(tmp_path / "parts", resume_settings=choice)
    whole = (script.but(**changes) if choice == "script" else script).whole(tmp_path / "whole")
    assert resumed.rates == whole.rates[STOP:]
    ((name, value),) = changes.items()
    assert f"{name} (saved {saved[name]}, the script's {value})" in caplog.text


class TestPlateau:
    """ReduceLROnPlateau goes by what it has seen, so its counts are kept."""

    @staticmethod
    def script(lr: float = 0.1, patience: int = 1, **settings: Any) -> Script:
        metric = On(after_epoch=lambda trainer: trainer.log(trainer.epoch, score=1.0, smooth=False, window_size=1))
        return Script(
            sgd(lr=lr),
            lambda o: ReduceLROnPlateau(o, factor=0.5, patience=patience, **settings),
            {"lr_scheduler_metric": "score", "hooks": [metric]},
            epochs=6,
        )

    def test_another_patience_counts_the_bad_epochs_there_were(self, tmp_path: Path) -> None:
        self.script().stopped(tmp_path)  # one good epoch, one bad one
        resumed = self.script(patience=0).resumed(tmp_path, resume_settings="script")
        assert [rate for (rate,) in resumed.rates[2::BATCHES]] == [0.05, 0.025, 0.0125]

    def test_by_default_the_saved_patience_counts(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.script().stopped(tmp_path)
        resumed = self.script(patience=0).resumed(tmp_path)
        assert [rate for (rate,) in resumed.rates[2::BATCHES]] == [0.05, 0.05, 0.025]
        assert "patience (saved 1, the script's 0)" in caplog.text

    def test_another_rate_is_reduced_as_often_as_the_saved_one_was(self, tmp_path: Path) -> None:
        self.script(patience=0).stopped(tmp_path)
        resumed = self.script(lr=0.04, patience=0).resumed(tmp_path, resume_settings="script")
        assert resumed.rates[0] == [0.02]

    def test_a_best_value_belongs_to_its_direction(self, tmp_path: Path) -> None:
        self.script().stopped(tmp_path)
        resumed = self.script(mode="max").resumed(tmp_path, resume_settings="script", max_epochs=3)
        scheduler = resumed.trainer.lr_scheduler.scheduler
        assert isinstance(scheduler, ReduceLROnPlateau)
        assert (scheduler.mode, scheduler.best) == ("max", 1.0)


def test_a_schedule_that_is_too_short_for_where_the_run_is(tmp_path: Path) -> None:
    script = Script(scheduler=lambda o: OneCycleLR(o, 0.2, 16), settings={"lr_scheduler_interval": "iter"})
    script.stopped(tmp_path)
    shorter = replace(script, scheduler=lambda o: OneCycleLR(o, 0.2, 8), epochs=2)
    trainer = shorter.trainer(tmp_path, resume="auto", resume_settings="script")
    before = weights_of(trainer.model), rates_of(trainer.optimizer)
    assert "cannot be stepped to where the run is, 10 steps" in str(raised_by(trainer.train, CheckpointError))
    assert differences(before, (weights_of(trainer.model), rates_of(trainer.optimizer))) == []


@pytest.mark.parametrize("choice", [None, "checkpoint", "script"])
def test_a_function_that_fails_at_the_saved_step_is_told_and_changes_nothing(choice: Any, tmp_path: Path) -> None:
    Script(scheduler=lambda o: LambdaLR(o, lambda step: 1.0)).stopped(tmp_path)
    table = Script(scheduler=lambda o: LambdaLR(o, lambda step: [1.0, 0.5][step]))
    trainer = table.trainer(tmp_path, resume="auto", resume_settings=choice)
    before = weights_of(trainer.model), rates_of(trainer.optimizer)
    error = str(raised_by(trainer.train, CheckpointError))
    assert "the lr_scheduler's function fails after 2 steps: IndexError: list index out of range" in error
    assert differences(before, (weights_of(trainer.model), rates_of(trainer.optimizer))) == []


def test_milestones_made_for_another_number_of_epochs_are_refused(tmp_path: Path) -> None:
    Script(scheduler=lambda o: MultiStepLR(o, [2, 3])).stopped(tmp_path)
    longer = Script(scheduler=lambda o: MultiStepLR(o, [4, 6]), epochs=8)
    error = str(raised_by(longer.trainer(tmp_path, resume="auto").train, CheckpointError))
    assert "milestones was [2, 3], now it is [4, 6]" in error
    resumed = longer.resumed(tmp_path, resume_settings="script")
    assert [rates[0] for rates in resumed.rates[2::BATCHES]] == pytest.approx([0.1, 0.01, 0.01, 0.001, 0.001])


def test_another_length_is_refused_before_a_hook_adds_layers_in_before_train(tmp_path: Path) -> None:
    began: list[str] = []

    def unfreeze(trainer: Trainer) -> None:
        began.append("before_train")
        if len(trainer.optimizer.param_groups) == 1:
            trainer.optimizer.add_param_group({"params": list(trainer.model.layers[2].parameters()), "lr": 0.01})

    def script(length: int) -> Script:
        hooks = [On(before_train=unfreeze)]
        first = lambda model: SGD(model.layers[0].parameters(), lr=0.1)  # noqa: E731
        return Script(first, lambda o: PolynomialLR(o, length), {"hooks": hooks})

    script(20).stopped(tmp_path)
    began.clear()
    assert "total_iters was 20" in str(raised_by(script(40).trainer(tmp_path, resume="auto").train, CheckpointError))
    assert began == []


def test_one_cycle_whose_saved_length_is_chosen_for_a_longer_run_says_how_to_go_on(tmp_path: Path) -> None:
    script = Script(scheduler=lambda o: OneCycleLR(o, 0.2, 16), settings={"lr_scheduler_interval": "iter"})
    script.stopped(tmp_path)
    longer = replace(script, scheduler=lambda o: OneCycleLR(o, 0.2, 32), epochs=8)
    trainer = longer.trainer(tmp_path, resume="auto", resume_settings="checkpoint")
    assert "resume_settings='script'" in str(raised_by(trainer.train, SettingError))
    assert longer.resumed(tmp_path, resume_settings="script").rates[0] == pytest.approx(
        rates_by_hand(longer.scheduler, "iter", sgd())[STOP], rel=1e-12
    )


@pytest.mark.parametrize("choice", [None, "checkpoint"])
def test_another_class_of_scheduler_needs_the_choice(choice: Any, tmp_path: Path) -> None:
    Script(scheduler=lambda o: OneCycleLR(o, 0.2, EPOCHS)).stopped(tmp_path)
    for scheduler, name in ((lambda o: StepLR(o, 1), "StepLR"), (lambda o: None, "None")):
        trainer = Script(scheduler=scheduler).trainer(tmp_path, resume="auto", resume_settings=choice)
        error = str(raised_by(trainer.train, CheckpointError))
        assert f"the lr_scheduler was OneCycleLR, now it is {name}. resume_settings='script'" in error


def test_a_scheduler_may_come_go_and_change_its_class_with_the_scripts_settings(tmp_path: Path) -> None:
    """And the state saved then resumes without a choice."""
    constant, step = Script(), Script(scheduler=lambda o: StepLR(o, 1, 0.5))
    cycle = Script(scheduler=lambda o: OneCycleLR(o, 0.2, EPOCHS))
    for saved, changed in ((constant, step), (step, constant), (cycle, step), (step, cycle)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        saved.stopped(folder)
        expected = [[0.1]] * 16
        if changed is not constant:
            expected = rates_by_hand(changed.scheduler, "epoch", changed.optimizer)
        changed.stopped(folder, 12, resume="auto", resume_settings="script")
        assert changed.resumed(folder).rates == expected[12:]


def test_the_settings_in_force_are_saved_so_the_next_resume_speaks_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Script(sgd(lr=0.1)).stopped(tmp_path, 4)
    other = Script(sgd(lr=0.02))
    other.trainer(tmp_path, CheckpointerHook(), resume="auto", max_epochs=2).train()
    assert len(warned(caplog)) == 1
    other.trainer(tmp_path, CheckpointerHook(), resume="auto", max_epochs=3, resume_settings="script").train()
    assert len(warned(caplog)) == 2
    assert other.resumed(tmp_path, CheckpointerHook()).rates == [[0.02]] * BATCHES
    assert len(warned(caplog)) == 2, "the script's settings are in force by now"


def test_a_rate_that_a_function_gives_everywhere_is_compared_at_its_step_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Inside a warm-up two functions agree; their values are told."""

    def script(total: int) -> Script:
        return Script(scheduler=lambda o: LambdaLR(o, lambda n: min(1.0, (n + 1) / 5, max(0.0, (total - n) / total))))

    script(20).stopped(tmp_path, 3)
    resumed = script(40).resumed(tmp_path)
    assert "functions are always the script's: total (saved 20, the script's 40)" in caplog.text
    assert resumed.rates == rates_by_hand(script(40).scheduler, "epoch", sgd())[3:]


def test_a_state_of_format_2_says_what_can_be_seen_of_its_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no record of what was set."""
    script = Script(two_groups(), lambda o: MultiStepLR(o, [1, 3], 0.5), {"warmup_method": "exp", "warmup_iters": 30})
    script.stopped(tmp_path)
    without_record(tmp_path)
    script.trainer(tmp_path, resume="auto", max_epochs=3, hooks=[]).train()
    assert warned(caplog) == []
    other = replace(script, optimizer=two_groups(0.2), scheduler=lambda o: MultiStepLR(o, [1, 3], 0.1))
    other.trainer(tmp_path, resume="auto", max_epochs=3).train()
    (told,) = warned(caplog)
    assert "lr (saved 0.1, the script's 0.2)" in told
    assert "gamma (saved 0.5, the script's 0.1)" in told


def without_record(folder: Path) -> None:
    path = folder / "checkpoints" / "latest.pth"
    io.write(path, {name: part for name, part in io.read(path).items() if name != "settings"})


def test_a_wrong_choice_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="resume_settings is 'saved'"):
        make_trainer(tmp_path, resume_settings="saved")  # type: ignore[arg-type]
