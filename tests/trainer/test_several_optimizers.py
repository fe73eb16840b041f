"""Several optimizers: a list steps as one, a dict is driven by losses of its own; both as in a loop by hand."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR

from tests.small_hooks import On, at_iter
from tests.small_runs import Net, UserError, differences, fail, make_batches, make_trainer, raised_by, weights_of
from tests.trainer.small_gan import WARMUP, Gan, GanTrainer, batches, by_hand, make, optimizers_of
from torch_frame import CheckpointerHook, HookBase, Trainer
from torch_frame.errors import CheckpointError, NonFiniteError, SettingError
from torch_frame.run.table import table

GAN_SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 3}, {"accumulate": 3}),
    "clipping": ({"clip_grad_norm": 0.2}, {"clip": 0.2}),
    "warm-up": (WARMUP, {"warmup": True}),
    "bf16": ({"precision": "bf16"}, {"dtype": torch.bfloat16}),
    "fp16": ({"precision": "fp16"}, {"dtype": torch.float16}),
    "ema": ({"use_ema": True, "ema_decay": 0.9}, {"ema_decay": 0.9}),
    "all": (
        {"gradient_accumulation_steps": 2, "clip_grad_norm": 0.2, "precision": "fp16", "use_ema": True, **WARMUP},
        {"accumulate": 2, "clip": 0.2, "dtype": torch.float16, "ema_decay": 0.9999, "warmup": True},
    ),
}


class RareGenerator(GanTrainer):
    g_every = 3


@pytest.mark.parametrize("kind", [GanTrainer, RareGenerator])
@pytest.mark.parametrize("name", GAN_SETTINGS)
def test_a_gan_has_the_bits_of_the_loop_by_hand(name: str, kind: type[GanTrainer], tmp_path: Path) -> None:
    settings, like = GAN_SETTINGS[name]
    torch.manual_seed(3)
    model, average = by_hand(batches(), 2, g_every=kind.g_every, **like)
    torch.manual_seed(3)
    trainer = make(tmp_path, 2, kind, **settings)
    trainer.train(5, 5)
    assert differences(weights_of(model), weights_of(trainer.model)) == []
    if "ema_decay" in like:
        expected, followed = average.state_dict(), trainer.model_evaluate.state_dict()
        for key, value in expected.items():  # torch's exp is not python's in the last bit
            torch.testing.assert_close(followed[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["plain", "accumulation", "all"])
@pytest.mark.parametrize("stop_after", [4, 7, 12])
def test_a_gan_is_resumed_bitwise_also_inside_an_epoch(name: str, stop_after: int, tmp_path: Path) -> None:
    settings, _ = GAN_SETTINGS[name]

    def run(folder: str, resume: Any = None, stop: int | None = None) -> Trainer:
        torch.manual_seed(3)
        hooks: list[HookBase] = [CheckpointerHook()]
        if stop is not None:
            hooks.append(On(after_iter=at_iter(stop - 1, stopped)))
        trainer = make(tmp_path / folder, 3, RareGenerator, hooks=hooks, create_new_dir=None, resume=resume, **settings)
        trainer.train(5, 5)
        return trainer

    def stopped(trainer: Any) -> None:
        trainer.save_at_safe_point("latest.pth", save_single_model=False)
        trainer.register_hooks([On(before_iter=stop_here)])

    def stop_here(trainer: Any) -> None:
        if not trainer.updater.window_open and trainer.optimization.num_open == 0:
            trainer.wait_for_saves()
            raise InterruptedError

    whole = run("whole")
    raised_by(lambda: run("parts", stop=stop_after), InterruptedError)
    resumed = run("parts", resume="auto")
    assert resumed.progress.iter == whole.progress.iter
    assert differences(state_of(whole), state_of(resumed)) == []


def state_of(trainer: Trainer) -> Any:
    names = ("progress", "model", "ema", "optimizers", "lr_schedulers", "grad_scaler")
    return {name: part.state_dict() for name, part in table(trainer._run).items() if name in names}


def test_hooks_see_each_optimizers_own_mean_gradient(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    def note(trainer: Any) -> None:
        model = trainer.model
        seen.append(tuple(next(part.parameters()).grad is not None for part in (model.d, model.g)))

    trainer = make(tmp_path, 1, hooks=[On(before_update=note)])
    trainer.train(5, 5)
    assert seen == [(True, False), (True, True)] * 7
    assert trainer.progress.num_updates == 7


def test_a_hook_may_take_the_gradient_away(tmp_path: Path) -> None:
    """The generator waits for three batches."""

    def take_away(trainer: Any) -> None:
        if trainer.cur_iter < 3:
            for parameter in trainer.model.g.parameters():
                parameter.grad = None

    trainer = make(tmp_path, 1, hooks=[On(before_update=take_away)])
    trainer.train(5, 5)
    steps = [int(optimizer.state[next(iter(optimizer.state))]["step"]) for optimizer in trainer.optimizer.values()]
    assert steps == [7, 4]


def test_the_norms_are_recorded_by_name(tmp_path: Path) -> None:
    trainer = make(tmp_path, 1, clip_grad_norm=0.5)
    trainer.train(5, 5)
    assert {"grad_norm_d", "grad_norm_g"} <= set(trainer.metric_storage)


class Broken(GanTrainer):
    """The generator's loss is not finite in one batch."""

    def train_one_iter(self, batch: Any) -> Any:
        model: Any = self.model
        self.update(model.loss_of_d(batch), "d")
        self.update(model.loss_of_g(batch) * (float("nan") if self.cur_iter == 2 else 1.0), "g")
        return {"total_loss": 0.0}


