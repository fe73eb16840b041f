"""A run that ends by iterations: where, with which state, and how it goes on."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset

from tests.small_data import Augmented
from tests.small_hooks import CountBatches, On, Stages, at_iter
from tests.small_runs import Net, Unsized, differences, make_batches, make_trainer, weights_of
from torch_frame import (
    CheckpointerHook,
    EarlyStoppingHook,
    EvalHook,
    EvalTotalHook,
    InfiniteDataLoader,
    LoggerHook,
    SettingError,
    Trainer,
)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(3, generator=generator), torch.randn(1, generator=generator)


class EndlessBatches:
    """Batches without an end."""

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(make_batches(7))


def augmented_loss(model: Any, batch: Tensor) -> Tensor:
    return model.predict(batch[:, 1:].float()).square().mean()


LOADERS: dict[str, Any] = {
    "a list": lambda: make_batches(5),
    "no length": Unsized,
    "endless batches": EndlessBatches,
    "an endless dataset": lambda: DataLoader(Endless(), 4),
    "shuffled": lambda: DataLoader(Augmented(20), 4, shuffle=True),
    "infinite": lambda: InfiniteDataLoader(Augmented(20), 4, shuffle=True),
}


def run(folder: Path, loader: str = "a list", *hooks: Any, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = Net(norm=True, dropout=True)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    given = {"hooks": [*hooks, CheckpointerHook()], "create_new_dir": None, "lr_scheduler_interval": "iter", "seed": 3}
    if loader in ("shuffled", "infinite"):
        given["step_fn"] = augmented_loss
    trainer = make_trainer(
        folder, model, optimizer, scheduler, LOADERS[loader](), **{"max_epochs": None, **given, **settings}
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("first", [3, 5, 7])
def test_a_run_continued_with_more_iterations_ends_as_one_in_one_go(loader: str, first: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", loader, max_iters=12, use_ema=True)
    part = run(tmp_path / "parts", loader, max_iters=first, use_ema=True)
    assert part.progress.iter == first
    parts = run(tmp_path / "parts", loader, max_iters=12, use_ema=True, resume="auto")
    assert (parts.progress.iter, parts.cur_iter) == (12, 11)
    assert differences(weights_of(whole.model), weights_of(parts.model)) == []
    assert differences(weights_of(whole.model_evaluate), weights_of(parts.model_evaluate)) == []
    assert whole.progress == parts.progress


def test_what_happens_inside_an_epoch_at_the_last_iteration(tmp_path: Path) -> None:
    seen = Stages(note=lambda stage, trainer: (stage, trainer.epoch, trainer.cur_iter))
    last = []
    hooks = [seen, On(after_epoch=lambda t: last.append((t.epoch, t.hooks[0].is_last_epoch())))]
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(
        tmp_path, model, optimizer, StepLR(optimizer, 1, 0.5), max_epochs=9, max_iters=8, hooks=hooks
    )
    trainer.train()
    assert seen.calls[-4:] == [("after_iter", 1, 7), ("after_epoch", 1, 7), ("after_train", 1, 7), ("close", 1, 7)]
    assert last == [(0, False), (1, True)]
    assert trainer.lr == 0.05  # one step, of the whole epoch
    assert (trainer.max_iters, trainer.max_epochs, trainer.progress.epoch, trainer.progress.inner_iter) == (8, 9, 1, 3)


def test_the_state_is_of_before_after_epoch(tmp_path: Path) -> None:
    class Counting(CheckpointerHook):
        count = 0

        def after_epoch(self) -> None:
            self.count += 1
            super().after_epoch()

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "count": self.count}

    hook = Counting(max_to_keep=3)
    trainer = make_trainer(tmp_path, max_epochs=None, max_iters=8, hooks=[hook])
    trainer.train()
    state = torch.load(f"{trainer.ckpt_dir}/latest.pth", weights_only=True)
    assert state["progress"]["inner_iter"] == 3
    assert hook.count == 2
    assert [one["count"] for one in state["hooks"].values() if "count" in one] == [1]
    assert {path.name for path in Path(trainer.ckpt_dir).iterdir()} == {
        "latest.pth", "previous.pth", "best.pth", "epoch_0.pth", "epoch_1.pth",
    }  # fmt: skip


def test_resumed_with_no_more_iterations_after_epoch_runs_again_and_nothing_is_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(tmp_path, max_iters=8)
    seen = Stages("before_epoch", "before_iter", "after_epoch", "after_train")
    with caplog.at_level(logging.INFO, "torch_frame"):
        second = run(tmp_path, "a list", seen, max_iters=8, resume="auto")
    assert seen.calls == ["after_epoch", "after_train"]
    assert differences(weights_of(first.model), weights_of(second.model)) == []
    assert "Nothing to train: max_iters is 8, and 8 batches are done." in caplog.text


def test_an_epochs_end_that_is_the_last_iteration_is_an_epochs_end(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_iters=10)
    assert (trainer.progress.epoch, trainer.progress.inner_iter) == (2, 0)
    seen = Stages("after_epoch", "after_train")
    run(tmp_path, "a list", seen, max_iters=10, resume="auto")
    assert seen.calls == ["after_train"]


def test_the_same_trainer_goes_on_inside_the_epoch(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", max_epochs=None, max_iters=12)
    whole.train()
    trainer = make_trainer(tmp_path / "parts", max_epochs=None, max_iters=7)
    for trainer.max_iters in (7, 9, 12):
        trainer.train()
    assert differences(weights_of(whole.model), weights_of(trainer.model)) == []
    assert trainer.progress.iter == 12


def test_whichever_comes_first_ends_the_run(tmp_path: Path) -> None:
    for epochs, iters, done in ((2, 100, 10), (2, 7, 7), (2, 0, 0), (0, 7, 0)):
        trainer = make_trainer(tmp_path / f"{epochs}_{iters}", max_epochs=epochs, max_iters=iters)
        trainer.train()
        assert (trainer.progress.iter, trainer.max_iters) == (done, min(epochs * 5, iters))
    trainer = make_trainer(tmp_path / "unsized", data=Unsized(), max_epochs=3, max_iters=12)
    trainer.train()
    assert trainer.progress.iter == 12


@pytest.mark.parametrize("iters", [np.int64(7), np.int32(7)])
def test_numbers_of_numpy_are_numbers(iters: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=np.int64(3), max_iters=iters, limit_batches=np.int64(4))
    trainer.train()
    assert trainer.progress.iter == 7


def test_small_numbers_of_numpy_do_not_overflow(tmp_path: Path) -> None:
    """5 batches an epoch: 40 epochs are more batches than an int8 holds."""
    trainer = make_trainer(tmp_path, max_epochs=np.int8(40), gradient_accumulation_steps=np.uint8(2))
    assert trainer.max_iters == 200
    trainer.max_epochs = np.uint8(60)
    assert trainer.max_iters == 300
    trainer.max_epochs = np.uint64(2)
    trainer.train()
    assert (trainer.progress.iter, trainer.progress.num_updates) == (10, 6)
    assert make_trainer(tmp_path, max_epochs=100, max_iters=np.int16(300)).length.num_updates(2) == 180


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({"max_epochs": None}, "max_epochs and max_iters are both None"),
    "text": ({"max_iters": "10"}, "max_iters is '10'"),
    "a fraction": ({"max_iters": 2.5}, "max_iters is 2.5"),
    "a flag": ({"max_iters": True}, "max_iters is True"),
    "negative": ({"max_iters": -1}, "max_iters is -1"),
    "no batch": ({"limit_batches": 0}, "limit_batches is 0"),
}


@pytest.mark.parametrize(("settings", "match"), BAD.values(), ids=BAD)
def test_a_length_that_is_none_is_refused(settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, SettingError), match=match):
        make_trainer(tmp_path, **settings)


@pytest.mark.parametrize("kind", [StepLR, ReduceLROnPlateau])
def test_a_schedule_by_epochs_needs_epochs(kind: Any, tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = kind(optimizer) if kind is ReduceLROnPlateau else kind(optimizer, 5)
    more = {"lr_scheduler_metric": "total_loss"} if kind is ReduceLROnPlateau else {}
    with pytest.raises(SettingError, match="lr_scheduler_interval is 'epoch', but max_epochs is None"):
        make_trainer(tmp_path, model, optimizer, scheduler, max_epochs=None, max_iters=5, **more)


def test_an_iterator_may_be_trained_on_for_one_epoch(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, data=iter(make_batches(9)), max_epochs=None, max_iters=7)
    trainer.train()
    assert trainer.progress.iter == 7


class Once(IterableDataset[Any]):
    """A stream that is used up, as some that read from a queue are."""

    def __init__(self) -> None:
        self.left = make_batches(6)

    def __iter__(self) -> Iterator[Any]:
        while self.left:
            yield self.left.pop()


def test_a_stream_that_is_used_up_too_early_is_told_with_what_was_trained(tmp_path: Path) -> None:
    data = DataLoader(Once(), batch_size=None)
    trainer = make_trainer(tmp_path, data=data, max_epochs=None, max_iters=100, hooks=[CheckpointerHook()])
    with pytest.raises(SettingError, match=r"used up after 6 batches: .*max_iters"):
        trainer.train()
    assert torch.load(f"{trainer.ckpt_dir}/latest.pth", weights_only=True)["progress"]["iter"] == 6


class TooLong:
    """Says that it has more batches than it yields, as sharded streams do."""

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Any]:
        return iter(make_batches(5))


def test_a_length_that_is_too_long_loses_no_evaluation_and_no_batch(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    class Noting(EvalHook):
        def _do_eval(self) -> None:
            seen.append((self.prefix, self.trainer.cur_iter))
            super()._do_eval()

    hooks = [
        Noting(make_batches(1), score, 99, period_unit="iter", prefix="a"),
        Noting(make_batches(1), score, prefix="b"),
    ]
    make_trainer(tmp_path, data=TooLong(), hooks=hooks).train()
    assert seen == [("b_", 4), ("a_", 9), ("b_", 9)]
    for iters, stands in ((7, (1, 2)), (12, (2, 2))):
        trainer = make_trainer(
            tmp_path / "run", data=TooLong(), max_epochs=None, max_iters=iters, hooks=[CheckpointerHook()],
            create_new_dir=None, resume="auto",
        )  # fmt: skip
        trainer.train()
        assert (trainer.progress.epoch, trainer.progress.inner_iter) == stands


@pytest.mark.parametrize(
    ("name", "value"), [("max_iters", "x"), ("max_iters", -1), ("max_epochs", None), ("max_epochs", 2.5)]
)
def test_a_length_that_is_set_later_is_checked(name: str, value: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    setattr(trainer, name, value)
    with pytest.raises((TypeError, SettingError), match=name):
        trainer.train()


def test_a_window_that_is_cut_is_told_and_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, max_epochs=None, max_iters=8, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.progress.num_updates == 5  # 2, 2, 1; 2, 1
    assert "inside a window of gradient_accumulation_steps=2: the last update is made of 1" in caplog.text
    caplog.clear()
    make_trainer(tmp_path, max_epochs=None, max_iters=9, gradient_accumulation_steps=2).train()
    assert "inside a window" not in caplog.text


def test_one_cycle_is_made_for_the_updates_of_the_run(tmp_path: Path) -> None:
    def build(steps: int, folder: str, **settings: Any) -> Trainer:
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.1)
        schedule = OneCycleLR(optimizer, 0.1, total_steps=steps)
        return make_trainer(tmp_path / folder, model, optimizer, schedule, lr_scheduler_interval="iter", **settings)

    build(8, "iters", max_epochs=None, max_iters=8).train()
    build(10, "dry", max_epochs=2, limit_batches=1).train()  # a dry run of a schedule for all of it
    with pytest.raises(SettingError, match="total_steps=8"):
        build(30, "wrong", max_epochs=None, max_iters=8).train()


# ---------------------------------------------------------------- evaluation and files by iterations


def score(model: Any, batch: Any) -> dict[str, Tensor]:
    return {"loss": (model.predict(batch[0]) - batch[1]).square().flatten()}


@pytest.mark.parametrize("loader", ["a list", "endless batches"])
def test_evaluation_and_weights_by_iterations(loader: str, tmp_path: Path) -> None:
    seen: list[int] = []
    evaluation = EvalHook(make_batches(2), score, 4, period_unit="iter", save_metric="loss", max_first=False)

    def look(trainer: Any) -> None:
        if trainer.metric_storage.latest_iters().get("eval_loss") == trainer.cur_iter:
            seen.append(trainer.cur_iter)

    note = On(after_iter=look)
    steps = CheckpointerHook(every_n_iters=3, keep_steps=2)
    trainer = make_trainer(
        tmp_path, data=LOADERS[loader](), max_epochs=None, max_iters=11, hooks=[evaluation, note, steps]
    )
    trainer.train()
    assert seen == [3, 7, 10]
    files = {path.name for path in Path(trainer.ckpt_dir).iterdir()}
    assert files == {"latest.pth", "previous.pth", "best.pth", "step_6.pth", "step_9.pth"}


def test_an_evaluation_inside_a_window_waits_for_its_end(tmp_path: Path) -> None:
    scored: dict[float, float] = {}

    def note(model: Any, batch: Any) -> dict[str, Tensor]:
        scores = score(model, batch)
        scored[float(scores["loss"].mean())] = float(model.layers[0].weight.sum())
        return scores

    hook = EvalHook(make_batches(1), note, 3, period_unit="iter", save_metric="loss", max_first=False)
    hooks = [hook, On(before_train=lambda trainer: scored.clear())]  # of the trial
    trainer = make_trainer(tmp_path, data=make_batches(14), max_epochs=1, gradient_accumulation_steps=4, hooks=hooks)
    trainer.train()
    assert len(scored) == 4  # after 4, 8, 12 and 14 batches
    best = torch.load(f"{trainer.ckpt_dir}/best.pth")
    assert float(best["layers.0.weight"].sum()) == scored[min(scored)]


@pytest.mark.parametrize("window", [1, 4])
def test_the_last_batch_of_a_loader_without_a_length_is_evaluated(window: int, tmp_path: Path) -> None:
    hook = EvalHook(make_batches(1), score, 2, period_unit="iter")
    at = []
    after = On(after_epoch=lambda t: at.append(t.metric_storage.latest_iters()["eval_loss"]))
    settings = {"data": Unsized(), "gradient_accumulation_steps": window, "hooks": [hook, after]}
    make_trainer(tmp_path, max_epochs=1, **settings).train()
    assert at == [4]


def test_kept_steps_are_counted_on_after_a_resume(tmp_path: Path) -> None:
    def hooks() -> list[Any]:
        return [CheckpointerHook(every_n_iters=2, keep_steps=2, save_last=True)]

    for iters in (5, 11):
        trainer = make_trainer(
            tmp_path, max_epochs=None, max_iters=iters, hooks=hooks(), create_new_dir=None, resume="auto"
        )
        trainer.train()
    assert {path.name for path in Path(trainer.ckpt_dir).glob("step*")} == {"step_8.pth", "step_10.pth"}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"keep_steps": 2}, "every_n_iters is None"),
        ({"keep_steps": 0, "every_n_iters": 2}, "keep_steps is 0"),
        ({"keep_steps": "two", "every_n_iters": 2}, "keep_steps is 'two'"),
    ],
)
def test_settings_of_kept_steps_that_are_none_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingError, match=match):
        CheckpointerHook(**settings)


def test_steps_may_be_kept_without_a_state(tmp_path: Path) -> None:
    hook = CheckpointerHook(every_n_iters=4, keep_steps=1, save_last=False)
    trainer = make_trainer(tmp_path, hooks=[hook], gradient_accumulation_steps=2)  # updates: 2, 2, 1; 2, 2, 1
    trainer.train()
    assert {path.name for path in Path(trainer.ckpt_dir).iterdir()} == {"best.pth", "step_5.pth"}


# ---------------------------------------------------------------- should_stop


def test_should_stop_inside_an_epoch_ends_the_run_at_the_next_safe_point(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", max_iters=10)
    seen = Stages("after_iter", "after_epoch", "after_train", note=lambda stage, t: (stage, t.cur_iter))

    def stop(trainer: Any) -> None:
        trainer.should_stop = True

    part = run(tmp_path / "parts", "a list", On(after_iter=at_iter(6, stop)), seen, max_iters=10)
    assert seen.calls[-2:] == [("after_iter", 6), ("after_train", 6)]
    assert part.should_stop
    parts = run(tmp_path / "parts", max_iters=10, resume="auto")
    assert differences(weights_of(whole.model), weights_of(parts.model)) == []


def test_should_stop_waits_for_the_windows_end(tmp_path: Path) -> None:
    def stop(trainer: Any) -> None:
        trainer.should_stop = True

    trainer = make_trainer(
        tmp_path, hooks=[On(after_iter=at_iter(0, stop))], data=make_batches(9), gradient_accumulation_steps=4
    )
    trainer.train()
    assert (trainer.progress.iter, trainer.progress.num_updates) == (4, 1)
    assert not Path(trainer.ckpt_dir, "latest.pth").exists()  # no hook writes it


def test_should_stop_in_after_epoch_ends_the_run_there(tmp_path: Path) -> None:
    hooks = [EarlyStoppingHook("total_loss", patience=1, max_first=True), CheckpointerHook()]
    trainer = make_trainer(tmp_path, max_epochs=9, hooks=hooks)
    trainer.train()
    assert trainer.progress.inner_iter == 0
    assert trainer.progress.epoch < 9


# ---------------------------------------------------------------- a dry run


@pytest.mark.parametrize("loader", LOADERS)
def test_a_dry_run_is_of_the_first_batches_of_everything(
    loader: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hook = EvalTotalHook(make_batches(7), CountBatches())
    trainer = run(tmp_path, loader, hook, max_epochs=2, limit_batches=3)
    assert (trainer.progress.epoch, trainer.progress.iter) == (2, 6)
    assert trainer.metric_storage["eval_batches"].latest == 3
    assert trainer.evaluate() == {"eval_batches": 3}
    assert "limit_batches is 3: a dry run" in caplog.text


def test_a_limit_beyond_the_data_changes_nothing(tmp_path: Path) -> None:
    limited, whole = run(tmp_path / "a", max_epochs=2, limit_batches=99), run(tmp_path / "b", max_epochs=2)
    assert differences(weights_of(limited.model), weights_of(whole.model)) == []


def test_a_dry_run_that_is_resumed_as_a_whole_one_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, max_epochs=1, limit_batches=2)
    run(tmp_path, max_epochs=2, resume="auto")
    assert "limit_batches was 2, now it is None" in caplog.text


# ---------------------------------------------------------------- what is shown


def test_the_lines_know_of_iterations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "torch_frame"):
        trainer = make_trainer(
            tmp_path, data=EndlessBatches(), max_epochs=None, max_iters=6, hooks=[LoggerHook(period=2)]
        )
        trainer.train()
    assert "max_iters=6 batches; the loader has no length" in caplog.text
    assert "Training begins at epoch 1, batch 1 of 6." in caplog.text
    lines = [line for line in caplog.messages if line.startswith("Iter ")]
    assert [line.split()[1] for line in lines] == ["total_loss", "2/6", "4/6", "6/6"]
    assert lines[-1].endswith(" 0.0 s")
    rows = [json.loads(line) for line in Path(trainer.work_dir, "metrics.jsonl").read_text().splitlines()]
    assert [row["iter"] for row in rows] == [1, 3, 5, 5][: len(rows)]


def test_the_settings_of_the_length_are_in_the_state(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_iters=3, limit_batches=4)
    state = torch.load(f"{trainer.ckpt_dir}/latest.pth", weights_only=True)
    assert (state["settings"]["max_epochs"], state["settings"]["max_iters"]) == (None, 3)
    assert state["environment"]["limit_batches"] == 4


def test_a_schedule_made_for_the_old_number_of_iterations_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def build(iters: int, **settings: Any) -> Trainer:
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.1)
        schedule = CosineAnnealingLR(optimizer, 6)
        settings = {"max_epochs": None, "max_iters": iters, "lr_scheduler_interval": "iter", **settings}
        hooks = [CheckpointerHook()]
        return make_trainer(tmp_path, model, optimizer, schedule, hooks=hooks, create_new_dir=None, **settings)

    build(6).train()
    build(9, resume="auto").train()
    assert "max_iters was 6, now it is 9, but the schedule is made for 6 steps." in caplog.text


def test_constant_schedules_by_updates_train_over_a_stream(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(
        tmp_path, model, optimizer, ConstantLR(optimizer, 0.5, 3), EndlessBatches(), None,
        max_iters=5, lr_scheduler_interval="iter",
    )  # fmt: skip
    trainer.train()
    assert trainer.lr == 0.1


def test_max_iters_at_an_epochs_end_leaves_the_loaders_own_generator_where_the_epoch_does(tmp_path: Path) -> None:
    """torch's RandomSampler draws from it when its last index has been given; a run that goes on needs it as it is then."""

    def train(folder: str, seen: list[Any], **settings: Any) -> None:
        def step(model: Any, batch: Any) -> Tensor:
            seen.append(batch.flatten().tolist())
            return model.layers[2].weight.square().sum()

        generator = torch.Generator().manual_seed(1)
        data = DataLoader(torch.arange(8.0), 2, shuffle=True, generator=generator)  # type: ignore[arg-type]
        fixed: Any = {"hooks": [CheckpointerHook()], "create_new_dir": None, "take_over": False, "step_fn": step}
        make_trainer(tmp_path / folder, data=data, **fixed, **settings).train()

    whole: list[Any] = []
    parts: list[Any] = []
    train("whole", whole, max_epochs=2)
    train("parts", parts, max_epochs=2, max_iters=4)
    train("parts", parts, max_epochs=2, resume="auto")
    assert parts == whole
