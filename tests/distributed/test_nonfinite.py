"""A loss or gradient that is not finite on one of two processes: all skip that update, or all raise and say on which rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.processes import on_processes, one_thread, outcomes
from tests.distributed.test_ddp import distance
from tests.small_hooks import On
from tests.small_runs import Net, differences, make_batches, make_trainer, weights_of
from torch_frame import NonFiniteError, Trainer
from torch_frame.distributed.ddp import DDP

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

NUM, AT = 6, 2


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def constant(loss: Tensor) -> Tensor:
    """Not finite, with a finite gradient."""
    return loss + math.inf


def behind_a_mask(loss: Tensor) -> Tensor:
    """A NaN that no gradient has: all of it is zero."""
    return (loss * 0 - 1).relu() + math.nan


def nowhere_else(loss: Tensor) -> Tensor:
    return loss * math.nan


BAD: dict[str, Callable[[Tensor], Tensor]] = {"constant": constant, "masked": behind_a_mask, "whole": nowhere_else}


def train(
    folder: Path,
    bad: Callable[[Tensor], Tensor] = constant,
    strategy: Any = None,
    model: nn.Module | None = None,
    on_rank: int | None = 1,
    **settings: Any,
) -> Any:
    """What a run ends with: weights, counts, or the words of its error. One process trains on the whole batches."""
    model = Net() if model is None else model
    data = TensorDataset(*(torch.cat(part) for part in zip(*make_batches(NUM, 8), strict=True)))
    size = 8 // (dist.get_world_size() if dist.is_initialized() else 1)
    calls = 0

    def step(model: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss: Tensor = model(batch)
        return bad(loss) if calls == AT + 1 and on_rank in (rank(), None) else loss

    optimizer = SGD(model.parameters(), 0.1)
    settings = {"seed": 3, "step_fn": step, **settings}
    trainer = make_trainer(
        folder, model, optimizer, None, DataLoader(data, size, shuffle=True), 1, strategy=strategy, **settings
    )
    try:
        trainer.train(5, 5)
    except NonFiniteError as error:
        return f"{trainer.cur_iter}: {error}"
    counts = [trainer.progress.num_updates, trainer.updater.num_skipped]
    parameters = {name: value.detach().clone() for name, value in trainer.model_or_module.named_parameters()}
    return {**parameters, "counts": torch.tensor(counts), "trusts": torch.tensor(trainer.updater.trusts_exchange)}


SETTINGS: dict[str, dict[str, Any]] = {
    "clipped": {"clip_grad_norm": 0.5},
    "accumulated": {"gradient_accumulation_steps": 3},
    "cut": {"gradient_accumulation_steps": 4, "max_iters": 3},
    "weighted": {"loss_weight": lambda batch: len(batch[0]), "gradient_accumulation_steps": 2},
}
STRATEGIES: dict[str, Callable[[], Any]] = {
    "views": lambda: DDP(gradient_as_bucket_view=True),
    "static": lambda: DDP(static_graph=True),
    "unused": lambda: DDP(find_unused_parameters=True),
    "fp16": lambda: DDP(comm_hook="fp16"),
    "own hook": lambda: DDP(comm_hook=(None, own_exchange)),
}


def own_exchange(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, which are texts here
    """As torch's, but not known to the strategy."""
    return default_hooks.allreduce_hook(state, bucket)


def noise_of_rank_0(trainer: Any) -> None:
    """A hook's own doing, on one rank."""
    if trainer.cur_iter == AT:
        next(trainer.model_or_module.parameters()).grad.fill_(math.nan)


