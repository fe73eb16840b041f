"""A state is a table of named parts: checked as a whole before the first of them is restored, and in its order."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import SequentialLR, StepLR

from tests.small_runs import Net, copied, differences, make_batches, make_trainer, raised_by, weights_of
from torch_frame import CheckpointerHook, CheckpointError, Trainer
from torch_frame.checkpoint.format import FORMAT, VERSION
from torch_frame.run import state
from torch_frame.run import table as of_run
from torch_frame.run.state import (
    RESTORED_FIRST,
    RESTORED_LAST,
    CheckedPart,
    capture,
    capture_copy,
    restore,
    restore_last,
)


class Noted:
    """A part that notes when it is loaded."""

    def __init__(self, name: str, log: list[str], value: Any = 1) -> None:
        self.name = name
        self.log = log
        self.value = value

    def state_dict(self) -> Any:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]
        self.log.append(self.name)


class Fussy(Noted):
    """A part that takes its own value only."""

    def differences(self, saved: Any, unknown: Collection[str]) -> list[str]:
        return [] if saved["value"] == self.value else [f"{self.name} was {saved['value']}, now it is {self.value}"]


def table(log: list[str], **values: Any) -> dict[str, Any]:
    names = ("progress", "model", "metric_storage", "hooks", *RESTORED_LAST)
    parts: dict[str, Any] = {name: Noted(name, log, values.get(name, 1)) for name in names}
    parts["optimizer"] = Fussy("optimizer", log, values.get("optimizer", 1))
    parts["precision"] = Fussy("precision", log, values.get("precision", 1))
    return parts


def test_parts_are_restored_in_the_order_of_the_table_and_random_numbers_last() -> None:
    log: list[str] = []
    parts = table(log)
    saved = capture(parts)
    restored = restore(parts, saved)
    assert log == ["progress", "metric_storage", "hooks", "model", "optimizer", "precision"]
    restore_last(parts, restored)
    assert log[6:] == ["data", "loader_generators", "rng"]


def test_all_differences_are_told_and_what_was_changed_is_put_back() -> None:
    log: list[str] = []
    saved = capture(table(log, optimizer=2, precision=3, progress=4, metric_storage=5, hooks=6))
    parts = table(log)
    with pytest.raises(CheckpointError, match=r"(?s)optimizer was 2, now it is 1.*precision was 3, now it is 1"):
        restore(parts, saved)
    assert [name for name in log if name not in RESTORED_FIRST] == []
    assert [parts[name].value for name in RESTORED_FIRST] == [1, 1, 1]


def test_what_the_checkpoint_could_not_say_is_not_compared() -> None:
    log: list[str] = []
    saved = {**capture(table(log, optimizer=2)), "unknown": ["optimizer"]}
    restore(table(log), saved)
    assert "optimizer" in log


def test_a_captured_state_says_what_it_is_and_may_hold_parts_of_an_earlier_moment() -> None:
    parts = table([], hooks=torch.tensor(1.0))
    earlier = capture_copy({name: parts[name] for name in ("metric_storage", "hooks")})
    assert earlier is not None
    parts["hooks"].value.fill_(2.0)
    parts["model"].value = 5
    saved = capture(parts, earlier)
    assert (saved["format"], saved["version"], saved["sealed"]) == (FORMAT, VERSION, True)
    assert saved["hooks"]["value"] == 1.0
    assert saved["model"]["value"] == 5


def test_what_cannot_be_saved_has_no_way_back() -> None:
    assert capture_copy(table([], hooks=object())) is None


def test_every_part_of_a_trainer_is_saved_and_read_back(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", hooks=[CheckpointerHook()], use_ema=True, precision="fp16")
    trainer.train()
    saved = torch.load(tmp_path / "run" / "checkpoints" / "latest.pth", weights_only=True)
    parts = of_run.table(trainer._run)
    assert list(saved)[4:] == list(parts)
    other = make_trainer(
        tmp_path / "other",
        data=make_batches(),
        max_epochs=4,
        hooks=[CheckpointerHook()],
        use_ema=True,
        precision="fp16",
    )
    state.restore(of_run.table(other._run), saved)
    assert all(
        torch.equal(a, b) for a, b in zip(weights_of(other.model).values(), saved["model"].values(), strict=True)
    )
    checked = {name for name, part in parts.items() if isinstance(part, CheckedPart)}
    assert checked == {
        *(
            "frozen",
            "model",
            "ema",
            "optimizers",
            "classes",
            "lr_schedulers",
            "settings",
            "precision",
            "seed",
            "loader_seed",
            "data_length",
        ),
        "attributes",
    }


class Refusing(StepLR):
    """Has saved states of another kind."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = -7
        raise LookupError("no such state")


@pytest.mark.parametrize("inside", [False, True])
def test_a_schedule_that_refuses_its_state_leaves_all_as_it_was(inside: bool, tmp_path: Path) -> None:
    def run(max_epochs: int, seed: int) -> Trainer:
        model = Net(seed=seed)
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        schedule: Any = Refusing(optimizer, 1)
        if inside:
            schedule = SequentialLR(optimizer, [schedule, StepLR(optimizer, 2)], [1])
        settings = {"max_epochs": max_epochs, "resume": "auto", "hooks": [CheckpointerHook()], "use_ema": True}
        return make_trainer(tmp_path, model, optimizer, schedule, **settings)

    run(2, seed=0).train()
    trainer = run(4, seed=1)
    assert trainer.model_ema is not None
    things = trainer.model, trainer.model_ema.model, trainer.optimizer, trainer.lr_scheduler
    before = [copied(thing.state_dict()) for thing in things]
    error = raised_by(trainer.train, CheckpointError)
    assert "load_state_dict refuses it: LookupError: no such state" in str(error)
    assert not differences([copied(thing.state_dict()) for thing in things], before)
    assert (trainer.progress.iter, trainer.lr) == (0, 0.05)
