"""An epoch's mean is over the batches that were trained on, and what it leaves out is told; files show what came."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tests.distributed.processes import on_processes
from tests.small_hooks import On, at_iter
from tests.small_runs import make_trainer, raised_by
from torch_frame import CheckpointerHook, EarlyStoppingHook, HookBase, LoggerHook, MetricStorage, Trainer
from torch_frame.checkpoint import io
from torch_frame.distributed.ddp import DDP
from torch_frame.errors import NonFiniteError
from torch_frame.tracking.record import RunFiles

NAN, INF = math.nan, math.inf
LOSSES = [3.0, NAN, 2.0, 5.0, 4.0, INF, 1.0, 0.5]


class Given(nn.Module):
    """Its loss is the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Tensor) -> Tensor:
        return self.weight * 0 + batch


def run(folder: Path, losses: list[float], *hooks: HookBase, epochs: int = 1, **settings: Any) -> Trainer:
    trainer = make_trainer(
        folder,
        Given(),
        data=[torch.tensor(loss) for loss in losses],
        max_epochs=epochs,
        hooks=hooks,
        create_new_dir=None,
        **{"on_nonfinite": "skip", **settings},
    )
    trainer.train()
    return trainer


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("reads", [False, True], ids=["unread", "read_each_batch"])
@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_the_epochs_mean_is_of_the_batches_that_were_trained_on(
    window: int, reads: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    look = On(after_iter=lambda trainer: trainer.value("total_loss"))
    trainer = run(tmp_path, LOSSES, *([look] if reads else []), gradient_accumulation_steps=window)
    windows = [LOSSES[i : i + window] for i in range(0, len(LOSSES), window)]
    trained = [loss for losses in windows if all(map(math.isfinite, losses)) for loss in losses]
    expected = sum(trained) / len(trained) if trained else NAN
    assert repr(trainer.value("total_loss")) == repr(expected)
    (line,) = told(caplog)
    assert line.startswith(f"Epoch 1: {len(LOSSES) - len(trained)} of {len(LOSSES)} batches were not trained on")


def test_a_finite_loss_with_an_infinite_gradient_is_left_out_too(tmp_path: Path) -> None:
    step = lambda model, batch: (model.weight.abs() + 1e-30).sqrt() * 0 + batch + model.weight * batch * 3e38  # noqa: E731
    trainer = run(tmp_path, [1.0, 2.0, 3.0], step_fn=step)
    assert trainer.updater.num_skipped == 2  # 2 * 3e38 and 3 * 3e38 are beyond float32
    assert trainer.value("total_loss") == 1.0


def test_a_row_of_the_file_still_shows_what_came(tmp_path: Path) -> None:
    trainer = run(tmp_path, LOSSES, LoggerHook(period=1))
    rows = [json.loads(line) for line in Path(trainer.work_dir, "metrics.jsonl").read_text().splitlines()]
    shown = [row["total_loss"] for row in rows]
    assert shown[0] == 3.0
    assert not any(isinstance(value, float) and math.isfinite(value) for value in shown[1:])  # 1.7's mean of 20
    assert math.isnan(trainer.metric_storage["total_loss"].avg)
    (entry,) = RunFiles.read(trainer.work_dir).entries
    assert entry.values["total_loss"] == 15.5 / 6


def test_hooks_that_follow_the_loss_see_the_mean(tmp_path: Path) -> None:
    def follow(losses: list[float]) -> tuple[Any, ...]:
        model = Given()
        optimizer = SGD(model.parameters(), lr=1.0)
        trainer = make_trainer(
            tmp_path / str(len(losses)),
            model,
            optimizer,
            lr_scheduler=ReduceLROnPlateau(optimizer, patience=0),
            lr_scheduler_metric="total_loss",
            data=[torch.tensor(loss) for loss in losses],
            max_epochs=5,
            hooks=[
                CheckpointerHook(save_metric="total_loss", max_first=False),
                stop := EarlyStoppingHook("total_loss", patience=3, max_first=False),
            ],
            on_nonfinite="skip",
        )
        trainer.train()
        return trainer.progress.epoch, trainer.lr, stop.best, trainer.hooks[0].cur_best

    finite = [loss for loss in LOSSES if math.isfinite(loss)]
    assert follow(LOSSES) == follow(finite) == (4, pytest.approx(1e-3), 15.5 / 6, 15.5 / 6)


def test_an_epoch_of_which_nothing_was_trained_is_nan_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[float] = []
    note = On(after_epoch=lambda trainer: seen.append(trainer.value("total_loss")))
    run(tmp_path, [NAN, INF], note, LoggerHook(), CheckpointerHook(save_metric="total_loss", max_first=False), epochs=2)
    assert repr(seen) == "[nan, nan]"  # and not an earlier epoch's
    assert [line for line in told(caplog) if "trained on" in line] == [
        f"Epoch {n}: 2 of 2 batches were not trained on, because a loss or a gradient was not finite: its means are NaN."
        for n in (1, 2)
    ]


def test_the_epoch_before_does_not_stand_for_one_of_which_nothing_was_trained(tmp_path: Path) -> None:
    step = lambda model, batch: model(batch if trainer.epoch == 0 else batch * NAN)  # noqa: E731
    seen: list[float] = []
    note = On(after_epoch=lambda trainer: seen.append(trainer.value("total_loss")))
    trainer = make_trainer(
        tmp_path, Given(), data=[torch.tensor(2.0)] * 3, step_fn=step, on_nonfinite="skip", hooks=[note]
    )
    trainer.train()
    assert repr(seen) == "[2.0, nan]"


def test_early_stopping_still_refuses_what_is_always_nan(tmp_path: Path) -> None:
    stop = EarlyStoppingHook("total_loss", max_first=False)
    error = raised_by(lambda: run(tmp_path, [NAN, NAN], stop), NonFiniteError)
    assert "'total_loss', which is NaN in epoch 1" in str(error)


def test_a_metric_that_is_nan_in_some_batches_is_the_mean_of_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recalls = [0.5, NAN, 1.0, NAN]
    step = lambda model, batch: (model(batch), {"recall": recalls[int(batch)], "always": NAN})  # noqa: E731
    stop = EarlyStoppingHook("recall", patience=1)
    hook = On(after_iter=lambda trainer: trainer.log(trainer.cur_iter, mine=recalls[trainer.inner_iter], window_size=3))
    trainer = run(tmp_path, [0.0, 1.0, 2.0, 3.0], stop, hook, step_fn=step, on_nonfinite="raise", epochs=2)
    assert trainer.value("recall") == stop.best == 0.75
    assert trainer.value("mine") == 1.0  # of its window of three
    assert math.isnan(trainer.value("always"))
    assert told(caplog)[0] == (
        "Epoch 1: recall was NaN in 2 of 4, always was NaN in 4 of 4, which its mean leaves out."
    )


def test_nothing_is_told_of_an_epoch_that_was_trained_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, [1.0, 2.0])
    assert told(caplog) == []


