"""ThroughputHook: the slow part is named, nothing is lost between the parts, and a step pays little for it."""

from __future__ import annotations

import json
import logging
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.small_hooks import On
from tests.small_runs import Net, make_batches, make_trainer
from torch_frame import CheckpointerHook, HookBase, LoggerHook, ThroughputHook, Trainer
from torch_frame.run.saving import Saver
from torch_frame.tracking.step_times import Parts, StepTimes, TimeSplit


class Sleeper:
    """Sleeps, and knows for how long it slept: on a busy machine it is woken late.

    Attributes:
        slept: seconds, in all.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.slept = seconds, 0.0

    def sleep(self) -> None:
        started = time.perf_counter()
        time.sleep(self.seconds)
        self.slept += time.perf_counter() - started


class SlowBatches(Sleeper):
    """Each batch takes a while."""

    def __init__(self, num: int, seconds: float) -> None:
        super().__init__(seconds)
        self.batches = make_batches(num)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.sleep()
            yield batch


class SlowHook(Sleeper, HookBase):
    def after_iter(self) -> None:
        self.sleep()


class Clock:
    """Tells the time that it is set to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def last_rows(work_dir: Path) -> dict[str, float]:
    """name -> its last value in metrics.jsonl."""
    rows = map(json.loads, (work_dir / "metrics.jsonl").read_text().splitlines())
    return {name: value for row in rows for name, value in row.items()}


