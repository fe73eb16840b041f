"""On CUDA: mixed precision equals torch's own loop, and a step waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from tests.small_runs import differences, weights_of
from torch_frame import HookBase, Trainer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)).cuda()


def make_data() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)) for _ in range(12)
    ]


def step(model: nn.Module, batch: Any) -> torch.Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_is_that_of_torchs_own_loop(precision: str, tmp_path: Path) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    expected = make_model()
    optimizer = AdamW(expected.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    for images, labels in make_data() * 2:
        with torch.autocast("cuda", dtype=dtype):
            loss = step(expected, (images.cuda(), labels.cuda()))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    model = make_model()
    settings: dict[str, Any] = {"precision": precision, "clip_grad_norm": 0.5, "step_fn": step, "hooks": []}
    Trainer(model, AdamW(model.parameters(), lr=0.01), None, make_data(), 2, tmp_path, **settings).train()
    assert not differences(weights_of(model), weights_of(expected))


class NoReads(HookBase):
    """From the second step on torch raises where the host waits for the device; an epoch's end may."""

    def after_iter(self) -> None:
        last = self.trainer.inner_iter == 11
        torch.cuda.set_sync_debug_mode("default" if last else "error")


@pytest.fixture
def _waiting_is_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_waiting_is_allowed_again")
@pytest.mark.parametrize(
    "settings",
    [{}, {"clip_grad_norm": 0.5}, {"use_ema": True}, {"precision": "bf16"}, {"gradient_accumulation_steps": 5}],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_the_host_waits_for_no_step(settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_model()
    data = [tuple(part.pin_memory() for part in batch) for batch in make_data()]
    optimizer = AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(model, optimizer, None, data, 2, tmp_path, step_fn=step, hooks=[NoReads()], **settings)
    trainer.train()
    assert trainer.progress.iter == 24