def test_infinities_that_were_trained_with_stay(tmp_path: Path) -> None:
    trainer = run(tmp_path, [1.0, 2.0], step_fn=lambda model, batch: (model(batch), {"ppl": INF}))
    assert trainer.value("ppl") == INF


@pytest.mark.parametrize("window", [1, 2])
def test_a_run_that_was_stopped_inside_the_epoch_has_the_same_sums(
    window: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": window, "seed": 0}
    whole = run(tmp_path / "whole", LOSSES, CheckpointerHook(), **settings)
    line = told(caplog)[-1]
    caplog.clear()

    def stop(trainer: Trainer) -> None:
        trainer.should_stop = True

    run(tmp_path / "parts", LOSSES, CheckpointerHook(), On(after_iter=at_iter(3, stop)), **settings)
    parts = run(tmp_path / "parts", LOSSES, CheckpointerHook(), resume="auto", **settings)
    assert told(caplog)[-1] == line
    states = [io.read(Path(trainer.ckpt_dir, "latest.pth"))["metric_storage"] for trainer in (whole, parts)]
    for state in states:
        state.pop("data_time"), state.pop("iter_time")
    assert repr(states[0]) == repr(states[1])


def test_states_from_before_have_no_counts_and_load(tmp_path: Path) -> None:
    storage, other = MetricStorage(), MetricStorage()
    storage.record(0, {"loss": 2.0})
    state = storage.state_dict()
    for saved in state.values():
        del saved["epoch_nan"], saved["epoch_skipped"]
    other.load_state_dict(state)
    assert other.value("loss") == 2.0


def test_of_a_dict_of_optimizers_what_one_of_them_was_trained_by_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Two(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            first, second = batch
            a, b = self.model[0](first), self.model[1](second)
            self.update(a, "a")
            self.update(b, "b")
            return {"a": a, "b": b}

    model = nn.ModuleList([Given(), Given()])
    optimizers = {name: SGD(part.parameters(), lr=0.1) for name, part in zip("ab", model, strict=True)}
    data = [torch.tensor(pair) for pair in ([1.0, 2.0], [INF, 3.0], [NAN, INF], [4.0, NAN])]
    settings: dict[str, Any] = {"hooks": [], "on_nonfinite": "skip", "create_new_dir": None}
    trainer = Two(model, optimizers, None, data, 1, tmp_path, **settings)
    trainer.train()
    assert (trainer.value("a"), trainer.value("b")) == (2.5, 2.5)


def test_a_step_without_update_counts_all_that_are_numbers(tmp_path: Path) -> None:
    class Own(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            return {"total_loss": self.model(batch)}

    model = Given()
    data = [torch.tensor(loss) for loss in (1.0, NAN, 3.0)]
    settings: dict[str, Any] = {"hooks": [], "on_nonfinite": "skip", "create_new_dir": None}
    trainer = Own(model, SGD(model.parameters(), lr=0.1), None, data, 2, tmp_path, **settings)
    trainer.train()
    assert trainer.value("total_loss") == 2.0


def test_an_epoch_shorter_than_its_length_settles_its_last_window(tmp_path: Path) -> None:
    class Claims:
        def __iter__(self) -> Any:
            return iter([torch.tensor(loss) for loss in (1.0, 2.0, 3.0, NAN, 7.0)])

        def __len__(self) -> int:
            return 9

    trainer = make_trainer(
        tmp_path, Given(), data=Claims(), max_epochs=1, on_nonfinite="skip", gradient_accumulation_steps=2, hooks=[]
    )
    trainer.train()
    assert trainer.value("total_loss") == 10 / 3


def test_lines_of_a_run_by_iterations_show_numbers(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        Given(),
        data=[torch.tensor(loss) for loss in (4.0, NAN, 2.0)],
        max_epochs=None,
        max_iters=3,
        on_nonfinite="skip",
        hooks=[LoggerHook(period=1)],
    )
    trainer.train()
    entries = RunFiles.read(trainer.work_dir).entries
    assert [entry.values["total_loss"] for entry in entries][:3] == [4.0, 4.0, 3.0]


def of_ranks(folder: Path) -> Any:
    losses = [[1.0, NAN, 3.0], [5.0, 6.0, INF]][torch.distributed.get_rank()]
    seen: list[float] = []
    note = On(after_epoch=lambda trainer: seen.append(trainer.value("total_loss")))
    run(folder, losses, note, EarlyStoppingHook("total_loss", patience=9), strategy=DDP(own_shards=True))
    return seen


def test_a_batch_that_another_rank_skipped_was_not_trained_on(tmp_path: Path) -> None:
    assert on_processes(of_ranks, tmp_path, 2, tmp_path / "run") == [[1.0], [1.0]]


def test_a_resume_by_epochs_keeps_the_last_epochs_mean(tmp_path: Path) -> None:
    run(tmp_path, [1.0, NAN], CheckpointerHook(), epochs=1)
    seen: list[float] = []
    note = On(before_epoch=lambda trainer: seen.append(trainer.value("total_loss")))
    run(tmp_path, [1.0, NAN], note, epochs=2, resume=str(tmp_path / "checkpoints" / "latest.pth"))
    assert seen == [1.0]