def test_a_loss_that_is_not_finite_is_an_error_before_its_step(tmp_path: Path) -> None:
    trainer = make(tmp_path, 1, Broken)
    with pytest.raises(NonFiniteError, match="loss is not finite"):
        trainer.train(5, 5)
    assert trainer.progress.num_updates == 2


def test_one_optimizer_may_skip_while_the_other_steps(tmp_path: Path) -> None:
    trainer = make(tmp_path, 1, Broken, on_nonfinite="skip")
    trainer.train(5, 5)
    counts = {name: unit.updater.num_skipped for name, unit in trainer.optimization.units.items()}
    assert counts == {"d": 0, "g": 1}
    assert trainer.progress.num_updates == 7
    assert [schedule.num_updates for schedule in trainer.lr_scheduler.values()] == [7, 6]
    assert trainer.model.g[1].num_batches_tracked == 13  # the forward pass of the discriminator's loss counts
    assert all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values())


class Critic(GanTrainer):
    """The discriminator steps several times in a batch, as in WGAN."""

    def train_one_iter(self, batch: Any) -> Any:
        model: Any = self.model
        for _ in range(3):
            with self.autocast():
                loss = model.loss_of_d(batch)
            self.update(loss, "d")
        return {"total_loss": loss}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_optimizer_may_step_several_times_in_a_batch(precision: Any, tmp_path: Path) -> None:
    trainer = make(tmp_path, 1, Critic, precision=precision)
    trainer.train(5, 5)
    assert trainer.lr_scheduler["d"].num_updates + trainer.optimization.units["d"].updater.num_skipped == 21
    assert trainer.progress.num_updates == 7
    with pytest.raises(SettingError, match="twice in one batch"):
        make(tmp_path / "other", 1, Critic, gradient_accumulation_steps=2).train(5, 5)


def a_step(name: Any, loss: str, before: Any = None, **more: Any) -> type[GanTrainer]:
    """A trainer whose step gives one loss to one optimizer."""

    class Step(GanTrainer):
        def train_one_iter(self, batch: Any) -> Any:
            if before is not None:
                before(self.model)
            self.update(getattr(self.model, loss)(batch), name(self) if callable(name) else name, **more)
            return {"total_loss": 0.0}

    return Step


def freeze(model: Any) -> None:
    model.d.requires_grad_(False)


WRONG_STEPS: dict[str, tuple[type[GanTrainer], type[Exception], str]] = {
    "another one's loss": (a_step("g", "loss_of_d"), SettingError, "none of the named optimizer's parameters"),
    "all frozen": (a_step("d", "loss_of_g", freeze), SettingError, "none of whose parameters requires a gradient"),
    "the object": (a_step(lambda trainer: trainer.optimizer["d"], "loss_of_d"), TypeError, "got a Adam for optimizer"),
    "weight 0": (a_step("d", "loss_of_d", weight=0), SettingError, r"update\(\) got the weight 0"),
}


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_a_step_that_would_train_nothing_is_an_error(name: str, tmp_path: Path) -> None:
    kind, error, text = WRONG_STEPS[name]
    with pytest.raises(error, match=text):
        make(tmp_path, 1, kind).train(5, 5)


