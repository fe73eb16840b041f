"""How the files in this folder were made: small runs of torch-frame 1.7.5, saved on their way and trained to their end.

    python -m venv .venv17 && .venv17/bin/pip install torch==2.13.0 torch-frame==1.7.5
    .venv17/bin/python tests/checkpoint/golden_17/make.py

For each run there are NAME.pth, the `latest.pth` that 1.7.5 had written when `saved_after` epochs were done, and NAME.json with
what 1.7.5 went on to do without a break: the learning rates of every step and the weights at the end. The tests build the same
runs with the present Trainer. 1.7.5 cannot train with ReduceLROnPlateau, nor with any scheduler that has no
`_get_closed_form_lr`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from torch_frame import Trainer
from torch_frame.hooks import CheckpointerHook, EvalHook, HookBase, LoggerHook

HERE = Path(__file__).parent
EPOCHS = 6
EPOCH_LEN = 3


class Net(nn.Module):
    """model((x, y)) -> loss; its weights at the start are a formula, not random numbers."""

    def __init__(self) -> None:
        super().__init__()
        # No bias before batch norm: its gradient would be rounding noise, which Adam makes as large as any other.
        self.layers = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.sin(torch.arange(float(parameter.numel())) + i).reshape(parameter.shape))

    def forward(self, batch: Any) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)


def samples() -> TensorDataset:
    x = torch.cos(torch.arange(24.0)).reshape(12, 2)
    return TensorDataset(x, x.sum(1, keepdim=True) ** 2)


def batches() -> DataLoader[Any]:
    """3 batches of 4 samples, in order."""
    return DataLoader(samples(), batch_size=4)


class SquaredErrors:
    """An `eval_func` that is an object: 1.7.5 pickles it into the checkpoint, the DataLoader and its data beside it."""

    def __call__(self, model: Any, batch: Any) -> dict[str, list[float]]:
        x, y = batch
        return {"error": (model.layers(x) - y).square().flatten().tolist()}


class Rates(HookBase):
    """Notes the learning rates that each step is made with."""

    def __init__(self) -> None:
        self.lrs: list[list[float]] = []

    def before_iter(self) -> None:
        self.lrs.append([float(group["lr"]) for group in self.trainer.optimizer.param_groups])


class SaveInside(HookBase):
    """Saves after the second batch of each epoch, as a user's hook may."""

    def after_iter(self) -> None:
        if self.trainer.inner_iter == 1:
            self.trainer.save_checkpoint("latest.pth", False)


class Keep(HookBase):
    """Copies the checkpoints of one epoch, which later ones would replace."""

    def __init__(self, epoch: int, to: dict[str, Path]) -> None:
        self.at = epoch
        self.to = to

    def after_epoch(self) -> None:
        if self.trainer.epoch == self.at:
            for name, path in self.to.items():
                shutil.copy(os.path.join(self.trainer.ckpt_dir, name), path)


@dataclass(frozen=True)
class Run:
    """A run's parts.

    Attributes:
        optimizer, scheduler: made of the model, of the optimizer.
        hooks: made anew for each trainer; what saves stands before what copies.
        settings: more arguments for Trainer.
        saved_after: epochs done when NAME.pth was written.
    """

    optimizer: Callable[[Net], Optimizer]
    scheduler: Callable[[Any], Any]
    hooks: Callable[[], list[HookBase]]
    settings: dict[str, Any]
    saved_after: int

    def trainer(self, work_dir: Path, hooks: list[HookBase]) -> Trainer:
        model = Net()
        optimizer = self.optimizer(model)
        return Trainer(
            model, optimizer, self.scheduler(optimizer), batches(), EPOCHS, str(work_dir), hooks=hooks, **self.settings
        )


def two_groups(model: Net) -> Optimizer:
    groups = [{"params": model.layers[0].parameters(), "lr": 0.01}, {"params": model.layers[1:].parameters()}]
    return AdamW(groups, lr=0.03)


RUNS = {
    "multistep": Run(  # saved inside the warm-up
        lambda model: SGD(model.parameters(), lr=0.2, momentum=0.9),
        lambda optimizer: MultiStepLR(optimizer, [1, 4], gamma=0.1),
        lambda: [CheckpointerHook(), LoggerHook(period=1)],
        {"warmup_method": "linear", "warmup_iters": 8, "warmup_factor": 0.01},
        saved_after=2,
    ),
    "cosine_ema": Run(
        two_groups,
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=EPOCHS),
        lambda: [EvalHook(batches(), SquaredErrors(), save_metric="error", max_first=False), LoggerHook()],
        {"warmup_method": "exp", "warmup_iters": 4, "use_ema": True, "ema_decay": 0.99, "clip_grad_norm": 1.0},
        saved_after=3,
    ),
    "step": Run(
        lambda model: SGD(model.parameters(), lr=0.1),
        lambda optimizer: StepLR(optimizer, 2, gamma=0.5),
        lambda: [CheckpointerHook(max_to_keep=2)],
        {},
        saved_after=3,
    ),
    "inside": Run(
        lambda model: SGD(model.parameters(), lr=0.1),
        lambda optimizer: StepLR(optimizer, 1, gamma=0.5),
        lambda: [SaveInside()],
        {},
        saved_after=3,
    ),
}


def nested(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in weights.items()}


def make(name: str) -> None:
    run, rates = RUNS[name], Rates()
    files = {"latest.pth": HERE / f"{name}.pth"}
    if run.settings.get("use_ema"):
        files["best.pth"] = HERE / f"{name}_best.pth"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # 1.7.5 saves the path of its work dir
        saving, *others = run.hooks()
        trainer = run.trainer(Path("run"), [rates, saving, Keep(run.saved_after - 1, files), *others])
        trainer.train()
        record = {"lrs": rates.lrs, "weights": nested(trainer.model.state_dict())}
        if trainer.model_ema is not None:
            record["ema"] = nested(dict(trainer.model_ema.model.named_parameters()))
        record["best"] = float(getattr(saving, "cur_best", 0.0))
    (HERE / f"{name}.json").write_text(json.dumps(record, allow_nan=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in RUNS:
        make(name)
    old = torch.load(HERE / "step.pth", weights_only=False)  # the format before torch 1.6
    torch.save(old, HERE / "step_legacy.pth", _use_new_zipfile_serialization=False)
