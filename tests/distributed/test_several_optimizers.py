"""Several optimizers and steps of one's own on two processes: as one process does on the whole batches, resumed bitwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.processes import on_processes, one_thread
from tests.small_hooks import On, at_iter
from tests.small_runs import UserError, differences, fail, raised_by, weights_of
from torch_frame import CheckpointerHook, SettingError, Trainer
from torch_frame.distributed.ddp import DDP
from torch_frame.run.table import table

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated, the last window ragged": {"gradient_accumulation_steps": 3},
    "all": {
        "gradient_accumulation_steps": 2,
        "clip_grad_norm": 0.1,
        "use_ema": True,
        "ema_decay": 0.9,
        "warmup_method": "linear",
        "warmup_iters": 3,
        "lr_scheduler_interval": "iter",
    },
    "skipping": {"on_nonfinite": "skip"},
}


class Pair(nn.Module):
    """Two networks, the second with a batch norm if asked for."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.g = nn.Sequential(nn.Linear(3, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh(), nn.Linear(6, 3))
            self.d = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, batch: Any) -> Tensor:
        (x,) = batch
        return (self.d(self.g(x)) - 1).square().mean()


class Adversarial(Trainer):
    """The generator steps in every other batch."""

    def train_one_iter(self, batch: Any) -> Any:
        model: Any = self.model
        (x,) = batch
        with self.autocast():
            d_loss = model.d(model.g(x).detach()).square().mean() + (model.d(x) - 1).square().mean()
        self.update(d_loss, "d")
        if self.cur_iter % 2 == 0:
            with self.autocast():
                g_loss = model(batch)
            self.update(g_loss, "g")
        return {"total_loss": d_loss}


class Own(Trainer):
    def train_one_iter(self, batch: Any) -> Any:
        with self.autocast():
            loss = self.model(batch)
        self.update(loss)
        return {"total_loss": loss}


def build(
    kind: type[Trainer],
    folder: Path,
    world_size: int,
    form: str,
    *,
    epochs: int = 2,
    norm: bool = False,
    **settings: Any,
) -> Trainer:
    model = Pair(norm).double()
    optimizer: Any
    scheduler: Any
    if form == "dict":
        optimizer = {"d": Adam(model.d.parameters(), lr=0.02), "g": Adam(model.g.parameters(), lr=0.01)}
        scheduler = {"d": StepLR(optimizer["d"], 3, 0.5), "g": None}
    elif form == "list":
        matrices = [p for p in model.parameters() if p.ndim == 2]
        optimizer = [Muon(matrices, lr=0.02), AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.01)]
        scheduler = [StepLR(optimizer[0], 3, 0.5), None]
    else:
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = StepLR(optimizer, 3, 0.5)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(40, 3, generator=generator, dtype=torch.float64))
    loader = DataLoader(data, 8 // world_size, shuffle=True)
    given = {"hooks": [], "seed": 5, **settings}
    return kind(model, optimizer, scheduler, loader, epochs, folder, **given)


def trained(*args: Any, **settings: Any) -> dict[str, Tensor]:
    trainer = build(*args, **settings)
    trainer.train(5, 5)
    average = {f"ema.{name}": value for name, value in weights_of(trainer.model_evaluate).items()}
    return {**weights_of(trainer.model_or_module), **average}


def train_all(folder: Path, world_size: int) -> dict[str, dict[str, Tensor]]:
    results = {}
    for name, settings in SETTINGS.items():
        results[f"dict, {name}"] = trained(Adversarial, folder / f"dict {name}", world_size, "dict", **settings)
    for name in ("plain", "all"):
        results[f"list, {name}"] = trained(Trainer, folder / f"list {name}", world_size, "list", **SETTINGS[name])
    return results


def resumed(folder: Path, form: str, precision: Any) -> list[dict[str, Tensor]]:
    """The state of an uninterrupted run and of one that ended by an error inside its second epoch."""
    kind = Adversarial if form == "dict" else Own if form == "own" else Trainer

    def run(name: str, **more: Any) -> dict[str, Any]:
        hooks = [CheckpointerHook(every_n_iters=2), *more.pop("hooks", [])]
        settings = {**SETTINGS["all"], "precision": precision, "hooks": hooks, "create_new_dir": None, **more}
        trainer = build(kind, folder / f"{form} {name}", 2, form, epochs=3, norm=True, **settings)
        trainer.train(5, 5)
        parts = table(trainer._run)
        return {
            name: parts[name].state_dict() for name in ("model", "ema", "optimizers", "lr_schedulers", "grad_scaler")
        }

    whole = run("whole")
    raised_by(lambda: run("parts", hooks=[On(before_iter=at_iter(8, fail))]), UserError)
    return [whole, run("parts", resume="auto")]


def work(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"weights": train_all(folder, 2)}
    found["resumed"] = [
        differences(*resumed(folder / str(precision), form, precision))
        for form, precision in (("dict", "fp16"), ("list", "fp32"), ("own", "bf16"))
    ]
    settings = {**SETTINGS["all"], "precision": "bf16"}
    kinds = (Trainer, Own)
    found["own"] = [trained(kind, folder / f"own {kind.__name__}", 2, "one", **settings) for kind in kinds]
    torch.manual_seed(torch.distributed.get_rank())
    outside = nn.Linear(3, 1).double()  # other weights on each rank, and not the model's
    model = Pair().double()
    given = {"d": SGD(outside.parameters(), lr=0.1), "g": SGD(model.parameters(), lr=0.1)}
    Trainer(model, given, None, [torch.zeros(1)], 0, folder / "outside", hooks=[], strategy=DDP(own_shards=True))
    found["outside"] = weights_of(outside)
    with_norm = build(Adversarial, folder / "norm", 2, "dict", norm=True)
    with_norm.train(5, 5)
    found["norm"] = weights_of(with_norm.model)
    found["is_bare"] = type(with_norm.model) is Pair
    strategy = DDP(find_unused_parameters=True)
    try:
        build(Adversarial, folder / "settings", 2, "dict", strategy=strategy)
    except (SettingError, ValueError) as error:
        found["refused"] = str(error)
    return found


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_bitwise(tmp_path: Path) -> None:
    first, second = on_processes(work, tmp_path / "two", 2, tmp_path / "two")
    one = train_all(tmp_path / "one", 1)
    for name, weights in one.items():
        assert differences(first["weights"][name], second["weights"][name]) == [], name
        for key, value in weights.items():
            torch.testing.assert_close(first["weights"][name][key], value, rtol=1e-9, atol=1e-11)
    assert first["resumed"] == second["resumed"] == [[], [], []]
    assert differences(*first["own"]) == []  # with update() and without
    assert differences(first["norm"], second["norm"]) == []  # statistics of the normalisation too
    assert differences(first["outside"], second["outside"]) == []  # rank 0's
    assert first["is_bare"]
    assert "find_unused_parameters cannot be set with a dict of optimizers" in first["refused"]
