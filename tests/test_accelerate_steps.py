"""AccelerateTrainer: steps of the script's own in mixed precision, and what stands above their errors."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.processes import on_processes, one_thread
from tests.small_hooks import On
from tests.small_runs import Net, Unsized, UserError, differences, fail, library_frames, raised_by, weights_of
from tests.test_accelerate_trainer import _new_state, as_launched, make, make_loader, reset
from torch_frame import AccelerateTrainer, CheckpointerHook, HookBase, SettingError, Trainer

pytest.importorskip("accelerate")

__all__ = ["_new_state", "one_thread"]


# ---------------------------------------------------------------- precision


class OwnStep(AccelerateTrainer):
    dtypes: list[torch.dtype] = []  # noqa: RUF012

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        predicted = self.model.layers(x)  # type: ignore[operator]
        self.dtypes = [*self.dtypes, predicted.dtype]
        return (predicted.float() - y).square().mean()

    def loss(self, batch: Any) -> Any:
        return self.error(*batch)

    def train_one_iter(self, batch: Any) -> dict[str, Any]:
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        return {"total_loss": loss.detach()}


class CallsModel(OwnStep):
    def loss(self, batch: Any) -> Any:
        return self.model(batch)


class CallsPreparedPart(OwnStep):
    """As diffusers' scripts do: each part is prepared by itself."""

    def prepare_model(self) -> None:
        layers, self.optimizer = self.accelerator.prepare(self.model.layers, self.optimizer)
        setattr(self.model, "layers", layers)  # noqa: B010


class UsesAccelerates(OwnStep):
    def loss(self, batch: Any) -> Any:
        with self.accelerator.autocast():
            return self.error(*batch)