def test_a_slow_loader_and_a_slow_hook_are_named_with_their_times(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hook, slow, batches = ThroughputHook(), SlowHook(0.02), SlowBatches(8, 0.05)
    hooks = [slow, hook, LoggerHook(progress_bar=False)]
    trainer = make_trainer(tmp_path / "run", data=batches, max_epochs=2, hooks=hooks)
    with caplog.at_level(logging.INFO, "torch_frame"):
        trainer.train()
    parts = hook.time_split.parts()
    assert batches.slept >= 16 * 0.05
    assert slow.slept >= 16 * 0.02
    assert parts.data == pytest.approx(batches.slept, rel=0.1)
    assert hook.time_split.hooks()["SlowHook"] == pytest.approx(slow.slept, rel=0.1)
    assert next(iter(hook.time_split.hooks())) == "SlowHook"
    text = (tmp_path / "run" / "log.txt").read_text()
    last_lines = text.splitlines()[-15:]
    assert any("Most of the time went to: data." in line for line in last_lines)
    assert any("Of the hooks' time: SlowHook 2" in line for line in last_lines)
    row = last_rows(tmp_path / "run")
    assert row["data_share"] == pytest.approx(50 / 70, rel=0.25)  # the second epoch's; other work may come between
    assert row["hooks_share"] == pytest.approx(20 / 70, rel=0.25)
    assert sum(row[f"{name}_share"] for name in Parts._fields) == pytest.approx(1)
    assert row["batches_per_s"] == pytest.approx(1 / 0.07, rel=0.25)


def test_the_parts_make_up_the_time_from_first_to_last() -> None:
    clock = Clock()
    split = TimeSplit(clock)
    clock.now = 5.0
    split.start()
    clock.now = 6.0  # 1 s step
    split.ask()
    clock.now = 8.0  # 2 s data
    split.receive()
    clock.now = 11.0  # 3 s step
    (first, hook, second, other, last) = split.around([("A", lambda: None), ("B", lambda: None)])
    first()
    clock.now = 15.0  # 4 s in A
    with split.saving():  # inside a hook
        clock.now = 20.0  # 5 s save
    with split.stepping():
        clock.now = 26.0  # 6 s step: A waits for the device
    second()
    clock.now = 33.0  # 7 s in B
    last()
    clock.now = 41.0  # 8 s step
    assert split.parts() == Parts(data=2.0, step=1.0 + 3.0 + 6.0 + 8.0, hooks=4.0 + 7.0, save=5.0)
    assert split.parts().total == 41.0 - 5.0
    assert split.hooks() == {"B": 7.0, "A": 4.0}
    hook(), other()


def test_an_epochs_end_does_not_count_as_waiting_for_data(tmp_path: Path) -> None:
    class SlowEnd(HookBase):
        def after_epoch(self) -> None:
            time.sleep(0.05)

    hook = ThroughputHook()
    make_trainer(tmp_path, hooks=[hook, SlowEnd()]).train()
    assert hook.time_split.parts().hooks >= 0.1
    assert hook.time_split.parts().data < 0.05


def test_a_slow_save_counts_as_save_not_as_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = ThroughputHook()
    trainer = make_trainer(tmp_path, hooks=[hook, CheckpointerHook()], max_epochs=3)
    carry_out = Saver.carry_out

    def slow(self: Saver, contents: Any) -> None:
        if self._states:
            time.sleep(0.1)
        carry_out(self, contents)

    monkeypatch.setattr(Saver, "carry_out", slow)
    trainer.train()
    parts = hook.time_split.parts()
    assert parts.save >= 0.2  # the last save comes behind the last line; see the docstring of the hook
    assert parts.step + parts.data + parts.hooks < parts.save


def test_throughput_samples_and_mfu_are_what_was_done_over_the_time(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
    hook = ThroughputHook(flops_per_batch=2e9, peak_tflops=0.5)
    hooks = [hook, LoggerHook(progress_bar=False)]
    make_trainer(tmp_path / "run", data=DataLoader(data, 10), max_epochs=1, hooks=hooks).train()
    row = last_rows(tmp_path / "run")
    assert row["samples_per_s"] == pytest.approx(10 * row["batches_per_s"])
    assert row["mfu"] == pytest.approx(row["batches_per_s"] * 2e9 / 0.5e12)
    assert row["peak_mib"] > 50  # torch alone is more


def test_batches_of_another_size_count_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Grows(HookBase):
        def before_epoch(self) -> None:
            if self.trainer.epoch == 1:
                self.trainer.data_loader = DataLoader(data, 20)

    data = TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
    hook, seen = ThroughputHook(), []
    rates = On(after_epoch=lambda t: seen.append(t.value("samples_per_s") / t.value("batches_per_s")))
    hooks = [hook, Grows(), rates, LoggerHook(progress_bar=False)]
    with caplog.at_level(logging.INFO, "torch_frame"):
        make_trainer(tmp_path / "run", data=DataLoader(data, 10), max_epochs=2, hooks=hooks).train()
    assert seen == [pytest.approx(10), pytest.approx(20)]
    line = next(line for line in caplog.messages if "Most of the time" in line)
    per_batch, per_sample = (
        float(line.split(f"{name}_per_s ")[1].split(",")[0].rstrip(".")) for name in ("batches", "samples")
    )
    assert per_sample / per_batch == pytest.approx(80 / 6, rel=1e-2)


def test_a_run_resumed_behind_an_epochs_last_batch_logs_no_rate_for_it(tmp_path: Path) -> None:
    def made(*hooks: HookBase) -> Trainer:
        all_hooks = [ThroughputHook(), *hooks, CheckpointerHook()]
        return make_trainer(tmp_path / "run", hooks=all_hooks, max_epochs=2, resume="auto")

    def stop(trainer: Trainer) -> None:
        signal.raise_signal(signal.SIGTERM)
        trainer.check_stop()

    with pytest.raises(SystemExit):
        made(On(after_epoch=stop)).train()
    seen: list[bool] = []
    made(On(after_epoch=lambda trainer: seen.append("batches_per_s" in trainer.metric_storage))).train()
    assert seen == [False, True]


def test_an_unknown_peak_is_told_and_mfu_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, hooks=[ThroughputHook(flops_per_batch=2e9)])
    trainer.train()
    assert "MFU is not recorded: how many TFLOP/s" in caplog.text
    assert "mfu" not in trainer.metric_storage


def test_a_run_that_fails_says_where_its_time_went(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(HookBase):
        def after_iter(self) -> None:
            time.sleep(0.02)
            if self.trainer.cur_iter == 3:
                raise RuntimeError("the user's")

    trainer = make_trainer(tmp_path, hooks=[ThroughputHook(), Failing()])
    with caplog.at_level(logging.INFO, "torch_frame"), pytest.raises(RuntimeError, match="the user's"):
        trainer.train()
    assert caplog.text.count("Milliseconds a batch: ") == 1
    assert "Of the hooks' time: Failing " in caplog.text


def test_a_run_that_is_stopped_says_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Interrupted(HookBase):
        def after_iter(self) -> None:
            if self.trainer.cur_iter == 3:
                signal.raise_signal(signal.SIGINT)

    trainer = make_trainer(tmp_path, hooks=[ThroughputHook(), Interrupted()])
    with caplog.at_level(logging.INFO, "torch_frame"), pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert caplog.text.count("Milliseconds a batch: ") == 1


def test_a_resumed_run_counts_its_own_batches_over_its_own_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path / "run", hooks=[ThroughputHook(), CheckpointerHook()], max_epochs=3).train()
    caplog.clear()
    hooks = [ThroughputHook(), CheckpointerHook(), SlowHook(0.02)]
    trainer = make_trainer(tmp_path / "run", hooks=hooks, max_epochs=4, resume="auto")
    with caplog.at_level(logging.INFO, "torch_frame"):
        trainer.train()
    lines = caplog.text.splitlines()
    rate = float(next(line for line in lines if "batches_per_s" in line).split("batches_per_s ")[1].split(",")[0])
    assert 0 < rate < 1 / 0.02  # 4 epochs' batches over one epoch's time would be more


def test_without_batches_there_is_nothing_to_tell(tmp_path: Path) -> None:
    make_trainer(tmp_path, hooks=[ThroughputHook()], max_epochs=0).train()


def test_a_second_train_begins_anew(tmp_path: Path) -> None:
    hook = ThroughputHook()
    slow = SlowHook(0.02)
    trainer = make_trainer(tmp_path, hooks=[hook, slow], max_epochs=1)
    trainer.train()
    slow.slept = 0.0
    trainer.max_epochs = 2
    trainer.train()
    assert hook.time_split.hooks()["SlowHook"] == pytest.approx(slow.slept, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flops_per_batch": 0}, "flops_per_batch is 0"),
        ({"flops_per_batch": 1e9, "peak_tflops": -1}, "peak_tflops is -1"),
        ({"peak_tflops": 1}, "pass flops_per_batch"),
        ({"period": 0}, "period is 0"),
        ({"period": 2.5}, "period is 2.5; it has to be a whole number of batches"),
        ({"flops_per_batch": float("inf")}, "flops_per_batch is inf"),
        ({"flops_per_batch": float("nan")}, "flops_per_batch is nan"),
        ({"flops_per_batch": "8e9"}, "flops_per_batch is '8e9'"),
        ({"samples_per_batch": 0}, "samples_per_batch is 0"),
    ],
)
def test_settings_that_make_no_sense_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThroughputHook(**settings)


