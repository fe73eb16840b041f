"""What ranks agree on, though each finds something else: when to stop, where to continue, what is shown."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.processes import on_processes
from tests.small_runs import Net, make_batches, make_trainer, weights_of
from torch_frame import CheckpointerHook, EarlyStoppingHook, EvalHook, EvalTotalHook, HookBase, LoggerHook
from torch_frame.distributed.ddp import DDP


def scores(model: Any, batch: Any) -> dict[str, Tensor]:
    return {"error": (model.predict(batch[0]) - batch[1]).abs().flatten()}


def loader(seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        TensorDataset(torch.randn(16, 3, generator=generator), torch.randn(16, 1, generator=generator)), 2
    )


def rank() -> int:
    return torch.distributed.get_rank()


class StopsInTheLastIteration(HookBase):
    """As one that looks at the clock, which is another one on each rank."""

    def after_iter(self) -> None:
        if self.trainer.strategy.rank == 1 and self.trainer.epoch == 1 and self.is_last_inner_iter():
            self.trainer.should_stop = True


def stop_by_rank_1(folder: Path) -> dict[str, Any]:
    hooks = [
        StopsInTheLastIteration(),
        EvalHook(make_batches(3), scores, 1000, period_unit="iter", progress_bar=False, prefix="last"),
        CheckpointerHook(5),
    ]
    trainer = make_trainer(folder / "stop", Net(), None, None, loader(), 9, hooks=hooks, create_new_dir=None)
    trainer.train(5, 5)
    state = torch.load(folder / "stop" / "checkpoints" / "latest.pth", weights_only=True)
    names = ("epoch", "inner_iter")
    return {
        "done": [getattr(trainer.progress, name) for name in names],
        "saved": [state["progress"][name] for name in names],
    }


def stop_early(folder: Path) -> dict[str, Any]:
    """By the losses of the step, which every rank has for itself."""

    def step(model: Any, batch: Any) -> Tensor:
        loss: Tensor = model(batch)
        return loss * 0 + (1.0 if rank() == 0 else 1.0 / (1 + trainer.cur_iter)) + loss * 1e-6

    hooks = [
        EarlyStoppingHook("total_loss", patience=2, max_first=False, min_delta=1e-3),
        EvalHook(make_batches(3), scores, 5, save_metric="error", max_first=False, progress_bar=False),
    ]
    trainer = make_trainer(folder / "early", Net(), None, None, loader(), 9, hooks=hooks, step_fn=step)
    trainer.train(5, 5)
    return {"epochs": trainer.progress.epoch, "best": hooks[1].cur_best}  # type: ignore[attr-defined]


def stop_early_inside_an_epoch(folder: Path, *, on_all: bool) -> int:
    """By the second evaluation that is not better; the epoch has 4 batches."""
    evaluation = EvalHook(make_batches(2), lambda m, b: {"acc": [0.5]}, period_unit="iter", progress_bar=False)
    hooks: list[Any] = [evaluation, EarlyStoppingHook("eval_acc", patience=2), CheckpointerHook(save_metric="eval_acc")]
    work_dir = folder / f"inside_{on_all}"
    trainer = make_trainer(work_dir, Net(), None, None, loader(), 9, hooks=hooks if on_all or rank() == 0 else [])
    trainer.train(5, 5)
    return trainer.progress.iter


def show(folder: Path) -> dict[str, Any]:
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        hooks = [EvalHook(make_batches(3), scores), LoggerHook()]
        trainer = make_trainer(folder / "show", Net(), None, None, loader(), 1, hooks=hooks)
        trainer.train()
    return {"output": output.getvalue() + errors.getvalue(), "work_dir": trainer.work_dir}


def resume_where_only_rank_0_has_the_file(folder: Path) -> dict[str, Any]:
    here = folder / f"disk_{rank()}"
    here.mkdir()
    os.chdir(here)
    settings: dict[str, Any] = {"hooks": [CheckpointerHook()], "create_new_dir": None}
    make_trainer(Path("run"), Net(), None, None, loader(), 2, **settings).train(5, 5)
    has_file = Path("run", "checkpoints", "latest.pth").exists()
    model = Net()
    settings["hooks"] = [CheckpointerHook()]
    trainer = make_trainer(Path("run"), model, None, None, loader(), 3, resume="auto", **settings)
    trainer.train(5, 5)
    missing = make_trainer(Path("run"), Net(), None, None, loader(), 3)
    try:
        missing.load_checkpoint("nothing.pth")
    except FileNotFoundError as error:
        told = str(error)
    return {"has": has_file, "iter": trainer.progress.iter, "updates": weights_of(model), "told": told}


class Stream:
    """Batches without a length; rank 1 has two more."""

    def __iter__(self) -> Any:
        return iter(make_batches(3 if rank() == 0 else 5))


def unequal_streams(folder: Path) -> tuple[int, str]:
    data: Any = Stream()
    trainer = make_trainer(
        folder / "stream", Net(), None, None, data, 2, strategy=DDP(own_shards=True), gradient_accumulation_steps=2
    )
    trainer.train(5, 3)
    return trainer.progress.iter, (folder / "stream" / "log.txt").read_text()


def torchmetric(folder: Path) -> dict[str, Any]:
    torchmetrics = pytest.importorskip("torchmetrics")

    def inputs(model: Any, batch: Any) -> Any:
        return model.predict(batch[0]), batch[1]

    def hook() -> EvalTotalHook:
        return EvalTotalHook(make_batches(5), torchmetrics.MeanSquaredError(), inputs=inputs, progress_bar=False)

    on_all = make_trainer(folder / "a", Net(), None, None, loader(), 1, hooks=[hook()]).evaluate()
    on_one = make_trainer(
        folder / "b", Net(), None, None, loader(), 1, hooks=[hook()] if rank() == 0 else []
    ).evaluate()
    return {"all": on_all, "one": on_one}


class SavesWeights(HookBase):
    """As scripts do, there and then: one file on all ranks, one on rank 0, one on rank 1."""

    def after_epoch(self) -> None:
        self.trainer.save_checkpoint("of_all.pth")
        self.trainer.save_checkpoint(f"of_rank_{rank()}.pth")


def save_weights(folder: Path) -> str:
    settings: dict[str, Any] = {"hooks": [SavesWeights()], "create_new_dir": None}
    make_trainer(folder / "weights", Net(), None, None, loader(), 2, **settings).train(5, 2)
    files = sorted(path.name for path in (folder / "weights" / "checkpoints").iterdir())
    assert files == ["of_all.pth", "of_rank_0.pth"]
    return (folder / "weights" / "log.txt").read_text()


def fewer_samples_than_ranks(folder: Path) -> dict[str, Any]:
    """Of 9 samples, in global batches of 4, the last batch has 1."""
    results: dict[str, Any] = {}
    for short in ("wrap", "drop"):
        seen: list[float] = []

        def step(model: Any, batch: Any, seen: list[float] = seen) -> Tensor:
            seen.extend(batch[0].flatten().tolist())
            loss: Tensor = model(batch[0]).square().mean()
            return loss

        data = DataLoader(TensorDataset(torch.arange(9.0).reshape(9, 1)), 2)
        strategy = DDP(short_batch=short)
        trainer = make_trainer(
            folder / short, torch.nn.Linear(1, 1), None, None, data, 1, strategy=strategy, step_fn=step
        )
        trainer.train(5, 2)
        results[short] = seen, trainer.epoch_len, (folder / short / "log.txt").read_text()
    with pytest.raises(ValueError, match="short_batch is 'pad'; it has to be 'wrap' or 'drop'"):
        DDP(short_batch="pad")
    return results


def agree_on_all(folder: Path) -> dict[str, Any]:
    return {
        "stop": stop_by_rank_1(folder),
        "early": stop_early(folder),
        "inside": [stop_early_inside_an_epoch(folder, on_all=on_all) for on_all in (True, False)],
        "show": show(folder),
        "weights": save_weights(folder),
        "short": fewer_samples_than_ranks(folder),
        "streams": unequal_streams(folder),
        "torchmetric": torchmetric(folder),
        "resume": resume_where_only_rank_0_has_the_file(folder),
    }


def test_ranks_agree(tmp_path: Path) -> None:
    first, second = on_processes(agree_on_all, tmp_path, 2, tmp_path)
    assert first["stop"] == second["stop"] == {"done": [1, 4], "saved": [1, 4]}
    assert first["early"] == second["early"]
    assert first["early"]["epochs"] == 3, "rank 0's loss stands still"
    assert first["inside"] == second["inside"] == [3, 3]
    assert "Epoch 1/1" in first["show"]["output"]
    assert second["show"]["output"] == ""
    assert first["show"]["work_dir"] == second["show"]["work_dir"]
    assert first["weights"].count("Rank 1 has saved weights (of_rank_1.pth) that rank 0 has not") == 2
    assert "of_all.pth)" not in first["weights"]
    for short, samples, told in (("wrap", 10, "given one that another rank has"), ("drop", 8, "and is left out")):
        seen, num_batches, log = zip(first["short"][short], second["short"][short], strict=True)
        assert len([*seen[0], *seen[1]]) == samples
        assert len({*seen[0], *seen[1]}) == min(samples, 9)
        assert num_batches == (samples // 4 + (short == "wrap"),) * 2
        assert told in log[0]
    assert first["streams"][0] == second["streams"][0] == 2 * 3
    told = "The epoch ends after 3 batches on each rank, because one of them has no more. Others have at least one more"
    assert first["streams"][1].count(told) == 1, "once, by rank 0, though rank 1 has more"
    values = [
        result["torchmetric"][name]["eval_MeanSquaredError"] for result in (first, second) for name in ("all", "one")
    ]
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)
    assert [first["resume"]["has"], second["resume"]["has"]] == [True, False]
    assert first["resume"]["iter"] == second["resume"]["iter"] == 3 * 4
    for name, value in first["resume"]["updates"].items():
        assert torch.equal(value, second["resume"]["updates"][name])
    assert "nothing.pth" in second["resume"]["told"]
