"""How the files in this folder were made: one run, ended by a signal inside an epoch, and trained without a break.

    PYTHONPATH=. .venv/bin/python tests/checkpoint/golden_3/make.py      # at the commit that added these files

`inside.pth` is the `latest.pth` in format 3 that the signal has left, `finished.pth` what the uninterrupted run ended with, and
on what machine. The run has what format 2 could not say: a frozen base that is in no file, a loss's weights, groups by name.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import NAdam, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from tests.checkpoint.golden_2.make import HELD_OUT, Samples, environment, squared_errors
from torch_frame import CheckpointerHook, EvalHook, HookBase, Trainer

HERE = Path(__file__).parent
BATCH_SIZE, MAX_EPOCHS = 4, 5  # epochs of six batches
INTERRUPTED_AT = 14
BASE_SEED = 5


class Net(nn.Module):
    """(N, 3) -> (N, 1): a frozen base, whose batch norm counts on, and layers that are trained.

    Args:
        names: of the trained layers, in the order in which they are made.
    """

    def __init__(self, names: str = "ab") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(BASE_SEED)
            self.base = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)).requires_grad_(False)
        made = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}
        for name in names:
            setattr(self, name, made[name])
        self.head = nn.Sequential(nn.Dropout(0.25), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        predicted: Tensor = self.head(torch.tanh(self.b(torch.tanh(self.a(self.base(x))))))
        return predicted


class Balanced(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        x, y, _ = batch
        error = (model(x + 0.1 * torch.rand(())) - y).square().mean()
        return error * torch.exp(-self.scale) + self.scale


class Interrupt(HookBase):
    """Ends the run inside epoch 2."""

    def after_iter(self) -> None:
        if self.trainer.cur_iter == INTERRUPTED_AT:
            signal.raise_signal(signal.SIGTERM)


def make_optimizer(model: Net, loss: Balanced, names: str = "ab") -> Optimizer:
    """A group for each trained layer, in the order of `names`, and one for the head and the loss."""
    groups: list[dict[str, Any]] = [
        {"params": list(getattr(model, name).parameters()), "lr": {"a": 0.02, "b": 0.01}[name]} for name in names
    ]
    return NAdam([*groups, {"params": [*model.head.parameters(), *loss.parameters()]}], lr=0.05)


def make_run(
    work_dir: Path, seed: int, *hooks: HookBase, names: str = "ab", **settings: Any
) -> tuple[Trainer, Balanced]:
    """The run's trainer and loss.

    Args:
        seed: of the first weights, the base's apart, and all random numbers.
        names: the order of the trained layers and of their groups.
        settings: more arguments for Trainer.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model, loss = Net(names), Balanced()
    optimizer = make_optimizer(model, loss, names)
    evaluation = EvalHook(HELD_OUT, squared_errors, save_metric="error", max_first=False, progress_bar=False)
    trainer = Trainer(
        model,
        optimizer,
        StepLR(optimizer, 2, 0.5),
        DataLoader(Samples(), BATCH_SIZE, shuffle=True),
        MAX_EPOCHS,
        work_dir,
        warmup_method="linear",
        warmup_iters=20,
        hooks=[CheckpointerHook(), evaluation, *hooks],
        use_ema=True,
        ema_decay=0.95,
        create_new_dir=None,
        step_fn=loss,
        device="cpu",
        precision="fp32",
        save_frozen=False,
        **settings,
    )
    return trainer, loss


def trained(work_dir: Path, *hooks: HookBase) -> tuple[Trainer, Balanced]:
    trainer, loss = make_run(work_dir, 0, *hooks)
    assert trainer.model_ema is not None
    trainer.model_ema.updates = 2000  # else the average would hardly differ from the weights
    trainer.train()
    return trainer, loss


def finished(trainer: Trainer, loss: Balanced) -> dict[str, Any]:
    """What a run ended with, in plain types and in the order of names."""
    assert trainer.model_ema is not None
    names = {parameter: name for name, parameter in trainer.model.named_parameters()} | {loss.scale: "scale"}
    state = {names[parameter]: dict(kept) for parameter, kept in trainer.optimizer.state.items()}
    rates = {names[group["params"][0]]: group["lr"] for group in trainer.optimizer.param_groups}
    return {
        "environment": environment(),
        "model": dict(sorted(trainer.model.state_dict().items())),
        "ema": dict(sorted(trainer.model_ema.model.state_dict().items())),
        "loss": loss.state_dict(),
        "optimizer": {name: dict(sorted(kept.items())) for name, kept in sorted(state.items())},
        "rates": dict(sorted(rates.items())),
        "progress": [trainer.progress.epoch, trainer.progress.iter, trainer.progress.num_updates],
    }


def make(folder: Path) -> None:
    with contextlib.suppress(SystemExit):  # by the signal
        trained(folder / "inside", Interrupt())
    shutil.copyfile(folder / "inside" / "checkpoints" / "latest.pth", HERE / "inside.pth")
    torch.save(finished(*trained(folder / "uninterrupted")), HERE / "finished.pth")


if __name__ == "__main__":
    torch.set_num_threads(1)
    socket.gethostname = lambda: "host"
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary))
