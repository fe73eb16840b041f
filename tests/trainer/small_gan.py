"""A small GAN: trained by a Trainer with a dict of optimizers, and by the loop that people write."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from torch_frame import Trainer

WARMUP = {"warmup_method": "linear", "warmup_iters": 5, "warmup_factor": 0.1}


class Gan(nn.Module):
    """Generator (with batch norm and dropout) and discriminator."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.g = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
            self.d = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss_of_d(self, real: Tensor) -> Tensor:
        fake = self.g(torch.randn(len(real), 2)).detach()
        return (self.d(real) - 1).square().mean() + self.d(fake).square().mean()

    def loss_of_g(self, real: Tensor) -> Tensor:
        return (self.d(self.g(torch.randn(len(real), 2))) - 1).square().mean()


def optimizers_of(model: Gan) -> tuple[dict[str, Optimizer], dict[str, Any]]:
    made: dict[str, Optimizer] = {
        "d": Adam(model.d.parameters(), lr=0.02, betas=(0.5, 0.99)),
        "g": Adam(model.g.parameters(), lr=0.01),
    }
    return made, {"d": StepLR(made["d"], 2, 0.5), "g": ExponentialLR(made["g"], 0.9)}


class GanTrainer(Trainer):
    """One loss for each optimizer; `g_every`: the generator's in each so many batches only."""

    g_every = 1

    def train_one_iter(self, batch: Any) -> Any:
        model: Any = self.model
        with self.autocast():
            d_loss = model.loss_of_d(batch)
        self.update(d_loss, "d")
        values = {"total_loss": d_loss}
        if self.inner_iter % self.g_every == 0:
            with self.autocast():
                g_loss = model.loss_of_g(batch)
            self.update(g_loss, "g")
            values["g_loss"] = g_loss
        return values


def batches(num: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, generator=generator) for _ in range(num)]


def make(work_dir: Path, max_epochs: int, kind: type[Trainer] = GanTrainer, **settings: Any) -> Trainer:
    model = Gan()
    optimizers, schedulers = optimizers_of(model)
    given = {"hooks": [], "lr_scheduler_interval": "iter", **settings}
    return kind(model, optimizers, schedulers, batches(), max_epochs, work_dir, **given)


def by_hand(
    data: Iterable[Tensor],
    epochs: int,
    *,
    accumulate: int = 1,
    clip: float = 0.0,
    warmup: bool = False,
    dtype: torch.dtype | None = None,
    ema_decay: float | None = None,
    g_every: int = 1,
) -> tuple[Gan, Gan]:
    """The model, and its average, of the loop that people write."""
    model = Gan()
    average = copy.deepcopy(model)
    optimizers, schedulers = optimizers_of(model)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    parameters = {"d": list(model.d.parameters()), "g": list(model.g.parameters())}
    base = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
    steps = dict.fromkeys(optimizers, 0)
    data = list(data)
    updates = 0

    def set_rates() -> None:
        for name, optimizer in optimizers.items():
            alpha = steps[name] / 5
            factor = 0.1 * (1 - alpha) + alpha if warmup and steps[name] < 5 else 1.0
            optimizer.param_groups[0]["lr"] = base[name] * factor if factor != 1.0 else base[name]

    set_rates()
    for _ in range(epochs):
        waiting = 0
        pending: set[str] = set()
        for index, batch in enumerate(data):
            if waiting == 0:
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
                window = min(accumulate, len(data) - index)
                calls = {"d": 0, "g": 0}
                buffers = [buffer.clone() for buffer in model.buffers()]
                stepped = False
            waiting += 1
            is_last = waiting == window
            names = ["d", "g"] if index % g_every == 0 else ["d"]
            for name in names:
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    loss = model.loss_of_d(batch) if name == "d" else model.loss_of_g(batch)
                scaler.scale(loss / accumulate if accumulate > 1 else loss).backward(inputs=parameters[name])
                calls[name] += 1
                pending.add(name)
                if is_last:
                    made = step_by_hand(
                        name, optimizers, schedulers, scaler, parameters, clip, accumulate / calls[name], base, steps
                    )
                    stepped |= made
                    buffers = buffers_after(model, buffers, made)
                    pending.discard(name)
                    set_rates()
            if is_last:
                for name in sorted(pending):
                    made = step_by_hand(
                        name, optimizers, schedulers, scaler, parameters, clip, accumulate / calls[name], base, steps
                    )
                    stepped |= made
                    buffers = buffers_after(model, buffers, made)
                    set_rates()
                pending.clear()
                if scaler.is_enabled():
                    scaler.update()
                if stepped and ema_decay is not None:
                    updates += 1
                    follow(average, model, ema_decay, updates)
                waiting = 0
    return model, average


def step_by_hand(
    name: str,
    optimizers: Any,
    schedulers: Any,
    scaler: Any,
    parameters: Any,
    clip: float,
    correction: float,
    base: dict[str, float],
    steps: dict[str, int],
) -> bool:
    optimizer, scheduler = optimizers[name], schedulers[name]
    scaler.unscale_(optimizer)
    if correction != 1.0:
        for parameter in parameters[name]:
            parameter.grad.mul_(correction)
    if clip:
        nn.utils.clip_grad_norm_(parameters[name], clip)
    if not all(bool(p.grad.isfinite().all()) for p in parameters[name]):
        scaler.step(optimizer)  # leaves it out
        return False
    scaler.step(optimizer)
    optimizer.param_groups[0]["lr"] = base[name]
    scheduler.step()
    base[name] = optimizer.param_groups[0]["lr"]
    steps[name] += 1
    return True


@torch.no_grad()
def buffers_after(model: nn.Module, before: list[Tensor], made: bool) -> list[Tensor]:
    """A forward pass whose update is skipped leaves nothing."""
    if not made:
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    return [buffer.clone() for buffer in model.buffers()]


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float, updates: int) -> None:
    d = decay * (1 - torch.exp(torch.tensor(-updates / 2000, dtype=torch.float64)).item())
    for own, weight in zip(average.parameters(), model.parameters(), strict=True):
        own.lerp_(weight, 1 - d)
    for own, buffer in zip(average.buffers(), model.buffers(), strict=True):
        own.copy_(buffer)