@pytest.mark.parametrize(
    ("kind", "is_told"), [(OwnStep, True), (CallsModel, False), (CallsPreparedPart, False), (UsesAccelerates, False)]
)
def test_mixed_precision_without_effect_in_an_own_step_is_told(
    kind: type[OwnStep], is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """accelerate casts in the forward pass of what was prepared: a step that calls parts of the model is computed in fp32."""
    trainer = make(kind, tmp_path, 1, mixed_precision="bf16")
    trainer.train()
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["precision='bf16'" in line for line in told] == [True] * is_told
    if kind in (OwnStep, UsesAccelerates):
        assert set(trainer.dtypes) == {torch.float32 if is_told else torch.bfloat16}
    assert not [part for part in trainer.model_or_module.modules() if part._forward_pre_hooks]


# ---------------------------------------------------------------- schedules and windows


class StepsSchedule(OwnStep):
    """1.7's step: it steps the schedule itself."""

    def train_one_iter(self, batch: Any) -> dict[str, Any]:
        with self.accelerator.accumulate(self.model):
            values = super().train_one_iter(batch)
            self.lr_scheduler.step()
        return values


def test_a_schedule_by_name_is_stepped_by_an_own_step(tmp_path: Path) -> None:
    """It stood still, with a warm-up at a rate of 0."""
    trainer = make(StepsSchedule, tmp_path, schedule="linear", warmup_iters=3)
    trainer.train(5, 5)
    assert trainer.lr == pytest.approx(0.0, abs=1e-12)
    assert trainer.lr_scheduler.scheduler.last_epoch == 15


def own_step(trainer: Any, batch: Any) -> dict[str, Any]:
    with trainer.autocast():
        loss = trainer.model(batch)
    trainer.optimizer.zero_grad()
    trainer.accelerator.backward(loss)
    trainer.optimizer.step()
    return {"total_loss": loss.detach()}


class HasOwnStep(AccelerateTrainer):
    train_one_iter = own_step  # type: ignore[assignment]


def test_a_step_that_is_set_on_the_object_updates_in_each_batch(tmp_path: Path) -> None:
    """accelerate's optimizer left out the updates inside windows, whose gradients were cleared."""
    weights = []
    for kind in (HasOwnStep, AccelerateTrainer):
        reset()
        torch.manual_seed(3)
        trainer = make(kind, tmp_path / kind.__name__, gradient_accumulation_steps=2, schedule="constant")
        if kind is AccelerateTrainer:
            trainer.train_one_iter = types.MethodType(own_step, trainer)
        trainer.train(5, 5)
        weights.append(weights_of(trainer.model_or_module))
    assert differences(*weights) == []


# ---------------------------------------------------------------- tracebacks


def of_hook(folder: Path) -> Any:
    settings: dict[str, Any] = {
        "loader": Unsized(),
        "hooks": [On(before_update=fail)],
        "gradient_accumulation_steps": 9,
    }
    return make(AccelerateTrainer, folder, **settings, own_shards=True, model=Net())


def of_backward(folder: Path) -> Any:
    model = Net()
    model.layers[0].weight.register_hook(fail)
    return make(AccelerateTrainer, folder, model=model, loader=make_loader(batch_size=4))


NUM_FRAMES: dict[Callable[[Path], Any], int] = {of_hook: 3, of_backward: 6}


@pytest.mark.parametrize("make_one", NUM_FRAMES)
def test_few_library_frames_stand_above_an_error(make_one: Callable[[Path], Any], tmp_path: Path) -> None:
    frames = library_frames(raised_by(make_one(tmp_path).train, UserError))
    assert len(frames) <= NUM_FRAMES[make_one], frames


def frames_above(folder: Path) -> list[list[str]]:
    found = []
    for make_one in NUM_FRAMES:
        as_launched()
        try:
            make_one(folder / make_one.__name__).train()
        except UserError as error:
            found.append(library_frames(error))
        except RuntimeError:  # the other rank has failed
            found.append([])
    return found


@pytest.mark.usefixtures("one_thread")
def test_few_library_frames_stand_above_an_error_of_the_main_process(tmp_path: Path) -> None:
    above_hook, above_backward = on_processes(frames_above, tmp_path, 2, tmp_path / "runs")[0]
    assert 0 < len(above_hook) <= 3, above_hook
    assert 0 < len(above_backward) <= 6, above_backward


class Sparse(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.eye(3).to_sparse())


def test_an_average_of_sparse_buffers_begins(tmp_path: Path) -> None:
    trainer = make(AccelerateTrainer, tmp_path, 1, model=Sparse(), use_ema=True)
    trainer.train(5, 5)
    mask: Any = trainer.model_ema.model.mask
    assert torch.equal(mask.to_dense(), torch.eye(3))
    assert isinstance(trainer.model_evaluate, nn.Module)


def test_a_best_value_whose_file_is_gone_begins_anew(tmp_path: Path) -> None:
    """The trainer's `save_checkpoint` was taken for one of the script's, whose files have other names."""

    def best(epochs: int, score: float) -> float:
        scores = On(after_epoch=lambda trainer: trainer.log(trainer.epoch, score=score, smooth=False))
        hook = CheckpointerHook(save_metric="score")
        make(AccelerateTrainer, tmp_path, epochs, hooks=[scores, hook], schedule="constant", resume="auto").train(5, 5)
        return hook.cur_best

    assert best(1, 0.9) == 0.9
    (tmp_path / "checkpoints" / "best.pth").unlink()
    assert best(2, 0.5) == 0.5


# ---------------------------------------------------------------- two processes


class OwnGradients:
    """A step with a backward pass of its own, over the model or over a part of it."""

    calls_model = False
    goes_through_update = False

    def train_one_iter(self: Any, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        loss = self.model(batch) if self.calls_model else (self.model.layers(x) - y).square().mean()
        if self.goes_through_update:
            self.update(loss)
        else:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return {"total_loss": loss.detach()}


class PlainParts(OwnGradients, Trainer):
    pass


class Parts(OwnGradients, AccelerateTrainer):
    pass


class Whole(Parts):
    calls_model = True


class Updates(Parts):
    goes_through_update = True


def steps_of_their_own(folder: Path) -> dict[str, Any]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torch_frame").addHandler(handler)
    found = {}
    for kind in (PlainParts, Parts, Whole, Updates):
        as_launched()
        told.clear()
        trainer = make(kind, folder / kind.__name__, 2, model=Net(), loader=make_loader(batch_size=4))
        trainer.train(3, 5)
        lines = [line for line in told if "have other weights" in line]
        found[kind.__name__] = weights_of(trainer.model_or_module), len(lines)
    return found


@pytest.mark.usefixtures("one_thread")
def test_an_own_step_whose_gradients_are_not_averaged_is_told(tmp_path: Path) -> None:
    first, second = on_processes(steps_of_their_own, tmp_path, 2, tmp_path / "runs")
    for name, is_apart in {"PlainParts": True, "Parts": True, "Whole": False, "Updates": False}.items():
        assert bool(differences(first[name][0], second[name][0])) is is_apart, name
        assert first[name][1] == int(is_apart), name


class SetsInEpoch(HookBase):
    """Sets attributes of the trainer when the second epoch begins, or behind the first."""

    def __init__(self, stage: str, **values: Any) -> None:
        self.stage, self.values = stage, values

    def before_epoch(self) -> None:
        self._set("before_epoch", 1)

    def after_epoch(self) -> None:
        self._set("after_epoch", 0)

    def _set(self, stage: str, epoch: int) -> None:
        for name, value in self.values.items() if (stage, epoch) == (self.stage, self.trainer.epoch) else ():
            setattr(self.trainer, name, value)


def set_on_main(folder: Path) -> dict[str, Any]:
    settings: list[dict[str, Any]] = [
        {"stage": "after_epoch", "max_epochs": 3},
        {"stage": "after_epoch", "max_epochs": 1},
        {"stage": "before_epoch", "gradient_accumulation_steps": 2},
        {"stage": "before_epoch", "data_loader": make_loader(80, batch_size=4)},
    ]
    found = {}
    for index, values in enumerate(settings):
        as_launched()
        torch.manual_seed(3)
        hooks = [SetsInEpoch(**values)]
        trainer = make(
            AccelerateTrainer, folder / str(index), 2, model=Net(), loader=make_loader(batch_size=4), hooks=hooks
        )
        name = f"{list(values)[-1]}={list(values.values())[-1]}".partition("<")[0]
        try:
            trainer.train(5, 5)
            found[name] = trainer.progress.num_updates
        except SettingError as error:
            found[name] = str(error)
    return found


@pytest.mark.usefixtures("one_thread")
def test_what_hooks_of_the_main_process_set_counts_on_all_or_is_an_error(tmp_path: Path) -> None:
    """The other process waited for ever, in another window or behind its last epoch."""
    first, second = on_processes(set_on_main, tmp_path, 2, tmp_path / "runs")
    assert first == second
    assert (first["max_epochs=3"], first["max_epochs=1"], first["gradient_accumulation_steps=2"]) == (15, 5, 5 + 3)
    assert "only rank 0 has set another data_loader" in first["data_loader="]
