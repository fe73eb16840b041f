"""Two and four processes on gloo train as one process does on the whole batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.processes import on_processes, one_thread
from tests.small_runs import Net, differences, make_batches, make_trainer, weights_of
from torch_frame import HookBase, NonFiniteError, SettingError
from torch_frame.distributed.ddp import DDP
from torch_frame.distributed.strategy import SingleProcess

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def num_samples(batch: Any) -> int:
    return len(batch[0])


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "accumulated, the last window ragged": {"gradient_accumulation_steps": 4},
    "weighted, ragged": {"loss_weight": num_samples, "size": 45},
    "weighted, ragged, accumulated": {"loss_weight": num_samples, "size": 45, "gradient_accumulation_steps": 2},
    "clipped": {"clip_grad_norm": 0.05, "gradient_accumulation_steps": 2},
    "ema and warm-up": {"use_ema": True, "ema_decay": 0.9, "warmup_method": "linear", "warmup_iters": 4},
    "skipping": {"on_nonfinite": "skip"},
}


def train(
    folder: Path, name: str, world_size: int, dtype: torch.dtype, wrapped: bool = False, **more: Any
) -> dict[str, Any]:
    """Weights, EMA's weights and the norms of the gradients after three epochs of batches of 8 in all."""
    settings = {**SETTINGS[name], **more}
    size = settings.pop("size", 40)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(size, 3, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(size, 1, generator=generator, dtype=torch.float64).to(dtype),
    )
    loader = DataLoader(data, 8 // world_size, shuffle=True)
    model = Net().to(dtype)
    given: nn.Module = DistributedDataParallel(model) if wrapped and world_size > 1 else model
    optimizer = AdamW(model.parameters(), lr=0.01)
    settings.setdefault("clip_grad_norm", 1e9)  # so that the norm is recorded
    trainer = make_trainer(
        folder / name, given, optimizer, StepLR(optimizer, 1, gamma=0.5), loader, 3, seed=5, **settings
    )
    trainer.train(5, 5)
    norms = torch.tensor(trainer.metric_storage["grad_norm"]._history, dtype=torch.float64)
    ema = {f"ema.{k}": v for k, v in weights_of(trainer.model_evaluate).items()}
    return {**weights_of(model), **ema, "norms": norms}


def train_all(folder: Path, world_size: int) -> dict[str, dict[str, Any]]:
    results = {}
    for dtype in (torch.float64, torch.float32):
        for name in SETTINGS:
            results[f"{name}, {dtype}"] = train(folder, name, world_size, dtype)
        results[f"wrapped by the script, {dtype}"] = train(folder, "plain", world_size, dtype, wrapped=True)
    return results


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1)) for name in b)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_end_with_the_weights_and_the_gradient_norms_of_one_process(world_size: int, tmp_path: Path) -> None:
    expected = train_all(tmp_path / "one", 1)
    results = on_processes(train_all, tmp_path / "ranks", world_size, tmp_path / "ranks", world_size)
    for name in expected:
        found = max(distance(result[name], expected[name]) for result in results)
        assert found < (1e-12 if "float64" in name else 1e-6), f"{name}: {found}"
        trained = [{k: v for k, v in result[name].items() if k != "norms"} for result in results]
        assert all(differences(weights, trained[0]) == [] for weights in trained), name


class Unsized:
    """A rank's part of some batches, without a length: nobody knows which batch is the last."""

    def __init__(self, batches: list[Any], rank: int, world_size: int) -> None:
        self.batches = [[part[rank::world_size] for part in batch] for batch in batches]

    def __iter__(self) -> Any:
        return iter(self.batches)


def train_unsized(folder: Path, world_size: int, rank: int | None = None) -> dict[str, Tensor]:
    model = Net().double()
    strategy = None if rank is None else DDP(own_shards=True)
    rank = 0 if strategy is None else strategy.rank
    batches = Unsized([(x.double(), y.double()) for x, y in make_batches(5)], rank, world_size)
    make_trainer(
        folder,
        model,
        AdamW(model.parameters(), lr=0.01),
        None,
        batches,
        3,
        strategy=strategy,
        gradient_accumulation_steps=4,
    ).train(5, 5)
    return weights_of(model)


