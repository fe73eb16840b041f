"""Is a run that was stopped inside an epoch resumed bitwise on this device, with deterministic algorithms? For make gpu.

In a process of its own, because CUBLAS_WORKSPACE_CONFIG has to be set before CUDA begins:

    CUBLAS_WORKSPACE_CONFIG=:4096:8 python benchmarks/_resumed.py cuda:0 fp32 bf16 compiled      # prints JSON
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from torch_frame import HookBase, Trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16", "gradient_accumulation_steps": 2, "use_ema": True},
    "compiled": {"compile": True, "precision": "bf16", "use_ema": True},
}


class Noisy(Dataset[Any]):
    """Vectors with noise that is drawn anew each time: (8,), and a class of 4."""

    def __len__(self) -> int:
        return 192

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.linspace(-1, 1, 8) * (index % 7) + 0.1 * torch.randn(8), index % 4


class Stopped(Exception):
    """The run ends here, as by a crash."""


class StopsInside(HookBase):
    """Saves the state inside the second epoch; some steps later the run ends."""

    def after_iter(self) -> None:
        if self.trainer.cur_iter == 16:
            self.trainer.save_at_safe_point("inside.pth", save_single_model=False)
        if self.trainer.cur_iter == 19:
            raise Stopped


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    vectors, labels = batch
    return nn.functional.cross_entropy(model(vectors), labels)


def run(device: torch.device, folder: Path, hooks: list[HookBase], **settings: Any) -> Trainer:
    torch.manual_seed(0)
    layers = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 4)
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    data = DataLoader(Noisy(), batch_size=16, shuffle=True)
    trainer = Trainer(
        model, optimizer, schedule, data, 3, folder, hooks=hooks, step_fn=cross_entropy, seed=3, **settings
    )
    try:
        trainer.train(5, 5)
    except Stopped:
        pass
    return trainer


def differing(device: torch.device, settings: dict[str, Any], folder: Path) -> list[str]:
    """Names of the weights, and of EMA's, that are not the same in every bit."""
    whole = run(device, folder / "whole", [], **settings)
    run(device, folder / "stopped", [StopsInside()], **settings)
    torch.manual_seed(99)
    resumed = run(device, folder / "stopped", [], resume=folder / "stopped" / "checkpoints" / "inside.pth", **settings)
    if resumed.start_epoch != 1:
        return ["everything: it began anew"]
    pairs = [(whole.model, resumed.model), (whole.model_evaluate, resumed.model_evaluate)]
    return [
        name
        for ours, theirs in pairs
        for name, tensor in ours.state_dict().items()
        if not torch.equal(tensor, theirs.state_dict()[name])
    ]


def main(device_name: str, *names: str) -> None:
    warnings.simplefilter("ignore")  # torch.compile's own
    torch.use_deterministic_algorithms(True)
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = differing(torch.device(device_name), SETTINGS[name], Path(folder))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