def clean(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.nan_to_num_(0.0)


def train_mended(folder: Path) -> Any:
    """Gradients are cleaned before DDP has them, so the other rank cannot know of the loss."""
    model = Net()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(clean)
    words = train(folder, nowhere_else, None, model, on_nonfinite="skip")
    raise NonFiniteError(str(words))  # the process ends


class Two(Trainer):
    """A step for each of two optimizers, of which the second has a bad loss on rank 1."""

    def train_one_iter(self, batch: Any) -> Any:
        model: Any = self.model
        first, second = model.layers[0], model.layers[2]
        loss = first(batch[0]).square().mean()
        self.update(loss, "first")
        other = second(torch.ones(2, 8)).square().mean()
        if self.cur_iter == AT and rank() == 1:
            other = constant(other)
        self.update(other, "second")
        return {"total_loss": loss}


def train_two(folder: Path) -> Any:
    model = Net()
    optimizers = {"first": SGD(model.layers[0].parameters(), 0.1), "second": SGD(model.layers[2].parameters(), 0.1)}
    data = TensorDataset(torch.cat([x for x, _ in make_batches(NUM, 8)]))
    settings: dict[str, Any] = {"hooks": [], "on_nonfinite": "skip"}
    trainer = Two(model, optimizers, None, DataLoader(data, 4), 1, folder, **settings)
    trainer.train(5, 5)
    skipped = [unit.updater.num_skipped for unit in trainer.optimization.units.values()]
    return {**weights_of(model), "skipped": torch.tensor(skipped)}


def all_runs(folder: Path) -> dict[str, Any]:
    runs: dict[str, Any] = {}
    for kind, bad in BAD.items():
        runs[f"raise {kind}"] = train(folder / f"raise_{kind}", bad)
        runs[f"skip {kind}"] = train(folder / f"skip_{kind}", bad, on_nonfinite="skip")
    for name, settings in SETTINGS.items():
        runs[f"skip {name}"] = train(folder / name, behind_a_mask, on_nonfinite="skip", **settings)
    for name, strategy in STRATEGIES.items():
        runs[f"skip {name}"] = train(folder / name, behind_a_mask, strategy(), on_nonfinite="skip")
        runs[f"raise {name}"] = train(folder / f"{name}_r", behind_a_mask, strategy())
    wrapped = DistributedDataParallel(Net(), process_group=dist.new_group([rank()]))
    runs["a group of its own"] = train(folder / "group", model=wrapped)
    hook = [On(before_update=noise_of_rank_0)] if rank() == 0 else []
    runs["hook"] = train(folder / "hook", on_rank=-1, hooks=hook, on_nonfinite="skip")
    runs["hook raises"] = train(
        folder / "hook_raises", on_rank=-1, hooks=[On(before_update=noise_of_rank_0)] if rank() == 0 else []
    )

    runs["by name"] = train_two(folder / "two")
    runs["all ranks"] = train(folder / "all", on_rank=None)
    runs["none"] = train(folder / "none", on_rank=-1)
    return runs


@pytest.mark.slow
def test_what_one_rank_finds_all_do(tmp_path: Path) -> None:
    first, second = on_processes(all_runs, tmp_path, 2, tmp_path)
    for name, of_first in first.items():
        if not isinstance(of_first, str):
            assert differences(of_first, second[name]) == [], name
    for kind, bad in BAD.items():
        assert f"{AT}: Training stopped: the loss is not finite on rank 1, in epoch 1" in first[f"raise {kind}"]
        assert f"{AT}: Training stopped: the loss is not finite, in epoch 1" in second[f"raise {kind}"]
        check_equal(first[f"skip {kind}"], tmp_path / f"one_{kind}", bad)
    for name, settings in SETTINGS.items():
        check_equal(first[f"skip {name}"], tmp_path / f"one_{name}", behind_a_mask, **settings)
    for name in STRATEGIES:
        assert first[f"skip {name}"]["counts"].tolist() == [NUM - 1, 1]
        assert bool(first[f"skip {name}"]["trusts"]) == (name != "own hook")
        assert "the loss is not finite on rank 1" in first[f"raise {name}"]
    assert "not finite on rank 1" in first["a group of its own"]
    assert first["hook"]["counts"].tolist() == [NUM - 1, 1]
    assert "the gradient is not finite, " in first["hook raises"]
    assert "the gradient is not finite on rank 0, " in second["hook raises"]
    assert first["by name"]["skipped"].tolist() == [0, 1]
    assert "the loss is not finite, " in first["all ranks"]
    assert first["none"]["counts"].tolist() == [NUM, 0]


def check_equal(run: dict[str, Tensor], folder: Path, bad: Callable[[Tensor], Tensor], **settings: Any) -> None:
    """Two ranks have skipped what one process on the whole batches does."""
    expected = train(folder, bad, on_nonfinite="skip", on_rank=0, **settings)
    assert run["counts"].tolist() == expected["counts"].tolist()
    assert run["counts"][1] == 1
    assert (bool(run["trusts"]), bool(expected["trusts"])) == (True, False)
    assert (
        distance(
            {name: run[name] for name in expected if "layers" in name},
            {n: v for n, v in expected.items() if "layers" in n},
        )
        < 1e-6
    )


def test_ranks_do_not_part_where_a_hook_of_the_users_hides_the_mark(tmp_path: Path) -> None:
    first, second = outcomes(train_mended, tmp_path, 2, tmp_path)
    assert "the loss is not finite, in epoch 1" in second.message
    assert "rank 1: NonFiniteError" in "".join([first.message, *first.notes])