def test_only_one_hook_splits_the_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ThroughputHook and ThroughputHook both split the run's time"):
        make_trainer(tmp_path, hooks=[ThroughputHook(), ThroughputHook()])


def test_without_the_hook_the_stages_hold_the_hooks_own_methods_only(tmp_path: Path) -> None:
    slow = SlowHook(0.0)
    trainer = make_trainer(tmp_path, hooks=[slow])
    assert trainer.stages["after_iter"] == [slow.after_iter]
    assert type(trainer._feed.times) is StepTimes


def test_it_runs_first_wherever_it_is_registered_and_every_hook_has_its_own_time(tmp_path: Path) -> None:
    hook, slow = ThroughputHook(), SlowHook(0.0)
    trainer = make_trainer(tmp_path, hooks=[slow, LoggerHook(progress_bar=False), hook])
    assert [type(one) for one in trainer.hooks] == [ThroughputHook, SlowHook, LoggerHook]
    calls = trainer.stages["after_iter"]
    assert calls[1::2] == [hook.after_iter, slow.after_iter, trainer.hooks[2].after_iter]
    assert len(calls) == 7  # a call that tells whose time it is before each, and one behind all
    assert trainer.stages["before_update"] == []


# ---------------------------------------------------------------- on CUDA

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class SlowOnDevice(Net):
    """The device needs some 10 ms for a step, the host does not."""

    def forward(self, batch: Any) -> Any:
        torch.cuda._sleep(20_000_000)
        return super().forward(batch)


@pytest.mark.cuda
@needs_cuda
def test_what_the_device_is_behind_counts_as_the_steps(tmp_path: Path) -> None:
    hook = ThroughputHook()
    model = SlowOnDevice().cuda()
    trainer = make_trainer(tmp_path, model, hooks=[hook, LoggerHook(progress_bar=False)], max_epochs=4)
    torch.cuda.synchronize()
    trainer.train()
    parts = hook.time_split.parts()
    assert parts.step > 20 * 0.003
    assert hook.time_split.hooks()["ThroughputHook"] < 0.1 * parts.step


@pytest.mark.cuda
@needs_cuda
def test_the_host_waits_for_no_step_because_of_the_hook(tmp_path: Path) -> None:
    class Watch(HookBase):
        def after_iter(self) -> None:
            inside = 1 < self.trainer.inner_iter < 15
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says that this check is a prototype
                torch.cuda.set_sync_debug_mode("error" if inside else "default")

    data = [tuple(part.pin_memory() for part in batch) for batch in make_batches(20)]
    trainer = make_trainer(tmp_path, Net().cuda(), data=data, hooks=[Watch(), ThroughputHook()])
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.progress.iter == 40
