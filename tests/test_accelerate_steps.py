"""AccelerateTrainer: steps of the script's own in mixed precision, and what stands above their errors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.processes import on_processes, one_thread
from tests.small_hooks import On
from tests.small_runs import Net, Unsized, UserError, fail, library_frames, raised_by
from tests.test_accelerate_trainer import _new_state, as_launched, make, make_loader
from torch_frame import AccelerateTrainer

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