def test_a_network_outside_the_model_is_trained_and_resumed(tmp_path: Path) -> None:
    class Outside(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            fake = self.model(torch.randn(len(batch), 2))
            d_loss = (self.d(batch) - 1).square().mean() + self.d(fake.detach()).square().mean()
            self.update(d_loss, "d")
            self.update((self.d(self.model(torch.randn(len(batch), 2))) - 1).square().mean(), "g")
            return {"total_loss": d_loss}

        d: nn.Module

    def run(folder: str, resume: Any = None, stop: bool = False) -> Outside:
        torch.manual_seed(0)
        gan = Gan()
        optimizers = {"d": Adam(gan.d.parameters(), lr=0.02), "g": Adam(gan.g.parameters(), lr=0.01)}
        hooks: list[HookBase] = [CheckpointerHook(every_n_iters=3)]
        hooks += [On(before_iter=at_iter(10, fail))] if stop else []
        work_dir = tmp_path / folder
        trainer = Outside(
            gan.g, optimizers, None, batches(), 3, work_dir, hooks=hooks, create_new_dir=None, resume=resume
        )
        trainer.d = gan.d
        trainer.train(5, 5)
        return trainer

    whole = run("whole")
    raised_by(lambda: run("parts", stop=True), UserError)
    resumed = run("parts", "auto")
    for name in ("model", "d"):
        assert differences(weights_of(getattr(whole, name)), weights_of(getattr(resumed, name))) == []


@pytest.mark.parametrize("stop_at", [3, 6, 11])
def test_a_signal_ends_a_gan_where_its_window_is_complete(stop_at: int, tmp_path: Path) -> None:
    settings: Any = {"gradient_accumulation_steps": 3, "precision": "fp16", "use_ema": True, "create_new_dir": None}

    def run(folder: str, resume: Any = None, stop: bool = False) -> Trainer:
        torch.manual_seed(3)
        hooks: list[HookBase] = [CheckpointerHook()]
        hooks += [On(after_iter=at_iter(stop_at, lambda trainer: signal.raise_signal(signal.SIGTERM)))] if stop else []
        trainer = make(tmp_path / folder, 2, hooks=hooks, resume=resume, **settings)
        trainer.train(5, 5)
        return trainer

    whole = run("whole")
    assert isinstance(raised_by(lambda: run("parts", stop=True), SystemExit), SystemExit)
    assert differences(state_of(whole), state_of(run("parts", "auto"))) == []


def test_one_cycle_and_plateau_belong_to_their_own_optimizers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    several = [SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)]
    schedulers = [ReduceLROnPlateau(several[0], patience=0, threshold=10.0), StepLR(several[1], 1, 0.5)]
    trainer = Trainer(
        model,
        several,
        schedulers,
        batches(),
        3,
        tmp_path / "plateau",
        hooks=[],
        step_fn=lambda model, batch: model(batch).square().mean(),
        lr_scheduler_metric="total_loss",
    )
    trainer.train(5, 5)
    rates = [rate for schedule in trainer.lr_scheduler for rate in schedule.get_last_lr()]
    assert rates == pytest.approx([0.1 * 0.1**3, 0.1 * 0.5**3])
    gan = Gan()
    optimizers, _ = optimizers_of(gan)
    steps = {"d": 14, "g": 6}  # the generator's are fewer
    cycles = {name: OneCycleLR(optimizers[name], 0.1, total_steps=num) for name, num in steps.items()}
    once = RareGenerator(
        gan, optimizers, cycles, batches(), 2, tmp_path / "cycle", hooks=[], lr_scheduler_interval="iter"
    )
    once.train(5, 5)
    assert [schedule.num_updates for schedule in once.lr_scheduler.values()] == [14, 6]


# ---------------------------------------------------------------- a list


