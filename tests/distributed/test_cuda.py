"""DDP on CUDA: one process on NCCL, and two on gloo that share a GPU. Several GPUs are needed for more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.processes import free_port, on_processes
from tests.small_runs import Net, make_batches, make_trainer, weights_of
from torch_frame import CheckpointerHook, EvalHook
from torch_frame.distributed.ddp import DDP
from torch_frame.distributed.strategy import SingleProcess

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped, accumulated": {"clip_grad_norm": 0.05, "gradient_accumulation_steps": 2},
    "weighted": {"loss_weight": lambda batch: batch[2].sum()},
    "ema, skipping": {"use_ema": True, "on_nonfinite": "skip"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
}


def scores(model: Any, batch: Any) -> dict[str, Tensor]:
    return {"error": (model.predict(batch[0]) - batch[1]).abs().flatten()}


def loss(model: Any, batch: Any) -> Tensor:
    result: Tensor = model(batch[:2])
    return result


def train(folder: Path, name: str, world_size: int, strategy: Any = None, **more: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(44, 3, generator=generator),
        torch.randn(44, 1, generator=generator),
        torch.ones(44, 1),
    )
    model = Net().cuda()
    hooks = [
        EvalHook(make_batches(5), scores, save_metric="error", max_first=False, progress_bar=False),
        CheckpointerHook(),
    ]
    trainer = make_trainer(
        folder / name,
        model,
        AdamW(model.parameters(), lr=0.01),
        None,
        DataLoader(data, 8 // world_size, shuffle=True),
        more.pop("epochs", 3),
        seed=5,
        hooks=hooks,
        step_fn=loss,
        strategy=strategy,
        create_new_dir=None,
        **{**SETTINGS[name], **more},
    )
    trainer.train(5, 5)
    return {name: value.cpu() for name, value in weights_of(model).items()}


def train_all(folder: Path, world_size: int) -> dict[str, dict[str, Tensor]]:
    return {name: train(folder, name, world_size) for name in SETTINGS}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in b)


def test_two_processes_that_share_a_gpu_equal_one(tmp_path: Path) -> None:
    expected = train_all(tmp_path / "one", 1)
    for result in on_processes(train_all, tmp_path / "ranks", 2, tmp_path / "ranks", 2):
        for name in expected:
            assert distance(result[name], expected[name]) < (2e-2 if "16" in name else 2e-6), name


def on_nccl(folder: Path) -> dict[str, Any]:
    dist.destroy_process_group()
    dist.init_process_group(init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    assert "nccl" in str(dist.get_backend_config())
    result: dict[str, Any] = {name: train(folder, name, 1, strategy=DDP()) for name in SETTINGS}
    result["compressed"] = train(folder / "b", "plain", 1, strategy=DDP(comm_hook="bf16", gradient_as_bucket_view=True))
    train(folder / "c", "plain", 1, strategy=DDP(), epochs=1)
    result["resumed"] = train(folder / "c", "plain", 1, strategy=DDP(), resume="auto")
    result["sum"] = float(DDP().sum(torch.tensor(2.5, device="cuda")))
    norm = Net(norm=True).cuda()
    synced = make_trainer(folder / "d", norm, strategy=DDP(sync_batchnorm=True))
    synced.train(5, 5)
    result["synced"] = [type(module).__name__ for module in synced.model_or_module.modules()]
    return result


def test_one_process_on_nccl_equals_one_without(tmp_path: Path) -> None:
    (result,) = on_processes(on_nccl, tmp_path / "nccl", 1, tmp_path / "nccl")
    for name in SETTINGS:
        expected = train(tmp_path / "one", name, 1, strategy=SingleProcess())
        assert distance(result[name], expected) < (2e-2 if "16" in name else 2e-6), name
    assert distance(result["resumed"], result["plain"]) < 1e-6
    assert distance(result["compressed"], result["plain"]) < 2e-2
    assert result["sum"] == 2.5
    assert "SyncBatchNorm" in result["synced"]


def share_on_nccl(port: int) -> None:
    rank = dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with pytest.raises(ValueError, match=r"on cuda:0 on the ranks \[0, 1\]"):
        make_trainer(Path("unused"), Net().cuda())


def test_two_ranks_on_one_gpu_are_told_before_nccl_fails(tmp_path: Path) -> None:
    assert on_processes(share_on_nccl, tmp_path, 2, free_port()) == [None, None]
