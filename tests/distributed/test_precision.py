"""Half precision on two processes: the bits of torch's own loop with DistributedDataParallel and its scaler, clipped unscaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from tests.distributed.processes import on_processes
from tests.small_runs import Net, differences, make_batches, make_trainer
from torch_frame.distributed.ddp import DDP

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CLIP = 0.5


def parts() -> list[Any]:
    return [[part[dist.get_rank() :: 2] for part in batch] for batch in make_batches(6, 8)]


def by_hand(dtype: torch.dtype) -> dict[str, Any]:
    model = Net()
    wrapped = DistributedDataParallel(model)
    optimizer = SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    norms: list[Tensor] = []
    for _ in range(2):
        for batch in parts():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = wrapped(batch)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
            scaler.step(optimizer)
            scaler.update()
    return {"weights": state(model), "norms": [float(norm) for norm in norms]}


def train(folder: Path, precision: str) -> dict[str, Any]:
    model = Net()
    settings: dict[str, Any] = {"precision": precision, "clip_grad_norm": CLIP, "strategy": DDP(own_shards=True)}
    trainer = make_trainer(folder, model, SGD(model.parameters(), 0.1), None, parts(), 2, **settings)
    trainer.train(5, 5)
    return {"weights": state(model), "norms": list(trainer.metric_storage["grad_norm"]._history)}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def both(folder: Path, precision: str) -> list[dict[str, Any]]:
    return [by_hand(DTYPES[precision]), train(folder / precision, precision)]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_bits_are_those_of_torchs_own_loop(precision: str, tmp_path: Path) -> None:
    for expected, found in on_processes(both, tmp_path, 2, tmp_path, precision):
        assert differences(expected["weights"], found["weights"]) == []
        norms = [norm for norm in expected["norms"] if norm == norm and norm != float("inf")]
        assert max(norms) > CLIP, "something was clipped"
        assert len(norms) == (12 if precision == "bf16" else 10), "fp16 skips two steps until its scale fits"
        assert found["norms"] == pytest.approx(norms, rel=1e-6)
