"""AccelerateTrainer: what an override of `prepare_model` makes, loads and wraps is what is trained, saved and resumed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from tests.distributed.processes import on_processes, one_thread
from tests.small_runs import Net, differences, weights_of
from tests.test_accelerate_trainer import _new_state, as_launched, make, make_loader, reset
from torch_frame import AccelerateTrainer, CheckpointerHook

accelerate = pytest.importorskip("accelerate")

__all__ = ["_new_state", "one_thread"]


class LoadsPretrained(AccelerateTrainer):
    def prepare_model(self) -> None:
        self.model.load_state_dict(Net(dropout=True, seed=9).state_dict())
        super().prepare_model()


class MakesOther(AccelerateTrainer):
    def prepare_model(self) -> None:
        self.model = Net(dropout=True, seed=9)
        self.optimizer = AdamW(self.model.parameters(), lr=0.01)
        super().prepare_model()


@pytest.mark.parametrize("kind", [LoadsPretrained, MakesOther])
def test_a_state_that_was_loaded_before_is_not_lost(kind: type[AccelerateTrainer], tmp_path: Path) -> None:
    """`load_checkpoint(path)`, then `train()`: the pretrained weights, or another model, took the place of the state."""

    def trainer(folder: str, epochs: int) -> Any:
        reset()
        torch.manual_seed(3)
        return make(kind, tmp_path / folder, epochs, hooks=[CheckpointerHook()], schedule="constant", use_ema=True)

    whole = trainer("whole", 4)
    whole.train(5, 5)
    trainer("parts", 2).train(5, 5)
    rest = trainer("parts", 4)
    rest.load_checkpoint(tmp_path / "parts" / "checkpoints" / "latest.pth")
    rest.train(5, 5)
    assert rest.progress.num_updates == 20
    assert differences(weights_of(rest.model_or_module), weights_of(whole.model_or_module)) == []
    assert differences(weights_of(rest.model_evaluate), weights_of(whole.model_evaluate)) == []


class Headed(Net):
    def predict(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(super().predict(x)) if hasattr(self, "head") else super().predict(x)
        return out


class AddsHead(AccelerateTrainer):
    """As scripts add adapters: to the model that is there."""

    def prepare_model(self) -> None:
        self.model.head = nn.Linear(1, 1)
        self.optimizer = AdamW(self.model.parameters(), lr=0.01)
        super().prepare_model()


def test_what_is_added_to_the_model_is_averaged_and_saved(tmp_path: Path) -> None:
    settings = {"hooks": [CheckpointerHook()], "use_ema": True, "ema_decay": 0.5, "ema_ramp": 0, "schedule": "constant"}
    trainer = make(AddsHead, tmp_path, 1, model=Headed(), **settings)
    trainer.train(5, 5)
    best = torch.load(tmp_path / "checkpoints" / "best.pth", weights_only=True)
    assert "head.weight" in best
    assert differences(best, weights_of(trainer.model_ema.model)) == []
    assert not torch.equal(best["head.weight"], trainer.model_or_module.head.weight), "no average of it"


def test_a_schedule_by_name_drives_the_optimizer_that_was_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(MakesOther, tmp_path, schedule="linear")
    trainer.train(5, 5)
    assert trainer.lr == pytest.approx(0.0, abs=1e-12)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_another_model_is_compiled_as_well(tmp_path: Path) -> None:
    trainer = make(MakesOther, tmp_path, 0, schedule="constant", compile={"backend": "eager"})
    trainer.train(5, 5)
    assert trainer.model_or_module._compiled_call_impl is not None


class Casts(AccelerateTrainer):
    def prepare_model(self) -> None:
        self.weight_dtype = torch.bfloat16  # of a frozen part, which the script casts
        super().prepare_model()


def test_weight_dtype_may_be_set(tmp_path: Path) -> None:
    trainer = make(Casts, tmp_path, 1)
    assert trainer.weight_dtype == torch.float32
    trainer.train(5, 5)
    assert trainer.weight_dtype == torch.bfloat16


# ---------------------------------------------------------------- two processes


class Parts(nn.Module):
    """A frozen encoder and a trained part, as diffusers' scripts have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.unet = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 1)

    def forward(self, batch: Any) -> Any:
        x, y = batch
        return {"error": (self.unet(self.encoder(x)) - y).square().mean()}


class PreparesPart(AccelerateTrainer):
    def prepare_model(self) -> None:
        unet: Any = self.model.unet
        prepared, self.optimizer = self.accelerator.prepare(unet, self.optimizer)
        setattr(self.model, "unet", prepared)  # noqa: B010


class PreparesPartOwnStep(PreparesPart):
    def train_one_iter(self, batch: Any) -> dict[str, Tensor]:
        return dict(super().train_one_iter(batch))  # type: ignore[arg-type]


def half(optimizer: Any) -> LambdaLR:
    """A schedule of the 10 updates of the run, times 2 processes."""
    return LambdaLR(optimizer, lambda step: 1 - step / 20)


def prepared_half(optimizer: Any) -> Any:
    return accelerate.Accelerator().prepare(half(optimizer))


def prepare_parts(folder: Path) -> dict[str, Any]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torch_frame").addHandler(handler)

    def trained(name: str, kind: type[AccelerateTrainer], **settings: Any) -> AccelerateTrainer:
        as_launched()
        told.clear()
        torch.manual_seed(3)
        model = Parts()
        optimizer = SGD(model.unet.parameters(), lr=0.1)
        make_schedule = settings.pop("make_schedule", lambda optimizer: None)
        schedule = make_schedule(optimizer)
        trainer = kind(
            model, optimizer, schedule, make_loader(batch_size=4), 2, folder / name, hooks=[], seed=5, **settings
        )
        trainer.train(5, 5)
        return trainer

    found: dict[str, Any] = {}
    for name, kind in {"part": PreparesPart, "whole": AccelerateTrainer}.items():
        trainer = trained(name, kind, use_ema=True)
        found[name] = weights_of(trainer.model_or_module), weights_of(trainer.model_evaluate)
    own = trained("own step", PreparesPartOwnStep)
    found["own"] = [name for name in own.model_or_module.state_dict() if "module." in name]
    found["own, told"] = [line for line in told if "DistributedDataParallel: unet" in line]
    trained("prepared", AccelerateTrainer, make_schedule=prepared_half, lr_scheduler_interval="iter")
    found["prepared, told"] = [line for line in told if "2 times an update" in line]
    trained("bare", AccelerateTrainer, make_schedule=half, lr_scheduler_interval="iter")
    found["bare, told"] = [line for line in told if "times an update" in line]
    return found


@pytest.mark.usefixtures("one_thread")
def test_parts_that_are_prepared_by_themselves_on_two_processes(tmp_path: Path) -> None:
    """A part's names had `module.` in them, so that files of two processes fitted no other number of them."""
    first, second = on_processes(prepare_parts, tmp_path, 2, tmp_path / "runs")
    for found in first["part"], second["part"]:
        for ours, whole in zip(found, first["whole"], strict=True):
            assert ours.keys() == whole.keys()
            torch.testing.assert_close(ours, whole, rtol=0, atol=1e-6)
    assert differences(first["part"], second["part"]) == []
    assert len(first["own"]) == 2
    assert len(first["own, told"]) == 1
    assert len(first["prepared, told"]) == 1, "accelerate steps such a schedule once for each process"
    assert first["bare, told"] == []