def train_unfrozen(folder: Path, world_size: int) -> dict[str, Tensor]:
    """A layer is trained from the second epoch on, and was frozen when the model was wrapped."""
    model = Net().double()
    model.layers[0].requires_grad_(False)
    x, y = make_batches(1, 8)[0]
    loader = DataLoader(TensorDataset(x.double(), y.double()), 4 // world_size)
    make_trainer(folder, model, AdamW(model.parameters(), lr=0.01), None, loader, 3, hooks=[Unfreeze()]).train(5, 5)
    return weights_of(model)


class Unfreeze(HookBase):
    def before_epoch(self) -> None:
        self.trainer.model_or_module.layers[0].requires_grad_(self.trainer.epoch > 0)  # type: ignore[union-attr, operator]


class Rows(torch.nn.Module):
    """Two tables with sparse gradients; the second one is used by samples with a word of 6 or more only."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rare = (torch.nn.Embedding(8, 2, sparse=True).double() for _ in range(2))
        for table in (self.words, self.rare):
            torch.nn.init.ones_(table.weight)

    def loss(self, words: Tensor) -> Tensor:
        rare = self.rare(words[words >= 6]) if (words >= 6).any() else torch.zeros(1)
        total: Tensor = (self.words(words).square().sum() + rare.square().sum()) / len(words)
        return total


def train_sparse(folder: Path, world_size: int) -> dict[str, Tensor]:
    """The step calls a method, so DDP does not exchange; the last samples, all of them rank 1's, use the second table."""
    model = Rows()
    words = TensorDataset(torch.tensor([1, 2, 1, 6, 3, 1, 7, 6]))
    make_trainer(
        folder,
        model,
        torch.optim.SparseAdam(list(model.parameters()), lr=0.1),
        None,
        DataLoader(words, 4 // world_size),
        2,
        clip_grad_norm=1.0,
        step_fn=lambda model, batch: model.loss(batch[0]),
    ).train(5, 5)
    return weights_of(model)


def train_odd(folder: Path, world_size: int) -> dict[str, dict[str, Tensor]]:
    return {
        "a window whose end was not foreseen": train_unsized(
            folder / "unsized", world_size, 0 if world_size > 1 else None
        ),
        "a layer that is unfrozen": train_unfrozen(folder / "unfrozen", world_size),
        "sparse": train_sparse(folder / "sparse", world_size),
    }


def test_gradients_that_ddp_does_not_exchange_are_averaged_all_the_same(tmp_path: Path) -> None:
    expected = train_odd(tmp_path / "one", 1)
    for result in on_processes(train_odd, tmp_path / "ranks", 2, tmp_path / "ranks", 2):
        for name in expected:
            assert distance(result[name], expected[name]) < 1e-12, name


def test_ddp_without_a_group_is_told_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no process group.*torchrun --nproc-per-node.*init_process_group"):
        make_trainer(tmp_path, strategy="ddp")


# ---------------------------------------------------------------- promise 6: how a batch is cut changes nothing


def tokens(batch: Any) -> float:
    return float(batch[2].sum())


def token_loss(model: Any, batch: Any) -> Tensor:
    """The mean over a batch's tokens, of which its samples have different numbers."""
    x, y, weight = batch
    return ((model.predict(x) - y).square() * weight).sum() / weight.sum()


def train_cut(folder: Path, world_size: int, batch_size: int, accumulate: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    size = 31  # the last window is ragged, and split unevenly
    data = TensorDataset(
        torch.randn(size, 3, generator=generator),
        torch.randn(size, 1, generator=generator),
        torch.randint(1, 9, (size, 1), generator=generator).float(),
    )
    model = Net()
    loader = DataLoader(data, batch_size, shuffle=True)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings: dict[str, Any] = {"step_fn": token_loss, "loss_weight": tokens, "clip_grad_norm": 1.0, "seed": 2}
    make_trainer(folder, model, optimizer, None, loader, 3, gradient_accumulation_steps=accumulate, **settings).train(
        5, 5
    )
    return weights_of(model)


# ---------------------------------------------------------------- what one rank finds, all do; settings of DDP


class NaNAt:
    """A loss that is NaN on rank 1, once."""

    def __init__(self, rank: int, at: int) -> None:
        self.rank = rank
        self.at = at
        self.calls = 0

    def __call__(self, model: Any, batch: Any) -> Tensor:
        self.calls += 1
        loss: Tensor = model(batch)
        return loss * float("nan") if self.rank == 1 and self.calls == self.at else loss


def train_with_nan(folder: Path, rank: int, on_nonfinite: str) -> Any:
    model = Net(norm=True)
    data = TensorDataset(*(torch.cat(part) for part in zip(*make_batches(4, 8), strict=True)))
    step = NaNAt(rank, 3)
    trainer = make_trainer(
        folder,
        model,
        SGD(model.parameters(), 0.1),
        None,
        DataLoader(data, 4),
        1,
        on_nonfinite=on_nonfinite,
        step_fn=step,
    )
    try:
        trainer.train(5, 5)
    except NonFiniteError as error:
        return str(error)
    return {**weights_of(model), "updates": torch.tensor(trainer.progress.num_updates)}


def train_with(folder: Path, strategy: DDP, **settings: Any) -> dict[str, Tensor]:
    model = Net()
    data = TensorDataset(*(torch.cat(part) for part in zip(*make_batches(4, 8), strict=True)))
    trainer = make_trainer(
        folder, model, SGD(model.parameters(), 0.1), None, DataLoader(data, 4), 2, strategy=strategy, seed=1, **settings
    )
    trainer.train(5, 5)
    return weights_of(model)


def train_compiled(folder: Path) -> dict[str, Tensor]:
    """What torch.compile makes of a model that is wrapped already; the weights are those of its file."""
    compiled = torch.compile(DistributedDataParallel(Net()), backend="eager")
    data = TensorDataset(*(torch.cat(part) for part in zip(*make_batches(4, 8), strict=True)))
    settings: Any = {"seed": 1, "gradient_accumulation_steps": 2}
    trainer = make_trainer(folder, compiled, SGD(compiled.parameters(), 0.1), None, DataLoader(data, 4), 2, **settings)
    trainer.train(5, 5)
    trainer.save_checkpoint("weights.pth")
    assert not any(isinstance(module, DistributedDataParallel) for module in trainer.model_or_module.modules())
    if trainer.rank > 0:
        return weights_of(trainer.model_or_module)
    weights: dict[str, Tensor] = torch.load(Path(trainer.ckpt_dir) / "weights.pth", weights_only=True)
    return weights


def message_of(error: type[Exception], work: Any) -> str:
    try:
        work()
    except error as raised:
        return str(raised)
    return "nothing"


def try_more(folder: Path) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    wrapped = DistributedDataParallel(Net())
    batches = make_batches()
    return {
        "4 on each of 2 ranks": train_cut(folder / "cut", 2, 4, 1),
        "2 on each of 2 ranks, accumulated": train_cut(folder / "cut2", 2, 2, 2),
        "skip": train_with_nan(folder / "skip", rank, "skip"),
        "raise": train_with_nan(folder / "raise", rank, "raise"),
        "plain": train_with(folder / "a", DDP()),
        "views": train_with(folder / "b", DDP(gradient_as_bucket_view=True)),
        "static": train_with(folder / "c", DDP(static_graph=True)),
        "accumulated": train_with(folder / "g", DDP(), gradient_accumulation_steps=2),
        "compiled, accumulated": train_compiled(folder / "i"),
        "static, accumulated": train_with(folder / "h", DDP(static_graph=True), gradient_accumulation_steps=2),
        "unused": train_with(folder / "d", DDP(find_unused_parameters=True)),
        "compressed": train_with(folder / "e", DDP(comm_hook="fp16")),
        "alone": train_with(folder / "f", SingleProcess()),
        "sync_batchnorm": message_of(
            ValueError, lambda: make_trainer(folder, Net(norm=True), strategy=DDP(sync_batchnorm=True))
        ),
        "wrapped": message_of(ValueError, lambda: make_trainer(folder, wrapped, strategy=DDP(static_graph=True))),
        "list": message_of(SettingError, lambda: make_trainer(folder, data=batches)),
        "hook": message_of(ValueError, lambda: DDP(comm_hook="fp8")),
    }


@pytest.mark.slow
def test_settings_cuts_and_what_one_rank_finds(tmp_path: Path) -> None:
    first, second = on_processes(try_more, tmp_path, 2, tmp_path)
    for name, value in first.items():
        if not isinstance(value, str) and name != "alone":
            assert differences(parameters(value), parameters(second[name])) == [], name

    whole = train_cut(tmp_path / "8x1", 1, 8, 1)
    cuts = {"4x2": train_cut(tmp_path / "4x2", 1, 4, 2), "1x8": train_cut(tmp_path / "1x8", 1, 1, 8)}
    cuts |= {name: value for name, value in first.items() if "ranks" in name}
    for name, weights in cuts.items():
        assert distance(weights, whole) < 1e-6, name

    assert first["skip"]["updates"] == 3
    assert all(bool(value.isfinite().all()) for value in (*first["skip"].values(), *second["skip"].values()))
    assert "iteration 2" in first["raise"]
    assert "iteration 2" in second["raise"]
    assert "loss is not finite" in second["raise"]

    for name in ("views", "static", "unused"):
        assert distance(first[name], first["plain"]) < 1e-6, name
    assert distance(first["static, accumulated"], first["accumulated"]) < 1e-6
    assert differences(first["compiled, accumulated"], first["accumulated"]) == []
    assert 0 < distance(first["compressed"], first["plain"]) < 1e-2
    assert distance(first["alone"], first["plain"]) > 1e-3, "one process with the whole data, in as many steps"

    assert "needs GPUs" in first["sync_batchnorm"]
    assert "static_graph" in first["wrapped"]
    assert "own_shards=True" in first["list"]
    assert "comm_hook" in first["hook"]


def parameters(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """Buffers of ranks other than 0 are their own until the next forward pass."""
    return {name: value for name, value in result.items() if "running" not in name and "batches" not in name}