def muon_and_adamw(model: nn.Module) -> list[Any]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return [Muon(matrices, lr=0.02), AdamW(rest, lr=0.01)]


def list_by_hand(model: nn.Module, epochs: int, clip: float, steps: int, dtype: Any) -> None:
    optimizers = muon_and_adamw(model)
    schedulers = [StepLR(optimizers[0], 2, 0.5), ExponentialLR(optimizers[1], 0.9)]
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    data = make_batches(6)
    for _ in range(epochs):
        for index, batch in enumerate(data):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = model(batch)
            scaler.scale(loss / steps).backward()
            if (index + 1) % steps == 0:
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                if all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
                    for optimizer in optimizers:
                        scaler.step(optimizer)
                scaler.update()
                for optimizer in optimizers:
                    optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("clip", "steps"), [(0.0, 1), (0.1, 2)])
def test_muon_beside_adamw_has_the_bits_of_the_loop_by_hand(
    clip: float, steps: int, precision: Any, tmp_path: Path
) -> None:
    model, expected = Net(), Net()
    list_by_hand(expected, 3, clip, steps, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision))

    def run(model: nn.Module, epochs: int, folder: str, resume: Any = None) -> None:
        optimizers = muon_and_adamw(model)
        make_trainer(
            tmp_path / folder,
            model,
            optimizers,  # type: ignore[arg-type]
            [StepLR(optimizers[0], 2, 0.5), ExponentialLR(optimizers[1], 0.9)],
            make_batches(6),
            epochs,
            clip_grad_norm=clip,
            gradient_accumulation_steps=steps,
            precision=precision,
            hooks=[CheckpointerHook()],
            create_new_dir=None,
            resume=resume,
        ).train(5, 5)

    run(model, 3, "whole")
    assert differences(weights_of(expected), weights_of(model)) == []
    run(Net(), 2, "parts")
    resumed = Net()
    run(resumed, 3, "parts", "auto")
    assert differences(weights_of(expected), weights_of(resumed)) == []


@pytest.mark.parametrize("settings", [{"on_nonfinite": "skip"}, {"precision": "fp16"}])
def test_a_list_is_skipped_as_one(settings: Any, tmp_path: Path) -> None:
    model = Net()
    optimizers = [SGD(model.layers[0].parameters(), lr=0.1), SGD(model.layers[2].parameters(), lr=0.1)]
    before: list[Any] = []

    def spoil(trainer: Any) -> None:
        before[:] = [weights_of(trainer.model)]
        if trainer.cur_iter == 2:
            model.layers[0].weight.grad[0, 0] = float("inf")

    def compare(trainer: Any) -> None:
        changed = {key for key, value in weights_of(trainer.model).items() if not torch.equal(value, before[0][key])}
        assert len(changed) == (0 if trainer.cur_iter == 2 else 4)

    hooks = [On(before_update=spoil, after_iter=compare)]
    trainer = make_trainer(tmp_path, model, optimizers, max_epochs=1, hooks=hooks, **settings)  # type: ignore[arg-type]
    if trainer.precision.scaler is not None:
        trainer.precision.scaler._init_scale = 16.0  # type: ignore[attr-defined]  # no overflow but ours
    trainer.train(5, 5)
    assert trainer.updater.num_skipped == 1
    assert trainer.progress.num_updates == 4


# ---------------------------------------------------------------- what is refused


def two(model: Net) -> list[Any]:
    return [SGD(model.layers[0].parameters(), lr=0.1), SGD(model.layers[2].parameters(), lr=0.2)]


