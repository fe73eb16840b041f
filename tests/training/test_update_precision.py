"""fp16 and bf16 have the bits of torch's own recipes; an overflow in fp16 changes nothing but the scale."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR

from tests.small_hooks import On
from tests.small_runs import Net, copied, differences, make_batches, make_trainer, raised_by, weights_of
from tests.training.small_updates import OPTIMIZERS, SGD_MOMENTUM, Batch
from torch_frame import CheckpointerHook, NonFiniteError, Trainer


class LoudNet(Net):
    """So large a loss that the first fp16 scales overflow."""

    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch) * 300


def fp16_by_hand(
    model: nn.Module, optimizer: Any, batches: list[Batch], clip: float, steps: int, scheduler: Any = None
) -> list[float]:
    """The recipe of torch's AMP examples; returns the scale after each update."""
    scaler = torch.amp.GradScaler("cpu")
    scales = []
    for i, batch in enumerate(batches):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(batch) / steps
        scaler.scale(loss).backward()
        if (i + 1) % steps == 0:
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("model_type", [Net, LoudNet])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fp16_has_the_bits_and_scales_of_a_loop_with_its_own_scaler(
    optimizer: str, clip: float, steps: int, model_type: Any, tmp_path: Path
) -> None:
    batches = make_batches(8)
    model, expected = model_type(), model_type()
    by_hand = fp16_by_hand(expected, OPTIMIZERS[optimizer](expected.parameters()), batches * 2, clip, steps)
    scales: list[float] = []

    def note_scale(trainer: Any) -> None:
        if not trainer.updater.window_open:
            scales.append(trainer.precision.scaler.get_scale())

    trainer = make_trainer(
        tmp_path,
        model,
        OPTIMIZERS[optimizer](model.parameters()),
        data=batches,
        precision="fp16",
        clip_grad_norm=clip,
        gradient_accumulation_steps=steps,
        hooks=[On(after_iter=note_scale)],
    )
    trainer.train()
    assert scales == by_hand
    assert differences(weights_of(expected), weights_of(model)) == []
    overflows = sum(after < before for before, after in itertools.pairwise([65536.0, *by_hand]))
    assert trainer.updater.num_skipped == overflows
    assert overflows > 0 or model_type is Net


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_bf16_has_the_bits_of_an_autocast_loop(clip: float, steps: int, tmp_path: Path) -> None:
    batches = make_batches(8)
    model, expected, in_fp32 = Net(norm=True), Net(norm=True), Net(norm=True)
    optimizer = SGD_MOMENTUM(expected.parameters())
    for i, batch in enumerate(batches * 2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = expected(batch) / steps
        loss.backward()
        if (i + 1) % steps == 0:
            if clip:
                nn.utils.clip_grad_norm_(expected.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    settings = {"data": batches, "clip_grad_norm": clip, "gradient_accumulation_steps": steps}
    make_trainer(tmp_path, model, SGD_MOMENTUM(model.parameters()), precision="bf16", **settings).train()
    make_trainer(tmp_path, in_fp32, SGD_MOMENTUM(in_fp32.parameters()), **settings).train()
    assert differences(weights_of(expected), weights_of(model)) == []
    assert differences(weights_of(in_fp32), weights_of(model))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_recorded_norm_is_that_of_the_true_gradient_before_clipping(precision: Any, tmp_path: Path) -> None:
    batch = make_batches(1)[0]
    model, expected = Net(), Net()
    expected(batch).backward()
    norm = nn.utils.get_total_norm([p.grad for p in expected.parameters()])
    trainer = make_trainer(tmp_path, model, data=[batch], max_epochs=1, clip_grad_norm=1e-3, precision=precision)
    trainer.train()
    assert trainer.metric_storage["grad_norm"].latest == pytest.approx(
        norm.item(), rel=1e-6 if precision == "fp32" else 0.05
    )


class NormLoudNet(LoudNet):
    def __init__(self) -> None:
        super().__init__(norm=True)


@pytest.mark.parametrize("steps", [1, 2])
def test_an_overflow_in_fp16_leaves_weights_buffers_and_state(steps: int, tmp_path: Path) -> None:
    model = NormLoudNet()
    optimizer = AdamW(model.parameters(), lr=0.01)
    seen: list[Any] = []

    def look(trainer: Trainer) -> None:
        if not trainer.updater.window_open:
            seen.append((trainer.updater.num_skipped, weights_of(model), copied(optimizer.state_dict()["state"])))

    trainer = make_trainer(
        tmp_path,
        model,
        optimizer,
        data=make_batches(16),
        precision="fp16",
        gradient_accumulation_steps=steps,
        hooks=[On(before_train=look, after_iter=look)],
    )
    trainer.train()
    assert 0 < trainer.updater.num_skipped < 32 // steps
    for (num_before, *before), (num_after, *after) in itertools.pairwise(seen):
        assert (differences(before, after) == []) == (num_after > num_before)


@pytest.mark.parametrize("scale_loss", [float("inf"), float("nan")])
def test_fp16_without_a_finite_gradient_raises_in_the_end(scale_loss: float, tmp_path: Path) -> None:
    model = Net(norm=True)
    before = weights_of(model)
    trainer = make_trainer(
        tmp_path,
        model,
        data=make_batches(200, 2),
        precision="fp16",
        step_fn=lambda model, batch: {"mse": model(batch) * scale_loss},
    )
    error = raised_by(trainer.train, NonFiniteError)
    for text in ("in a row", "epoch 1", f"iteration {trainer.cur_iter}", "mse="):
        assert text in str(error)
    assert 10 <= trainer.updater.num_skipped <= 100
    assert differences(before, weights_of(model)) == []


def test_fp16_that_may_skip_goes_on(tmp_path: Path) -> None:
    model = Net(norm=True)
    before = weights_of(model)
    trainer = make_trainer(
        tmp_path,
        model,
        data=make_batches(200, 2),
        max_epochs=1,
        precision="fp16",
        on_nonfinite="skip",
        step_fn=lambda model, batch: model(batch) * float("nan"),
    )
    trainer.train()
    assert trainer.updater.num_skipped == 200
    assert differences(before, weights_of(model)) == []


def test_a_resumed_fp16_run_is_bitwise_the_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """Its scale has come down by then: the first update after the resume is not to be taken for an overflow."""

    def trainer(name: str, epochs: int) -> Trainer:
        model = NormLoudNet()
        optimizer = SGD(model.parameters(), lr=1e-4)
        return make_trainer(
            tmp_path / name,
            model,
            optimizer,
            data=make_batches(12),
            max_epochs=epochs,
            precision="fp16",
            hooks=[CheckpointerHook()],
            create_new_dir=None,
        )

    whole = trainer("whole", 2)
    whole.train()
    trainer("parts", 1).train()
    resumed = trainer("parts", 2)
    resumed.load_checkpoint("latest.pth")
    resumed.train()
    assert whole.precision.scaler.get_scale() < 65536
    assert differences(weights_of(whole.model), weights_of(resumed.model)) == []


def test_a_skipped_first_step_needs_no_warning_of_the_schedulers(tmp_path: Path) -> None:
    model = LoudNet()
    optimizer = SGD(model.parameters(), lr=0.01)
    scheduler = ExponentialLR(optimizer, 0.9)
    make_trainer(
        tmp_path, model, optimizer, scheduler, make_batches(8), 1, precision="fp16", lr_scheduler_interval="iter"
    ).train()
