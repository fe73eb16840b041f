"""On two ranks: runs that end by iterations, modes, averages, and what is told, as on one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.processes import Failed, on_processes, outcomes
from tests.small_hooks import CountBatches, On, Stages, at_iter
from tests.small_runs import Net, differences, make_batches, make_trainer, weights_of
from torch_frame import CheckpointerHook, EvalTotalHook, HookBase, Trainer
from torch_frame.distributed.ddp import DDP

NORM = "layers.1"


def rank() -> int:
    return torch.distributed.get_rank()


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(20, 3, generator=generator), torch.randn(20, 1, generator=generator))
    return DataLoader(data, 2, shuffle=True)


class Stream:
    """Batches of this rank, without an end and without a length."""

    def __iter__(self) -> Any:
        while True:
            yield from make_batches(3, seed=rank())


def run(folder: Path, *hooks: Any, data: Any = None, model: nn.Module | None = None, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = Net(norm=True, dropout=True) if model is None else model
    given = {"max_epochs": None, "seed": 1, "use_ema": True, "create_new_dir": None, **settings}
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    hooks = [*hooks, CheckpointerHook(every_n_iters=2, keep_steps=2)]  # type: ignore[assignment]
    trainer = make_trainer(folder, model, optimizer, None, loader() if data is None else data, hooks=hooks, **given)
    trainer.train(5, 2)
    return trainer


def iterations(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, settings in {
        "a loader": {},
        "a stream": {"data": Stream(), "strategy": DDP(own_shards=True)},
        "windows": {"gradient_accumulation_steps": 2},
    }.items():
        whole = run(folder / name / "whole", max_iters=8, **settings)
        seen = Stages("after_epoch", "after_train")
        run(folder / name / "parts", seen, max_iters=4, **settings)
        parts = run(folder / name / "parts", max_iters=8, resume="auto", **settings)
        found[name] = {
            "done": parts.progress.iter,
            "calls": seen.calls,
            "differences": differences(weights_of(whole.model), weights_of(parts.model))
            + differences(weights_of(whole.model_evaluate), weights_of(parts.model_evaluate)),
            "files": sorted(path.name for path in Path(parts.ckpt_dir).glob("step*")),
        }
    return found


def stop_inside(folder: Path) -> dict[str, Any]:
    """One rank wants to stop, inside an epoch."""

    def stop(trainer: Any) -> None:
        trainer.should_stop = trainer.strategy.rank == 1

    whole = run(folder / "whole", max_epochs=2)
    part = run(folder / "parts", On(after_iter=at_iter(2, stop)), max_epochs=2)
    parts = run(folder / "parts", max_epochs=2, resume="auto")
    return {"at": part.progress.iter, "differences": differences(weights_of(whole.model), weights_of(parts.model))}


def dry_run(folder: Path) -> dict[str, Any]:
    hooks = [
        EvalTotalHook(loader(), CountBatches(), prefix="map"),
        EvalTotalHook(make_batches(7), CountBatches(), prefix="list"),
    ]
    trainer = run(folder, *hooks, max_epochs=2, limit_batches=3)
    return {"done": trainer.progress.iter, "values": trainer.evaluate()}


class Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


def modes(folder: Path) -> dict[str, Any]:
    ear = Ear()
    logging.getLogger("torch_frame").addHandler(ear)
    seen: list[list[str]] = []

    class Note(HookBase):
        def before_iter(self) -> None:
            seen.append([name for name, one in self.trainer.model_or_module.named_modules() if not one.training])

    frozen, given = Net(norm=True), Net(norm=True, dropout=True).eval()
    frozen.layers[1].eval().requires_grad_(False)
    frozen.extra = nn.Linear(1, 1)
    run(folder / "frozen", Note(), model=frozen, max_iters=1, strategy=DDP(find_unused_parameters=True))
    run(folder / "given", Note(), model=given, max_iters=1)
    replaced = Net()
    optimizer = SGD(replaced.layers[0].parameters(), lr=0.1)
    settings = {"max_epochs": 1, "strategy": DDP(find_unused_parameters=True)}
    make_trainer(folder / "replaced", replaced, optimizer, None, loader(), **settings).train(5, 2)
    logging.getLogger("torch_frame").removeHandler(ear)
    return {"seen": seen, "heard": ear.heard}


def average(folder: Path) -> dict[str, Any]:
    """In 16 bits, with a mask of infinities."""
    model = Net()
    model.mask = nn.Parameter(torch.full((2, 2), float("-inf")).triu(1), requires_grad=False)
    data = [(x.bfloat16(), y.bfloat16()) for x, y in make_batches(4, seed=rank())]
    settings = {"data": data, "model": model.bfloat16(), "strategy": DDP(own_shards=True)}
    trainer = run(folder, max_iters=6, **settings)
    assert trainer.model_ema is not None
    equal = torch.equal(trainer.model_evaluate.mask, model.mask)  # type: ignore[arg-type]
    return {"mask": equal, "average": trainer.model_ema.wide_state()}


def all_of_it(folder: Path) -> dict[str, Any]:
    return {work.__name__: work(folder / work.__name__) for work in (iterations, stop_inside, dry_run, modes, average)}


def test_two_ranks_end_by_iterations_with_modes_and_averages_as_one(tmp_path: Path) -> None:
    first, second = on_processes(all_of_it, tmp_path, 2, tmp_path)
    for found in (first, second):
        for name, kind in found["iterations"].items():
            steps = (4, 5) if name == "windows" else (6, 8)  # 2 + 2 + 1 batches in the first epoch, 2 + 1 of the second
            assert kind["done"] == 8, name
            assert kind["calls"] == ["after_epoch", "after_train"], name
            assert kind["differences"] == [], name
            assert kind["files"] == [f"step_{count}.pth" for count in steps], name
        assert found["stop_inside"] == {"at": 3, "differences": []}
        assert found["dry_run"] == {"done": 6, "values": {"map_batches": 3, "list_batches": 3}}
        assert found["modes"]["seen"] == [[NORM], []]
        assert found["average"]["mask"]
    heard = " ".join(first["modes"]["heard"])
    assert "Net was in eval mode when epoch 1 began" in heard
    assert (
        "No optimizer has these trainable parameters, so they stay as they are: layers.2.weight, layers.2.bias" in heard
    )
    assert differences(first["average"]["average"], second["average"]["average"]) == []


def twice(folder: Path) -> None:
    def step(model: Any, batch: Any) -> dict[str, Tensor]:
        loss = model(batch)
        return {"loss": loss * 2, "part": loss} if rank() == 1 else {"loss": loss}

    make_trainer(folder, Net(), None, None, loader(), step_fn=step).train(5, 5)


def test_a_loss_that_counts_twice_on_one_rank_ends_both(tmp_path: Path) -> None:
    first, second = outcomes(twice, tmp_path, 2, tmp_path)
    assert isinstance(second, Failed)
    assert second.kind == "StepOutputError"
    assert isinstance(first, Failed)