REFUSED = {
    "empty list": (lambda m, o: ([], None), SettingError, "empty list"),
    "an object twice": (lambda m, o: ([o[0], o[0]], None), SettingError, "the same SGD object twice"),
    "a shared parameter": (
        lambda m, o: ([o[0], SGD(m.parameters(), lr=0.1)], None),
        SettingError,
        r"A parameter of shape \[8, 3\] is in optimizer\[0\] and in optimizer\[1\]",
    ),
    "no optimizer in a list": (lambda m, o: ([o[0], "sgd"], None), TypeError, r"optimizer\[1\] is str"),
    "a key that is no name": (lambda m, o: ({1: o[0]}, None), TypeError, "the key 1"),
    "one scheduler for several": (lambda m, o: (o, StepLR(o[0], 1)), SettingError, "Give it the optimizer's form"),
    "too few schedulers": (lambda m, o: (o, [StepLR(o[0], 1)]), SettingError, r"lr_scheduler\[0\], but optimizer"),
    "schedulers exchanged": (
        lambda m, o: (o, [StepLR(o[1], 1), None]),
        SettingError,
        r"lr_scheduler\[0\] was made for optimizer\[1\]",
    ),
    "a list for a dict": (lambda m, o: ({"a": o[0], "b": o[1]}, [None, None]), SettingError, r"optimizer\['a'\]"),
    "a dict without a step": (lambda m, o: ({"a": o[0], "b": o[1]}, None), SettingError, "override it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_belong_together_is_refused_before_the_first_step(name: str, tmp_path: Path) -> None:
    make_them, error, text = REFUSED[name]
    model = Net()
    optimizer, scheduler = make_them(model, two(model))
    with pytest.raises(error, match=text):
        make_trainer(tmp_path, model, optimizer, scheduler).train(5, 5)


def test_update_with_a_wrong_name_is_an_error(tmp_path: Path) -> None:
    class Wrong(GanTrainer):
        def train_one_iter(self, batch: Any) -> Any:
            self.update(self.model.loss_of_d(batch), self.name)  # type: ignore[operator, attr-defined]

    for name in ("generator", None):
        trainer = make(tmp_path / str(name), 1, Wrong)
        trainer.name = name  # type: ignore[attr-defined]
        with pytest.raises(SettingError, match="the optimizers are 'd', 'g'"):
            trainer.train(5, 5)


def test_shared_parameters_of_a_dict_are_refused_with_accumulation_only(tmp_path: Path) -> None:
    class Shared(GanTrainer):
        def train_one_iter(self, batch: Any) -> Any:
            self.update(self.model.loss_of_d(batch), "a")  # type: ignore[operator]
            self.update(self.model.loss_of_d(batch), "b")  # type: ignore[operator]
            return {"total_loss": 0.0}

    def trainer(folder: str, **settings: Any) -> Trainer:
        model = Gan()
        optimizers = {"a": SGD(model.d.parameters(), lr=0.1), "b": SGD(model.d.parameters(), lr=0.01)}
        return Shared(model, optimizers, None, batches(), 1, tmp_path / folder, hooks=[], **settings)

    trainer("a").train(5, 5)
    with pytest.raises(SettingError, match="mixed in a window"):
        trainer("b", gradient_accumulation_steps=2).train(5, 5)


# ---------------------------------------------------------------- a resume with another script


def test_settings_of_each_optimizer_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(epochs: int, rate: float, **more: Any) -> Trainer:
        model = Gan()
        optimizers = {"d": Adam(model.d.parameters(), lr=0.02), "g": Adam(model.g.parameters(), lr=rate)}
        hooks = [CheckpointerHook()]
        work_dir = tmp_path / "run"
        trainer = GanTrainer(
            model, optimizers, None, batches(), epochs, work_dir, hooks=hooks, create_new_dir=None, **more
        )
        trainer.train()
        return trainer

    run(1, 0.01)
    saved = run(2, 0.05, resume="auto")
    assert "optimizer['g']: The script has other settings than the checkpoint: lr (saved 0.01, the script's 0.05)" in (
        caplog.text
    )
    assert [schedule.get_last_lr() for schedule in saved.lr_scheduler.values()] == [[0.02], [0.01]]
    script = run(3, 0.05, resume="auto", resume_settings="script")
    assert [schedule.get_last_lr() for schedule in script.lr_scheduler.values()] == [[0.02], [0.05]]


def test_another_set_of_optimizers_is_an_error_with_both(tmp_path: Path) -> None:
    model = Net()
    make_trainer(
        tmp_path / "run",
        model,
        two(model),
        hooks=[CheckpointerHook()],
        create_new_dir=None,  # type: ignore[arg-type]
    ).train(5, 5)
    with pytest.raises(
        CheckpointError, match=r"optimizers were optimizer\[0\], optimizer\[1\], now they are optimizer"
    ):
        make_trainer(tmp_path / "run", max_epochs=3, create_new_dir=None, resume="auto").train(5, 5)
